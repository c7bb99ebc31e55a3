"""Conditional requests and ranges (RFC 9110, sections 13 and 14). No I/O."""

from __future__ import annotations

import calendar
import re
from email.utils import formatdate, parsedate
from functools import lru_cache

from prism.http.head import RequestHead

__all__ = ["asks_for_less", "conditional", "http_date", "parse_date", "parse_range", "precondition"]

_TAG = re.compile(rb'[ \t]*(W/)?("[!#-~\x80-\xff]*")[ \t]*(?:,|\Z)')
_RANGE = re.compile(rb"bytes=[ \t]*(?:([0-9]{1,19})-([0-9]{0,19})|-([0-9]{1,19}))[ \t]*", re.I)


@lru_cache(maxsize=1024)
def http_date(seconds: int) -> bytes:
    """An IMF-fixdate (RFC 9110, section 5.6.7) of seconds since the epoch."""
    return formatdate(seconds, usegmt=True).encode()


def parse_date(value: bytes | None) -> int | None:
    """Seconds since the epoch; ``None`` for what is not a date, which is to be ignored."""
    if value is None:
        return None
    try:
        parsed = parsedate(value.decode("ascii"))
        return None if parsed is None else calendar.timegm(parsed)
    except (ValueError, OverflowError):
        return None


def _matches(value: bytes, etag: bytes | None, *, weak: bool) -> bool:
    """Whether a list of entity tags, or ``*``, holds the current one (``None``: no object)."""
    if etag is None:
        return False
    if value.strip() == b"*":
        return True
    position = 0
    while match := _TAG.match(value, position):
        if match[2] == etag and (weak or not match[1]):
            return True
        position = match.end()
    return False


def conditional(head: RequestHead) -> bool:
    """Whether a request may have preconditions."""
    return any([name.startswith(b"if-") for name, _ in head.headers])  # noqa: C419 - faster


def asks_for_less(head: RequestHead) -> bool:
    """Whether a request may be answered with less than the whole object."""
    return any([name == b"range" or name[:3] == b"if-" for name, _ in head.headers])  # noqa: C419


def precondition(head: RequestHead, etag: bytes | None, modified: int) -> int:
    """Evaluates a request's preconditions in the order of RFC 9110, section 13.2.2.

    Args:
        head: the request's.
        etag: the current entity tag, strong; ``None`` when there is no object.
        modified: when the object was modified last, seconds since the epoch.

    Returns:
        0 when the request is to be carried out, else the status to answer: 304 or 412.
    """
    if not conditional(head):
        return 0
    safe = head.method in (b"GET", b"HEAD")
    match = head.get_all(b"if-match")
    if match is not None:
        if not _matches(match, etag, weak=False):
            return 412
    elif (since := parse_date(head.get(b"if-unmodified-since"))) is not None and (
        etag is not None and modified > since
    ):
        return 412
    match = head.get_all(b"if-none-match")
    if match is not None:
        if _matches(match, etag, weak=True):
            return 304 if safe else 412
    elif (
        safe
        and (since := parse_date(head.get(b"if-modified-since"))) is not None
        and etag is not None
        and modified <= since
    ):
        return 304
    return 0


def parse_range(head: RequestHead, etag: bytes, modified: int, size: int) -> tuple[int, int] | None:
    """The part of the body that a GET asks for.

    Several ranges in one request are answered with the whole body, as RFC 9110, section 14.2
    allows; so is a range that is malformed, or whose ``If-Range`` does not hold.

    Returns:
        (offset, length) in octets; ``None`` for the whole; a length of 0: not satisfiable (416).
    """
    value = head.get(b"range")
    if value is None or head.method != b"GET":
        return None
    match = _RANGE.fullmatch(value)
    if match is None:
        return None
    condition = head.get(b"if-range")
    if condition is not None and condition != etag and parse_date(condition) != modified:
        return None
    first, last, suffix = match.groups()
    if suffix is not None:
        length = min(int(suffix), size)
        return None if length == 0 < int(suffix) else (size - length, length)
    start = int(first)
    end = min(int(last) + 1, size) if last else size
    if last and int(last) < start:
        return None
    return (start, max(0, end - start))
