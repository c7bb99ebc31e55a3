"""Listening sockets: several worker processes share an address, a storm of clients is bounded."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable

from prism.flow import Endpoint

__all__ = ["Listener"]

log = logging.getLogger(__name__)

ACCEPTS = 64  # connections accepted in one go before the loop does something else
DEFER = 5  # seconds that the kernel keeps a client that says nothing to itself
PAUSE = 0.1  # seconds without accepting, when the process has no descriptors left
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Listener:
    """Accepts connections on one endpoint and gives each to a callback.

    The address is shared with other processes by SO_REUSEPORT (socket(7)). A connection is
    accepted when its first octets have come, which spares a wake-up and a look in vain for each
    (TCP_DEFER_ACCEPT, tcp(7)); one without any is accepted after some seconds all the same.

    Args:
        endpoint: where to listen.
        backlog: length of the queue of connections that are not accepted yet.
        on_accept: called with the socket (non-blocking, TCP_NODELAY set), the client's endpoint
            and the endpoint it connected to.

    Raises:
        OSError: the endpoint cannot be had.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        backlog: int,
        on_accept: Callable[[socket.socket, Endpoint, Endpoint], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_accept = on_accept
        self._sock = _bind(endpoint, backlog)
        self._loop.add_reader(self._sock.fileno(), self._accept)

    def close(self) -> None:
        """Stop listening; connections that are in the queue are accepted still. Idempotent."""
        if self._sock.fileno() < 0:
            return
        self._accept()
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()

    def _accept(self) -> None:
        for _ in range(ACCEPTS):
            try:
                sock, address = self._sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._pause(error)
                    return
                continue  # that client has gone already (accept(2))
            try:
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                local = Endpoint.from_sockaddr(sock.getsockname())
            except OSError:
                sock.close()
                continue
            self._on_accept(sock, Endpoint.from_sockaddr(address), local)

    def _pause(self, error: OSError) -> None:
        """Wait, instead of being woken for the same connection for ever."""
        log.error("cannot accept connections now: %s", error.strerror)
        self._loop.remove_reader(self._sock.fileno())
        self._loop.call_later(PAUSE, self._go_on)

    def _go_on(self) -> None:
        if self._sock.fileno() >= 0:
            self._loop.add_reader(self._sock.fileno(), self._accept)


def _bind(endpoint: Endpoint, backlog: int) -> socket.socket:
    listener = socket.socket(endpoint.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if endpoint.family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, DEFER)
        listener.bind((endpoint.host, endpoint.port))
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"cannot listen on {endpoint}: {error.strerror}") from None
    return listener
