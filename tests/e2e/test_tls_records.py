"""What TLS clients may do to a connection that moves, and what they must not."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest
from e2e_bed import Bed, wait_for
from e2e_capture import capturing
from e2e_http import Cut, digest, payload
from e2e_tls import SUITES, TLS1_2, TLS1_3, TlsConn, tls_bed, tls_client
from openssl_peer import KEY_UPDATE_NOT_REQUESTED, KEY_UPDATE_REQUESTED

from prism._ext.tls_record import Tls

OK = (200, 201, 204)
APPLICATION_DATA = 23
UNEXPECTED_MESSAGE, BAD_RECORD_MAC, RECORD_OVERFLOW = 10, 20, 22
CLUSTER = {
    "backends": 3,
    "settings": {"frontend.body_timeout": 3.0, "backend.body_timeout": 3.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def shared() -> Iterator[Bed]:
    with tls_bed(**CLUSTER) as found:  # type: ignore[arg-type]
        yield found


# -- KeyUpdate and the ends -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [KEY_UPDATE_NOT_REQUESTED, KEY_UPDATE_REQUESTED])
@pytest.mark.parametrize("suite", SUITES[TLS1_3])
def test_key_updates(shared: Bed, suite: str, kind: int) -> None:
    """Before the first handoff, between handoffs, in a body, and in a burst."""
    before, handoffs = shared.snapshot(), shared.switch("handoffs")
    data = payload("update", 150_000)
    with tls_client(shared, TLS1_3, suite).open() as conn:
        conn.sock.key_update(kind)
        for turn in range(9):
            path = shared.key(shared.backends[turn % 3], f"update-{kind}")
            request = conn.start("PUT", path, data)
            conn.send(request[:40_000])
            conn.sock.key_update(kind)
            conn.send(request[40_000:])
            assert conn.response("PUT").status in OK
            for _ in range(turn):
                conn.sock.key_update(kind)
            answer = conn.request("GET", path)
            assert (answer.status, answer.sha256) == (200, digest(data))
            if turn % 2:
                conn.sock.key_update(kind)
                time.sleep(0.002)  # it is there alone, before the next owner is known
    assert shared.switch("handoffs") - handoffs == 9
    shared.assert_clean(before)


def test_key_updates_of_s_client(shared: Bed) -> None:
    """OpenSSL's client asks for them between requests to two backends, at its user's command."""
    paths = [shared.key(node, "K") for node in ("be1", "be2")]
    for path in paths:
        shared.store(path, 5)
    host = shared.client.service.host
    command = ["stdbuf", "-o0", "openssl", "s_client", "-connect", f"{host}:443"]
    process = shared.cluster.popen(
        "client", command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    said = b""

    def hear(mark: bytes, times: int) -> None:
        nonlocal said
        deadline = time.monotonic() + 10
        while said.count(mark) < times:
            assert time.monotonic() < deadline, said[-2000:]
            said += os.read(process.stdout.fileno(), 65536)

    def say(line: bytes) -> None:
        process.stdin.write(line)
        process.stdin.flush()

    try:
        hear(b"read R BLOCK", 1)
        for turn, letter in enumerate(b"KkKKkk"):
            say(bytes([letter]) + b"\n")
            hear(b"KEYUPDATE", turn + 1)
            # Lines of their own: s_client looks for commands at the beginning of what it reads.
            say(f"GET {paths[turn % 2]} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            hear(b"HTTP/1.1 200", turn + 1)
        say(b"Q\n")
        assert process.wait(5) == 0
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
    assert said.count(b"(be1/0)") == said.count(b"(be2/0)") == 3


@pytest.mark.parametrize("version", [TLS1_3, TLS1_2])
def test_close_notify_before_the_answer(shared: Bed, version: int) -> None:
    """The client has ended its side of TLS, not of TCP: it gets everything, then our end."""
    path, data = shared.key("be1", "half"), payload("half", 3_000_000)
    before, turns = shared.snapshot(), 6
    shared.client.once("PUT", path, data)
    for turn in range(turns):
        with tls_client(shared, version).open() as conn:
            shared.client.once("GET", path) if turn % 2 else None
            conn.send(conn.start("GET", path))
            time.sleep(turn % 3 * 0.001)
            conn.sock.raw.sendall(conn.peer.shutdown())
            answer = conn.response()
            assert (answer.status, answer.sha256) == (200, digest(data))
            assert conn.at_end()
            assert not conn.sock.truncated
    shared.assert_clean(before, closed_by_backend=turns)


@pytest.mark.parametrize("version", [TLS1_3, TLS1_2])
def test_close_notify_after_the_end(shared: Bed, version: int) -> None:
    """A client that answers our close_notify with its own is not reset for it."""
    path = shared.key("be1", "last")
    shared.store(path, 3000)
    before = shared.snapshot()
    with capturing(shared.client.namespace) as capture, tls_client(shared, version).open() as conn:
        answer = conn.request("GET", path, headers=[("Connection", "close")])
        assert answer.status == 200
        assert conn.at_end()
        assert not conn.sock.truncated
        time.sleep(0.05)  # it has closed by now, if it does not wait
        conn.sock.raw.sendall(conn.peer.shutdown())
        conn.sock.raw.close()
        shared.assert_clean(before, closed_by_backend=1)
    (talk,) = (talk for (_, port), talk in capture.talks().items() if port == conn.local[1])
    assert (talk.out.rsts, talk.back.rsts) == (0, 0)


@pytest.mark.parametrize("chunked", [0, 5000])
@pytest.mark.parametrize("version", [TLS1_3, TLS1_2])
def test_truncated_uploads(shared: Bed, version: int, chunked: int) -> None:
    """A FIN without close_notify in mid-body is no end of the body: counted, logged, not stored."""
    before, cuts = shared.snapshot(), shared.total("bodies_cut")
    path = shared.key("be2", f"cut-{chunked}")
    for part in (3_000, 20_000, 60_000):
        with tls_client(shared, version).open() as conn:
            conn.send(conn.start("PUT", path, payload(part, 70_000), chunked=chunked)[:part])
            time.sleep(0.02)
            conn.cut()
            with contextlib.suppress(Cut, ConnectionResetError):
                assert conn.response("PUT").status >= 400
    assert wait_for(lambda: shared.total("bodies_cut") - cuts == 3)
    assert shared.client.once("GET", path).status == 404
    shared.assert_clean(before)
    log = shared.cluster.node("be2").log.read_text()
    assert "inside a request body, and without a close_notify" in log


@pytest.mark.parametrize("version", [TLS1_3, TLS1_2])
def test_uploads_without_length_cannot_be_cut(shared: Bed, version: int) -> None:
    """A close_notify in mid-body is an end, but not that of the body either."""
    cuts, path = shared.total("bodies_cut"), shared.key("be3", "notified")
    with tls_client(shared, version).open() as conn:
        conn.send(conn.start("PUT", path, bytes(70_000), chunked=5000)[:30_000])
        conn.half_close()
        with contextlib.suppress(Cut, ConnectionResetError):
            assert conn.response("PUT").status >= 400
    assert wait_for(lambda: shared.total("bodies_cut") - cuts == 1)
    assert shared.client.once("GET", path).status == 404


# -- bad records ----------------------------------------------------------------------------------


def _flipped(tls: Tls) -> bytes:
    record = bytearray(tls.seal(b"GET / HTTP/1.1\r\n"))
    record[-3] ^= 4
    return bytes(record)


def _repeated(tls: Tls) -> bytes:
    """The same record twice: the second has the wrong sequence number."""
    return tls.seal(b"GET / HTTP/1.1\r\n") * 2


def _left_out(tls: Tls) -> bytes:
    tls.seal(b"GET / HTTP/1.1\r\n")
    return tls.seal(b"Host: a\r\n\r\n")


def _oversized(tls: Tls) -> bytes:
    return struct.pack("!BHH", APPLICATION_DATA, 0x0303, 16384 + 257 + 1792) + os.urandom(16384)


def _plaintext(tls: Tls) -> bytes:
    request = b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n"
    return struct.pack("!BHH", APPLICATION_DATA, 0x0303, len(request)) + request


def _plain_alert(tls: Tls) -> bytes:
    return struct.pack("!BHHBB", 21, 0x0303, 2, 2, 80)


def _plain_http(tls: Tls) -> bytes:
    return b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n"


def _all_padding(tls: Tls) -> bytes:
    """A TLS 1.3 record whose inner plaintext is nothing but zeros: it has no content type."""
    return tls.seal(b"\0" * 50, 0)


def _unknown_type(tls: Tls) -> bytes:
    return tls.seal(b"what is this", 99)


def _handshake(tls: Tls) -> bytes:
    """A ClientHello in the middle: a renegotiation, or nonsense in TLS 1.3."""
    return tls.seal(b"\x01\x00\x00\x04abcd", 22)


def _empty_handshake(tls: Tls) -> bytes:
    return tls.seal(b"\x18\x00\x00\x00", 22)


BAD: list[tuple[Callable[[Tls], bytes], dict[int, tuple[int, ...]]]] = [
    (_flipped, {TLS1_3: (BAD_RECORD_MAC,), TLS1_2: (BAD_RECORD_MAC,)}),
    (_repeated, {TLS1_3: (BAD_RECORD_MAC,), TLS1_2: (BAD_RECORD_MAC,)}),
    (_left_out, {TLS1_3: (BAD_RECORD_MAC,), TLS1_2: (BAD_RECORD_MAC,)}),
    (_oversized, {TLS1_3: (RECORD_OVERFLOW,), TLS1_2: (RECORD_OVERFLOW,)}),
    (_plaintext, {TLS1_3: (BAD_RECORD_MAC,), TLS1_2: (BAD_RECORD_MAC,)}),
    (_plain_alert, {TLS1_3: (UNEXPECTED_MESSAGE,), TLS1_2: (BAD_RECORD_MAC, 50)}),
    (_plain_http, {TLS1_3: (UNEXPECTED_MESSAGE, 70), TLS1_2: (UNEXPECTED_MESSAGE, 70)}),
    (_all_padding, {TLS1_3: (UNEXPECTED_MESSAGE,)}),
    (_unknown_type, {TLS1_3: (UNEXPECTED_MESSAGE,), TLS1_2: (UNEXPECTED_MESSAGE,)}),
    (_handshake, {TLS1_3: (UNEXPECTED_MESSAGE,)}),
    (_empty_handshake, {TLS1_3: (50,)}),
]
CASES = [
    pytest.param(make, version, alerts[version], id=f"{make.__name__[1:]}-{version & 7}")
    for make, alerts in BAD
    for version in alerts
]


def _alert_of(raw: socket.socket, tls: Tls) -> int | None:
    """The alert that comes before the server's end; None: there is only the end."""
    data = b""
    raw.settimeout(5)
    while piece := raw.recv(65536):
        data += piece
    opened = tls.open(data)
    assert opened.error is None
    return opened.alert


