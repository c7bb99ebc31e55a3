"""Streams, request bodies and exchanges over real loopback sockets."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from http_loop import serving
from hypothesis import given, settings
from hypothesis import strategies as st

from prism.flow import Flow
from prism.http.body import ChunkedDecoder, ClientGone, IncompleteBody, RequestBody
from prism.http.exchange import Exchange, Rest
from prism.http.head import HttpError, RequestHead, parse_head
from prism.http.stream import PlainStream, linger_close


def pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection over loopback: the client's and the server's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        return client, listener.accept()[0]


@pytest.fixture
async def ends() -> AsyncIterator[tuple[socket.socket, PlainStream]]:
    client, server = pair()
    stream = PlainStream(server)
    yield client, stream
    client.close()
    stream.close()


def head_of(*fields: str, method: str = "PUT", version: str = "1.1") -> RequestHead:
    lines = "".join(f"{field}\r\n" for field in ("Host: h", *fields))
    head = parse_head(f"{method} / HTTP/{version}\r\n{lines}\r\n".encode())
    assert head is not None
    return head


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def settle() -> None:
    await asyncio.sleep(0.02)


# -- streams -----------------------------------------------------------------------------------


async def test_a_kernel_without_room_for_more_is_given_room(
    ends: tuple[socket.socket, PlainStream],
) -> None:
    """It wakes below the mark, again and again, until what is there is taken out."""
    client, stream = ends
    client.sendall(b"half a head")
    await stream.readable(5)
    for _ in range(2):
        assert stream.peek() == b"half a head"
        stream.await_more(11)
        assert not stream.pending
    assert stream.peek() == b"half a head"
    assert stream.pending == b"half a head"
    stream.await_more(11)
    client.sendall(b", and the rest")
    await stream.readable(5)
    assert stream.peek() == b"half a head, and the rest"
    client.shutdown(socket.SHUT_WR)
    stream.await_more(25)
    await stream.readable(5)
    assert stream.peek() == b"half a head, and the rest"
    assert stream.eof


async def test_an_end_behind_pending_octets_is_seen() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        stream = PlainStream(listener.accept()[0], pending=b"half a head")
    client.close()
    await asyncio.sleep(0.01)
    assert stream.peek() == b"half a head"
    assert stream.eof
    stream.close()


async def test_peek_leaves_and_consume_takes(ends: tuple[socket.socket, PlainStream]) -> None:
    client, stream = ends
    with pytest.raises(BlockingIOError):
        stream.peek()
    client.sendall(b"abcdef")
    await stream.readable(1)
    assert stream.peek() == b"abcdef"
    assert stream.peek(3) == b"abc"
    stream.consume(2)
    assert stream.receive(3) == b"cde"
    assert not stream.eof
    with pytest.raises(ValueError, match="not there"):
        stream.consume(2)
    client.close()
    await stream.readable(1)
    assert stream.peek() == b""
    assert stream.eof


async def test_pending_comes_first() -> None:
    client, server = pair()
    stream = PlainStream(server, pending=b"abc")
    assert stream.peek() == b"abc"
    client.sendall(b"def")
    await settle()
    await stream.readable(1)
    assert stream.peek() == b"abcdef"
    assert stream.peek(2) == b"ab"
    stream.consume(4)
    assert stream.pending == b""
    assert stream.receive(9) == b"ef"
    stream.close()
    client.close()


async def test_flow(ends: tuple[socket.socket, PlainStream]) -> None:
    client, stream = ends
    assert stream.flow == Flow.of_socket(stream.sock)
    assert stream.flow.client.port == client.getsockname()[1]


async def test_await_more_does_not_spin(ends: tuple[socket.socket, PlainStream]) -> None:
    client, stream = ends
    client.sendall(b"GET")
    await stream.readable(1)
    stream.await_more(len(stream.peek()))
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1

    stream.on_readable(count)
    await asyncio.sleep(0.1)
    assert calls <= 1
    calls = 0
    await asyncio.sleep(0.05)
    assert calls == 0
    client.sendall(b" ")
    await asyncio.sleep(0.05)
    assert calls > 0
    stream.off_readable()
    calls = 0
    await settle()
    assert calls == 0
    stream.reset_lowat()
    await stream.readable(1)


async def test_end_of_file_behind_an_incomplete_head(
    ends: tuple[socket.socket, PlainStream],
) -> None:
    client, stream = ends
    client.sendall(b"GET /")
    await stream.readable(1)
    stream.await_more(len(stream.peek()))
    assert stream.peek() == b"GET /"
    assert not stream.eof
    client.shutdown(socket.SHUT_WR)
    await stream.readable(1)
    assert stream.peek() == b"GET /"
    assert stream.eof


async def test_waiting_ends(ends: tuple[socket.socket, PlainStream]) -> None:
    client, stream = ends
    with pytest.raises(TimeoutError):
        await stream.readable(0.02)
    waiter = asyncio.ensure_future(stream.readable(None))
    await settle()
    with pytest.raises(RuntimeError):
        await stream.readable(1)
    stream.close()
    with pytest.raises(ConnectionAbortedError):
        await waiter
    with pytest.raises(ConnectionAbortedError):
        await stream.writable(1)
    assert client.recv(1) == b""


async def test_abort_resets(ends: tuple[socket.socket, PlainStream]) -> None:
    client, stream = ends
    stream.abort()
    stream.abort()
    assert stream.fileno() == -1
    with pytest.raises(ConnectionResetError):
        client.recv(1)


@pytest.mark.parametrize("watched", [False, True])
async def test_a_reset_is_noticed(ends: tuple[socket.socket, PlainStream], watched: bool) -> None:
    client, stream = ends
    if watched:  # the loop watches on after the first wait
        client.sendall(b"x")
        await stream.readable(1)
        stream.receive(1)
    waiting = asyncio.ensure_future(stream.readable(2))
    await settle()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    await waiting
    with pytest.raises(ConnectionResetError):
        stream.peek()


async def test_input_that_nobody_waited_for(ends: tuple[socket.socket, PlainStream]) -> None:
    client, stream = ends
    client.sendall(b"a")
    await stream.readable(1)
    assert stream.receive(1) == b"a"
    client.sendall(b"b")
    await settle()
    for _ in range(3):
        await stream.readable(1)
        assert stream.peek() == b"b"
    called = asyncio.Event()
    stream.on_readable(called.set)
    await asyncio.wait_for(called.wait(), 1)
    stream.off_readable()
    await settle()
    assert stream.receive(1) == b"b"
    with pytest.raises(TimeoutError):
        await stream.readable(0.02)
    client.close()
    await settle()
    await stream.readable(1)
    assert stream.peek() == b""
    await stream.readable(1)


async def test_linger_close_saves_the_response(
    ends: tuple[socket.socket, PlainStream],
) -> None:
    client, stream = ends
    client.sendall(b"x" * 50_000)
    await stream.readable(1)
    stream.send(b"sorry")
    closing = asyncio.ensure_future(linger_close(stream, seconds=1))
    await settle()
    client.sendall(b"y" * 1000)
    assert client.recv(100) == b"sorry"
    assert client.recv(100) == b""
    client.close()
    started = time.monotonic()
    await closing
    assert time.monotonic() - started < 0.5
    assert stream.fileno() == -1


# -- the chunked coding ------------------------------------------------------------------------


def decode(data: bytes, step: int) -> tuple[bytes, int, bool]:
    """Feeds ``data`` so that ``step`` more octets are there each time, like peeks of a queue."""
    decoder = ChunkedDecoder()
    out = b""
    used = have = 0
    while have < len(data) and not decoder.complete:
        have = min(have + step, len(data))
        got, n = decoder.feed(data[used:have])
        out += got
        used += n
    return out, used, decoder.complete


@given(
    st.lists(st.binary(min_size=1, max_size=50), max_size=8),
    st.sampled_from([b"", b";a", b";a=b;c", b' ;q="x y"']),
    st.sampled_from([b"", b"Trailer: v\r\n", b"A:\r\nB: c\r\n"]),
    st.binary(max_size=20),
    st.integers(1, 70),
)
def test_chunked_round_trip(
    chunks: list[bytes], extension: bytes, trailer: bytes, following: bytes, step: int
) -> None:
    body = b"".join(b"%x%s\r\n%s\r\n" % (len(c), extension, c) for c in chunks)
    body += b"0" + extension + b"\r\n" + trailer + b"\r\n"
    assert decode(body + following, step) == (b"".join(chunks), len(body), True)


@pytest.mark.parametrize("step", [1, 1000])
@pytest.mark.parametrize(
    "data",
    [
        b"5\nhello\r\n0\r\n\r\n",
        b"5\r\nhello\n0\r\n\r\n",
        b"5\r\nhello!\r\n0\r\n\r\n",
        b"x\r\n",
        b"\r\n",
        b"-1\r\n",
        b"0x5\r\n",
        b"5 \r\n",
        b" 5\r\n",
        b"1_0\r\n",
        b"10000000000000000\r\n",
        b"5;a\0\r\n",
        b"5;a\rb\r\n",
        b"5;" + b"a" * 2000,
        b"0\r\nbad trailer\r\n\r\n",
        b"0\r\n folded: x\r\n\r\n",
        b"0\r\n" + b"a: b\r\n" * 3000,
    ],
)
def test_chunked_refuses(data: bytes, step: int) -> None:
    with pytest.raises(HttpError) as caught:
        decode(data, step)
    assert caught.value.status == 400


@settings(max_examples=300)
@given(
    st.lists(st.sampled_from([b"5", b"\r\n", b"a", b";", b"0", b"\n", b"hello", b":"])), st.data()
)
def test_chunked_never_crashes(pieces: list[bytes], data: st.DataObject) -> None:
    try:
        decode(b"".join(pieces), data.draw(st.integers(1, 20)))
    except HttpError:
        pass


# -- bodies ------------------------------------------------------------------------------------


async def test_a_body_is_read_to_the_octet(ends: tuple[socket.socket, PlainStream]) -> None:
    client, stream = ends
    body = RequestBody(stream, head_of("Content-Length: 5"))
    client.sendall(b"helloGET /next")
    await settle()
    assert await body.read() == b"hello"
    assert body.complete
    assert await body.read() == b""
    assert stream.peek() == b"GET /next"


async def test_a_chunked_body_is_read_to_the_octet(
    ends: tuple[socket.socket, PlainStream],
) -> None:
    client, stream = ends
    body = RequestBody(stream, head_of("Transfer-Encoding: chunked"))
    whole = os.urandom(200_000)
    wire = b"186a0\r\n" + whole[:100_000] + b"\r\n1\r\n" + whole[100_000:100_001] + b"\r\n"
    wire += b"1869f;x=y\r\n" + whole[100_001:] + b"\r\n0\r\nT: x\r\n\r\nNEXT"

    async def trickle() -> None:
        loop = asyncio.get_running_loop()
        client.setblocking(False)
        await loop.sock_sendall(client, wire[:-30])
        for octet in wire[-30:]:
            await asyncio.sleep(0.001)
            await loop.sock_sendall(client, bytes((octet,)))

    sending = asyncio.ensure_future(trickle())
    got = b"".join([piece async for piece in body])
    await sending
    assert got == whole
    assert body.complete
    await settle()
    assert stream.peek() == b"NEXT"


async def test_framing_without_data_does_not_hold_back_what_follows(
    ends: tuple[socket.socket, PlainStream],
) -> None:
    client, stream = ends
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    body = RequestBody(stream, head_of("Transfer-Encoding: chunked"), timeout=1)
    reading = asyncio.ensure_future(body.read())
    for piece in (b"5\r", b"\n", b"h"):
        await settle()
        client.sendall(piece)
    assert await reading == b"h"


async def test_continue_is_sent_once_and_only_when_needed(
    ends: tuple[socket.socket, PlainStream],
) -> None:
    client, stream = ends
    fields = ("Content-Length: 2", "Expect: 100-continue")
    body = RequestBody(stream, head_of(*fields))
    assert not body.drainable
    assert not await body.drain()
    reading = asyncio.ensure_future(body.read())
    await settle()
    assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.sendall(b"a")
    assert await reading == b"a"
    client.sendall(b"b")
    await settle()
    assert await body.read() == b"b"
    client.sendall(b"cd")
    await settle()
    assert await RequestBody(stream, head_of(*fields)).read() == b"cd"
    client.setblocking(False)
    with pytest.raises(BlockingIOError):
        client.recv(100)


@pytest.mark.parametrize(
    ("field", "data"),
    [
        ("Content-Length: 5", b"hell"),
        ("Content-Length: 5", b""),
        ("Transfer-Encoding: chunked", b""),
        ("Transfer-Encoding: chunked", b"5\r\nhell"),
        ("Transfer-Encoding: chunked", b"5\r\nhello"),
        ("Transfer-Encoding: chunked", b"5\r\nhello\r\n0\r\n"),
        ("Transfer-Encoding: chunked", b"5;ext"),
    ],
)
async def test_a_cut_off_body(
    ends: tuple[socket.socket, PlainStream], field: str, data: bytes
) -> None:
    client, stream = ends
    body = RequestBody(stream, head_of(field), timeout=2)
    client.sendall(data)
    reading = asyncio.ensure_future(read_all(body))
    await settle()
    client.shutdown(socket.SHUT_WR)
    with pytest.raises(IncompleteBody):
        await reading


async def read_all(body: RequestBody) -> bytes:
    return b"".join([piece async for piece in body])


async def test_limits_time_outs_and_resets(ends: tuple[socket.socket, PlainStream]) -> None:
    client, stream = ends
    body = RequestBody(stream, head_of("Transfer-Encoding: chunked"), timeout=0.05)
    body.limit = 3
    client.sendall(b"3\r\nabc\r\n")
    await settle()
    assert await body.read() == b"abc"
    with pytest.raises(HttpError) as caught:
        await body.read()
    assert caught.value.status == 408
    client.sendall(b"1\r\nd\r\n")
    await settle()
    with pytest.raises(HttpError) as caught:
        await body.read()
    assert caught.value.status == 413
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    with pytest.raises(ClientGone):
        await body.read()


async def test_drain_has_a_limit(ends: tuple[socket.socket, PlainStream]) -> None:
    client, stream = ends
    client.sendall(b"x" * 2000)
    body = RequestBody(stream, head_of("Content-Length: 1000"))
    assert body.drainable
    assert await body.drain()
    body = RequestBody(stream, head_of("Content-Length: 100000000"))
    assert not body.drainable
    assert not await body.drain(500)


# -- exchanges ---------------------------------------------------------------------------------


class Script:
    """An app that answers as the path says."""

    def __init__(self, file: Path | None = None) -> None:
        self.file = file

    def handle(self, exchange: Exchange) -> Rest:
        key = exchange.head.key.decode()
        if key == "file":
            assert self.file is not None
            fd = os.open(self.file, os.O_RDONLY)
            return exchange.send_file(200, (), fd, 0, os.fstat(fd).st_size)
        if key == "truncated":
            assert self.file is not None
            fd = os.open(self.file, os.O_RDONLY)
            return exchange.send_file(200, (), fd, 0, os.fstat(fd).st_size + 1)
        if key == "chunked":
            return self.chunked(exchange, None)
        if key == "short":
            return self.chunked(exchange, 100)
        if key == "silent":
            return None
        if key == "fail":
            raise HttpError(404, "there is no such thing")
        if key == "inject":
            try:
                return exchange.respond(200, ((b"X", b"a\r\nSet-Cookie: b"),))
            except ValueError:
                return exchange.respond(500, (), b"caught")
        if key.isdigit():
            return exchange.respond(int(key), ((b"X-A", b"b"),))
        return exchange.respond(200, (), key.encode())

    async def chunked(self, exchange: Exchange, length: int | None) -> None:
        exchange.start(200, (), length)
        async for piece in exchange.body:
            await exchange.write(piece)
        await exchange.write(b"end")
        await exchange.end()


async def ask(port: int, data: bytes) -> bytes:
    """Sends ``data`` and everything that comes back until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    writer.write_eof()
    try:
        return await asyncio.wait_for(reader.read(), 5)
    finally:
        writer.close()


