"""The connection loop over real loopback sockets: peek, decide, serve, next."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from tls_pairs import pair

from prism._ext.tls_record import Tls
from prism.flow import Endpoint
from prism.http.connection import Connection, State
from prism.http.exchange import Exchange
from prism.http.head import HttpError, Limits, RequestHead
from prism.http.stream import PlainStream
from prism.tls.stream import TlsStream


class Echo:
    """Answers with the method, the key and the body."""

    def handle(self, exchange: Exchange) -> Any:
        if exchange.head.has_body:
            return self._with_body(exchange)
        return exchange.respond(200, (), exchange.head.method + b" " + exchange.head.key)

    async def _with_body(self, exchange: Exchange) -> None:
        body = b"".join([piece async for piece in exchange.body])
        rest = exchange.respond(200, (), body)
        if rest is not None:
            await rest


class Broken:
    """Raises in the middle of a response of known length."""

    async def handle(self, exchange: Exchange) -> None:
        exchange.start(200, (), 100)
        await exchange.write(b"x" * 10)
        raise RuntimeError("broken on purpose")


class Keeper:
    """A dispatcher that serves everything here and remembers what it was told."""

    limits = Limits()
    body_timeout = 5.0
    server = b"test"

    def __init__(self, app: Any) -> None:
        self.app = app
        self.heads: list[RequestHead] = []
        self.errors: list[int] = []
        self.ended: list[Connection] = []
        self.defer = False

    def dispatch(self, connection: Connection, head: RequestHead) -> None:
        self.heads.append(head)
        if not self.defer:
            connection.serve(self.app)

    def bad_request(self, connection: Connection, error: HttpError) -> None:
        self.errors.append(error.status)

    def answered(self, connection: Connection, exchange: Exchange) -> None:
        pass

    def closed(self, connection: Connection) -> None:
        self.ended.append(connection)


class Bed:
    """A client's socket and the connection at its other end."""

    def __init__(self, app: Any, tls: Tls | None = None) -> None:
        self.keeper = Keeper(app)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.client = socket.create_connection(listener.getsockname())
            sock, _ = listener.accept()
        self.client.setblocking(False)
        stream = TlsStream(sock, tls) if tls else PlainStream(sock)
        local = Endpoint.from_sockaddr(sock.getsockname())
        self.connection = Connection(
            stream, stream.flow, stream.flow.pack(), self.keeper, local=local
        )
        self.connection.start()

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.client, data)

    async def receive(self, until: bytes = b"") -> bytes:
        """What comes until ``until`` was seen, or the end."""
        data = b""
        async with asyncio.timeout(5):
            while not until or until not in data:
                piece = await asyncio.get_running_loop().sock_recv(self.client, 65536)
                if not piece:
                    break
                data += piece
        return data


@pytest.fixture
async def make_bed() -> AsyncIterator[Any]:
    beds: list[Bed] = []

    def make(app: Any = None, tls: Tls | None = None) -> Bed:
        beds.append(Bed(app or Echo(), tls))
        return beds[-1]

    yield make
    for bed in beds:
        bed.connection.close()
        bed.client.close()


def get(key: str, *lines: str) -> bytes:
    return "\r\n".join((f"GET /{key} HTTP/1.1", "Host: h", *lines, "", "")).encode()


async def test_requests_follow_each_other_on_one_connection(make_bed: Any) -> None:
    bed = make_bed()
    for index in range(3):
        await bed.send(get(f"k{index}"))
        assert (await bed.receive(b"GET k")).endswith(f"GET k{index}".encode())
    assert bed.connection.requests == 3
    assert bed.connection.state is State.IDLE


async def test_pipelined_requests_are_answered_in_order(make_bed: Any) -> None:
    bed = make_bed()
    count = 100  # more than are answered in one go
    await bed.send(b"".join(get(f"k{index:03}") for index in range(count)))
    data = await bed.receive(b"GET k099")
    assert [data.find(b"GET k%03d" % index) for index in range(count)] == sorted(
        data.find(b"GET k%03d" % index) for index in range(count)
    )
    assert data.count(b"HTTP/1.1 200") == count


async def test_one_octet_at_a_time(make_bed: Any) -> None:
    bed = make_bed()
    request = b"PUT /a HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello"
    bed.client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for octet in request:
        await bed.send(bytes((octet,)))
        await asyncio.sleep(0.001)
    assert (await bed.receive(b"hello")).startswith(b"HTTP/1.1 200")


