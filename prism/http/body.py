"""Request bodies: read exactly, and not an octet further (RFC 9112, sections 6 and 7).

What follows a body is the next request, which may be handed over with the connection; so framing
octets are peeked at, and only what belongs to this body is consumed.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Final

from prism.errors import PrismError
from prism.http.head import HttpError, RequestHead
from prism.http.stream import PEEK_LIMIT, Stream

__all__ = ["DRAIN_LIMIT", "ChunkedDecoder", "ClientGone", "IncompleteBody", "RequestBody"]

DRAIN_LIMIT: Final = 256 * 1024
"""Unread octets of a body up to which reading them is cheaper than a new connection."""

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_MAX_LINE = 1024  # octets of a chunk-size line with its extensions
_MAX_TRAILERS = 8 * 1024  # octets
_NARROW_FROM = 64 * 1024  # octets of a body that leave a wide window behind
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[\t -~\x80-\xff]*)?")
_TRAILER = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t -~\x80-\xff]*")


class ClientGone(PrismError):
    """The client's connection is lost or stands still; there is nobody to answer."""


class IncompleteBody(ClientGone):
    """The client ended the connection in the middle of a request body."""


class ChunkedDecoder:
    """The chunked transfer coding, sans I/O.

    Attributes:
        left: octets of the current chunk still to come; they can be read without the decoder,
            when they are subtracted here.
        complete: the last chunk and the trailer section have been consumed.
    """

    __slots__ = ("_after_data", "_trailers", "_trailers_size", "complete", "left")

    def __init__(self) -> None:
        self.left = 0
        self.complete = False
        self._after_data = False  # the CR LF behind a chunk's data comes next
        self._trailers = False
        self._trailers_size = 0

    def feed(self, data: bytes) -> tuple[bytes, int]:
        """Decodes what it can.

        Returns:
            The decoded octets, and how many of ``data`` were used up. The rest is an incomplete
            line, to be given again with more behind it, or what follows the body.

        Raises:
            HttpError: 400, the coding is broken.
        """
        parts = []
        position = 0
        while not self.complete:
            if self.left:
                part = data[position : position + self.left]
                if not part:
                    break
                parts.append(part)
                position += len(part)
                self.took(len(part))
                continue
            end = self._line_end(data, position)
            if end < 0:
                break
            self._line(data[position:end])
            position = end + 2
        return b"".join(parts), position

    def took(self, n: int) -> None:
        """Counts ``n`` octets of the current chunk's data as read."""
        self.left -= n
        self._after_data = not self.left

    def _line_end(self, data: bytes, position: int) -> int:
        end = data.find(b"\n", position, position + _MAX_LINE + 2)
        if end < 0:
            if len(data) - position > _MAX_LINE:
                raise HttpError(400, f"a line of the chunked coding is over {_MAX_LINE} octets")
            return -1
        if end == position or data[end - 1] != 13:
            raise HttpError(400, "lines of the chunked coding must end with CR LF")
        return end - 1

    def _line(self, line: bytes) -> None:
        if self._after_data:
            if line:
                raise HttpError(400, "a chunk is longer than its size says")
            self._after_data = False
        elif self._trailers:
            self._trailer(line)
        else:
            size = _SIZE.fullmatch(line)
            if size is None:
                raise HttpError(400, "a chunk's size is not a hexadecimal number")
            self.left = int(size[1], 16)
            self._trailers = not self.left

    def _trailer(self, line: bytes) -> None:
        """Trailer fields are checked and dropped: nothing here has a use for them."""
        self._trailers_size += len(line)
        if self._trailers_size > _MAX_TRAILERS:
            raise HttpError(400, f"the trailer section is over {_MAX_TRAILERS} octets")
        if line and not _TRAILER.fullmatch(line):
            raise HttpError(400, "a malformed trailer field")
        self.complete = not line


