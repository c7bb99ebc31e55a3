"""TLS beyond one connection: resumption, workers, held uploads; and what nobody gets to see."""

from __future__ import annotations

import base64
import json
import ssl
import time
from pathlib import Path

import pytest
from e2e_bed import Bed, wait_for
from e2e_http import payload
from e2e_tls import SUITES, TLS1_2, TLS1_3, tls_bed, tls_client, tls_counters

VERSION = {TLS1_3: ssl.TLSVersion.TLSv1_3, TLS1_2: ssl.TLSVersion.TLSv1_2}


def _context(bed: Bed, version: int) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(bed.cluster.ca_file))
    context.minimum_version = context.maximum_version = VERSION[version]
    return context


def _ask(
    bed: Bed, context: ssl.SSLContext, paths: list[str], session: ssl.SSLSession | None = None
) -> tuple[ssl.SSLSession | None, bool, int]:
    """Requests on one connection; its session, whether that was resumed, the client's port."""
    service = bed.client.service
    raw = bed.client.namespace.socket()
    raw.settimeout(10)
    raw.connect((service.host, service.port))
    port = raw.getsockname()[1]
    with context.wrap_socket(raw, server_hostname=service.host, session=session) as tls:
        for path in paths:
            tls.sendall(f"GET {path} HTTP/1.1\r\nHost: {service.host}\r\n\r\n".encode())
            data = b""
            while b"\r\n\r\n" not in data or not data.endswith(b"the end"):
                piece = tls.recv(65536)
                assert piece
                data += piece
            assert data.startswith(b"HTTP/1.1 200")
        return tls.session, bool(tls.session_reused), port


def _objects(bed: Bed) -> list[str]:
    paths = [bed.key(node, "life") for node in bed.backends]
    for path in paths:
        assert bed.client.once("PUT", path, b"the end").status in (201, 204)
    return paths


@pytest.mark.parametrize("version", [TLS1_3, TLS1_2])
def test_resumption(version: int) -> None:
    """A session of a connection that was handed over is good for another, which is handed over.

    With two workers the tickets of one are good at the other.
    """
    with tls_bed(backends=2, workers=2) as bed:
        paths, context = _objects(bed), _context(bed, version)
        session, resumed, _ = _ask(bed, context, paths * 2)
        assert not resumed
        assert session is not None
        handoffs, ports = bed.switch("handoffs"), []
        for _ in range(24):
            _, resumed, port = _ask(bed, context, paths, session)
            assert resumed
            ports.append(str(port))
        assert bed.switch("handoffs") - handoffs == 48
        label = f"TLSv1.{version - 0x0301} {SUITES[version][0]} True"
        counts = [s["tls"]["handshakes"].get(label, 0) for s in bed.cluster.statuses("fe1")]
        assert sum(counts) == 24
        assert min(counts) > 0, "all came to one worker, so nothing is shown"


def test_uploads_over_tls_are_held() -> None:
    """What comes while the connection is locked waits at the switch, and the upload is whole."""
    with tls_bed(backends=2, lock="hold") as bed:
        data, tries = payload("held", 30_000), 0
        while bed.switch("held_packets") < 20 and tries < 400:
            tries += 1
            path = bed.key(bed.backends[tries % 2], f"held-{tries % 8}")
            with bed.client.open() as conn:
                request = conn.start("PUT", path, data)
                conn.send(request[:200])
                due = time.perf_counter() + tries % 25 * 2e-5
                while time.perf_counter() < due:
                    pass
                conn.send(request[200:])
                assert conn.response("PUT").status in (201, 204)
                assert conn.request("GET", path).body == data
        assert bed.switch("held_packets") >= 20
        assert bed.switch("dropped_packets") == 0


# -- secrets --------------------------------------------------------------------------------------


def _forms(secret: bytes) -> list[bytes]:
    """How octets may be written: raw, as hexadecimal, base64, and Python's and JSON's ways."""
    plain = [
        secret,
        secret.hex().encode(),
        secret.hex().upper().encode(),
        secret.hex(":").encode(),
        base64.b64encode(secret)[: len(secret)],
        base64.urlsafe_b64encode(secret)[: len(secret)],
        repr(secret)[2:-1].encode(),
        json.dumps(secret.decode("latin-1"))[1:-1].encode(),
    ]
    return [form for form in plain if len(form) >= 8]


