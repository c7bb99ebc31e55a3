"""What responses are made of and how they are sent: status lines, dates, errors, back-pressure."""

from __future__ import annotations

import http
import json
import time
from email.utils import formatdate
from typing import Final

from prism.http.body import ClientGone
from prism.http.head import HttpError
from prism.http.stream import Stream

__all__ = [
    "STALL_TIMEOUT",
    "STATUS_LINES",
    "date_line",
    "error_message",
    "error_response",
    "send_all",
    "status_line",
    "wait_writable",
]

STALL_TIMEOUT: Final = 60.0
"""Seconds that a client may read nothing."""

STATUS_LINES: Final = {
    status.value: b"HTTP/1.1 %d %s\r\n" % (status.value, status.phrase.encode())
    for status in http.HTTPStatus
}
"""By status, with their line ends."""


class _Date:
    """The Date field's line (RFC 9110, section 6.6.1), made once a second."""

    __slots__ = ("line", "second")

    def __init__(self) -> None:
        self.second = 0
        self.line = b""

    def get(self) -> bytes:
        now = int(time.time())
        if now != self.second:
            self.second = now
            self.line = b"Date: %s\r\n" % formatdate(now, usegmt=True).encode()
        return self.line


date_line: Final = _Date().get


async def send_all(
    stream: Stream, data: bytes | memoryview, seconds: float, more: bool = False
) -> None:
    """Sends everything, waiting while the client does not read.

    Raises:
        ClientGone: the client is lost, or read nothing for ``seconds``.
    """
    view = memoryview(data)
    while True:
        try:
            view = view[stream.send(view, more) :]
        except BlockingIOError:
            pass
        except OSError as error:
            raise ClientGone(f"the connection broke in the response: {error}") from None
        if not view:
            return
        await wait_writable(stream, seconds)


async def wait_writable(stream: Stream, seconds: float) -> None:
    """Waits until something can be sent, as long as the client reads at all.

    A slow client with a large send buffer may not be writable for minutes while it reads on; only
    one whose unacknowledged octets do not shrink either is given up.

    Raises:
        ClientGone: the client is lost, or read nothing for ``seconds``.
    """
    unsent = stream.unsent()
    while True:
        try:
            await stream.writable(seconds)
        except TimeoutError:
            left = stream.unsent()
            if left >= unsent:
                raise ClientGone(f"the client read nothing for {seconds:g} seconds") from None
            unsent = left
        except OSError as error:
            raise ClientGone(f"the connection broke in the response: {error}") from None
        else:
            return


def status_line(status: int) -> bytes:
    """The status line with its line end (RFC 9112, section 4)."""
    return STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status


def error_message(error: HttpError) -> bytes:
    """The JSON document of an error response: ``status``, ``error`` (its phrase), ``detail``."""
    phrase = status_line(error.status)[13:-2].decode()
    document = {"status": error.status, "error": phrase, "detail": error.detail}
    return json.dumps(document).encode() + b"\n"


async def error_response(
    stream: Stream, error: HttpError, server: bytes = b"", seconds: float = STALL_TIMEOUT
) -> None:
    """Answers bytes that are no request head; the connection must be closed afterwards.

    Use :func:`prism.http.stream.linger_close` for that: the client may still be sending.

    Raises:
        ClientGone: the client is lost, or read nothing for ``seconds``.
    """
    body = error_message(error)
    fields = b"".join(b"%s: %s\r\n" % field for field in error.headers)
    if server:
        fields += b"Server: %s\r\n" % server
    head = (
        b"%sContent-Type: application/json\r\nContent-Length: %d\r\n%sConnection: close\r\n%s\r\n"
    )
    data = head % (status_line(error.status), len(body), date_line(), fields)
    await send_all(stream, data + body, seconds)
