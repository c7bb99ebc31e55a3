"""Connections to an upstream HTTP/1.1 server, and the responses read from them.

Response heads go through llhttp (httptools), then framing is decided here, because only here it
is known what was asked: a response to HEAD has no body (RFC 9112, section 6.3).
"""

from __future__ import annotations

from typing import Final, NamedTuple

import httptools

from prism._ext.http_scan import quiet
from prism.errors import PrismError
from prism.flow import Endpoint
from prism.http.body import ChunkedDecoder
from prism.http.head import HttpError
from prism.http.stream import PlainStream

__all__ = [
    "HOP_BY_HOP",
    "Address",
    "NotSent",
    "ResponseHead",
    "Upstream",
    "UpstreamError",
    "UpstreamFailed",
    "connection_options",
]

Address = Endpoint | str
"""Where an upstream listens: a TCP endpoint, or the path of a unix socket."""

HOP_BY_HOP: Final = frozenset(
    b"connection keep-alive proxy-connection proxy-authenticate proxy-authorization te trailer"
    b" transfer-encoding upgrade".split()
)
"""Fields that speak of one connection only (RFC 9110, section 7.6.1), names in lower case."""

_MAX_HEAD = 64 * 1024
_PIECE = 256 * 1024  # octets read at once


class UpstreamError(PrismError):
    """The upstream server broke off, or what it sends is not HTTP.

    Attributes:
        silent: it sent nothing of a response, so that it may not have seen the request either.
    """

    def __init__(self, detail: str, *, silent: bool = False) -> None:
        super().__init__(detail)
        self.silent = silent


class UpstreamFailed(HttpError):
    """The upstream server did not answer: 502, 503 or 504 for the client."""


class NotSent(UpstreamFailed):
    """There is no connection upstream; nothing of the request was sent."""


class ResponseHead(NamedTuple):
    """A response's head."""

    status: int
    headers: list[tuple[bytes, bytes]]  # as sent, without hop-by-hop fields and Content-Length
    length: int | None  # of the body; None when chunked or ended by closing, or not declared
    chunked: bool
    keep_alive: bool  # the connection can be used again after the body
    upgrade: bytes  # the protocol switched to, in a 101 response


class _Fields:
    __slots__ = ("fields",)

    def __init__(self) -> None:
        self.fields: list[tuple[bytes, bytes]] = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name, value.strip(b" \t")))


def connection_options(values: list[bytes]) -> set[bytes]:
    """The members of Connection fields, in lower case."""
    return {option.strip(b" \t").lower() for value in values for option in value.split(b",")}


def parse_response_head(block: bytes) -> ResponseHead:
    """Reads a response head that is complete with its blank line.

    Raises:
        UpstreamError: it is malformed, or its framing is ambiguous.
    """
    collector = _Fields()
    parser = httptools.HttpResponseParser(collector)
    try:
        parser.feed_data(block)
    except httptools.HttpParserUpgrade:
        pass  # the head is read; what follows it is no matter of this parser
    except httptools.HttpParserError as error:
        raise UpstreamError(f"the upstream's response is not HTTP: {error}") from None
    length: int | None = None
    codings: list[bytes] = []
    connection: list[bytes] = []
    headers = []
    upgrade = b""
    for name, value in collector.fields:
        lower = name.lower()
        if lower == b"content-length":
            if not value.isdigit() or length not in (None, int(value)):
                raise UpstreamError("the upstream's Content-Length is not one number")
            length = int(value)
        elif lower == b"transfer-encoding":
            codings.append(value.lower())
        elif lower == b"connection":
            connection.append(value)
        elif lower == b"upgrade":
            upgrade = value
        elif lower not in HOP_BY_HOP:
            headers.append((name, value))
    if codings and (codings != [b"chunked"] or length is not None):
        raise UpstreamError("the upstream's transfer coding is not understood")
    options = connection_options(connection)
    if options - {b"close", b"keep-alive"}:
        headers = [field for field in headers if field[0].lower() not in options]
    old = parser.get_http_version() != "1.1"
    keep = b"keep-alive" in options if old else b"close" not in options
    status = parser.get_status_code()
    return ResponseHead(status, headers, length, bool(codings), keep, upgrade)


