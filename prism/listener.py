"""Listening sockets: several worker processes share an address, a storm of clients is bounded."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import socket
from collections.abc import Callable

from prism._ext.sockets import accept
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

    Attributes:
        endpoint: where it listens, with the port that port 0 has become.

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
        self._family = endpoint.family
        self._sock = _bind(endpoint, backlog)
        self.endpoint = Endpoint.from_sockaddr(self._sock.getsockname())
        # Where it listens on all addresses, each connection has to be asked for its own.
        everywhere = ipaddress.ip_address(self.endpoint.host).is_unspecified
        self._local = None if everywhere else self.endpoint
        self._loop.add_reader(self._sock.fileno(), self._accept)

    def close(self) -> None:
        """Stop listening; connections that are in the queue are accepted still. Idempotent."""
        if self._sock.fileno() < 0:
            return
        self._accept()
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()

    def _accept(self) -> None:
        listener, family = self._sock.fileno(), self._family
        for _ in range(ACCEPTS):
            try:
                accepted = accept(listener)
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._pause(error)
                    return
                continue  # that client has gone already (accept(2))
            if accepted is None:
                return
            fd, host, port = accepted
            # With all that is known about it, or Python would ask the kernel again.
            sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, fd)
            local = self._local
            if local is None:
                try:
                    local = Endpoint.from_sockaddr(sock.getsockname())
                except OSError:
                    sock.close()
                    continue
            self._on_accept(sock, Endpoint(host, port), local)

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
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # inherited
        listener.bind((endpoint.host, endpoint.port))
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"cannot listen on {endpoint}: {error.strerror}") from None
    return listener
