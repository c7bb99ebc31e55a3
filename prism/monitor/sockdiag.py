"""The monitor that needs no kernel module: SOCK_DIAG's destroy notifications.

Since Linux 4.3 the kernel multicasts each TCP socket that it destroys (sock_diag(7),
``net/core/sock_diag.c``). The message carries the socket's cookie (SO_COOKIE), a number that no
other socket of this boot has, so a notification is never mistaken for that of an earlier or later
socket with the same addresses.

For an active closer the full socket goes when TIME_WAIT begins; the kernel is then asked whether
one stands. When notifications were lost (ENOBUFS) all sockets are dumped, and each watched one that
is not in the dump is looked up by itself, because a dump can miss a socket that moves.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from prism._ext.sockets import cookie_of
from prism.flow import Endpoint
from prism.monitor.base import Gone, OnGone, Reason

__all__ = [
    "MonitorCounters",
    "SockDiagMonitor",
    "TcpState",
    "cookie_of",
    "dump",
    "lookup",
    "open_diag",
]

log = logging.getLogger(__name__)

_NETLINK_SOCK_DIAG = 4
_SOL_NETLINK = 270
_NETLINK_ADD_MEMBERSHIP = 1
_SO_RCVBUFFORCE = 33
# linux/netlink.h, linux/sock_diag.h; pyroute2 has them too, and takes 0.15 s to be imported.
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_SOCK_DIAG_BY_FAMILY = 20
_SKNLGRP_INET_TCP_DESTROY, _SKNLGRP_INET6_TCP_DESTROY = 1, 3
_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_RECEIVE_BUFFER = 8 << 20  # octets; some 6,000 notifications
_BATCH = 512  # notifications in one turn of the event loop
_DUMP_BATCH = 8  # dump datagrams (of some 32 KiB) in one turn of the event loop

# struct nlmsghdr; struct inet_diag_req_v2; offsets in struct inet_diag_msg (linux/inet_diag.h).
_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBxI2s2s16s16sI8s")
_ANY_COOKIE = b"\xff" * 8
_MESSAGE_AT = _HEADER.size
_STATE_AT = _MESSAGE_AT + 1
_COOKIE_AT = _MESSAGE_AT + 44
_MESSAGE_SIZE = 72
_U64 = struct.Struct("=Q")
_ATTRIBUTE = struct.Struct("=HH")
_INET_DIAG_INFO = 2
_BUFFER_SIZE = 64 << 10


class TcpState:
    """Kernel TCP states (``include/net/tcp_states.h``) that matter here."""

    ESTABLISHED = 1
    SYN_RECV = 3
    FIN_WAIT2 = 5
    TIME_WAIT = 6
    CLOSE = 7
    LISTEN = 10


_ALL_BUT_LISTEN_AND_CLOSE = (1 << 13) - 1 & ~(1 << TcpState.LISTEN | 1 << TcpState.CLOSE)
_CONNECTED = _ALL_BUT_LISTEN_AND_CLOSE & ~(1 << TcpState.TIME_WAIT)


@dataclass(slots=True)
class MonitorCounters:
    """What a monitor has seen since the start."""

    notifications: int = 0
    gone: int = 0
    time_waits: int = 0
    overflows: int = 0
    resyncs: int = 0
    found_missing: int = 0


class _Watched(NamedTuple):
    cookie: int
    local: Endpoint
    peer: Endpoint
    on_gone: OnGone


class SockDiagMonitor:
    """See :class:`prism.monitor.base.Monitor`. Watches the namespace it is started in."""

    name = "sockdiag"

    def __init__(self) -> None:
        self.counters = MonitorCounters()
        self._by_cookie: dict[int, _Watched] = {}
        self._by_ends: dict[tuple[Endpoint, Endpoint], _Watched] = {}
        self._buffer = bytearray(_BUFFER_SIZE)
        self._events: socket.socket | None = None
        self._queries: socket.socket | None = None
        self._resync: asyncio.Task[None] | None = None
        self._stale = False
        self._loop: asyncio.AbstractEventLoop

    def __len__(self) -> int:
        return len(self._by_cookie)

    async def start(self) -> None:
        """Begin to listen to the kernel.

        Raises:
            OSError: no SOCK_DIAG (INET_DIAG) in this kernel, or not permitted.
        """
        self._loop = asyncio.get_running_loop()
        events = open_diag()
        try:
            _set_buffer(events, _RECEIVE_BUFFER)
            for group in (_SKNLGRP_INET_TCP_DESTROY, _SKNLGRP_INET6_TCP_DESTROY):
                events.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
            events.setblocking(False)
            self._queries = open_diag()
        except OSError:
            events.close()
            raise
        self._events = events
        self._loop.add_reader(events.fileno(), self._readable)

    def watch(self, sock_fd: int, local: Endpoint, peer: Endpoint, on_gone: OnGone) -> None:
        """Call ``on_gone`` once, from the event loop, when this very socket is gone.

        Raises:
            OSError: ``sock_fd`` is not an open socket.
        """
        watched = _Watched(cookie_of(sock_fd), local, peer, on_gone)
        before = self._by_ends.get((local, peer))
        if before is not None:
            self._by_cookie.pop(before.cookie, None)
        self._by_ends[local, peer] = watched
        self._by_cookie[watched.cookie] = watched

    def forget(self, local: Endpoint, peer: Endpoint) -> None:
        """Stop watching; what is not watched may be forgotten too."""
        watched = self._by_ends.pop((local, peer), None)
        if watched is not None:
            self._by_cookie.pop(watched.cookie, None)

    def alive(self, local: Endpoint, peer: Endpoint) -> bool:
        """Whether the kernel has this connection now; one in TIME_WAIT does not count.

        Raises:
            OSError: the kernel cannot be asked.
        """
        state = self._lookup(local, peer)
        return state is not None and bool(_CONNECTED >> state & 1)

    def time_wait(self, local: Endpoint, peer: Endpoint) -> bool:
        """Whether a TIME_WAIT stands for these ends.

        A kernel socket that this side closed and the peer has not (FIN_WAIT2) counts: Linux keeps
        it as it keeps TIME_WAIT once its descriptor is closed.

        Raises:
            OSError: the kernel cannot be asked.
        """
        return self._lookup(local, peer) in (TcpState.TIME_WAIT, TcpState.FIN_WAIT2)

    async def close(self) -> None:
        """Stop; nothing is called any more."""
        if self._events is not None:
            self._loop.remove_reader(self._events.fileno())
            self._events.close()
            self._events = None
        if self._resync is not None:
            self._resync.cancel()
            await asyncio.gather(self._resync, return_exceptions=True)
        if self._queries is not None:
            self._queries.close()
            self._queries = None
        self._by_cookie.clear()
        self._by_ends.clear()

    # Notifications

    def _readable(self) -> None:
        """Take what has come, a bounded number of notifications at a time."""
        events, buffer, watched = self._events, self._buffer, self._by_cookie
        for _ in range(_BATCH):
            if events is None or self._events is not events:
                return  # closed by a callback
            try:
                size = events.recv_into(buffer)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self.counters.overflows += 1
                self._start_resync()
                continue
            self.counters.notifications += 1
            if size < _MESSAGE_AT + _MESSAGE_SIZE:
                continue
            found = watched.get(_U64.unpack_from(buffer, _COOKIE_AT)[0])
            if found is not None:
                timed_out = _was_retrying(buffer, size)
                self._gone(found, Reason.TIMED_OUT if timed_out else Reason.ENDED)

    def _gone(self, watched: _Watched, reason: Reason) -> None:
        del self._by_cookie[watched.cookie]
        ends = (watched.local, watched.peer)
        if self._by_ends.get(ends) is watched:
            del self._by_ends[ends]
        try:
            time_wait = self.time_wait(*ends)
        except OSError as error:
            log.warning("cannot ask for the TIME_WAIT of %s: %s", watched.peer, error)
            time_wait = True
        if time_wait and reason is not Reason.UNKNOWN:
            reason = Reason.TIME_WAIT
        self.counters.gone += 1
        self.counters.time_waits += time_wait
        try:
            watched.on_gone(Gone(watched.local, watched.peer, reason, time_wait))
        except Exception:
            log.exception("telling of the end of %s failed", watched.peer)

    # After an overflow

    def _start_resync(self) -> None:
        if self._resync is not None and not self._resync.done():
            self._stale = True  # lost more meanwhile: once more afterwards
            return
        self._resync = self._loop.create_task(self._resynchronise())

    async def _resynchronise(self) -> None:
        """Find the watched sockets that are gone, by a dump and then one by one."""
        self._stale = True
        while self._stale:
            self._stale = False
            self.counters.resyncs += 1
            suspects = dict(self._by_cookie)
            try:
                async for cookie in dump():
                    suspects.pop(cookie, None)
            except OSError as error:
                log.warning("cannot dump the TCP sockets, looking up each one: %s", error)
            for number, watched in enumerate(suspects.values()):
                if self._by_cookie.get(watched.cookie) is watched and self._is_missing(watched):
                    self.counters.found_missing += 1
                    self._gone(watched, Reason.UNKNOWN)
                if number % _BATCH == _BATCH - 1:
                    await asyncio.sleep(0)

    def _is_missing(self, watched: _Watched) -> bool:
        try:
            state = self._lookup(watched.local, watched.peer, _U64.pack(watched.cookie))
        except OSError as error:
            log.warning("cannot look up %s: %s", watched.peer, error)
            return False
        return state is None or not _CONNECTED >> state & 1

    def _lookup(self, local: Endpoint, peer: Endpoint, cookie: bytes = _ANY_COOKIE) -> int | None:
        if self._queries is None:
            raise OSError(errno.EBADF, "the monitor is not started")
        return lookup(self._queries, local, peer, cookie)


def open_diag() -> socket.socket:
    """A NETLINK_SOCK_DIAG socket, for notifications or for :func:`lookup`.

    Raises:
        OSError: not in this kernel.
    """
    sock = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG
    )
    sock.bind((0, 0))
    return sock


def _set_buffer(sock: socket.socket, size: int) -> None:
    """A receive buffer of ``size`` octets, or as much as the system allows."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, size)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)


