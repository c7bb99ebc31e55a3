"""Listening sockets: several worker processes share an address, a storm of clients is bounded.

A client is connected, as it sees it, before it is accepted here: the kernel keeps those that have
said nothing yet, and those whose last ACK is still under way. Closing the socket would reset them
with their first octet, so :meth:`Listener.retire` has them come in first.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import ipaddress
import logging
import socket
import struct
from collections.abc import Callable

from prism._ext.sockets import accept
from prism.flow import Endpoint
from prism.monitor.sockdiag import TcpState, dump

__all__ = ["Listener"]

log = logging.getLogger(__name__)

ACCEPTS = 64  # connections accepted in one go before the loop does something else
DEFER = 5  # seconds that the kernel keeps a client that says nothing to itself
PAUSE = 0.1  # seconds without accepting, when the process has no descriptors left
# Seconds until those have been asked again that have said nothing: the kernel does so 1, 3 and 7
# seconds after a SYN, so none waits for over 4; and until those are in that are on their way.
SILENT, ON_THEIR_WAY = 5.0, 1.0
_LOOK = 0.05  # seconds between two looks at who is half open
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27  # asm-generic/socket.h
# Classic BPF over a segment's TCP header, dropping SYNs without an ACK: code, jt, jf, k
# (linux/filter.h). tcp(7) has nothing to end listening with and keep who is half open.
_NO_SYNS = b"".join(
    struct.pack("=HBBI", *instruction)
    for instruction in (
        (0x30, 0, 0, 13),  # load the octet with the flags
        (0x54, 0, 0, 0x12),  # of these SYN and ACK
        (0x15, 0, 1, 0x02),  # SYN alone?
        (0x06, 0, 0, 0),  # drop it
        (0x06, 0, 0, 0xFFFFFFFF),  # let it in
    )
)
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
        while self._accept():
            pass
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()

    async def retire(self, seconds: float) -> None:
        """Have all come in that are connected as they see it, and nobody else; then close.

        Where there are none, that is at once. In the end new clients' SYNs are dropped, not
        refused, for a moment: what is accepted then would be in a queue that is about to go.

        Args:
            seconds: for all of it; clients that have not come in by then are reset when they speak.
        """
        until = self._loop.time() + seconds
        self._defer(0)  # who has said nothing is asked again, and is accepted with that answer
        await self._none_half_open(min(until, self._loop.time() + SILENT))
        if self._sock.fileno() < 0:
            return
        program = ctypes.create_string_buffer(_NO_SYNS, len(_NO_SYNS))
        instructions = struct.pack("HP", len(_NO_SYNS) // 8, ctypes.addressof(program))
        self._sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, instructions)
        await self._none_half_open(min(until, self._loop.time() + ON_THEIR_WAY))

    def resume(self) -> None:
        """Listen as before, after a :meth:`retire` that was cancelled."""
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)
        except FileNotFoundError:
            pass  # it had not come so far
        self._defer(DEFER)

    def _defer(self, seconds: int) -> None:
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, seconds)

    async def _none_half_open(self, until: float) -> None:
        """Wait until nobody is connected, or connecting, who is not in the queue yet."""
        while self._sock.fileno() >= 0:
            try:
                half_open = [_ async for _ in dump(1 << TcpState.SYN_RECV, self.endpoint.port)]
            except OSError as error:
                log.warning("cannot see who is half open, so waiting for long enough: %s", error)
                await asyncio.sleep(until - self._loop.time())
                return
            if not half_open or self._loop.time() >= until:
                return
            await asyncio.sleep(_LOOK)

    def _accept(self) -> bool:
        """Accept what is in the queue; whether there may be more."""
        listener, family = self._sock.fileno(), self._family
        for _ in range(ACCEPTS):
            try:
                accepted = accept(listener)
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._pause(error)
                    return False
                continue  # that client has gone already (accept(2))
            if accepted is None:
                return False
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
        return True

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
