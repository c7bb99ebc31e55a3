"""What TLS costs: handshakes against nginx with the same certificates, and handoffs against plain.

Run as root, with nginx installed::

    pytest benchmarks/bench_tls.py

Both comparisons take turns in one run, so that what else happens on the machine meets both sides.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import ssl
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from naming import lab_name

from prism.lab.cluster import Cluster
from prism.lab.netns import Namespace
from prism.placement import placement_from

SECONDS = 2  # of each measurement of handshakes
TURNS = 3
ROUNDS = 300
HANDSHAKE_GOAL = 0.8  # of nginx's rate

NGINX = """
worker_processes 1;
daemon off;
pid {dir}/nginx.pid;
error_log {dir}/error.log;
events {{ worker_connections 1024; }}
http {{
  access_log off;
  server {{
    listen 10.77.0.80:8443 ssl;
    ssl_certificate {cert};
    ssl_certificate_key {key};
    ssl_protocols TLSv1.2 TLSv1.3;
    ssl_session_tickets on;
    ssl_session_cache off;
    location / {{ return 200 "ok"; }}
  }}
}}
"""


@contextlib.contextmanager
def _cluster(**options: Any) -> Iterator[Cluster]:
    cluster = Cluster(lab_name(), backends=2, **options)
    try:
        with cluster:
            yield cluster
    finally:
        cluster.dir.with_name(f"{cluster.name}.lock").unlink(missing_ok=True)


# -- handshakes ------------------------------------------------------------------------------


def _certificate(directory: Path, kind: str) -> tuple[Path, Path]:
    """A self-signed certificate: what is compared is signing, not chains."""
    new = ["rsa:2048"] if kind == "rsa" else ["ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    cert, key = directory / f"{kind}.pem", directory / f"{kind}.key"
    command = ["openssl", "req", "-x509", "-nodes", "-subj", "/CN=bench", "-days", "2", "-newkey"]
    subprocess.run(
        [*command, *new, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True
    )
    key.chmod(0o600)
    return cert, key


@contextlib.contextmanager
def _nginx(namespace: Namespace, directory: Path, cert: Path, key: Path) -> Iterator[int]:
    """One worker, in the frontend's namespace; its pid."""
    config = directory / "nginx.conf"
    config.write_text(NGINX.format(dir=directory, cert=cert, key=key))
    process = namespace.popen(["nginx", "-c", str(config), "-p", str(directory)])
    try:
        time.sleep(0.5)
        assert process.poll() is None, (directory / "error.log").read_text()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        yield int(children.split()[0])
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(5)


def _processor_time(pid: int) -> float:
    """Seconds that a process has used (proc(5): utime and stime)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _rate(cluster: Cluster, pid: int, port: int, version: str) -> tuple[float, float]:
    """New sessions a second, with three clients: of the clock, and of the server's processor time.

    The clients share the processors with the server, so the second is what a whole one could do.
    """
    before = _processor_time(pid)
    command = ["openssl", "s_time", "-connect", f"10.77.0.80:{port}", "-new", "-time", str(SECONDS)]
    command.append("-tls1_3" if version == "1.3" else "-tls1_2")
    clients = [
        cluster.popen("client", command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for _ in range(3)
    ]
    total = 0
    for client in clients:
        said = client.communicate(timeout=SECONDS + 20)[0].decode()
        found = re.search(r"(\d+) connections in (\d+) real seconds", said)
        assert found is not None, said
        total += int(found[1])
    return total / SECONDS, total / (_processor_time(pid) - before)


@pytest.mark.parametrize("version", ["1.3", "1.2"])
@pytest.mark.parametrize("kind", ["ecdsa", "rsa"])
def test_handshakes(
    tmp_path: Path, kind: str, version: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One worker of ours and one of nginx's, in turns."""
    cert, key = _certificate(tmp_path, kind)
    pairs = [{"certificate": str(cert), "key": str(key)}]
    tmp_path.chmod(0o755)
    with (
        _cluster(tls=True, trace=False, settings={"tls.certificates": pairs}) as cluster,
        _nginx(cluster.topology.namespace("fe1"), tmp_path, cert, key) as nginx,
    ):
        ours, theirs = [], []
        for _ in range(TURNS):
            theirs.append(_rate(cluster, nginx, 8443, version))
            ours.append(_rate(cluster, cluster.node("fe1").pid, 443, version))
        counts = cluster.statuses("fe1")[0]["tls"]["handshakes"]
    assert all(label.startswith(f"TLSv{version}") for label in counts), counts
    with capsys.disabled():
        print(f"\nhandshakes, {kind}, TLS {version} (goal {HANDSHAKE_GOAL} of nginx)")
        for name, each in (("a second", 0), ("a processor second", 1)):
            rates = [statistics.median(turn[each] for turn in side) for side in (ours, theirs)]
            share = rates[0] / rates[1]
            print(f"  {name}: Prism {rates[0]:.0f}, nginx {rates[1]:.0f} ({share:.2f} of it)")


