"""A cluster whose backends must have the kernel seal: curl, s_client and our own client on it."""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from e2e_bed import Bed, wait_for
from e2e_capture import RST, capturing
from e2e_tls import SUITES, TlsConn, tls_bed, tls_client
from openssl_peer import KEY_UPDATE_REQUESTED, TLS1_2, TLS1_3

from prism.tls.kernel_probe import probe
from prism.tls.offload import RECEIVE_FROM

LARGE, UPLOAD, MEDIUM = 16 << 20, 4 << 20, 300_000
LARGE_UPLOAD = RECEIVE_FROM + 100_000
SLOW = {  # the emulated machine is some twenty times slower than a real one
    "cluster.lease": 30.0,
    "frontend.handoff_deadline_ms": 5000.0,
    "backend.handoff_deadline_ms": 5000.0,
}


@pytest.fixture(scope="module")
def lab(_guest: None) -> Iterator[Bed]:
    patch = pytest.MonkeyPatch()
    patch.setattr("prism.lab.cluster._READY_PATIENCE", 120.0)  # seconds, twenty on a real machine
    # With the module: test_kmod_lab.py.
    settings = {"tls.offload": "kernel", "backend.monitor": "sockdiag", **SLOW}
    with tls_bed(backends=2, frontends=1, settings=settings) as found:
        patch.undo()
        yield found
        assert found.no_unexpected_errors() == []


@pytest.fixture(scope="module")
def medium(lab: Bed) -> dict[str, tuple[str, str]]:
    """For each backend an object of its: path and hash."""
    found = {}
    for node in ("be1", "be2"):
        path = lab.key(node, "medium")
        found[node] = path, put(lab, path, MEDIUM)
    return found


@pytest.fixture(autouse=True)
def _no_reset(lab: Bed, request: pytest.FixtureRequest) -> Iterator[None]:
    """None from the service, and from a client only at the very end.

    A client that closes without waiting for our close_notify, like curl, has its kernel refuse it.
    """
    with capturing(lab.cluster.topology.namespace("client")) as capture:
        yield
    assert capture.packets
    if request.function is test_an_upload_that_is_cut_short_is_no_success:
        return
    for talk in capture.talks().values():
        assert talk.back.rsts == 0
        sent = [packet.flags for packet in talk.packets if packet.outgoing]
        ended = next((at for at, flags in enumerate(sent) if flags & RST), len(sent))
        assert all(flags & RST for flags in sent[ended:]), sent[ended:]


def put(lab: Bed, path: str, size: int) -> str:
    """Store an object, without TLS; its hash."""
    data = hashlib.shake_128(path.encode()).digest(size)
    answer = lab.plain.once("PUT", path, data)  # type: ignore[attr-defined]
    assert answer.status in (200, 201, 204), answer
    return hashlib.sha256(data).hexdigest()


def kernel_sessions(lab: Bed, node: str, what: str = "TlsTxSw") -> int:
    """Connections that the kernel has begun to seal for (or to open) in a node's namespace."""
    text = lab.cluster.exec(node, ["cat", "/proc/net/tls_stat"], capture_output=True, text=True)
    counts = dict(line.split() for line in text.stdout.splitlines())
    return int(counts[what])