def strip_date(answer: bytes) -> bytes:
    return b"".join(x for x in answer.splitlines(True) if not x.startswith(b"Date: "))


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        (
            b"GET /x HTTP/1.1\r\nHost: h\r\n\r\nHEAD /yy HTTP/1.1\r\nHost: h\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nServer: test\r\nContent-Length: 1\r\n\r\nx"
            b"HTTP/1.1 200 OK\r\nServer: test\r\nContent-Length: 2\r\n\r\n",
        ),
        (
            b"GET /x HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\nGET / HTTP/1.1\r\n",
            b"HTTP/1.1 200 OK\r\nServer: test\r\nContent-Length: 1\r\nConnection: close\r\n\r\nx",
        ),
        (
            b"GET /x HTTP/1.0\r\n\r\nGET /x HTTP/1.0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nServer: test\r\nContent-Length: 1\r\nConnection: close\r\n\r\nx",
        ),
        (
            b"GET /x HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET /chunked HTTP/1.0\r\n"
            b"Connection: keep-alive\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nServer: test\r\nContent-Length: 1\r\n"
            b"Connection: keep-alive\r\n\r\nx"
            b"HTTP/1.1 200 OK\r\nServer: test\r\nConnection: close\r\n\r\nend",
        ),
        (
            b"GET /204 HTTP/1.1\r\nHost: h\r\n\r\nGET /304 HTTP/1.1\r\nHost: h\r\n\r\n",
            b"HTTP/1.1 204 No Content\r\nX-A: b\r\nServer: test\r\n\r\n"
            b"HTTP/1.1 304 Not Modified\r\nX-A: b\r\nServer: test\r\n\r\n",
        ),
        (
            b"PUT /chunked HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\nab"
            b"HEAD /chunked HTTP/1.1\r\nHost: h\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nServer: test\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"2\r\nab\r\n3\r\nend\r\n0\r\n\r\nHTTP/1.1 200 OK\r\nServer: test\r\n\r\n",
        ),
        (
            b"PUT /x HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc"
            b"GET /y HTTP/1.1\r\nHost: h\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nServer: test\r\nContent-Length: 1\r\n\r\nx"
            b"HTTP/1.1 200 OK\r\nServer: test\r\nContent-Length: 1\r\n\r\ny",
        ),
        (
            b"PUT /x HTTP/1.1\r\nHost: h\r\nContent-Length: 99999999\r\n\r\nabc",
            b"HTTP/1.1 200 OK\r\nServer: test\r\nContent-Length: 1\r\nConnection: close\r\n\r\nx",
        ),
        (
            b"PUT /x HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nServer: test\r\nContent-Length: 1\r\nConnection: close\r\n\r\nx",
        ),
        (
            b"GET /inject HTTP/1.1\r\nHost: h\r\n\r\n",
            b"HTTP/1.1 500 Internal Server Error\r\nServer: test\r\n"
            b"Content-Length: 6\r\n\r\ncaught",
        ),
    ],
)
async def test_responses(request_: bytes, answer: bytes) -> None:
    async with serving(Script()) as port:
        assert strip_date(await ask(port, request_)) == answer


