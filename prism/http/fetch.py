"""A small request from one node to another, its whole response kept in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable

import httptools

from prism.errors import PrismError
from prism.flow import Endpoint

__all__ = ["FetchError", "ask", "fetch"]

MAX_RESPONSE = 8 << 20  # octets


class FetchError(PrismError):
    """No whole response came."""


class _Response:
    """Collects what ``httptools`` finds."""

    def __init__(self) -> None:
        self.body = bytearray()
        self.complete = False

    def on_body(self, data: bytes) -> None:
        self.body += data
        if len(self.body) > MAX_RESPONSE:
            raise FetchError(f"a response over {MAX_RESPONSE} octets")

    def on_message_complete(self) -> None:
        self.complete = True


Pieces = AsyncIterable[bytes]


async def _nothing() -> Pieces:
    return
    yield b""


async def fetch(endpoint: Endpoint, target: bytes, seconds: float) -> tuple[int, bytes]:
    """GET ``target`` from an HTTP/1.1 server; returns status and body.

    Raises:
        FetchError: the server cannot be reached, or sends no whole response in ``seconds``.
    """
    host = str(endpoint).encode()
    request = b"GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n" % (target, host)
    return await ask(endpoint, request, _nothing(), seconds)


async def ask(
    endpoint: Endpoint, request: bytes, body: Pieces, seconds: float
) -> tuple[int, bytes]:
    """Send a request of one's own making, and its body behind it; returns status and body.

    Args:
        endpoint: the server's.
        request: the head; the connection ends with the response.
        body: its pieces.
        seconds: for each piece, and for all of the response.

    Raises:
        FetchError: as of :func:`fetch`.
    """
    try:
        async with asyncio.timeout(seconds):
            reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
        try:
            writer.write(request)
            async for piece in body:
                writer.write(piece)
                async with asyncio.timeout(seconds):
                    await writer.drain()
            async with asyncio.timeout(seconds):
                return await _response(endpoint, reader)
        finally:
            writer.close()
    except (OSError, httptools.HttpParserError) as error:
        raise FetchError(f"{endpoint}: {error or type(error).__name__}") from None


async def _response(endpoint: Endpoint, reader: asyncio.StreamReader) -> tuple[int, bytes]:
    response = _Response()
    parser = httptools.HttpResponseParser(response)
    while not response.complete:
        data = await reader.read(65536)
        if not data:
            raise FetchError(f"{endpoint}: the response was cut off")
        parser.feed_data(data)
    return parser.get_status_code(), bytes(response.body)