def test_curl_downloads_and_uploads_on_one_connection(lab: Bed, tmp_path: Path) -> None:
    """Sixteen megabytes down, four up, and so on; the owner changes three times in between."""
    first, second, up = lab.key("be1", "large"), lab.key("be1", "other"), lab.key("be2", "up")
    wanted = [put(lab, first, LARGE), put(lab, second, MEDIUM)]
    upload = tmp_path / "upload"
    upload.write_bytes(hashlib.shake_128(b"upload").digest(UPLOAD))
    wanted.append(hashlib.sha256(upload.read_bytes()).hexdigest())
    sealing = [kernel_sessions(lab, node) for node in ("be1", "be2")]
    opening = kernel_sessions(lab, "be2", "TlsRxSw")
    handoffs = lab.total("handoffs_in")
    common = ["--silent", "--show-error", "--fail", "--cacert", str(lab.cluster.ca_file)]
    common += ["--max-time", "120", "--write-out", "%{num_connects} %{http_code}\n"]
    url = lab.cluster.url
    requests = [
        [f"{url}{first}", "--output", str(tmp_path / "0")],
        [f"{url}{up}", "--upload-file", str(upload), "--output", str(tmp_path / "answer")],
        [f"{url}{second}", "--output", str(tmp_path / "1")],
        [f"{url}{up}", "--output", str(tmp_path / "2")],
    ]
    command = ["curl"]
    for request in requests:
        command += [*(["--next"] if len(command) > 1 else []), *common, *request]
    done = lab.cluster.exec("client", command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    why = [each.get("why") for node in lab.nodes for each in lab.events(node, "handoff-out")]
    assert [connects for connects, _ in lines] == ["1", "0", "0", "0"], why
    assert all(status.startswith("2") for _, status in lines)
    got = [hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in "012"]
    assert got == wanted
    assert lab.total("handoffs_in") == handoffs + 4
    now = [kernel_sessions(lab, node) for node in ("be1", "be2")]
    assert [after - before for after, before in zip(now, sealing, strict=True)] == [2, 1]
    assert kernel_sessions(lab, "be2", "TlsRxSw") - opening == probe().rekey
    assert lab.total("relays") == 0


def test_s_client_asks_for_a_key_update(lab: Bed, medium: dict[str, tuple[str, str]]) -> None:
    path, wanted = medium["be1"]
    service = lab.cluster.topology.services(443)[0]
    command = ["openssl", "s_client", "-connect", str(service), "-tls1_3", "-brief"]
    command += ["-CAfile", str(lab.cluster.ca_file), "-verify_return_error"]
    renewals = lab.counters("be1")["renewals"]
    process = lab.cluster.popen(
        "client",
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
    )
    try:
        for turn in range(3):
            last = "Connection: close\r\n" if turn == 2 else ""
            process.stdin.write(f"GET {path} HTTP/1.1\r\nHost: a\r\n{last}\r\n".encode())
            assert digest_of_answer(process.stdout) == wanted
            moved = 0 if probe().rekey else turn
            assert lab.counters("be1")["renewals"] == renewals + moved
            if turn < 2:
                process.stdin.write(b"K\n")  # on its own: a KeyUpdate, with a request for ours
                time.sleep(0.5)
        assert process.stdout.read() == b""
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


def digest_of_answer(stream: IO[bytes]) -> str:
    """Reads one response; its body's hash."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        octet = stream.read(1)
        assert octet, head
        head += octet
    assert head.startswith(b"HTTP/1.1 200"), head
    length = next(
        int(line.partition(b":")[2])
        for line in head.lower().split(b"\r\n")
        if line.startswith(b"content-length:")
    )
    body = hashlib.sha256()
    while length:
        piece = stream.read(length)
        assert piece
        body.update(piece)
        length -= len(piece)
    return body.hexdigest()


@pytest.mark.parametrize(
    ("version", "suite"), [(version, suite) for version in SUITES for suite in SUITES[version]]
)
def test_every_suite(
    lab: Bed, medium: dict[str, tuple[str, str]], version: int, suite: str
) -> None:
    """Downloads at both backends, with a KeyUpdate in between, and an upload where we are."""
    renewals = lab.total("renewals")
    before = kernel_sessions(lab, "be1") + kernel_sessions(lab, "be2")
    conn = tls_client(lab, version, suite).connect()
    for node in ("be1", "be1", "be2", "be1"):
        path, wanted = medium[node]
        answer = conn.request("GET", path)
        assert (answer.status, answer.sha256) == (200, wanted)
        assert answer.node == f"{node}/0"
    after = kernel_sessions(lab, "be1") + kernel_sessions(lab, "be2")
    assert after == before + 3
    assert lab.total("renewals") == renewals
    if version == TLS1_3:
        conn.sock.key_update(KEY_UPDATE_REQUESTED)
    path, wanted = medium["be1"]
    answer = conn.request("GET", path)
    assert (answer.status, answer.sha256) == (200, wanted)
    assert lab.total("renewals") == renewals + has_to_move(version)
    upload_with_key_update(lab, conn, version)
    conn.close()


def has_to_move(version: int) -> bool:
    """A KeyUpdate, or a body in which one may be, has a connection renewed."""
    return version == TLS1_3 and not probe().rekey


def upload_with_key_update(lab: Bed, conn: TlsConn, version: int) -> None:
    """To the backend that has just sent a file on this connection, and back."""
    path = lab.key("be1", "uploaded")
    data = hashlib.shake_128(str(time.monotonic()).encode()).digest(MEDIUM)
    renewals = lab.counters("be1")["renewals"]
    request = conn.start("PUT", path, data)
    conn.send(request[: MEDIUM // 2])
    if version == TLS1_3:
        time.sleep(0.2)
        conn.sock.key_update(KEY_UPDATE_REQUESTED)
    conn.send(request[MEDIUM // 2 :])
    assert conn.response("PUT").status in (200, 201, 204)
    assert lab.counters("be1")["renewals"] == renewals + has_to_move(version)
    answer = conn.request("GET", path)
    assert (answer.status, answer.sha256) == (200, hashlib.sha256(data).hexdigest())
    assert answer.node == "be1/0"


@pytest.mark.parametrize("version", [TLS1_2, TLS1_3])
def test_the_kernel_opens_large_uploads(
    lab: Bed, medium: dict[str, tuple[str, str]], version: int
) -> None:
    """To one backend, on to the other with the next request's head, and the same from there.

    The second time, a part of the request after that is there already when the head is decided on.
    """
    data = hashlib.shake_128(b"large").digest(LARGE_UPLOAD)
    receives = version == TLS1_2 or probe().rekey
    relays = lab.total("relays")
    conn = tls_client(lab, version, SUITES[version][0]).connect()
    for node, other in (("be1", "be2"), ("be2", "be1")):
        before = kernel_sessions(lab, node, "TlsRxSw")
        path = lab.key(node, f"opened-{version}")
        request = conn.start("PUT", path, data)
        conn.send(request[: LARGE_UPLOAD // 2])
        if receives and version == TLS1_3:
            conn.sock.key_update(KEY_UPDATE_REQUESTED)
        conn.send(request[LARGE_UPLOAD // 2 :])
        assert conn.response("PUT").status in (200, 201, 204)
        assert kernel_sessions(lab, node, "TlsRxSw") == before + receives
        wanted = {other: medium[other], node: (path, hashlib.sha256(data).hexdigest())}
        if node == "be2":
            ask_with_a_gap(conn, [read for read, _ in wanted.values()])
        for name, (read, digest) in wanted.items():
            answer = conn.request("GET", read) if node == "be1" else conn.response()
            assert (answer.status, answer.sha256) == (200, digest)
            assert answer.node == f"{name}/0"
        if node == "be1":
            assert lab.total("relays") == relays
    conn.close()


def ask_with_a_gap(conn: TlsConn, paths: list[str]) -> None:
    """Two requests at once, the second cut inside its record, and the rest of it later."""
    first, second = (conn.peer.write(conn.start("GET", path)) for path in paths)
    conn.sock.raw.sendall(first + second[:10])
    time.sleep(0.05)
    conn.sock.raw.sendall(second[10:])


def test_an_upload_that_is_cut_short_is_no_success(lab: Bed) -> None:
    """By a close_notify, inside the body."""
    cuts, path = lab.total("bodies_cut"), lab.key("be1", "cut")
    conn = tls_client(lab, TLS1_2, SUITES[TLS1_2][0]).connect()
    before = kernel_sessions(lab, "be1", "TlsRxSw")
    request = conn.start("PUT", path, bytes(LARGE_UPLOAD))
    conn.send(request[: LARGE_UPLOAD // 2])
    # Not before: the kernel takes no connection whose client has finished sending.
    assert wait_for(lambda: kernel_sessions(lab, "be1", "TlsRxSw") == before + 1, 30)
    conn.sock.shutdown(socket.SHUT_WR)
    assert wait_for(lambda: lab.total("bodies_cut") == cuts + 1, 30)
    assert lab.client.once("GET", path).status == 404
    conn.sock.raw.close()


def test_many_connections_and_their_first_files(
    lab: Bed, medium: dict[str, tuple[str, str]]
) -> None:
    """The send buffer of a new connection is smaller than the file: it fills up on the way."""
    path, wanted = medium["be1"]
    for _ in range(10):
        answer = lab.client.once("GET", path)
        assert (answer.status, answer.sha256) == (200, wanted)


def test_the_backends_say_who_seals(lab: Bed) -> None:
    for node in ("be1", "be2"):
        lines = [json.loads(line) for line in lab.cluster.node(node).log.read_text().splitlines()]
        said = [line for line in lines if "seals TLS records with" in str(line)]
        assert len(said) == 1
        assert "CHACHA20-POLY1305" in str(said[0])
    # Nothing goes over the wire here, and _no_reset wants to see something.
    assert lab.client.once("GET", lab.key("be1", "medium")).status == 200