def _told(bed: Bed) -> dict[str, bytes]:
    """All that the processes write or answer: logs, status documents, metrics, the lab's report."""
    told = {f"log of {name}": node.log.read_bytes() for name, node in bed.cluster.nodes.items()}
    for name in bed.cluster.nodes:
        for path in bed.cluster.status_sockets(name):
            for page in ("status", "metrics"):
                done = bed.cluster.exec(
                    "switch",
                    ["curl", "-s", "--unix-socket", str(path), f"http://localhost/{page}"],
                    capture_output=True,
                )
                assert done.returncode == 0
                told[f"{page} of {path.name}"] = done.stdout
    told["lab status"] = json.dumps(bed.cluster.status()).encode()
    return told


def test_nobody_is_told_secrets() -> None:
    """Neither keys nor bodies are in logs (debug, traced), status answers or error answers."""
    marker = payload("marker", 24).hex().encode()
    answers = b""
    with tls_bed(backends=2, settings={"telemetry.log_level": "debug"}) as bed:
        secrets = {"body": marker}
        for number, (version, suites) in enumerate(SUITES.items()):
            for suite in suites:
                with tls_client(bed, version, suite).open() as conn:
                    for node in bed.backends:
                        path = bed.key(node, f"secret-{number}")
                        body = marker + b"." * 5000
                        assert conn.request("PUT", path, body).status in (201, 204)
                        assert conn.request("GET", path).body == body
                        head = conn.start("PUT", path, body, headers=[("If-Match", '"no"')])
                        conn.send(head)
                        refusal = conn.response("PUT")
                        answers += refusal.reason.encode() + refusal.body
                    conn.send(b"GET / HTTP/9.9\r\n\r\n" + marker)
                    refusal = conn.response()
                    assert refusal.status >= 400
                    answers += refusal.body
                    secrets |= {f"{suite} {k}": v for k, v in conn.peer.log.items()}
        # A record that nobody can open, an upload that is cut, a backend that dies under load.
        with bed.client.open() as conn:
            secrets |= {f"bad {k}": v for k, v in conn.peer.log.items()}
            raw, tls = conn.take_over()
            raw.sendall(tls.seal(marker)[:-1] + b"x")
            assert raw.recv(1000)
            raw.close()
        with bed.client.open() as conn:
            conn.send(conn.start("PUT", bed.key("be1"), marker * 1000)[:20_000])
            conn.cut()
        with bed.client.open() as conn:
            secrets |= {f"killed {k}": v for k, v in conn.peer.log.items()}
            assert conn.request("GET", bed.key("be2", "secret-0")).status == 200
            bed.cluster.kill("be2")
        bed.cluster.restart("be2")
        assert wait_for(lambda: bed.total("bodies_cut"))
        for name in ("CLIENT_TRAFFIC_SECRET_0", "SERVER_TRAFFIC_SECRET_0", "CLIENT_RANDOM"):
            assert any(name in key for key in secrets)
        for kind, directory in (("node", "pki"), ("service", "tls")):
            for file in (bed.cluster.dir / directory).glob("*.key"):
                lines = file.read_text().splitlines()
                secrets[f"{kind} {file.name}"] = lines[1].encode()
        secrets["cluster.key"] = bytes.fromhex((bed.cluster.dir / "cluster.key").read_text())
        told = _told(bed) | {"error answers": answers}
        assert b'"debug"' in b"".join(told.values())
        assert b'"handoff-in"' in told["log of be1"]
        found = [
            f"{name} in {where}"
            for name, secret in secrets.items()
            for form in _forms(secret)
            for where, text in told.items()
            if form in text
        ]
        assert found == []


def test_no_core_dumps() -> None:
    """No process writes its memory to a file (that others may not read it: test_process.py)."""
    with tls_bed(backends=1, workers=2) as bed:
        for name, pid in bed.pids().items():
            limits = Path(f"/proc/{pid}/limits").read_text()
            line = next(line for line in limits.splitlines() if line.startswith("Max core file"))
            assert line.split()[4:6] == ["0", "0"], name
        assert tls_counters(bed)["failures"] == {}
