"""A TCP connection as a stream, and how to close one without losing the last response.

It works on asyncio's loop and on uvloop.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import select
import socket
import struct
import termios
from collections.abc import Callable

from prism._ext import tcp_repair
from prism._ext.http_scan import drop, peek
from prism.flow import Flow
from prism.http.stream_protocol import PEEK_LIMIT, Stream

__all__ = ["PEEK_LIMIT", "PlainStream", "Stream", "has_unread", "linger_close"]

_ABORTIVE = struct.pack("ii", 1, 0)
_NOTHING = bytes(4)
_AHEAD = 16 * 1024  # octets


class PlainStream:
    """A connected TCP socket as a stream.

    Args:
        sock: connected; made non-blocking. The stream owns it from now on.
        flow: the connection's name; by default the socket's own two ends.
        pending: octets that were received before, to be read before the socket's.
    """

    __slots__ = (
        "_awaiting",
        "_clamp",
        "_eof",
        "_fd",
        "_flow",
        "_loop",
        "_lowat",
        "_pending",
        "_reader",
        "_vain",
        "_watched",
        "_writer",
        "sock",
    )

    def __init__(self, sock: socket.socket, flow: Flow | None = None, pending: bytes = b"") -> None:
        sock.setblocking(False)
        self.sock = sock
        self._fd = sock.fileno()
        self._flow = flow
        self._pending = pending
        self._eof = False
        self._awaiting = False  # what is there was seen, and is not enough
        self._lowat = 1
        self._vain = 0  # looks at too little since the mark was raised
        self._loop = asyncio.get_running_loop()
        self._reader: asyncio.Future[None] | Callable[[], None] | None = None
        self._writer: asyncio.Future[None] | None = None
        self._watched = False
        self._clamp = 0  # the window's bound, while it is narrow

    def __repr__(self) -> str:
        return f"<PlainStream fd={self._fd} {self._flow or ''}>"

    @property
    def flow(self) -> Flow:
        """The connection's name, as the client sees it."""
        if self._flow is None:
            self._flow = Flow.of_socket(self.sock)
        return self._flow

    @property
    def eof(self) -> bool:
        """The client has finished sending and all it sent was seen."""
        return self._eof

    @property
    def secure(self) -> bool:
        """Whether the client speaks TLS."""
        return False

    @property
    def movable(self) -> bool:
        """Nothing waits here to be sent."""
        return True

    def must_move(self, body: bool) -> bool:
        """Never; see :meth:`Stream.must_move`."""
        return False

    @property
    def unsettled(self) -> bool:
        """Never; see :attr:`Stream.unsettled`."""
        return False

    def expect(self, n: int) -> None:
        """Does nothing; see :meth:`Stream.expect`."""

    def narrow(self) -> None:
        """Lets the client send only the beginning of its next request ahead."""
        if not self._clamp:
            try:
                self._clamp = tcp_repair.narrow(self._fd, _AHEAD)
            except OSError:
                pass  # lost, as whoever reads next will see; or no privilege, and no handoffs

    def widen(self) -> None:
        """Undoes :meth:`narrow`."""
        if self._clamp:
            try:
                self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, self._clamp)
            except OSError:
                pass  # lost, as whoever reads next will see
            self._clamp = 0

    def export_tls(self) -> bytes:
        """Empty: this connection has no TLS."""
        return b""

    @property
    def pending(self) -> bytes:
        """Octets received before the socket's that were not consumed yet."""
        return self._pending

    def fileno(self) -> int:
        """The socket's descriptor, -1 when closed."""
        return self._fd

    def peek(self, limit: int = PEEK_LIMIT) -> bytes:
        """What was received and not consumed; see :meth:`Stream.peek`."""
        pending = self._pending
        if len(pending) >= limit:
            return pending[:limit]
        try:
            data = peek(self._fd, limit - len(pending))
        except BlockingIOError:
            if not pending:
                raise
            return pending
        if not data:
            self._eof = True
        elif len(data) < self._lowat and self._lowat > 1 and not self._eof:
            self._woken_below_the_mark(len(data))
            if self._pending is not pending:
                return self._pending
        return pending + data if pending else data

    def _woken_below_the_mark(self, n: int) -> None:
        """A FIN is behind the ``n`` octets, or the kernel has no room for more behind them.

        A peek cannot show a FIN behind data, so ask for it. Without one, and not for the first
        time, for once may be for another reason: make room, or this would go on for ever.
        """
        if self._fin_received():
            self._eof = True
            return
        self._vain += 1
        if self._vain > 1:
            self._vain = 0
            self._pending += self.sock.recv(n)
            self.reset_lowat()

    def _fin_received(self) -> bool:
        poll = select.poll()
        poll.register(self._fd, select.POLLRDHUP)
        return bool(poll.poll(0))

    def consume(self, n: int) -> None:
        """Takes the first ``n`` octets; see :meth:`Stream.consume`."""
        if self._pending:
            taken = min(n, len(self._pending))
            self._pending = self._pending[taken:]
            n -= taken
        while n > 0:
            taken = drop(self._fd, n)
            if not taken:
                raise ValueError(f"{n} octets to consume are not there")
            n -= taken

    def receive(self, n: int) -> bytes:
        """Takes up to ``n`` octets; see :meth:`Stream.receive`."""
        if self._pending:
            data, self._pending = self._pending[:n], self._pending[n:]
            return data
        data = self.sock.recv(n)
        if not data and n:
            self._eof = True
        return data

    def send(self, data: bytes | memoryview, more: bool = False) -> int:
        """Sends what fits now; see :meth:`Stream.send`."""
        return self.sock.send(data, socket.MSG_MORE if more else 0)

    def send_file(self, fd: int, offset: int, n: int) -> int:
        """Sends up to ``n`` octets of a file with sendfile(2); see :meth:`Stream.send_file`."""
        return os.sendfile(self._fd, fd, offset, n)

    def unsent(self) -> int:
        """Octets not acknowledged by the client (SIOCOUTQ, tcp(7)); 0 when closed."""
        if self._fd < 0:
            return 0
        return int.from_bytes(fcntl.ioctl(self._fd, termios.TIOCOUTQ, _NOTHING), "little")

    def shutdown_write(self) -> None:
        """Ends our sending side; does nothing when the connection is gone."""
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def abort(self) -> None:
        """Closes with a reset."""
        try:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORTIVE)
        except OSError:
            pass  # it is closed all the same
        self.close()

    def close(self) -> None:
        """Closes; waiters get :class:`ConnectionAbortedError`."""
        if self._fd < 0:
            return
        # Off the loop first: a descriptor closed under uvloop's poll handle would stay in it.
        for waiter in (self._reader, self._writer):
            if isinstance(waiter, asyncio.Future) and not waiter.done():
                waiter.set_exception(ConnectionAbortedError("the stream was closed"))
        self._reader = None
        self._unwatch_input()
        self._stop_writing()
        self._fd = -1
        self._pending = b""
        self.sock.close()

    def release(self) -> int:
        """Gives the descriptor away, open as it is; the stream counts as closed."""
        for waiter in (self._reader, self._writer):
            if isinstance(waiter, asyncio.Future) and not waiter.done():
                waiter.set_exception(ConnectionAbortedError("the stream was given away"))
        self._reader = None
        self._unwatch_input()
        self._stop_writing()
        self._fd = -1
        self._pending = b""
        return self.sock.detach()

    def await_more(self, n: int) -> None:
        """Readable only when more than ``n`` octets are there (SO_RCVLOWAT, socket(7))."""
        self._awaiting = True
        mark = max(1, n + 1 - len(self._pending))
        if mark != self._lowat:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, mark)
            self._lowat = mark

    def reset_lowat(self) -> None:
        """Undoes :meth:`await_more`."""
        self._awaiting = False
        self._vain = 0
        if self._lowat != 1:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
            self._lowat = 1

    async def readable(self, seconds: float | None) -> None:
        """Waits for input, end of file or an error; see :meth:`Stream.readable`."""
        if self._pending and not self._awaiting:
            return
        if self._reader is not None:
            raise RuntimeError("somebody waits for this stream's input already")
        self._check_open()
        future = self._reader = self._loop.create_future()
        self._watch_input()
        try:
            await self._wait(future, seconds)
        finally:
            self._reader = None

    async def writable(self, seconds: float | None) -> None:
        """Waits until something can be sent; see :meth:`Stream.writable`."""
        if self._writer is not None:
            raise RuntimeError("somebody waits to write to this stream already")
        self._check_open()
        future = self._writer = self._loop.create_future()
        self._loop.add_writer(self._fd, _wake, future)
        try:
            await self._wait(future, seconds)
        finally:
            self._stop_writing()

    async def _wait(self, future: asyncio.Future[None], seconds: float | None) -> None:
        timer = None if seconds is None else self._loop.call_later(seconds, _expire, future)
        try:
            await future
        finally:
            if timer is not None:
                timer.cancel()

    def _check_open(self) -> None:
        if self._fd < 0:
            raise ConnectionAbortedError("the stream is closed")

    def on_readable(self, callback: Callable[[], None]) -> None:
        """Calls ``callback`` whenever there is input; see :meth:`Stream.on_readable`."""
        if isinstance(self._reader, asyncio.Future):
            raise RuntimeError("somebody waits for this stream's input already")
        self._check_open()
        self._reader = callback
        self._watch_input()
        if self._pending and not self._awaiting:
            self._loop.call_soon(self._report_pending, callback)

    def _report_pending(self, callback: Callable[[], None]) -> None:
        if self._reader is callback and self._pending:
            callback()

    def off_readable(self) -> None:
        """Ends :meth:`on_readable`."""
        if not isinstance(self._reader, asyncio.Future):
            self._reader = None

    def watch(self) -> None:
        """Has the loop watch the input from now on, as when somebody waits for it.

        Where it does so already for the socket's former owner, who must not be told any more, that
        costs no system call.
        """
        self._watch_input()

    def _watch_input(self) -> None:
        """Has the loop watch the descriptor, unless it still does.

        It stops only when input comes that nobody waits for, so that a connection that goes from
        request to request costs no epoll_ctl(2).
        """
        if not self._watched:
            self._watched = True
            self._loop.add_reader(self._fd, self._input)

    def _input(self) -> None:
        reader = self._reader
        if reader is None:
            self._unwatch_input()
        elif isinstance(reader, asyncio.Future):
            _wake(reader)
        else:
            reader()

    def _unwatch_input(self) -> None:
        if self._watched:
            self._watched = False
            self._loop.remove_reader(self._fd)

    def _stop_writing(self) -> None:
        if self._writer is not None:
            self._writer = None
            if self._fd >= 0:
                self._loop.remove_writer(self._fd)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _expire(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_exception(TimeoutError("the other side was silent for too long"))


def has_unread(stream: Stream) -> bool:
    """Whether closing now would reset the connection, and perhaps lose our last response.

    It would when the client sent more than was read, a pipelined request for example; then use
    :func:`linger_close`.
    """
    try:
        return bool(stream.peek(1))
    except OSError:
        return False


async def linger_close(stream: Stream, seconds: float = 2.0, octets: int = 1 << 20) -> None:
    """Closes a stream on which the client may still be sending.

    Closing with unread input makes the kernel reset the connection, and the client might lose the
    response that says why (RFC 9112, section 9.6). So: end our side, read on for a while, close.

    Args:
        stream: closed on return, whatever happens.
        seconds: the longest time to read on.
        octets: the most to read.
    """
    deadline = asyncio.get_running_loop().time() + seconds
    try:
        stream.shutdown_write()
        stream.reset_lowat()
        while octets > 0:
            try:
                data = stream.receive(PEEK_LIMIT)
            except BlockingIOError:
                remaining = deadline - asyncio.get_running_loop().time()
                if remaining <= 0:
                    return
                await stream.readable(remaining)
                continue
            if not data:
                return
            octets -= len(data)
    except OSError:  # a time-out as well: nothing more to wait for
        pass
    finally:
        stream.close()