# -- handoffs --------------------------------------------------------------------------------


def _connect(cluster: Cluster, context: ssl.SSLContext | None) -> socket.socket:
    """A connection that is ready for a request, and settled."""
    sock = cluster.topology.namespace("client").socket()
    sock.settimeout(5)
    sock.connect(("10.77.0.80", 443 if context else 80))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if context is not None:
        sock = context.wrap_socket(sock, server_hostname="10.77.0.80")
    time.sleep(0.002)
    return sock


def _first_octet(cluster: Cluster, context: ssl.SSLContext | None, request: bytes) -> float:
    """Seconds from the request to the first octet of the response, with a handoff in between."""
    with _connect(cluster, context) as sock:
        began = time.perf_counter()
        sock.sendall(request)
        assert sock.recv(4096).startswith(b"HTTP/1.1 200")
        return time.perf_counter() - began


def _steps(log: Path, event: str) -> dict[bool, list[dict[str, int]]]:
    """The steps of all handoffs in a log, apart by whether they were of TLS connections."""
    found: dict[bool, list[dict[str, int]]] = {True: [], False: []}
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        if entry.get("event") == event:
            found[entry["flow"].endswith(":443")].append(entry["steps"])
    return found


@pytest.mark.parametrize("trace", [False, True], ids=["quiet", "traced"])
def test_handoff_with_tls_and_without(trace: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """The time to the first octet as a client sees it, and the backend's steps, in turns."""
    with _cluster(tls=True, trace=trace) as cluster:
        placement = placement_from(cluster.config("fe1"))
        key = next(k for k in map(str, range(99)) if placement.choose(k).name == "be1")
        context = ssl.create_default_context(cafile=str(cluster.ca_file))
        with _connect(cluster, None) as sock:
            head = f"PUT /{key} HTTP/1.1\r\nHost: bench\r\nContent-Length: 512\r\n\r\n".encode()
            sock.sendall(head + os.urandom(512))
            assert sock.recv(4096).startswith(b"HTTP/1.1 201")
        request = f"GET /{key} HTTP/1.1\r\nHost: bench\r\n\r\n".encode()
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(ROUNDS):
            times[False].append(_first_octet(cluster, None, request))
            times[True].append(_first_octet(cluster, context, request))
        time.sleep(0.2)
        ins = _steps(cluster.node("be1").log, "handoff-in") if trace else {True: [], False: []}
        assert cluster.status()["counters"]["handoffs"] >= 2 * ROUNDS
    with capsys.disabled():
        for tls, values in times.items():
            middle, best = statistics.median(values), statistics.quantiles(values, n=10)[0]
            name = "with TLS" if tls else "without"
            print(f"\n{name}: first octet {middle * 1e6:.0f} us (best tenth {best * 1e6:.0f} us)")
            for step in ins[tls][-1] if ins[tls] else ():
                at = [steps[step] / 1e3 for steps in ins[tls] if step in steps]
                low = statistics.quantiles(at, n=10)[0]
                print(f"  {step:10s} {statistics.median(at):8.1f} us, best tenth {low:8.1f} us")
