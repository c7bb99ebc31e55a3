"""Accepting without the objects around it: the same as Python's own accept, and listeners on it."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
import struct
from contextlib import closing

import pytest

from prism._ext.sockets import accept, cookie_of
from prism.flow import Endpoint
from prism.listener import Listener

HOSTS = ["127.0.0.1", "::1"]


def listening(host: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family)
    listener.setblocking(False)
    return listener


@pytest.mark.parametrize("host", HOSTS)
def test_accept_gives_what_python_s_gives(host: str) -> None:
    with listening(host) as listener:
        assert accept(listener.fileno()) is None
        with closing(socket.create_connection(listener.getsockname()[:2])) as client:
            accepted = None
            while accepted is None:
                accepted = accept(listener.fileno())
            fd, peer, port = accepted
            with socket.socket(fileno=fd) as sock:
                assert (peer, port) == client.getsockname()[:2]
                assert sock.getpeername() == client.getsockname()
                assert not os.get_blocking(fd)
                assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        assert accept(listener.fileno()) is None


def test_an_ipv4_client_of_an_ipv6_listener_is_an_ipv4_one() -> None:
    listener = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    port = listener.getsockname()[1]
    with closing(listener), closing(socket.create_connection(("127.0.0.1", port))):
        fd, peer, _ = accept(listener.fileno()) or (-1, "", 0)
        os.close(fd)
        assert peer == "127.0.0.1"


def test_errors_have_their_numbers() -> None:
    with socket.socket() as sock, pytest.raises(OSError, match="accept") as caught:
        accept(sock.fileno())  # it does not listen
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(OSError, match="SO_COOKIE") as caught:
        cookie_of(-1)
    assert caught.value.errno == errno.EBADF


def test_a_cookie_is_the_kernel_s() -> None:
    with socket.socket() as one, socket.socket() as other:
        assert cookie_of(one.fileno()) == struct.unpack("=Q", one.getsockopt(1, 57, 8))[0]
        assert cookie_of(one.fileno()) != cookie_of(other.fileno())


BOUND = pytest.mark.parametrize(("bound", "host"), [("127.0.0.1",) * 2, ("0.0.0.0", "127.0.0.1"),
                                                    ("::1",) * 2, ("::", "::1")])  # fmt: skip


@BOUND
async def test_a_listener_tells_both_ends(bound: str, host: str) -> None:
    found: asyncio.Queue[tuple[socket.socket, Endpoint, Endpoint]] = asyncio.Queue()
    listener = Listener(Endpoint(bound, 0), 8, lambda *accepted: found.put_nowait(accepted))
    try:
        port = listener.endpoint.port
        _, writer = await asyncio.open_connection(host, port)
        writer.write(b"x")  # it is accepted when it says something
        sock, client, local = await asyncio.wait_for(found.get(), 20)
        with sock:
            assert client == writer.get_extra_info("sockname")[:2]
            assert local == (host, port)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.family == (socket.AF_INET6 if ":" in host else socket.AF_INET)
        writer.close()
    finally:
        listener.close()


@BOUND
async def test_a_listener_that_retires_lets_in_who_is_connected(bound: str, host: str) -> None:
    """Also who has said nothing, and was with the kernel only; afterwards, nobody."""
    found: list[socket.socket] = []
    listener = Listener(Endpoint(bound, 0), 128, lambda sock, *_: found.append(sock))
    port = listener.endpoint.port
    writers = [(await asyncio.open_connection(host, port))[1] for _ in range(80)]
    assert found == []
    await asyncio.wait_for(listener.retire(20.0), 8)
    late = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    late.settimeout(0.2)
    with late, pytest.raises(TimeoutError):  # neither let in, to be reset then, nor refused yet
        late.connect((host, port))
    listener.close()
    assert len(found) == len(writers)
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(host, port)
    for writer in writers:
        writer.close()
    for sock in found:
        sock.close()


async def test_a_listener_that_stays_after_all_listens_as_before() -> None:
    found: asyncio.Queue[socket.socket] = asyncio.Queue()
    listener = Listener(Endpoint("127.0.0.1", 0), 8, lambda sock, *_: found.put_nowait(sock))
    try:
        await listener.retire(0.0)
        listener.resume()
        listener.resume()
        _, writer = await asyncio.open_connection(*listener.endpoint)
        with pytest.raises(TimeoutError):  # it is left to the kernel until it says something
            await asyncio.wait_for(found.get(), 0.3)
        writer.write(b"x")
        (await asyncio.wait_for(found.get(), 5)).close()
        writer.close()
    finally:
        listener.close()
