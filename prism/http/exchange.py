"""One request and its response.

What a connection does with an exchange:

1. parse a peeked head, ``stream.consume(head.length)``, make an :class:`Exchange`;
2. ``rest = app.handle(exchange)``. ``None``: the app has answered inline. Else run the coroutine
   with the stream's readability callback off (the body is read from the stream), and afterwards
   ``await exchange.finish()``;
3. inline: when ``exchange.settled`` is false, ``await exchange.finish()`` too: it drains what is
   left of a small body, ends a response that was left open, or answers 500 when there is none;
4. ``exchange.keep_alive``: the next request begins at the stream's next octet. Otherwise
   ``await linger_close(stream)``, or plain ``stream.close()`` when ``exchange.body.complete`` and
   nothing is unread (:func:`~prism.http.stream.has_unread`).

What comes out of the coroutine (or out of ``handle``): :class:`HttpError` while nothing is sent
is answered by :meth:`Exchange.fail`; :class:`ClientGone` and any other exception: call
``stream.abort()``, so that the client sees a cut-off response as cut off.

Responses go out inline: one ``send`` for head and small body, ``MSG_MORE`` before a file. Only
when the socket is full is there a coroutine to await, and a client that reads nothing for
:attr:`Exchange.timeout` seconds is given up.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

from prism.http.body import ClientGone, RequestBody
from prism.http.head import HttpError, RequestHead
from prism.http.origin import Origin
from prism.http.response import (
    STALL_TIMEOUT,
    date_line,
    error_message,
    error_response,
    send_all,
    status_line,
    wait_writable,
)
from prism.http.stream import Stream

__all__ = ["App", "Exchange", "Headers", "Rest", "Waits", "error_response", "field_lines"]

Headers = Sequence[tuple[bytes, bytes]]
Rest = Coroutine[Any, Any, None] | None
"""``None``: done. A coroutine: must be awaited to the end, once."""

_SMALL = 64 * 1024  # octets of a body that are copied behind the head into one send
_FILE_PIECE = 1 << 20  # octets per sendfile(2) call
_INLINE = 4 << 20  # octets of a file in one go, before other connections have a turn


class App(Protocol):
    """Answers exchanges."""

    def handle(self, exchange: Exchange) -> Rest:
        """Answers at once and returns ``None``, or returns a coroutine that does the rest.

        It may raise :class:`HttpError` before anything is sent. A coroutine that is returned is
        run to its end or cancelled when the connection goes away.
        """
        ...


def field_lines(headers: Headers) -> bytes:
    """Header fields with their line ends.

    Raises:
        ValueError: one has a line end or NUL in it.
    """
    lines = b"".join([b"%b: %b\r\n" % field for field in headers])
    if lines.count(b"\n") != len(headers) or lines.count(b"\r") != len(headers) or b"\0" in lines:
        raise ValueError("a response header field with a line end or NUL in it")
    return lines


class Waits(Protocol):
    """What an exchange waits for without a coroutine."""

    def cancel(self) -> None:
        """Nobody waits any more: the connection is gone."""
        ...


class Exchange:
    """One request, its body, and the response to it.

    Attributes:
        head: the request's head, already consumed from the stream.
        body: the request's body, to be read from the stream.
        stream: the connection.
        origin: where the request came from, when known.
        status: the response's status; 0 while there is none.
        started: the response's head is sent or about to be: it is too late for another one.
        finished: the response is whole and with the kernel.
        keep_alive: the connection can serve another request afterwards. Apps may clear it before
            the response starts.
        sent: octets of response body sent.
        timeout: seconds that the client may read nothing.
        resume: where an app may set ``waits``, return ``None`` and answer later: to be called with
            the exchange and what is left to do then.
        waits: what it waits for.
    """

    __slots__ = ("_chunked", "_head", "_left", "_server", "body", "finished", "head", "keep_alive",
                 "origin", "resume", "sent", "started", "status", "stream", "timeout",
                 "waits")  # fmt: skip

    def __init__(
        self,
        head: RequestHead,
        stream: Stream,
        origin: Origin | None = None,
        server: bytes = b"",
        timeout: float = STALL_TIMEOUT,
    ) -> None:
        self.head = head
        self.stream = stream
        self.origin = origin
        if head.has_body or head.upgrade is not None:
            stream.widen()
        self.body = RequestBody(stream, head, timeout)
        self.timeout = timeout
        self.keep_alive = head.keep_alive
        self.status = 0
        self.started = False
        self.finished = False
        self.sent = 0
        self.resume: Callable[[Exchange, Rest], None] | None = None
        self.waits: Waits | None = None
        self._server = b"Server: %s\r\n" % server if server else b""
        self._head = b""
        self._left: int | None = None
        self._chunked = False

    @property
    def settled(self) -> bool:
        """Nothing is left to do: the response is out and the request's body is read."""
        return self.finished and (self.body.complete or not self.keep_alive)

    @property
    def bodiless(self) -> bool:
        """The response has no body whatever its head says (RFC 9110, section 6.4.1)."""
        return self.head.method == b"HEAD" or self.status in (204, 304)

    def give_away(self) -> None:
        """Leave the connection to a protocol that is not HTTP; it is closed afterwards."""
        if self.started:
            raise RuntimeError("this exchange has a response already")
        self.started = self.finished = True
        self.keep_alive = False

    # -- the whole response at once ---------------------------------------------------------

    def respond(self, status: int, headers: Headers = (), body: bytes = b"") -> Rest:
        """Sends a whole response.

        Args:
            status: final, so 200 or more.
            headers: without Content-Length, Transfer-Encoding and Connection, which are made here,
                as are Date and Server when they are not given.
            body: left away where the response must not have one.
        """
        head = self._begin(status, headers, len(body))
        if self.bodiless:
            body = b""
        self._left = 0
        self.sent = len(body)
        if len(body) <= _SMALL:
            return self._send(head + body, last=True)
        return self._send_rest((head, body))

    def respond_ready(self, status: int, lines: bytes, body: bytes) -> Rest:
        """As :meth:`respond`, with lines of :func:`field_lines`; Date and Server not among them."""
        if self.started:
            raise RuntimeError("this exchange has a response already")
        self.status = status
        self.started = True
        self._left = 0
        framing, connection = self._framing(len(body)), self._connection()
        if self.bodiless:
            body = b""
        self.sent = len(body)
        parts = (status_line(status), lines, date_line(), self._server, framing, connection)
        return self._send(b"".join((*parts, b"\r\n", body)), last=True)

    def fail(self, error: HttpError) -> Rest:
        """Answers with an error status and a JSON document that says what is wrong."""
        headers = ((b"Content-Type", b"application/json"), *error.headers)
        return self.respond(error.status, headers, error_message(error))

    def send_file(self, status: int, headers: Headers, fd: int, offset: int, length: int) -> Rest:
        """Sends a response whose body is ``length`` octets of a file from ``offset``.

        Args:
            status: as in :meth:`respond`.
            headers: as in :meth:`respond`.
            fd: an open file; always closed, even if this raises.
            offset: octets from the file's beginning.
            length: octets to send. A file that ends before that makes the connection abort.
        """
        # A FileIO closes itself when the coroutine that holds it is dropped before it ran.
        file: io.FileIO | None = None
        try:
            head = self._begin(status, headers, length)
            if self.bodiless or not length:
                self._left = 0
                return self._send(head, last=True)
            end = offset + length
            unsent = head[self._push(head, more=True) :]
            if not unsent:
                offset = self._push_pieces(fd, offset, end)
                if offset == end:
                    self.finished = True
                    return None
            file = io.FileIO(fd)
            return self._send_file_rest(unsent, file, offset, end)
        finally:
            if file is None:
                os.close(fd)

    def framing_lines(self) -> tuple[bytes, bytes]:
        """Server and Connection lines, for heads that are made elsewhere; either may be empty."""
        return self._server, self._connection()

    def pass_on(self, status: int, data: bytes, octets: int, left: int) -> Rest:
        """Sends a response that was made elsewhere, or its beginning.

        Args:
            status: as in :meth:`respond`.
            data: the head with the lines of :meth:`framing_lines`, and what there is of the body.
            octets: of the body in it.
            left: octets of the body that :meth:`write` will be given; 0: the response is whole.
        """
        self.status = status
        self.started = True
        self._left = left
        self.sent = octets
        return self._send(data, last=not left)

    # -- a response in pieces ---------------------------------------------------------------

    def start(self, status: int, headers: Headers = (), length: int | None = None) -> None:
        """Begins a response; its head goes out with the first :meth:`write` or :meth:`end`.

        Args:
            status: as in :meth:`respond`.
            headers: as in :meth:`respond`.
            length: octets of the body when known; else it is chunked, or in HTTP/1.0 ended by
                closing the connection.
        """
        self._head = self._begin(status, headers, length)

    async def write(self, data: bytes) -> None:
        """Sends a piece of the body; waits while the client does not read (back-pressure).

        Raises:
            ClientGone: the client is lost or reads nothing.
            ValueError: this is more than the length declared.
        """
        rest = self.write_now(data)
        if rest is not None:
            await rest

    def write_now(self, data: bytes) -> Rest:
        """:meth:`write`, done at once when the socket takes everything."""
        if self._left is not None:
            if len(data) > self._left:
                raise ValueError("a response body longer than its Content-Length")
            self._left -= len(data)
        if not data or self.bodiless:
            return None
        self.sent += len(data)
        head, self._head = self._head, b""
        if self._chunked:
            head += b"%x\r\n" % len(data)
            return self._send_pieces(head, data, b"\r\n")
        return self._send_pieces(head, data, b"")

    def passed(self, n: int) -> None:
        """Counts octets of the body that went from another socket to the client's."""
        self.sent += n
        if self._left is not None:
            self._left -= n

    async def end(self) -> None:
        """Ends the response.

        Raises:
            ClientGone: the client is lost or reads nothing.
            ValueError: the body was shorter than the length declared; the connection is aborted.
        """
        rest = self.end_now()
        if rest is not None:
            await rest

    def end_now(self) -> Rest:
        """:meth:`end`, done at once when the socket takes everything."""
        if self.finished:
            return None
        if self._left and not self.bodiless:
            self.keep_alive = False
            self.stream.abort()
            raise ValueError("a response body shorter than its Content-Length")
        head, self._head = self._head, b""
        if self._chunked and not self.bodiless:
            head += b"0\r\n\r\n"
        if not head:
            self.finished = True
            return None
        return self._send(head, last=True)

    def inform(self, status: int, headers: Headers = ()) -> Rest:
        """Sends an interim (1xx) response, except to HTTP/1.0 clients, who do not know them."""
        if self.head.version == 10 or self.started:
            return None
        lines = b"".join(b"%s: %s\r\n" % field for field in headers)
        return self._send(status_line(status) + lines + b"\r\n", last=False)

    async def finish(self) -> None:
        """Brings the exchange to its end after the app's part; see the module's text.

        Raises:
            ClientGone: the client is lost or reads nothing.
        """
        if not self.started:
            rest = self.fail(HttpError(500, "the application gave no answer"))
            if rest is not None:
                await rest
        await self.end()
        if not self.body.complete and self.keep_alive:
            self.keep_alive = await self.body.drain()

    # -- inside -----------------------------------------------------------------------------

    def _begin(self, status: int, headers: Headers, length: int | None) -> bytes:
        """Decides the framing and the connection's fate, and makes the head."""
        if self.started:
            raise RuntimeError("this exchange has a response already")
        self.status = status
        self._left = length
        parts = [status_line(status)]
        lines = 2
        date, server = True, self._server
        for name, value in headers:
            parts += (name, b": ", value, b"\r\n")
            lines += 1
            if len(name) == 4 and name.lower() == b"date":
                date = False
            elif len(name) == 6 and name.lower() == b"server":
                server = b""
        for line in (
            date_line() if date else b"",
            server,
            self._framing(length),
            self._connection(),
        ):
            if line:
                parts.append(line)
                lines += 1
        parts.append(b"\r\n")
        head = b"".join(parts)
        if head.count(b"\n") != lines or head.count(b"\r") != lines or b"\0" in head:
            raise ValueError("a response header field with a line end or NUL in it")
        self.started = True
        return head

    def _framing(self, length: int | None) -> bytes:
        """RFC 9112, section 6.3, and RFC 9110, section 8.6."""
        if self.status in (204, 304):
            return b""
        if length is not None:
            return b"Content-Length: %d\r\n" % length
        if self.bodiless:
            return b""
        if self.head.version == 10:
            self.keep_alive = False
            return b""
        self._chunked = True
        return b"Transfer-Encoding: chunked\r\n"

    def _connection(self) -> bytes:
        if self.keep_alive and not self.body.drainable:
            self.keep_alive = False
        if not self.keep_alive:
            return b"Connection: close\r\n"
        return b"Connection: keep-alive\r\n" if self.head.version == 10 else b""

    def _push(self, data: bytes | memoryview, more: bool = False) -> int:
        """Sends what fits; 0 when nothing does."""
        try:
            return self.stream.send(data, more)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise ClientGone(f"the connection broke in the response: {error}") from None

    def _push_file(self, fd: int, offset: int, length: int) -> int:
        try:
            sent = self.stream.send_file(fd, offset, min(length, _FILE_PIECE))
        except BlockingIOError:
            return 0
        except OSError as error:
            raise ClientGone(f"the connection broke in the response: {error}") from None
        if not sent:
            self.keep_alive = False
            self.stream.abort()
            raise ClientGone("a file was shortened while it was sent")
        self.sent += sent
        return sent

    def _push_pieces(self, fd: int, offset: int, end: int) -> int:
        """Sends what fits, up to a bound that leaves other connections their turn."""
        bound = min(end, offset + _INLINE)
        while offset < bound:
            sent = self._push_file(fd, offset, end - offset)
            if not sent:
                break
            offset += sent
        return offset

    def _send(self, data: bytes, last: bool) -> Rest:
        sent = self._push(data)
        if sent < len(data):
            return self._send_rest((memoryview(data)[sent:],), last)
        if last:
            self.finished = True
        return None

    def _send_pieces(self, head: bytes, data: bytes, tail: bytes) -> Rest:
        if len(data) <= _SMALL:
            return self._send(head + data + tail if head or tail else data, last=False)
        return self._send_rest((head, data, tail), last=False)

    async def _send_rest(self, pieces: tuple[bytes | memoryview, ...], last: bool = True) -> None:
        for index, piece in enumerate(pieces):
            if piece:
                await send_all(self.stream, piece, self.timeout, more=index + 1 < len(pieces))
        if last:
            self.finished = True

    async def _send_file_rest(self, head: bytes, file: io.FileIO, offset: int, end: int) -> None:
        with file:
            if head:
                await send_all(self.stream, head, self.timeout, more=True)
            while offset < end:
                offset += self._push_file(file.fileno(), offset, end - offset)
                if offset < end:
                    await wait_writable(self.stream, self.timeout)
            self.finished = True