@pytest.fixture
def others(shared: Bed) -> Iterator[Callable[[], None]]:
    """Connections of others to the frontend and each backend; the call says they are well."""
    paths = {node: shared.key(node, "others") for node in shared.backends}
    hashes = {node: digest(shared.store(path, 30_000)) for node, path in paths.items()}
    with contextlib.ExitStack() as stack:
        conns = {node: stack.enter_context(shared.client.open()) for node in paths}
        fresh = stack.enter_context(shared.client.open())
        for node, conn in conns.items():
            assert conn.request("GET", paths[node]).sha256 == hashes[node]
        owners = {node: shared.counters(node)["connections"] for node in paths}
        assert set(owners.values()) == {1}

        def well() -> None:
            for node, conn in [*conns.items(), ("be1", fresh)]:
                assert conn.request("GET", paths[node]).sha256 == hashes[node]

        yield well


@pytest.mark.parametrize(("make", "version", "alerts"), CASES)
def test_bad_records(
    shared: Bed,
    others: Callable[[], None],
    make: Callable[[Tls], bytes],
    version: int,
    alerts: tuple[int, ...],
) -> None:
    """To a backend after the handoff, and to the frontend: the right alert, and the end of it."""
    path = shared.key("be1", "bad")
    data = shared.store(path, 1000)
    total = shared.total("tls_alerts")
    for moved in (True, False):
        with _bare(shared, version) as (raw, tls, conn):
            if moved:
                raw.sendall(tls.seal(conn.start("GET", path)))
                assert _response(raw, tls).endswith(data)
            raw.sendall(make(tls))
            assert _alert_of(raw, tls) in alerts
    assert shared.counters("be1")["tls_alerts"]
    assert shared.total("tls_alerts") - total == 2
    others()


@contextlib.contextmanager
def _bare(bed: Bed, version: int) -> Iterator[tuple[socket.socket, Tls, TlsConn]]:
    """A connection whose records are made by hand from here on."""
    with tls_client(bed, version).open() as conn:
        raw, tls = conn.take_over()
        try:
            yield raw, tls, conn
        finally:
            raw.close()


def _response(raw: socket.socket, tls: Tls) -> bytes:
    """A response with a Content-Length, as it came."""
    data, plain = b"", b""
    raw.settimeout(5)
    while True:
        piece = raw.recv(65536)
        assert piece, "the connection ended"
        data += piece
        opened = tls.open(data)
        assert opened.error is None, opened.error
        data = data[opened.consumed :]
        plain += opened.data
        head, end, body = plain.partition(b"\r\n\r\n")
        if end:
            length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            if len(body) >= length:
                return plain
