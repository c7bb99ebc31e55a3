"""All TLS handshakes of one process: bounded in number and time, counted, certificates renewed.

Signing holds the event loop up: about 0.1 ms for ECDSA on P-256, 1 ms for RSA with 2048 bits.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any, Final, Generic, Protocol, TypeVar

from prism.config_tls import TlsConfig
from prism.flow import Flow
from prism.telemetry.metrics import LabelledCounter
from prism.tls.context import TlsContexts
from prism.tls.established import Established
from prism.tls.handshake import Handshake

__all__ = ["Done", "TlsServer"]

log = logging.getLogger(__name__)

Done = Callable[[socket.socket, Established | None], None]

RELOAD: Final = 1.0  # seconds between two looks at the certificates' files
LINGER: Final = 1.0  # seconds a refused client has to read its alert
_MAX_LINGERING: Final = 256
_LINGER_OCTETS: Final = 64 * 1024


class TlsServer:
    """Does handshakes for the frontend.

    Args:
        config: the section of the configuration.
        contexts: made before the workers were forked, so that they share tickets; by default
            they are made here.

    Attributes:
        handshakes: successful ones by version, suite and whether a ticket was used.
        failures: by reason; time-outs and those crowded out are among them.
        timeouts: handshakes that took too long.
        crowded_out: handshakes ended because there were too many newer ones.

    Raises:
        ConfigError: a certificate, key or CA cannot be used.
    """

    def __init__(self, config: TlsConfig, contexts: TlsContexts | None = None) -> None:
        self.contexts = contexts or TlsContexts(config)
        self.handshakes = LabelledCounter("version", "suite", "resumed")
        self.failures = LabelledCounter("reason")
        self.timeouts = 0
        self.crowded_out = 0
        self._loop = asyncio.get_running_loop()
        self._tickets = config.tickets
        self._max = config.max_handshakes
        self._pending: dict[Handshake, Done] = {}
        self._running: _Deadlines[Handshake] = _Deadlines(config.handshake_timeout, self._too_slow)
        self._lingering: _Deadlines[_Lingering] = _Deadlines(LINGER, _Lingering.close)
        self._poll = self._loop.call_later(RELOAD, self._look_at_files)
        self._closed = False

    def __len__(self) -> int:
        """Handshakes under way."""
        return len(self._pending)

    def accept(self, sock: socket.socket, flow: Flow, on_done: Done) -> None:
        """Do a handshake; the client may have sent its part or not.

        Args:
            sock: connected and non-blocking. It is not the caller's until ``on_done``.
            flow: the connection's name.
            on_done: called once, maybe before this returns. With what was established, the socket
                is the caller's, and its queue holds what follows the client's Finished. The loop
                may watch its input still, for nobody: the caller watches it in its own name
                (which then costs no system call), or removes the reader before it closes the
                socket. With ``None``, it is closed, or will be as soon as the client has read
                the alert.
        """
        if self._closed:
            sock.close()
            on_done(sock, None)
            return
        if len(self._pending) >= self._max:
            self.crowded_out += 1
            self._running.oldest().abandon("crowded out")
        handshake = Handshake(
            sock, flow, self.contexts, self._tickets, self._ended, loop=self._loop
        )
        self._pending[handshake] = on_done
        self._running.add(handshake)
        handshake.advance()

    def reload(self) -> bool:
        """Read certificates and keys again, at once; ``False``: they are broken, none changes."""
        return self.contexts.reload()

    def close(self) -> None:
        """End all handshakes; their ``on_done`` is called with ``None``. Idempotent."""
        self._closed = True
        self._poll.cancel()
        for handshake in list(self._pending):
            handshake.abandon("server stopped")
        for lingering in self._lingering.all():
            lingering.close()
        self._running.close()
        self._lingering.close()

    def snapshot(self) -> dict[str, Any]:
        """The counters, for the status document."""
        return {
            "handshakes": self.handshakes.snapshot(),
            "failures": self.failures.snapshot(),
            "timeouts": self.timeouts,
            "crowded_out": self.crowded_out,
            "pending": len(self._pending),
        }

    # -- ends ------------------------------------------------------------------------------

    def _ended(self, handshake: Handshake, established: Established | None, why: str) -> None:
        on_done = self._pending.pop(handshake)
        self._running.remove(handshake)
        sock = handshake.sock
        if established is not None:
            self.handshakes.add(established.version, established.suite, established.resumed)
        else:
            self.failures.add(why)
            log.debug("%s: TLS handshake failed: %s", handshake.flow, why)
            self._dispose(sock, linger=handshake.said)
        on_done(sock, established)

    def _dispose(self, sock: socket.socket, *, linger: bool) -> None:
        """Close; a close with unread input would reset the connection and the alert be lost."""
        if not linger or self._closed:
            _close(sock)
            return
        if len(self._lingering) >= _MAX_LINGERING:
            self._lingering.oldest().close()
        lingering = _Lingering(sock, self._loop, self._lingering)
        self._lingering.add(lingering)
        lingering.start()

    def _too_slow(self, handshake: Handshake) -> None:
        self.timeouts += 1
        handshake.abandon("timed out")

    def _look_at_files(self) -> None:
        self._poll = self._loop.call_later(RELOAD, self._look_at_files)
        if self.contexts.changed():
            self.contexts.reload()


def _close(sock: socket.socket) -> None:
    """Close with a FIN, whatever part of a record there is to read."""
    try:
        sock.shutdown(socket.SHUT_WR)
        left = _LINGER_OCTETS
        while left > 0 and (data := sock.recv(16384)):
            left -= len(data)
    except OSError:
        pass  # there is no more to read, or the connection is lost
    sock.close()


class _Timed(Protocol):
    deadline: float


_T = TypeVar("_T", bound=_Timed)


class _Deadlines(Generic[_T]):
    """Things that all have the same time, oldest first, and one timer for all of them."""

    def __init__(self, seconds: float, expire: Callable[[_T], None]) -> None:
        self._seconds = seconds
        self._expire = expire
        self._loop = asyncio.get_running_loop()
        self._items: dict[_T, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._items)

    def add(self, item: _T) -> None:
        item.deadline = self._loop.time() + self._seconds
        self._items[item] = None
        if self._timer is None:
            self._timer = self._loop.call_at(item.deadline, self._look)

    def remove(self, item: _T) -> None:
        self._items.pop(item, None)

    def oldest(self) -> _T:
        return next(iter(self._items))

    def all(self) -> list[_T]:
        return list(self._items)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        """The timer is for the oldest of when it was set; most have gone by then."""
        self._timer = None
        now = self._loop.time()
        while self._items:
            item = self.oldest()
            if item.deadline > now:
                self._timer = self._loop.call_at(item.deadline, self._look)
                return
            self._items.pop(item)
            self._expire(item)


class _Lingering:
    """A refused client: its input is thrown away until it has read the alert and closes."""

    __slots__ = ("_left", "_loop", "_others", "_sock", "deadline")

    def __init__(
        self, sock: socket.socket, loop: asyncio.AbstractEventLoop, others: _Deadlines[_Lingering]
    ) -> None:
        self.deadline = 0.0
        self._sock = sock
        self._loop = loop
        self._others = others
        self._left = _LINGER_OCTETS

    def start(self) -> None:
        try:
            self._sock.shutdown(socket.SHUT_WR)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        except OSError:
            self.close()
            return
        self._loop.add_reader(self._sock.fileno(), self._drain)

    def _drain(self) -> None:
        try:
            data = self._sock.recv(16384)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._left -= len(data)
        if not data or self._left <= 0:
            self.close()

    def close(self) -> None:
        if self._sock.fileno() >= 0:
            self._others.remove(self)
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()