def _was_retrying(buffer: bytearray, size: int) -> bool:
    """Whether a destroyed socket was retransmitting or probing (tcpi_retransmits, tcpi_probes)."""
    at = _MESSAGE_AT + _MESSAGE_SIZE
    while at + 8 <= size:
        length, kind = _ATTRIBUTE.unpack_from(buffer, at)
        if kind == _INET_DIAG_INFO:
            return bool(buffer[at + 6] or buffer[at + 7])
        at += max(length + 3 & ~3, 4)
    return False


def _request(
    flags: int,
    family: int,
    states: int,
    ends: tuple[bytes, bytes, bytes, bytes] = (b"", b"", b"", b""),
    cookie: bytes = _ANY_COOKIE,
) -> bytes:
    body = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, states, *ends, 0, cookie)
    size = _HEADER.size + len(body)
    return _HEADER.pack(size, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST | flags, 1, 0) + body


def lookup(
    sock: socket.socket, local: Endpoint, peer: Endpoint, cookie: bytes = _ANY_COOKIE
) -> int | None:
    """The TCP state of one connection, None where the kernel has none.

    Args:
        sock: a blocking NETLINK_SOCK_DIAG socket with nothing to read; the kernel answers
            inside the send.
        local: the connection's own end.
        peer: the other end.
        cookie: the socket's cookie, if it has to be that very one.

    Raises:
        OSError: the kernel cannot be asked.
    """
    family = local.family
    ends = (
        local.port.to_bytes(2, "big"),
        peer.port.to_bytes(2, "big"),
        socket.inet_pton(family, local.host),
        socket.inet_pton(family, peer.host),
    )
    sock.send(_request(0, family, _ALL_BUT_LISTEN_AND_CLOSE, ends, cookie))
    answer = sock.recv(8192, socket.MSG_DONTWAIT)
    kind = _HEADER.unpack_from(answer)[1]
    if kind == _NLMSG_ERROR:
        number = -struct.unpack_from("=i", answer, _HEADER.size)[0]
        if number in (errno.ENOENT, errno.ESTALE):
            return None
        raise OSError(number, f"SOCK_DIAG: {errno.errorcode.get(number, number)}")
    state = answer[_STATE_AT]
    return None if state == TcpState.LISTEN else state


