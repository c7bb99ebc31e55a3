"""A window that is taken back: what the client may send ahead, and that nothing else changes."""

from __future__ import annotations

import asyncio
import errno
import socket
import threading

import pytest
from tcp_bed import MakeNamespace, numbers, pair, pattern, rebuild, receive, settle, until

from prism._ext import tcp_repair
from prism.http.body import RequestBody
from prism.http.head import parse_head
from prism.http.stream import PlainStream
from prism.lab.netns import Namespace

pytestmark = pytest.mark.net

KIB, MIB = 1 << 10, 1 << 20
AHEAD = 16 * KIB
SCALED = 4 * KIB  # a window is told in units of up to so many octets here
FAMILIES = ["127.0.0.1", "::1"]


@pytest.fixture
def host(make_namespace: MakeNamespace) -> Namespace:
    return make_namespace("host")


def offered(server: socket.socket) -> int:
    """Octets that the client may send from where it stands."""
    state = numbers(server)
    return (int(state["rcv_wup"]) + int(state["rcv_wnd"]) - int(state["rcv_nxt"])) & 0xFFFFFFFF


def upload(client: socket.socket, server: socket.socket, octets: int) -> None:
    body = pattern(octets)
    thread = threading.Thread(target=client.sendall, args=(body,))
    thread.start()
    assert receive(server, octets) == body
    thread.join()


@pytest.mark.parametrize("address", FAMILIES)
def test_the_client_learns_with_the_next_acknowledgement(host: Namespace, address: str) -> None:
    client, server = pair(host, host, address)
    with client, server:
        upload(client, server, 2 * MIB)
        settle(client)
        assert offered(server) > 4 * AHEAD
        before = numbers(server)
        clamp = tcp_repair.narrow(server.fileno(), AHEAD)
        assert clamp == before["window_clamp"]
        changed = {name for name, value in numbers(server).items() if value != before[name]}
        assert changed <= {"rcv_wnd", "window_clamp", "timestamp"}
        assert offered(server) == AHEAD
        server.sendall(b"done")
        assert client.recv(4) == b"done"
        client.sendall(b"next")
        settle(client)
        assert numbers(client)["snd_wnd"] <= AHEAD + SCALED


@pytest.mark.parametrize("address", FAMILIES)
def test_it_grows_again_when_it_may(host: Namespace, address: str) -> None:
    client, server = pair(host, host, address)
    with client, server:
        upload(client, server, MIB)
        clamp = tcp_repair.narrow(server.fileno(), AHEAD)
        assert clamp
        server.sendall(b"done")
        assert client.recv(4) == b"done"
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, clamp)
        upload(client, server, 2 * MIB)
        assert offered(server) > 4 * AHEAD


def test_a_narrow_one_moves_on(host: Namespace) -> None:
    """Exported while it is narrow, and wide again at its next owner."""
    client, server = pair(host, host, "127.0.0.1")
    with client:
        upload(client, server, MIB)
        clamp = tcp_repair.narrow(server.fileno(), AHEAD)
        server.sendall(b"done")
        assert client.recv(4) == b"done"
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, clamp)
        settle(client)
        with rebuild(host, server) as new:
            upload(client, new, 2 * MIB)
            assert offered(new) > 4 * AHEAD


def test_a_client_that_does_not_wait_is_left_alone(host: Namespace) -> None:
    client, server = pair(host, host, "127.0.0.1")
    with client, server:
        upload(client, server, MIB)
        client.sendall(b"GET / HTTP/1.1\r\n")
        until(lambda: server.recv(64, socket.MSG_PEEK))
        before = numbers(server)
        assert tcp_repair.narrow(server.fileno(), AHEAD) == 0
        after = numbers(server)
        assert (after["rcv_wnd"], after["window_clamp"]) == (
            before["rcv_wnd"],
            before["window_clamp"],
        )


def test_a_port_can_be_listened_on_again(host: Namespace) -> None:
    """Repair mode clears SO_REUSEADDR; a restarted server would not get its port."""
    client, server = pair(host, host, "127.0.0.1")
    with client, server:
        assert tcp_repair.narrow(server.fileno(), AHEAD)
        assert server.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)


def test_what_cannot_be(host: Namespace) -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as sock, pytest.raises(OSError) as caught:
        tcp_repair.narrow(sock.fileno(), AHEAD)
    assert caught.value.errno in (errno.ENOPROTOOPT, errno.EOPNOTSUPP)
    client, server = pair(host, host, "127.0.0.1")
    with client, server:
        for octets in (0, 4095, (1 << 30) + 1):
            with pytest.raises(ValueError, match="4096"):
                tcp_repair.narrow(server.fileno(), octets)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_was_read(host: Namespace, chunked: bool) -> None:
    """Its end narrows the window, and the next request's body finds it wide again."""
    client, server = pair(host, host, "127.0.0.1")
    body = pattern(MIB)
    framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
    head = parse_head(f"PUT /k HTTP/1.1\r\nHost: h\r\n{framing}\r\n\r\n".encode())
    assert head is not None
    octets = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if chunked else body

    async def read(stream: PlainStream) -> None:
        thread = threading.Thread(target=client.sendall, args=(octets,))
        thread.start()
        received = b"".join([piece async for piece in RequestBody(stream, head)])
        assert received == body
        thread.join()

    async def run() -> None:
        stream = PlainStream(server)
        wide = server.getsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP)
        await read(stream)
        assert offered(server) <= AHEAD
        stream.widen()
        assert server.getsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP) >= wide
        await read(stream)
        stream.close()

    with client:
        asyncio.run(run())
