"""Refused requests: the error that becomes a response, and what exactly is wrong with a head."""

from __future__ import annotations

import re
from typing import Final

from prism.errors import PrismError

__all__ = ["TOKEN", "HttpError", "explain_fields", "explain_request_line"]

TOKEN: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
"""A pattern for methods and field names (RFC 9110, section 5.6.2)."""


class HttpError(PrismError):
    """A request that is answered with an error status.

    Attributes:
        status: the HTTP status code.
        detail: what is wrong, for the client to read.
        headers: further response header fields, for example ``Allow``.
    """

    def __init__(
        self, status: int, detail: str, headers: tuple[tuple[bytes, bytes], ...] = ()
    ) -> None:
        super().__init__(f"{status}: {detail}")
        self.status = status
        self.detail = detail
        self.headers = headers


def explain_request_line(line: bytes, max_target: int) -> HttpError:
    """Says what is wrong with a request line."""
    if len(line) > max_target + 64 and b" " in line[:64]:
        return HttpError(414, f"the request target is over {max_target} octets")
    if b"\n" in line or b"\r" in line:
        return HttpError(400, "lines must end with CR LF")
    parts = line.split(b" ")
    if not re.fullmatch(TOKEN, parts[0]):
        return HttpError(400, "the request does not begin with a method")
    if len(parts) != 3:
        return HttpError(400, "the request line is not method, target, version with single blanks")
    if not re.fullmatch(rb"HTTP/[0-9]\.[0-9]", parts[2]):
        return HttpError(400, "the request line does not end with an HTTP version")
    return HttpError(400, "the request target has a character that must be percent-encoded")


def explain_fields(block: bytes) -> HttpError:
    """Says what is wrong with a block of header field lines."""
    for line in block.split(b"\r\n"):
        if b"\n" in line or b"\r" in line:
            return HttpError(400, "lines must end with CR LF")
        if line.startswith((b" ", b"\t")):
            return HttpError(400, "a folded header field line (RFC 9112, section 5.2)")
        name, colon, value = line.partition(b":")
        if line and not colon:
            return HttpError(400, "a header field line without a colon")
        if line and name.endswith((b" ", b"\t")):
            return HttpError(400, "blanks between a header field's name and its colon")
        if line and not re.fullmatch(TOKEN, name):
            return HttpError(400, "a header field's name is not a token")
        if re.search(rb"[^\t -~\x80-\xff]", value):
            return HttpError(400, "a control character in a header field's value")
    return HttpError(400, "the header fields are malformed")