class Upstream:
    """One connection to an upstream server, for one request at a time.

    Attributes:
        reused: it has served a request before, so that the server may have closed it meanwhile.
        reusable: set when a response was read whole and the connection may be used again.
        sent: something of the current request was sent.
    """

    __slots__ = ("_buffer", "_decoder", "_left", "_silent", "reusable", "reused", "sent", "stream")

    def __init__(self, stream: PlainStream) -> None:
        self.stream = stream
        self.reused = False
        self.reusable = False
        self.sent = False
        self._buffer = b""
        self._decoder: ChunkedDecoder | None = None
        self._left: int | None = 0
        self._silent = True

    def begin(self) -> None:
        """Makes ready for a request."""
        self.reusable = self.sent = False
        self._silent = True
        self._buffer = b""

    @property
    def drained(self) -> bool:
        """Nothing was received behind the last response so far."""
        return not self._buffer

    def is_quiet(self) -> bool:
        """Nothing is in the socket: no end of file, no stray octets behind the last response."""
        return quiet(self.stream.fileno())

    def give_back(self, data: bytes) -> None:
        """Puts octets that were received elsewhere before what is read next."""
        self._buffer = data
        self._silent = False

    def expect(self, left: int) -> None:
        """Goes on with a response of whose body ``left`` octets are still to come."""
        self._silent = False
        self._left = left
        self._decoder = None

    async def send(self, data: bytes, seconds: float) -> None:
        """Sends all of ``data``.

        Raises:
            UpstreamError: the connection is lost, or the server read nothing for ``seconds``.
        """
        view = memoryview(data)
        while True:
            try:
                view = view[self.stream.send(view) :]
                self.sent = True
                if not view:
                    return
            except BlockingIOError:
                pass
            except OSError as error:
                raise UpstreamError(f"sending upstream failed: {error}", silent=True) from None
            try:
                await self.stream.writable(seconds)
            except OSError as error:
                raise UpstreamError(f"sending upstream failed: {error}", silent=True) from None

    async def read_head(self, seconds: float) -> ResponseHead:
        """Reads the next response head, also an interim one.

        Raises:
            TimeoutError: nothing came for ``seconds``; calling again goes on waiting.
            UpstreamError: the connection is lost, or this is not HTTP.
        """
        buffer = self._buffer
        while True:
            end = buffer.find(b"\r\n\r\n")
            if end >= 0:
                self._buffer = buffer[end + 4 :]
                return parse_response_head(buffer[: end + 4])
            if len(buffer) > _MAX_HEAD:
                raise UpstreamError(f"the upstream's response head is over {_MAX_HEAD} octets")
            if self._silent:
                await self._readable(seconds)  # it takes its time; no use in trying first
            data = await self._receive(seconds)
            if not data:
                raise UpstreamError(
                    "the upstream closed the connection without a response", silent=self._silent
                )
            self._silent = False
            buffer = self._buffer = buffer + data

    async def _receive(self, seconds: float) -> bytes:
        while True:
            try:
                return self.stream.receive(_PIECE)
            except BlockingIOError:
                pass
            except OSError as error:
                raise UpstreamError(
                    f"the upstream's connection broke: {error}", silent=self._silent
                ) from None
            await self._readable(seconds)

    async def _readable(self, seconds: float) -> None:
        try:
            await self.stream.readable(seconds)
        except TimeoutError:
            raise
        except OSError as error:
            raise UpstreamError(f"the upstream's connection broke: {error}") from None

    def take_rest(self) -> bytes:
        """What was received behind the head: of the protocol that was switched to."""
        rest, self._buffer = self._buffer, b""
        return rest

    @property
    def left(self) -> int:
        """Octets of the body that are still in the socket, where its length was declared."""
        if self._decoder is not None or self._left is None or self._buffer:
            return 0
        return self._left

    def passed(self, n: int) -> None:
        """Count octets of the body that went past this object."""
        if self._left is not None:
            self._left -= n

    def begin_body(self, head: ResponseHead, *, bodiless: bool) -> None:
        """Sets the framing of the body that follows ``head``."""
        self._decoder = ChunkedDecoder() if head.chunked and not bodiless else None
        self._left = 0 if bodiless else head.length

    async def read_body(self, seconds: float) -> bytes:
        """A piece of the body; empty at its end.

        Raises:
            TimeoutError: nothing came for ``seconds``.
            UpstreamError: the body is cut off or its coding is broken.
        """
        if self._decoder is not None:
            return await self._read_chunked(self._decoder, seconds)
        if self._left == 0:
            return b""
        data, self._buffer = self._buffer, b""
        if not data:
            data = await self._receive(seconds)
        if self._left is None:
            return data  # ended by closing
        if not data:
            raise UpstreamError(f"the upstream's body ends {self._left} octets early")
        if len(data) > self._left:
            data, self._buffer = data[: self._left], data[self._left :]
        self._left -= len(data)
        return data

    async def _read_chunked(self, decoder: ChunkedDecoder, seconds: float) -> bytes:
        while not decoder.complete:
            try:
                data, used = decoder.feed(self._buffer)
            except HttpError as error:
                raise UpstreamError(f"the upstream's body: {error.detail}") from None
            self._buffer = self._buffer[used:]
            if data:
                return data
            if decoder.complete:
                break
            more = await self._receive(seconds)
            if not more:
                raise UpstreamError("the upstream's body ends before its last chunk")
            self._buffer += more
        return b""
