"""The head of an HTTP/1 request, read from bytes that were only peeked at. No I/O.

:func:`parse_head` is strict where leniency lets two parsers disagree about where a message ends
(RFC 9112, section 11.2), because the head is read here by the frontend and read again by the
backend, or by an upstream server, after the connection was handed over. Anything ambiguous is
refused; nothing is repaired.

A request's *key* is what placement, policies and the object store agree on:

1. the path is the target up to ``?``; an absolute target (RFC 9112, section 3.2.2) counts from
   the first slash after the authority;
2. percent-encoded octets are decoded once; a ``%`` without two hexadecimal digits, and an encoded
   NUL, are refused (400);
3. then, so that an encoded slash or dot cannot hide anything: runs of ``/`` become one, segments
   ``.`` vanish, segments ``..`` remove the one before; climbing above the root is refused (400);
4. the leading slash is dropped. ``/`` has the empty key. A trailing slash stays.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple
from urllib.parse import unquote_to_bytes

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

from prism._ext.http_scan import scan_request
from prism.http.refusal import TOKEN, HttpError, explain_fields, explain_request_line

__all__ = [
    "METHODS",
    "HttpError",
    "Limits",
    "RequestHead",
    "normalise_path",
    "parse_any_head",
    "parse_head",
]

METHODS: Final = frozenset(
    b"GET HEAD PUT POST DELETE OPTIONS PATCH "
    b"PROPFIND PROPPATCH MKCOL COPY MOVE LOCK UNLOCK SEARCH REPORT".split()
)
"""Methods that are accepted; others are answered 501 (RFC 9110, section 9.1)."""

_REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([!-~]+) HTTP/([0-9])\.([0-9])\r\n")
# The look-behind keeps a search over hostile input linear: a field can only begin after a line's
# end. Whatever the search skips is missed in the sum of lengths, and then looked at closely.
_FIELD = re.compile(rb"(?<=\n)(" + TOKEN + rb"):([\t -~\x80-\xff]*)\r\n")
_LINE_STARTS = re.compile(rb"(?:" + TOKEN + rb"(?: [!-~]*(?: [HTTP/0-9.]*)?)?)?\Z")
_HOST = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z\-._~!$&'()*+,;=%]+)(?::[0-9]*)?\Z")
_ABSOLUTE = re.compile(rb"(?i:https?)://([^/?]*)(.*)\Z")
_BAD_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})|%00")
_SPECIAL = frozenset(
    (b"host", b"content-length", b"transfer-encoding", b"connection", b"expect", b"upgrade")
)
_MAX_LENGTH = (1 << 63) - 1


class Limits(NamedTuple):
    """Bounds on a request head; octets unless said otherwise."""

    max_head: int = 32 * 1024
    max_headers: int = 100  # fields
    max_target: int = 8 * 1024


DEFAULT_LIMITS: Final = Limits()


class RequestHead:
    """A complete, valid request head.

    Attributes:
        method: as sent, for example ``b"GET"``.
        target: the request target as sent.
        path: the raw path: the target's part up to ``?``.
        query: the raw query without its ``?``; empty when there is none.
        key: the decoded, normalised path without its leading slash (see the module's text).
        version: ``10`` or ``11``.
        host: the authority asked for, from the target or the ``Host`` field; empty in an HTTP/1.0
            request without one.
        headers: the fields in order, names in lower case, values without surrounding blanks.
        length: octets of the head, with empty lines before it and the blank line after it.
        content_length: the body's length in octets when declared.
        chunked: the body is in the chunked transfer coding.
        keep_alive: the client wants the connection kept open.
        expect_continue: the client waits for ``100 Continue`` before it sends the body.
        upgrade: the protocol the client would switch to, when it asks for that.
    """

    __slots__ = (
        "chunked",
        "content_length",
        "expect_continue",
        "headers",
        "host",
        "keep_alive",
        "key",
        "length",
        "method",
        "path",
        "query",
        "target",
        "upgrade",
        "version",
    )

    method: bytes
    target: bytes
    path: bytes
    query: bytes
    key: bytes
    version: int
    host: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    length: int
    content_length: int | None
    chunked: bool
    keep_alive: bool
    expect_continue: bool
    upgrade: bytes | None

    def get(self, name: bytes) -> bytes | None:
        """The value of the first field ``name`` (lower case), or ``None``."""
        for field, value in self.headers:
            if field == name:
                return value
        return None

    def get_all(self, name: bytes) -> bytes | None:
        """The values of all fields ``name`` (lower case) joined by commas, or ``None``."""
        values = [value for field, value in self.headers if field == name]
        return b", ".join(values) if values else None

    @property
    def has_body(self) -> bool:
        """Octets of a body follow the head."""
        return self.chunked or bool(self.content_length)

    def __repr__(self) -> str:
        return f"<RequestHead {self.method.decode()} {self.target.decode()}>"


def parse_head(data: bytes, limits: Limits = DEFAULT_LIMITS) -> RequestHead | None:
    """Reads the request head at the beginning of ``data``.

    Empty lines before the request line are tolerated (RFC 9112, section 2.2). What follows the
    head is not looked at.

    Args:
        data: everything peeked so far.
        limits: bounds; a head over them is refused as soon as that is known.

    Returns:
        The head, or ``None`` when ``data`` ends before it does and is fine so far.

    Raises:
        HttpError: the head is, or has begun, in a way that no more bytes can mend. The connection
            cannot be used further: where the next request begins is not known.
    """
    head = RequestHead()
    found = scan_request(data, head, limits)
    if not found:
        return parse_any_head(data, limits)
    if found == 2:
        head.key = normalise_path(head.path)
    return head


def parse_any_head(data: bytes, limits: Limits = DEFAULT_LIMITS) -> RequestHead | None:
    """:func:`parse_head` for every kind of head: the scanner knows the usual ones only."""
    start = 0
    while data.startswith(b"\r\n", start):
        start += 2
    end = data.find(b"\r\n\r\n", start, limits.max_head)
    if end < 0:
        _check_incomplete(data, start, limits)
        return None
    line = _REQUEST_LINE.match(data, start, end + 2)
    if line is None:
        raise explain_request_line(data[start : data.index(b"\r\n", start)], limits.max_target)
    return _build(data, line, end + 2, limits)


def _build(data: bytes, line: re.Match[bytes], end: int, limits: Limits) -> RequestHead:
    """Makes a head from its request line and the fields between that and ``end``."""
    head = RequestHead()
    method, target, major, minor = line.groups()
    _check_request_line(method, target, major, minor, limits)
    head.method = method
    head.version = 11 if minor == b"1" else 10
    head.target = target
    head.length = end + 2
    _check_count(data, line.end(), end, limits)
    fields = _Fields()
    try:
        HttpRequestParser(fields).feed_data(data[line.start() : head.length])
    except HttpParserUpgrade:
        pass  # that is decided later, and elsewhere
    except HttpParserError as error:
        _explain_framing(head, fields.special, data[line.end() : end])
        raise HttpError(400, f"the request head is malformed: {error}") from None
    head.headers = tuple(fields.all)
    special = fields.special
    _set_host(head, special.get(b"host"))
    _set_framing(head, special)
    _set_connection(head, special)
    _set_target(head)
    return head


class _Fields:
    """Collects the header fields that ``httptools`` finds."""

    __slots__ = ("all", "special")

    def __init__(self) -> None:
        self.all: list[tuple[bytes, bytes]] = []
        self.special: dict[bytes, list[bytes]] = {}

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        value = value.strip(b" \t")
        self.all.append((name, value))
        if name in _SPECIAL:
            self.special.setdefault(name, []).append(value)


def _explain_framing(head: RequestHead, special: dict[bytes, list[bytes]], block: bytes) -> None:
    """Says better than the parser can what is wrong with fields it has refused.

    Raises:
        HttpError: 400, or 501 for a transfer coding that is not understood.
    """
    size = sum(len(name) + len(value) + 3 for name, value in _FIELD.findall(b"\n" + block))
    if size != len(block):
        raise explain_fields(block)
    # The lines are well-formed, so it is the framing. The parser stops at the field it refuses.
    for key in (b"content-length", b"transfer-encoding"):
        values = [v.strip(b" \t") for n, v in _FIELD.findall(b"\n" + block) if n.lower() == key]
        if values:
            special[key] = values
    _set_framing(head, special)


def _check_request_line(
    method: bytes, target: bytes, major: bytes, minor: bytes, limits: Limits
) -> None:
    if major != b"1" or minor > b"1":
        version = f"{major.decode()}.{minor.decode()}"
        raise HttpError(505, f"HTTP/{version} is not supported, only 1.0 and 1.1 are")
    if method not in METHODS:
        raise HttpError(501, f"the method {method[:32].decode()} is not supported")
    if len(target) > limits.max_target:
        raise HttpError(414, f"the request target is over {limits.max_target} octets")


def _check_count(data: bytes, begin: int, end: int, limits: Limits) -> None:
    if data.count(b"\n", begin, end) > limits.max_headers:
        raise HttpError(431, f"more than {limits.max_headers} header fields")


def _set_host(head: RequestHead, values: list[bytes] | None) -> None:
    """RFC 9112, section 3.2: exactly one valid Host field in HTTP/1.1."""
    head.host = b""
    if values is None:
        if head.version == 11:
            raise HttpError(400, "an HTTP/1.1 request needs a Host field")
    elif len(values) > 1:
        raise HttpError(400, "more than one Host field")
    elif not _HOST.match(values[0]):
        raise HttpError(400, "the Host field is not a host and optional port")
    else:
        head.host = values[0]


def _set_framing(head: RequestHead, special: dict[bytes, list[bytes]]) -> None:
    """Where the body ends (RFC 9112, section 6), and whether the client waits to send it."""
    head.content_length = None
    head.chunked = head.expect_continue = False
    lengths = special.get(b"content-length")
    if lengths is not None:
        if len(lengths) > 1:
            raise HttpError(400, "more than one Content-Length field")
        head.content_length = _content_length(lengths[0])
    codings = special.get(b"transfer-encoding")
    if codings is not None:
        _check_codings(head, _split(codings))
        head.chunked = True
    expectations = special.get(b"expect")
    if expectations is not None:
        if [value.lower() for value in expectations] != [b"100-continue"]:
            raise HttpError(417, "the only expectation understood is 100-continue")
        head.expect_continue = head.version == 11 and head.has_body


def _set_connection(head: RequestHead, special: dict[bytes, list[bytes]]) -> None:
    """What becomes of the connection afterwards (RFC 9112, section 9.3)."""
    head.keep_alive = head.version == 11
    head.upgrade = None
    options = special.get(b"connection")
    if options is not None:
        tokens = _split(options)
        if b"close" in tokens:
            head.keep_alive = False
        elif b"keep-alive" in tokens:
            head.keep_alive = True
        if b"upgrade" in tokens and b"upgrade" in special:
            head.upgrade = special[b"upgrade"][0]


def _split(values: list[bytes]) -> list[bytes]:
    """The members of a comma-separated list field, in lower case."""
    return [member.strip(b" \t").lower() for value in values for member in value.split(b",")]


def _content_length(value: bytes) -> int:
    """The value of a Content-Length field (RFC 9110, section 8.6)."""
    # bytes.isdigit() knows only the ten ASCII digits; int() alone would take "+5" and "1_0".
    if not value.isdigit() or len(value) > 19 or int(value) > _MAX_LENGTH:
        raise HttpError(400, "Content-Length is not a plain decimal number")
    return int(value)


def _check_codings(head: RequestHead, codings: list[bytes]) -> None:
    """Transfer codings, RFC 9112, section 6.1: chunked, once, alone, in HTTP/1.1."""
    if head.version == 10:
        raise HttpError(400, "Transfer-Encoding in an HTTP/1.0 request")
    if head.content_length is not None:
        raise HttpError(400, "both Content-Length and Transfer-Encoding")
    if codings != [b"chunked"]:
        if b"" in codings or codings.count(b"chunked") > 1 or b"chunked" in codings[:-1]:
            raise HttpError(400, "chunked must be the last transfer coding, and only once")
        raise HttpError(501, "the only transfer coding understood is chunked")


def _set_target(head: RequestHead) -> None:
    """Splits the target into path and query, and makes the key."""
    target = head.target
    if b"#" in target or b"\\" in target:
        raise HttpError(400, "the request target has a character that must be percent-encoded")
    if not target.startswith(b"/"):
        absolute = _ABSOLUTE.match(target)
        if absolute is not None:
            if not _HOST.match(absolute[1]):
                raise HttpError(400, "the request target's authority is not a host")
            head.host = absolute[1]
            target = absolute[2]
            if not target.startswith(b"/"):
                target = b"/" + target
        elif target != b"*" or head.method != b"OPTIONS":
            raise HttpError(400, "the request target is neither a path nor an http URI")
    head.path, _, head.query = target.partition(b"?")
    head.key = b"*" if target == b"*" else normalise_path(head.path)


def normalise_path(path: bytes) -> bytes:
    """The key of a raw path; the rules are in the module's text.

    Raises:
        HttpError: 400, for broken or forbidden escapes and for climbing above the root.
    """
    if b"%" in path:
        if _BAD_ESCAPE.search(path):
            raise HttpError(400, "the path has a broken percent-escape or a NUL")
        path = unquote_to_bytes(path)
    if b"//" not in path and b"/." not in path:
        return path[1:]
    kept: list[bytes] = []
    segments = path.split(b"/")
    for segment in segments:
        if segment == b"..":
            if not kept:
                raise HttpError(400, "the path climbs above the root")
            kept.pop()
        elif segment not in (b"", b"."):
            kept.append(segment)
    key = b"/".join(kept)
    # "a/", "a/." and "a/b/.." all name the directory, so all keep the trailing slash.
    return key + b"/" if key and segments[-1] in (b"", b".", b"..") else key


def _check_incomplete(data: bytes, start: int, limits: Limits) -> None:
    """Refuses the beginning of a head that cannot become a good one."""
    last = data.rfind(b"\r\n", start)
    if last < start:
        _check_partial_line(data[start:], limits)
    else:
        line = _REQUEST_LINE.match(data, start, last + 2)
        if line is None:
            raise explain_request_line(data[start : data.index(b"\r\n", start)], limits.max_target)
        method, target, major, minor = line.groups()
        _check_request_line(method, target, major, minor, limits)
        if len(data) < limits.max_head:
            _check_fields(data, line.end(), last + 2, limits)
    if len(data) >= limits.max_head:
        raise HttpError(431, f"the request head is over {limits.max_head} octets")


def _check_fields(data: bytes, begin: int, end: int, limits: Limits) -> None:
    """Checks the complete field lines, and what has come of the next one."""
    _check_count(data, begin, end, limits)
    size = sum(len(name) + len(value) + 3 for name, value in _FIELD.findall(data, begin, end))
    if begin + size != end:
        raise explain_fields(data[begin:end])
    rest = data[end:].removesuffix(b"\r")
    if rest and not _FIELD.match(b"\n" + rest + (b"\r\n" if b":" in rest else b":\r\n"), 1):
        raise explain_fields(rest)


def _check_partial_line(line: bytes, limits: Limits) -> None:
    """Checks a request line whose end has not come yet."""
    if len(line) > limits.max_target + 64:
        if b" " not in line[:64]:
            raise HttpError(400, "the request does not begin with a method")
        raise HttpError(414, f"the request target is over {limits.max_target} octets")
    if not _LINE_STARTS.match(line.removesuffix(b"\r")):
        raise explain_request_line(line, limits.max_target)