async def test_nothing_is_consumed_before_the_decision(make_bed: Any) -> None:
    bed = make_bed()
    bed.keeper.defer = True
    request = get("a") + get("b")
    await bed.send(request)
    while not bed.keeper.heads:
        await asyncio.sleep(0.001)
    assert bed.connection.state is State.DECIDING
    stream = bed.connection.detach()
    assert stream.peek() == request
    # The handoff fails and the request is served here after all, and so is the next one.
    bed.keeper.defer = False
    bed.connection.attach()
    bed.connection.serve(bed.keeper.app)
    assert (await bed.receive(b"GET b")).count(b"HTTP/1.1 200") == 2


@pytest.mark.parametrize(
    ("request_octets", "status"),
    [
        (b"GET / HTTP/1.1\n\n", 400),
        (b"BREW / HTTP/1.1\r\nHost: h\r\n\r\n", 501),
        (b"GET / HTTP/1.1\r\nHost: h\r\nX: " + b"x" * 40000 + b"\r\n\r\n", 431),
    ],
)
async def test_a_bad_head_is_answered_and_never_dispatched(
    make_bed: Any, request_octets: bytes, status: int
) -> None:
    bed = make_bed()
    await bed.send(request_octets)
    bed.client.shutdown(socket.SHUT_WR)
    data = await bed.receive()
    assert data.startswith(f"HTTP/1.1 {status} ".encode())
    assert b"Connection: close" in data
    assert bed.keeper.errors == [status]
    assert not bed.keeper.heads
    await asyncio.sleep(0.01)
    assert bed.keeper.ended == [bed.connection]


async def test_an_error_answer_survives_a_client_that_goes_on_sending(make_bed: Any) -> None:
    bed = make_bed()
    await bed.send(b"GET / HTTP/1.1\r\nHost: h\r\nX: " + b"x" * 65536)
    for _ in range(16):
        await bed.send(b"y" * 65536)
    bed.client.shutdown(socket.SHUT_WR)
    assert (await bed.receive()).startswith(b"HTTP/1.1 431 ")


async def test_a_response_that_breaks_off_is_reset(make_bed: Any) -> None:
    bed = make_bed(Broken())
    await bed.send(get("a"))
    with pytest.raises(ConnectionResetError):
        await bed.receive()
    assert bed.keeper.ended == [bed.connection]


@pytest.mark.parametrize("started", [False, True])
async def test_an_app_that_fails_at_once_is_reset(make_bed: Any, started: bool) -> None:
    class Fails:
        def handle(self, exchange: Exchange) -> Any:
            if started:
                exchange.start(200, (), 100)
                raise HttpError(500, "too late for an answer")
            raise RuntimeError("broken on purpose")

    bed = make_bed(Fails())
    await bed.send(get("a"))
    with pytest.raises(ConnectionResetError):
        await bed.receive()
    assert bed.keeper.ended == [bed.connection]


async def test_a_client_that_leaves_closes_the_connection_once(make_bed: Any) -> None:
    bed = make_bed()
    await bed.send(get("a")[:-5])
    bed.client.close()
    async with asyncio.timeout(5):
        while not bed.keeper.ended:
            await asyncio.sleep(0.001)
    assert bed.keeper.ended == [bed.connection]


async def test_a_half_closed_client_gets_its_answer(make_bed: Any) -> None:
    bed = make_bed()
    await bed.send(get("a"))
    bed.client.shutdown(socket.SHUT_WR)
    assert (await bed.receive()).endswith(b"GET a")


async def test_a_slow_head_is_answered_with_408(make_bed: Any) -> None:
    bed = make_bed()
    await bed.send(b"GET / HT")
    await asyncio.sleep(0.05)
    assert not bed.connection.overdue(0.0, idle=1.0, head=1.0)
    later = asyncio.get_running_loop().time() + 100
    assert bed.connection.overdue(later, idle=1000.0, head=1.0)
    bed.connection.expire()
    bed.client.shutdown(socket.SHUT_WR)
    assert (await bed.receive()).startswith(b"HTTP/1.1 408 ")


async def test_a_client_of_an_idle_tls_connection_is_not_reset(make_bed: Any) -> None:
    """It answers our close_notify with its own, to a socket that waits for it."""
    tls, theirs = pair(0x1301)
    bed = make_bed(tls=tls)
    bed.connection.expire()
    assert theirs.open(await bed.receive()).closed
    assert bed.keeper.ended == []
    await bed.send(theirs.close_notify())
    async with asyncio.timeout(5):
        while not bed.keeper.ended:
            await asyncio.sleep(0.01)
    assert bed.client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