class RequestBody:
    """One request's body.

    Attributes:
        length: octets when declared, ``None`` for a chunked body.
        received: octets read so far, decoded.
        complete: nothing of the body is left in the stream.
        limit: octets over which reading raises 413; set it before reading. The length declared
            is for the app to compare, before it asks for the body.
        timeout: seconds that the client may stand still.
    """

    __slots__ = ("_chunked", "_expected", "_stream", "complete", "length", "limit", "received",
                 "timeout")  # fmt: skip

    def __init__(self, stream: Stream, head: RequestHead, timeout: float = 60.0) -> None:
        self._stream = stream
        self._chunked = ChunkedDecoder() if head.chunked else None
        self._expected = head.expect_continue
        self.length = None if head.chunked else head.content_length or 0
        self.received = 0
        self.complete = self.length == 0
        self.limit: int | None = None
        self.timeout = timeout

    @property
    def awaited(self) -> bool:
        """The client still waits for ``100 Continue`` and may never send the body."""
        return self._expected

    @property
    def drainable(self) -> bool:
        """What is left is small and sure to come, so the connection is worth keeping."""
        if self.complete:
            return True
        left = DRAIN_LIMIT + 1 if self.length is None else self.length - self.received
        return not self._expected and left <= DRAIN_LIMIT

    def read_now(self, n: int = PEEK_LIMIT) -> bytes:
        """Up to ``n`` octets that are here already; empty at the body's end.

        Raises:
            BlockingIOError: nothing is here; use :meth:`read`.
            IncompleteBody: the connection ended before the body did.
            ClientGone: the connection is lost.
            HttpError: 400 for a broken chunked coding, 413 over :attr:`limit`.
        """
        if self.complete:
            return b""
        try:
            data = self._take(n) if self._chunked is None else self._take_chunked(n, self._chunked)
        except BlockingIOError:
            raise
        except OSError as error:
            raise ClientGone(f"the connection broke in the request body: {error}") from None
        self._expected = False
        self.received += len(data)
        if self._chunked is None:
            self.complete = self.received == self.length
        else:
            self.complete = self._chunked.complete
        if self.limit is not None and self.received > self.limit:
            raise HttpError(413, f"the body is over {self.limit} octets")
        if self.complete and self.received >= _NARROW_FROM:
            self._stream.narrow()
        return data

    def _take(self, n: int) -> bytes:
        length = self.length or 0
        if not self.received:
            self._stream.expect(length)
        data = self._stream.receive(min(n, length - self.received))
        if not data:
            raise IncompleteBody(
                f"the connection ended after {self.received} of {self.length} octets of the body"
            )
        return data

    def _take_chunked(self, n: int, decoder: ChunkedDecoder) -> bytes:
        """Decodes from a peek; reads straight when more than one peek's worth of a chunk is due."""
        stream = self._stream
        while True:
            if decoder.left >= n:
                data = stream.receive(n)
                decoder.took(len(data))
                if not data:
                    raise IncompleteBody("the connection ended inside a chunk")
                return data
            raw = stream.peek(min(n, PEEK_LIMIT))
            if not raw:
                raise IncompleteBody("the connection ended before the last chunk")
            data, used = decoder.feed(raw)
            if used:
                stream.consume(used)
                stream.reset_lowat()
            if data or decoder.complete:
                return data
            if used < len(raw):
                if stream.eof:
                    raise IncompleteBody("the connection ended inside the chunked coding")
                n = max(n, 2 * _MAX_LINE)
                if used == 0 and len(raw) < n:
                    stream.await_more(len(raw))
                    raise BlockingIOError

    async def read(self, n: int = PEEK_LIMIT) -> bytes:
        """Up to ``n`` octets; empty at the body's end. Asks for the body when the client waits.

        Raises:
            IncompleteBody: the connection ended before the body did.
            ClientGone: the connection is lost.
            HttpError: 400 and 413 as in :meth:`read_now`; 408 when the client stood still.
        """
        while True:
            try:
                return self.read_now(n)
            except BlockingIOError:
                pass
            if self._expected:
                await self._send_continue()
            try:
                await self._stream.readable(self.timeout)
            except TimeoutError:
                raise HttpError(408, f"no request body for {self.timeout:g} seconds") from None
            except OSError as error:
                raise ClientGone(f"the connection broke in the request body: {error}") from None

    async def _send_continue(self) -> None:
        rest = memoryview(_CONTINUE)
        while rest:
            try:
                rest = rest[self._stream.send(rest) :]
            except BlockingIOError:
                try:
                    await self._stream.writable(self.timeout)
                except OSError as error:
                    raise ClientGone(f"the client reads nothing: {error}") from None
            except OSError as error:
                raise ClientGone(f"the connection broke: {error}") from None
        self._expected = False

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._pieces()

    async def _pieces(self) -> AsyncIterator[bytes]:
        while piece := await self.read():
            yield piece

    async def drain(self, limit: int = DRAIN_LIMIT) -> bool:
        """Reads and drops the rest, so that the next request is at the stream's beginning.

        Args:
            limit: octets to drop at most.

        Returns:
            Whether the body's end was reached; if not, the connection has to be closed.
        """
        if self._expected:
            return self.complete
        try:
            while not self.complete and limit > 0:
                limit -= len(await self.read())
        except (ClientGone, HttpError):
            return False
        return self.complete
