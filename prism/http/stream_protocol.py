"""What a stream is: a connection whose input can be looked at before it is taken.

The request head is only peeked at, so that the kernel's receive queue still holds the request
when the connection is exported. :class:`prism.http.stream.PlainStream` is a TCP connection as it
is; a TLS stream follows the same protocol.

Blocking: the plain methods never wait, they raise :class:`BlockingIOError`; :meth:`Stream.readable`
and :meth:`Stream.writable` wait.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from prism.flow import Flow

__all__ = ["PEEK_LIMIT", "Stream"]

PEEK_LIMIT: Final = 64 * 1024
"""Octets that a peek shows at most."""


class Stream(Protocol):
    """What serves as a client's connection. One reader and one writer at a time."""

    @property
    def flow(self) -> Flow:
        """The connection's name, as the client sees it."""
        ...

    @property
    def eof(self) -> bool:
        """The client has finished sending and all it sent was seen; it may still read."""
        ...

    def fileno(self) -> int:
        """The socket's descriptor, -1 when closed."""
        ...

    def peek(self, limit: int = PEEK_LIMIT) -> bytes:
        """What was received and not consumed, at most ``limit`` octets; empty at end of file.

        Raises:
            BlockingIOError: nothing is there now.
            OSError: the connection is lost.
        """
        ...

    def consume(self, n: int) -> None:
        """Takes the first ``n`` octets of what was peeked out of the input.

        Raises:
            ValueError: fewer than ``n`` octets are there.
        """
        ...

    def receive(self, n: int) -> bytes:
        """Takes up to ``n`` octets; empty at end of file. Raises like :meth:`peek`."""
        ...

    def send(self, data: bytes | memoryview, more: bool = False) -> int:
        """Sends what fits now and says how much that was; ``more``: do not send a short packet yet.

        Raises:
            BlockingIOError: nothing fits.
            OSError: the connection is lost.
        """
        ...

    def send_file(self, fd: int, offset: int, n: int) -> int:
        """Sends up to ``n`` octets of a file from ``offset``; 0 when the file ends there.

        Raises like :meth:`send`.
        """
        ...

    def unsent(self) -> int:
        """Octets sent that the client has not acknowledged: shrinks while the client reads."""
        ...

    def shutdown_write(self) -> None:
        """Ends our sending side; does nothing when the connection is gone."""
        ...

    def abort(self) -> None:
        """Closes with a reset: the client sees that what it got is not whole."""
        ...

    def close(self) -> None:
        """Closes; waiters get :class:`ConnectionAbortedError`. Calling it again does nothing."""
        ...

    @property
    def secure(self) -> bool:
        """Whether the client speaks TLS."""
        ...

    @property
    def movable(self) -> bool:
        """The connection can be handed over now: nothing waits here to be sent."""
        ...

    def must_move(self, body: bool) -> bool:
        """Whether a request cannot be answered before the connection was handed over.

        A handoff to this very node will do, since what stands in the way is the socket. ``body``:
        the request has one, so that input will be read before the answer.
        """
        ...

    @property
    def unsettled(self) -> bool:
        """It is not movable now, but may be in a moment: ask again."""
        ...

    def expect(self, n: int) -> None:
        """Says that ``n`` octets of a request's body are going to be received."""
        ...

    def narrow(self) -> None:
        """Lets a client that waits for its answer send little of its next request ahead.

        An upload leaves a wide window behind. If the next request belongs to another node, what
        has come of it travels twice: here, and with the handoff.
        """
        ...

    def widen(self) -> None:
        """Undoes :meth:`narrow`: more than a request's head is going to be received."""
        ...

    def export_tls(self) -> bytes:
        """The TLS state that travels with the TCP state, a secret; empty without TLS."""
        ...

    @property
    def pending(self) -> bytes:
        """Octets taken from the socket that were not consumed yet: they travel with a handoff."""
        ...

    def release(self) -> int:
        """Gives the socket's descriptor away, open as it is; the stream counts as closed."""
        ...

    def await_more(self, n: int) -> None:
        """Makes the stream readable only when more than the ``n`` octets already peeked are there.

        Without it, waiting on an incomplete head would return at once, again and again. End of
        file and errors still wake. Call :meth:`reset_lowat` when the head is complete.
        """
        ...

    def reset_lowat(self) -> None:
        """Undoes :meth:`await_more`; cheap when there is nothing to undo."""
        ...

    async def readable(self, seconds: float | None) -> None:
        """Waits until there is something to peek at, or end of file, or an error.

        It may return in vain: what follows still has to expect :class:`BlockingIOError`.

        Raises:
            TimeoutError: nothing came in ``seconds``.
            ConnectionAbortedError: the stream was closed meanwhile.
        """
        ...

    async def writable(self, seconds: float | None) -> None:
        """Waits until something can be sent; raises like :meth:`readable`."""
        ...

    def on_readable(self, callback: Callable[[], None]) -> None:
        """Calls ``callback`` whenever there is something to peek at, until :meth:`off_readable`.

        For the idle state: no task waits. It is level-triggered, and may call once in vain; not
        to be used together with :meth:`readable`.
        """
        ...

    def off_readable(self) -> None:
        """Ends :meth:`on_readable`; does nothing when it is not on."""
        ...
