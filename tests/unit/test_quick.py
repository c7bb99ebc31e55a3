"""The quick way of relaying against the slow one: the same octets, whatever the upstream says."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import socket
import struct
from collections.abc import AsyncIterator, Sequence

import pytest
from http_loop import serving
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prism.apps.quick import Quick
from prism.apps.relay import Relay
from prism.flow import Endpoint, Flow
from prism.http.connection import Connection
from prism.http.exchange import App, Exchange
from prism.http.head import HttpError, Limits, RequestHead
from prism.http.stream import PlainStream
from prism.listener import Listener

WARM = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nwarm"
OK = b"HTTP/1.1 200 OK\r\nETag: x\r\nContent-Length: 3\r\n\r\nabc"


class Keeper:
    """Gives every request to one app."""

    limits = Limits()
    body_timeout = 5.0
    server = b"test"

    def __init__(self, app: App) -> None:
        self.app = app
        self.connections: set[Connection] = set()

    def dispatch(self, connection: Connection, head: RequestHead) -> None:
        self.connections.add(connection)
        connection.serve(self.app)

    def bad_request(self, connection: Connection, error: HttpError) -> None:
        pass

    def answered(self, connection: Connection, exchange: Exchange) -> None:
        pass

    def closed(self, connection: Connection) -> None:
        self.connections.discard(connection)


@contextlib.asynccontextmanager
async def kept(app: App) -> AsyncIterator[int]:
    """Serves on real connections, which let an app answer later."""
    keeper = Keeper(app)

    def accepted(sock: socket.socket, client: Endpoint, local: Endpoint) -> None:
        flow = Flow(client, local)
        Connection(PlainStream(sock, flow), flow, flow.pack(), keeper, local=local).start()

    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = Endpoint.from_sockaddr(free.getsockname())
    listener = Listener(endpoint, 64, accepted)
    try:
        yield endpoint.port
    finally:
        listener.close()
        for connection in list(keeper.connections):
            connection.close(abort=True)


class Upstream:
    """Answers "/warm" with a response, and everything else with these pieces; counts."""

    def __init__(self, pieces: Sequence[bytes], *, end: bool = False, pause: float = 0) -> None:
        self.pieces = pieces
        self.end = end
        self.pause = pause
        self.connections = 0
        self.asked = asyncio.Event()
        self.lost = asyncio.Event()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if b"/warm" in head:
                    writer.write(WARM)
                    continue
                self.asked.set()
                for piece in self.pieces:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(self.pause)
                if self.end:
                    break
        self.lost.set()
        writer.close()


@contextlib.asynccontextmanager
async def relayed(behind: Upstream, *, quick: bool, seconds: float = 5.0) -> AsyncIterator[int]:
    server = await asyncio.start_server(behind.handle, "127.0.0.1", 0)
    relay = Relay(response_timeout=seconds)
    app = relay.to(Endpoint("127.0.0.1", server.sockets[0].getsockname()[1]))
    try:
        async with (kept if quick else serving)(app) as port:
            yield port
        assert len(relay.waiting) == 0
    finally:
        relay.close()
        server.close()


def request(path: str, method: str = "GET") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode()


async def ask(port: int, data: bytes) -> bytes:
    """Everything until the end; a reset adds a mark."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    writer.write_eof()
    got = b""
    try:
        while piece := await asyncio.wait_for(reader.read(65536), 10):
            got += piece
    except ConnectionResetError:
        got = b"reset"
    writer.close()
    return re.sub(rb"Date: [^\r]*", b"Date:", got)


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What became of each quick request."""
    taken: list[str] = []
    ask_, slow = Quick.ask, Quick._by_coroutine

    def noting_ask(self: Quick) -> object:
        taken.append("quick")
        return ask_(self)

    def noting_slow(self: Quick, attempt: object) -> object:
        taken[-1] = "slow"
        return slow(self, attempt)  # type: ignore[arg-type]

    monkeypatch.setattr(Quick, "ask", noting_ask)
    monkeypatch.setattr(Quick, "_by_coroutine", noting_slow)
    return taken


async def both(
    pieces: Sequence[bytes], method: str = "GET", *, end: bool = True, pause: float = 0
) -> bytes:
    """Asks both ways; the answers are the same, and returned."""
    answers = []
    for quick in (True, False):
        behind = Upstream(pieces, end=end, pause=pause)
        async with relayed(behind, quick=quick) as port:
            answers.append(await ask(port, request("/warm") + request("/x", method)))
    assert answers[0] == answers[1]
    return answers[0]


RESPONSES = [
    OK,
    b"HTTP/1.1 404 Gone Fishing\r\nContent-Length: 2\r\nDate: D\r\nServer: S\r\n\r\nno",
    b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 304 Not Modified\r\nETag: x\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n\r\nuntil the end",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK,
    b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nold",
    b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc",
    b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: x-y\r\nX-Y: no\r\n\r\nabc",
    b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcHTTP/1.1 200 stray",
    b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc",  # cut off
    b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + bytes(100_000),
    b"HTTP/1.1 200 OK\r\nContent-Length: 400000\r\n\r\n" + bytes(400_000),
    b"HTTP/1.1 299 Odd\r\nContent-Length: 1\r\n\r\nx",
    b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
    b"SMTP ready\r\n\r\n",
    b"",
]


@pytest.mark.parametrize("response", RESPONSES, ids=range(len(RESPONSES)))
async def test_answers_are_the_same(response: bytes, ways: list[str]) -> None:
    await both([response])
    assert len(ways) == 1
    for cut in (1, len(response) // 2):
        await both([response[:cut], response[cut:]], pause=0.005)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(RESPONSES), st.lists(st.integers(1, 120), max_size=4))
def test_answers_are_the_same_wherever_they_are_split(response: bytes, cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(response)]
    pieces = [response[a:b] for a, b in itertools.pairwise(places) if a < b]
    asyncio.run(both(pieces, pause=0.001))


async def test_plain_answers_go_the_quick_way(ways: list[str]) -> None:
    answer = await both([OK], end=False)
    assert answer.endswith(b"\r\nContent-Length: 3\r\n\r\nabc")
    head = await both([b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n"], "HEAD", end=False)
    assert head.endswith(b"Content-Length: 3\r\n\r\n")
    assert ways == ["quick", "quick"]


async def test_bodies_in_pieces_go_the_quick_way(ways: list[str]) -> None:
    body = bytes(range(256)) * 256
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
    pieces = [head + body[:100], body[100:40_000], body[40_000:-1], body[-1:]]
    assert (await both(pieces, end=False, pause=0.01)).endswith(b"\r\n\r\n" + body)
    assert ways == ["quick"]


async def test_bodies_that_stand_still_are_cut_off(ways: list[str]) -> None:
    behind = Upstream([OK[:-1]])
    async with relayed(behind, quick=True, seconds=0.2) as port:
        assert await ask(port, request("/warm") + request("/x")) == b"reset"
        await asyncio.wait_for(behind.lost.wait(), 5)
    assert ways == ["slow"]


async def test_pipelined_requests_keep_their_order_and_the_connection(ways: list[str]) -> None:
    behind = Upstream([OK])
    async with relayed(behind, quick=True) as port:
        answer = await ask(port, request("/warm") + request("/x") * 60)
    assert answer.count(b"\r\n\r\nabc") == 60
    assert behind.connections == 1
    assert ways == ["quick"] * 60


async def test_stale_connections_are_replaced(ways: list[str]) -> None:
    """The upstream ends the kept connection without an answer, just when it is asked."""
    behind = Upstream([], end=True)
    async with relayed(behind, quick=True) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request("/warm"))
        await reader.readuntil(b"warm")
        behind.pieces, behind.end = [], True
        first = behind.connections

        async def mend() -> None:
            await behind.asked.wait()
            behind.pieces, behind.end = [OK], False

        mending = asyncio.ensure_future(mend())
        writer.write(request("/x"))
        assert (await asyncio.wait_for(reader.readuntil(b"abc"), 5)).startswith(b"HTTP/1.1 200 ")
        await mending
        assert behind.connections == first + 1
        writer.close()
    assert ways == ["slow"]


async def test_slow_answers_time_out(ways: list[str]) -> None:
    behind = Upstream([], pause=0)
    async with relayed(behind, quick=True, seconds=0.2) as port:
        answer = await ask(port, request("/warm") + request("/x"))
        await asyncio.wait_for(behind.lost.wait(), 5)
    assert b"HTTP/1.1 504 " in answer
    assert len(ways) == 1


async def test_a_clients_reset_ends_the_upstream_connection(ways: list[str]) -> None:
    behind = Upstream([])
    async with relayed(behind, quick=True) as port:
        client = socket.create_connection(("127.0.0.1", port))
        client.sendall(request("/warm") + request("/x"))
        await asyncio.wait_for(behind.asked.wait(), 5)
        assert not behind.lost.is_set()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        await asyncio.wait_for(behind.lost.wait(), 5)
    assert ways == ["quick"]


async def test_a_client_that_reads_nothing_gets_everything_in_the_end(ways: list[str]) -> None:
    size = 3_000_000
    behind = Upstream([b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size, bytes(size)])
    async with relayed(behind, quick=True) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=65536)
        writer.write(request("/warm") + request("/x"))
        await asyncio.sleep(0.2)
        await reader.readuntil(b"warm")
        await reader.readuntil(b"\r\n\r\n")
        assert await asyncio.wait_for(reader.readexactly(size), 10) == bytes(size)
        writer.close()
    assert ways == ["slow"]