async def dump(states: int = _CONNECTED, port: int = 0) -> AsyncIterator[int]:
    """The cookies of TCP sockets, letting the event loop turn now and then.

    The kernel makes the next part of a dump when the last one is read, so no read waits.

    Args:
        states: a bit for each state they may be in; by default, all those that are connected.
        port: their own; by default, any.

    Raises:
        OSError: the kernel cannot be asked.
    """
    ends = (port.to_bytes(2, "big"), b"", b"", b"")
    for family in (socket.AF_INET, socket.AF_INET6):
        with open_diag() as sock:
            sock.send(_request(_NLM_F_DUMP, family, states, ends))
            parts = 0
            last = False
            while not last:
                for cookie in _cookies(sock.recv(_BUFFER_SIZE, socket.MSG_DONTWAIT)):
                    if cookie is None:
                        last = True
                    else:
                        yield cookie
                parts += 1
                if parts % _DUMP_BATCH == 0:
                    await asyncio.sleep(0)


def _cookies(data: bytes) -> Iterator[int | None]:
    """The cookies in one datagram of a dump; None at its end."""
    at = 0
    while at + _HEADER.size <= len(data):
        size, kind, *_ = _HEADER.unpack_from(data, at)
        if kind == _NLMSG_DONE:
            yield None
            return
        if kind == _NLMSG_ERROR:
            number = -struct.unpack_from("=i", data, at + _HEADER.size)[0]
            raise OSError(number, f"SOCK_DIAG: {errno.errorcode.get(number, number)}")
        yield _U64.unpack_from(data, at + _COOKIE_AT)[0]
        at += max(size + 3 & ~3, _HEADER.size)
