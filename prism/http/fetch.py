"""A small request from one node to another, its whole response kept in memory."""

from __future__ import annotations

import asyncio

import httptools

from prism.errors import PrismError
from prism.flow import Endpoint

__all__ = ["FetchError", "fetch"]

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


async def fetch(endpoint: Endpoint, target: bytes, seconds: float) -> tuple[int, bytes]:
    """GET ``target`` from an HTTP/1.1 server; returns status and body.

    Raises:
        FetchError: the server cannot be reached, or sends no whole response in ``seconds``.
    """
    try:
        async with asyncio.timeout(seconds):
            return await _fetch(endpoint, target)
    except (OSError, httptools.HttpParserError) as error:
        raise FetchError(f"{endpoint}: {error or type(error).__name__}") from None


async def _fetch(endpoint: Endpoint, target: bytes) -> tuple[int, bytes]:
    reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
    response = _Response()
    parser = httptools.HttpResponseParser(response)
    try:
        host = str(endpoint).encode()
        writer.write(b"GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n" % (target, host))
        while not response.complete:
            data = await reader.read(65536)
            if not data:
                raise FetchError(f"{endpoint}: the response was cut off")
            parser.feed_data(data)
        return parser.get_status_code(), bytes(response.body)
    finally:
        writer.close()
