"""The monitor that has a kernel module: ``/dev/prism_monitor`` (``kmod/``, docs/kernel.md).

Each watched socket is registered with the module, which tells when nothing of its connection is
left in the kernel: neither the socket nor, where this side closed first, its TIME_WAIT. So a rule
can be withdrawn at that very moment, whether TIME_WAIT ran its 60 seconds or the client cut it
short. One descriptor serves all sockets, and many events are read at once.

What the module has no room for is looked up once a second instead. Should the module's queue of
events overflow, because this process did not come to read it, it says how many were lost; then all
that is watched is gone through once, and what the module does not know any more is looked up.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import socket
import struct
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from prism.flow import Endpoint
from prism.monitor.base import Gone, OnGone, Reason
from prism.monitor.sockdiag import TcpState, cookie_of, lookup, open_diag

__all__ = ["ABI", "DEVICE", "Info", "KmodCounters", "KmodMonitor", "device_info"]

log = logging.getLogger(__name__)

DEVICE: Final = Path("/dev/prism_monitor")
ABI: Final = 2

# kmod/prism_monitor.h; tests/unit/test_kmod_abi.py compares.
REGISTER: Final = struct.Struct("=iIQQ")
REGISTER_IOCTL: Final = 0xC018_50A0
UNREGISTER_IOCTL: Final = 0x4008_50A1
INFO: Final = struct.Struct("=6I")
INFO_IOCTL: Final = 0x8018_50A2
CHECK_IOCTL: Final = 0x4008_50A3
EVENT: Final = struct.Struct("=Q18xBB36x")  # cookie, reason, flags
CLOSED, RESET, TIMED_OUT, TIME_WAIT, HANDED_OFF, LOST = range(1, 7)
STARTS: Final = 1
SEES_TIME_WAIT: Final = 1

_REASONS: Final = {
    CLOSED: Reason.ENDED,
    RESET: Reason.ENDED,
    TIMED_OUT: Reason.TIMED_OUT,
    TIME_WAIT: Reason.TIME_WAIT,
    HANDED_OFF: Reason.ENDED,
}
_BATCH = 512  # events in one turn of the event loop
_NO_ROOM = (errno.ENOSPC, errno.ENOMEM)
_SWEEP = 1.0  # seconds


@dataclass(frozen=True, slots=True)
class Info:
    """What the module says of itself.

    Attributes:
        sees_time_wait: whether it can tell when a TIME_WAIT ends, on this kernel.
        limit: how many sockets may be registered at one descriptor.
        registered: how many are, at this one.
        unread: how many events wait to be read at this one.
        lost: how many found no room there since the last read.
    """

    sees_time_wait: bool
    limit: int
    registered: int
    unread: int
    lost: int


@dataclass(slots=True)
class KmodCounters:
    """What a monitor has seen since the start."""

    registered: int = 0
    gone: int = 0
    time_waits: int = 0
    no_room: int = 0
    lost: int = 0


class _Watched:
    __slots__ = ("local", "number", "on_gone", "peer", "registered", "socket")

    def __init__(
        self, number: int, socket: int, local: Endpoint, peer: Endpoint, on_gone: OnGone
    ) -> None:
        self.number = number
        self.socket = socket
        self.local = local
        self.peer = peer
        self.on_gone = on_gone
        self.registered = True


class KmodMonitor:
    """See :class:`prism.monitor.base.Monitor`. Tells of sockets in any namespace."""

    name = "kmod"

    def __init__(self, device: Path = DEVICE) -> None:
        self.counters = KmodCounters()
        self.device = device
        self.info = Info(False, 0, 0, 0, 0)
        self._fd = -1
        self._queries: socket.socket | None = None
        self._number = 0
        self._by_number: dict[int, _Watched] = {}
        self._by_ends: dict[tuple[Endpoint, Endpoint], _Watched] = {}
        self._unregistered: dict[int, _Watched] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self._unchecked: deque[int] = deque()  # numbers, after events were lost
        self._check_again = False
        self._checker: asyncio.Handle | None = None
        self._loop: asyncio.AbstractEventLoop

    def __len__(self) -> int:
        return len(self._by_number)

    async def start(self) -> None:
        """Open the device.

        Raises:
            OSError: there is none, it may not be opened, or the module is of another version.
        """
        self._loop = asyncio.get_running_loop()
        fd = os.open(self.device, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            self.info = device_info(fd)
            self._queries = open_diag()
        except OSError:
            os.close(fd)
            raise
        self._fd = fd
        self._loop.add_reader(fd, self._readable)

    def watch(self, sock_fd: int, local: Endpoint, peer: Endpoint, on_gone: OnGone) -> None:
        """Call ``on_gone`` once, from the event loop, when nothing of the connection is left.

        Raises:
            OSError: ``sock_fd`` is not a TCP socket with a peer, or somebody else watches it.
        """
        self.forget(local, peer)
        self._number = number = self._number + 1
        registered = True
        try:
            socket_cookie = self._register(sock_fd, number)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            registered = False
            socket_cookie = cookie_of(sock_fd)
        watched = _Watched(number, socket_cookie, local, peer, on_gone)
        self._by_number[number] = self._by_ends[local, peer] = watched
        if registered:
            self.counters.registered += 1
        else:
            self._no_room(watched)

    def forget(self, local: Endpoint, peer: Endpoint) -> None:
        """Stop watching; what is not watched may be forgotten too."""
        watched = self._by_ends.pop((local, peer), None)
        if watched is None:
            return
        self._by_number.pop(watched.number, None)
        self._unregistered.pop(watched.number, None)
        if watched.registered:
            self._unregister(watched.socket)

    def alive(self, local: Endpoint, peer: Endpoint) -> bool:
        """Whether the kernel has this connection now; one in TIME_WAIT does not count.

        Raises:
            OSError: the kernel cannot be asked.
        """
        return self._state(local, peer) not in (None, TcpState.TIME_WAIT)

    async def close(self) -> None:
        """Stop; nothing is called any more."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        if self._checker is not None:
            self._checker.cancel()
            self._checker = None
        if self._queries is not None:
            self._queries.close()
            self._queries = None
        self._by_number.clear()
        self._by_ends.clear()
        self._unregistered.clear()

    def _register(self, sock_fd: int, number: int) -> int:
        request = bytearray(REGISTER.pack(sock_fd, 0, number, 0))
        try:
            fcntl.ioctl(self._fd, REGISTER_IOCTL, request)
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise
            # The same socket under other ends: the new ones count.
            old = cookie_of(sock_fd)
            for watched in [w for w in self._by_number.values() if w.socket == old]:
                self.forget(watched.local, watched.peer)
            fcntl.ioctl(self._fd, REGISTER_IOCTL, request)
        return int(REGISTER.unpack(request)[3])

    def _unregister(self, socket_cookie: int) -> None:
        try:
            fcntl.ioctl(self._fd, UNREGISTER_IOCTL, struct.pack("=Q", socket_cookie))
        except OSError as error:
            if error.errno != errno.ENOENT:  # its event is there already
                raise

    # Events

    def _readable(self) -> None:
        """Take what has come, a bounded number of events at a time."""
        try:
            data = os.read(self._fd, EVENT.size * _BATCH)
        except BlockingIOError:
            return
        for number, reason, flags in EVENT.iter_unpack(data):
            watched = self._by_number.get(number)
            if reason == LOST:
                self._lost(number)
            elif watched is not None:
                self._gone(watched, _REASONS.get(reason, Reason.UNKNOWN), bool(flags & STARTS))

    def _gone(self, watched: _Watched, reason: Reason, time_wait: bool) -> None:
        del self._by_number[watched.number]
        self._unregistered.pop(watched.number, None)
        ends = (watched.local, watched.peer)
        if self._by_ends.get(ends) is watched:
            del self._by_ends[ends]
        self.counters.gone += 1
        self.counters.time_waits += reason is Reason.TIME_WAIT
        try:
            watched.on_gone(Gone(watched.local, watched.peer, reason, time_wait))
        except Exception:
            log.exception("telling of the end of %s failed", watched.peer)

    # Where the module has no room

    def _no_room(self, watched: _Watched) -> None:
        if not self.counters.no_room:
            log.warning(
                "the monitor module has no room beyond %d sockets: looking up the others once a "
                "second; raise /sys/module/prism_monitor/parameters/max_registrations",
                self.info.limit,
            )
        self.counters.no_room += 1
        self._look_up_later(watched)

    def _look_up_later(self, watched: _Watched) -> None:
        watched.registered = False
        self._unregistered[watched.number] = watched
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(_SWEEP, self._sweep)

    def _sweep(self) -> None:
        """Look up what the module does not watch; a bounded number at a time, the oldest first."""
        self._sweeper = None
        for watched in list(self._unregistered.values())[:_BATCH]:
            if self._unregistered.pop(watched.number, None) is None:
                continue  # forgotten by a callback
            try:
                state = self._state(watched.local, watched.peer, watched.socket)
            except OSError as error:
                log.warning("cannot look up %s: %s", watched.peer, error)
                state = TcpState.ESTABLISHED
            if state is None:
                self._gone(watched, Reason.UNKNOWN, False)
            else:
                self._unregistered[watched.number] = watched  # behind the others
        if self._unregistered and self._fd >= 0:
            self._sweeper = self._loop.call_later(_SWEEP, self._sweep)

    # After events were lost

    def _lost(self, count: int) -> None:
        log.warning(
            "%d events of the monitor module were lost: this process was too busy to read them; "
            "looking up all that is watched, or see "
            "/sys/module/prism_monitor/parameters/max_unread",
            count,
        )
        self.counters.lost += count
        if self._checker is not None:
            self._check_again = True  # behind those that are to be checked yet, all once more
            return
        self._unchecked.extend(self._by_number)
        self._checker = self._loop.call_soon(self._check)

    def _check(self) -> None:
        """Find those whose event was lost, a bounded number at a time."""
        for _ in range(min(_BATCH, len(self._unchecked))):
            watched = self._by_number.get(self._unchecked.popleft())
            if watched is not None and watched.registered and not self._registered(watched.socket):
                self._missed(watched)
            if self._fd < 0:
                return  # a callback has closed the monitor
        if not self._unchecked and self._check_again:
            self._check_again = False
            self._unchecked.extend(self._by_number)
        self._checker = self._loop.call_soon(self._check) if self._unchecked else None

    def _registered(self, socket_cookie: int) -> bool:
        """Whether the module has the socket yet, so that its event is still to come."""
        try:
            fcntl.ioctl(self._fd, CHECK_IOCTL, struct.pack("=Q", socket_cookie))
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            return False
        return True

    def _missed(self, watched: _Watched) -> None:
        """The socket has gone without a word; a TIME_WAIT may stand that the module cannot see."""
        try:
            state = self._state(watched.local, watched.peer, watched.socket)
        except OSError as error:
            log.warning("cannot look up %s: %s", watched.peer, error)
            state = TcpState.TIME_WAIT
        if state is None:
            self._gone(watched, Reason.UNKNOWN, False)
        else:
            self._look_up_later(watched)

    def _state(
        self, local: Endpoint, peer: Endpoint, socket_cookie: int | None = None
    ) -> int | None:
        if self._queries is None:
            raise OSError(errno.EBADF, "the monitor is not started")
        if socket_cookie is None:
            return lookup(self._queries, local, peer)
        return lookup(self._queries, local, peer, struct.pack("=Q", socket_cookie))


def device_info(fd: int) -> Info:
    """What the module says of itself.

    Args:
        fd: the open device.

    Raises:
        OSError: it is not the module's device, or of another version (EPROTO).
    """
    answer = bytearray(INFO.size)
    fcntl.ioctl(fd, INFO_IOCTL, answer)
    abi, features, limit, registered, unread, lost = INFO.unpack(answer)
    if abi != ABI:
        raise OSError(
            errno.EPROTO,
            f"the monitor module speaks version {abi}, not {ABI}: prism-proxy kmod install",
        )
    return Info(bool(features & SEES_TIME_WAIT), limit, registered, unread, lost)