async def test_errors_are_explained() -> None:
    async with serving(Script()) as port:
        for request, status, detail in (
            (b"GET /fail HTTP/1.1\r\nHost: h\r\n\r\n", b"404 Not Found", b"no such thing"),
            (b"GET /silent HTTP/1.1\r\nHost: h\r\n\r\n", b"500 Internal", b"no answer"),
            (b"GET /fail\r\n\r\n", b"400 Bad Request", b"request line"),
        ):
            answer = await ask(port, request)
            assert answer.startswith(b"HTTP/1.1 " + status)
            assert detail in answer.partition(b"\r\n\r\n")[2]


async def test_a_file_larger_than_all_buffers(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(12_000_000))
    seen: list[Exchange] = []
    async with serving(Script(path), seen.append) as port:
        answer = await ask(port, b"GET /file HTTP/1.1\r\nHost: h\r\n\r\n" * 2)
        whole = path.read_bytes()
        assert answer.count(whole) == 2
        assert [exchange.sent for exchange in seen] == [12_000_000] * 2
        with pytest.raises(ConnectionResetError):
            await ask(port, b"GET /truncated HTTP/1.1\r\nHost: h\r\n\r\n")
        with pytest.raises(ConnectionResetError):
            await ask(port, b"GET /short HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")


async def test_files_are_closed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    get = b"GET /file HTTP/1.1\r\nHost: h\r\n\r\n"

    async def requests() -> None:
        path.write_bytes(b"small")
        async with serving(Script(path)) as port:
            assert (await ask(port, get * 3 + get.replace(b"GET", b"HEAD"))).count(b"small") == 3
            path.write_bytes(b"")
            await ask(port, get)
        await settle()

    await requests()  # a loop opens what it needs for itself
    before = open_files()
    await requests()
    assert open_files() == before


async def test_a_client_that_does_not_read_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(20_000_000))

    def impatient(exchange: Exchange) -> None:
        exchange.timeout = 0.3

    before = open_files()
    async with serving(Script(path), impatient) as port:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        client.connect(("127.0.0.1", port))
        client.sendall(b"GET /file HTTP/1.1\r\nHost: h\r\n\r\n")
        await asyncio.sleep(1.0)
        with pytest.raises(ConnectionResetError):
            while client.recv(1 << 20):
                pass
        client.close()
    assert open_files() == before


async def test_a_slow_client_that_reads_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(8_000_000))

    def impatient(exchange: Exchange) -> None:
        exchange.timeout = 0.15

    async with serving(Script(path), impatient) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=4096)
        writer.write(b"GET /file HTTP/1.1\r\nHost: h\r\n\r\n")
        got = 0
        while got < 8_000_000:
            got += len(await asyncio.wait_for(reader.read(100_000), 5))
            if got < 1_000_000:
                await asyncio.sleep(0.03)
        writer.close()
