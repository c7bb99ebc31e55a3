"""The request head parser: what it takes, what it refuses, and that llhttp agrees."""

from __future__ import annotations

import time

import httptools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism.http.head import HttpError, Limits, RequestHead, normalise_path, parse_head

GOOD = b"GET /a/b%20c?x=1&y=/.. HTTP/1.1\r\nHost: example:80\r\nAccept:\t */* \r\n\r\n"


def ok(data: bytes) -> RequestHead:
    head = parse_head(data)
    assert head is not None
    return head


def request(*lines: str, line: str = "GET / HTTP/1.1", host: str = "Host: h\r\n") -> bytes:
    return (line + "\r\n" + host + "".join(f"{x}\r\n" for x in lines) + "\r\n").encode("latin-1")


def test_reads_a_head() -> None:
    head = ok(GOOD + b"body")
    assert (head.method, head.version, head.host) == (b"GET", 11, b"example:80")
    assert (head.path, head.query, head.key) == (b"/a/b%20c", b"x=1&y=/..", b"a/b c")
    assert head.headers == ((b"host", b"example:80"), (b"accept", b"*/*"))
    assert head.length == len(GOOD)
    assert head.get(b"accept") == b"*/*"
    assert head.get(b"none") is None
    assert head.keep_alive
    assert not head.has_body


def test_leading_empty_lines_count() -> None:
    assert ok(b"\r\n\r\n" + GOOD).length == len(GOOD) + 4
    assert parse_head(b"\r\n\r\n") is None
    assert parse_head(b"") is None


@pytest.mark.parametrize("cut", range(len(GOOD)))
def test_every_prefix_is_incomplete(cut: int) -> None:
    assert parse_head(GOOD[:cut]) is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (("Content-Length: 0",), (0, False, True, False, None)),
        (("Content-Length: 12",), (12, False, True, False, None)),
        (("Transfer-Encoding: Chunked",), (None, True, True, False, None)),
        (("Connection: close",), (None, False, False, False, None)),
        (("Connection: x, Close",), (None, False, False, False, None)),
        (("Content-Length: 1", "Expect: 100-Continue"), (1, False, True, True, None)),
        (("Expect: 100-continue",), (None, False, True, False, None)),
        (("Connection: Upgrade", "Upgrade: websocket"), (None, False, True, False, b"websocket")),
        (("Upgrade: websocket",), (None, False, True, False, None)),
    ],
)
def test_special_fields(fields: tuple[str, ...], expected: tuple[object, ...]) -> None:
    head = ok(request(*fields))
    assert (
        head.content_length,
        head.chunked,
        head.keep_alive,
        head.expect_continue,
        head.upgrade,
    ) == expected


def test_http_10() -> None:
    assert not ok(b"GET / HTTP/1.0\r\n\r\n").keep_alive
    assert ok(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n").keep_alive
    assert ok(b"GET / HTTP/1.0\r\n\r\n").version == 10


def test_targets() -> None:
    head = ok(request(line="GET HTTP://other:81?q HTTP/1.1"))
    assert (head.host, head.path, head.query, head.key) == (b"other:81", b"/", b"q", b"")
    assert ok(request(line="OPTIONS * HTTP/1.1")).path == b"*"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01", 400),  # a TLS client hello
        (b"GET / HTTP/1.1\nHost: h\n\n", 400),
        (b"GET / HTTP/1.1\r\nHost: h\nX: y\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: h\rX: y\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: h\r\nX: a\0b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: h\r\n folded\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n Host: h\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost : h\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: h\r\nno colon\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: h\r\n: empty\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: h\r\nHost: h\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost:\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: h@evil/\r\n\r\n", 400),
        (b"GET  / HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (b"GET / HTTP/1.1 \r\nHost: h\r\n\r\n", 400),
        (b" GET / HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (b"GET / \r\nHost: h\r\n\r\n", 400),
        (b"GET /\r\n\r\n", 400),
        (b"GET /a b HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (b"GET /\xc3\xa4 HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (b"GET /#a HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (b"GET /a\\..\\b HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (b"GET a HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (b"GET * HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (b"GET ftp://h/ HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (b"GET http://u@h/ HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (b"GET http:/// HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (b"G(T / HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (b"GET / http/1.1\r\nHost: h\r\n\r\n", 400),
        (b"GET / HTTP/1.10\r\nHost: h\r\n\r\n", 400),
        (b"GET / HTTP/1.2\r\nHost: h\r\n\r\n", 505),
        (b"GET / HTTP/0.9\r\nHost: h\r\n\r\n", 505),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (b"get / HTTP/1.1\r\nHost: h\r\n\r\n", 501),
        (b"CONNECT h:1 HTTP/1.1\r\nHost: h\r\n\r\n", 501),
        (b"TRACE / HTTP/1.1\r\nHost: h\r\n\r\n", 501),
        (b"BREW / HTTP/1.1\r\nHost: h\r\n\r\n", 501),
        (request("Content-Length: 1", "Transfer-Encoding: chunked"), 400),
        (request("Transfer-Encoding: chunked", "Content-Length: 1"), 400),
        (request("Content-Length: 1", "Content-Length: 2"), 400),
        (request("Content-Length: 1", "Content-Length: 1"), 400),
        (request("Content-Length: 1, 1"), 400),
        (request("Content-Length: +1"), 400),
        (request("Content-Length: -1"), 400),
        (request("Content-Length: 1_0"), 400),
        (request("Content-Length: 0x1"), 400),
        (request("Content-Length: \xb2"), 400),
        (request("Content-Length:"), 400),
        (request("Content-Length: 99999999999999999999"), 400),
        (request("Transfer-Encoding: gzip"), 501),
        (request("Transfer-Encoding: gzip, chunked"), 501),
        (request("Transfer-Encoding: xchunked"), 501),
        (request("Transfer-Encoding: chunked, gzip"), 400),
        (request("Transfer-Encoding: chunked, chunked"), 400),
        (request("Transfer-Encoding: chunked", "Transfer-Encoding: identity"), 400),
        (request("Transfer-Encoding:"), 400),
        (request("Transfer-Encoding: \x0bchunked"), 400),
        (request("Transfer-Encoding: chunked", line="PUT / HTTP/1.0"), 400),
        (request("Expect: something"), 417),
        (request(line="GET /../a HTTP/1.1"), 400),
        (request(line="GET /%2e%2E/a HTTP/1.1"), 400),
        (request(line="GET /a%00 HTTP/1.1"), 400),
        (request(line="GET /a%4 HTTP/1.1"), 400),
        (request(line="GET /a%zz HTTP/1.1"), 400),
        (request(line="GET /" + "a" * 9000 + " HTTP/1.1"), 414),
        (request(*(f"X-{i}: v" for i in range(120))), 431),
        (request("X: " + "a" * 40000), 431),
    ],
)
def test_refuses(data: bytes, status: int) -> None:
    with pytest.raises(HttpError) as caught:
        parse_head(data)
    assert caught.value.status == status
    assert caught.value.detail


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\r\n\nGET", 400),
        (b"GET / HTTP/1.1\n", 400),
        (b"GET / HTTP/1.1\rX", 400),
        (b"GET / HTTP/1.1\r\nHo st", 400),
        (b"GET / HTTP/1.1\r\nHost: a\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\n ", 400),
        (b"GET / HTTP/1.1\r\nHost: \x01", 400),
        (b"GET /\x7f", 400),
        (b"BREW / HTTP/1.1\r\n", 501),
        (b"GET / HTTP/3.0\r\n", 505),
        (b"GET /" + b"a" * 10_000, 414),
        (b"A" * 10_000, 400),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 32_768, 431),
        (b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 101, 431),
        (b"\r\n" * 20_000, 431),
    ],
)
def test_refuses_before_the_end(data: bytes, status: int) -> None:
    with pytest.raises(HttpError) as caught:
        parse_head(data)
    assert caught.value.status == status


def test_limits_are_exact() -> None:
    small = Limits(max_head=len(GOOD), max_headers=2, max_target=18)
    assert parse_head(GOOD, small) is not None
    for change, status in (("max_head", 431), ("max_headers", 431), ("max_target", 414)):
        value = getattr(small, change)
        with pytest.raises(HttpError) as caught:
            parse_head(GOOD, small._replace(**{change: value - 1}))
        assert caught.value.status == status


@pytest.mark.parametrize(
    ("path", "key"),
    [
        (b"/", b""),
        (b"/a", b"a"),
        (b"//a///b", b"a/b"),
        (b"/a/", b"a/"),
        (b"/a//", b"a/"),
        (b"/a/.", b"a/"),
        (b"/a/./b", b"a/b"),
        (b"/a/b/..", b"a/"),
        (b"/a/../b", b"b"),
        (b"/a/..", b""),
        (b"/a/%2e%2e/b", b"b"),
        (b"/a%2Fb", b"a/b"),
        (b"/a%2f%2fb", b"a/b"),
        (b"/a/..%2fb", b"b"),
        (b"/%252e%252e/a", b"%2e%2e/a"),
        (b"/...", b"..."),
        (b"/.a", b".a"),
        (b"/a..", b"a.."),
        (b"/%41%ff", b"A\xff"),
    ],
)
def test_keys(path: bytes, key: bytes) -> None:
    assert normalise_path(path) == key


@given(st.binary(max_size=200).map(lambda b: b"/" + b.replace(b"%", b"").replace(b"\0", b"")))
def test_keys_are_normal_forms(path: bytes) -> None:
    try:
        key = normalise_path(path)
    except HttpError:
        return
    assert normalise_path(b"/" + key) == key
    assert not key.startswith(b"/")
    assert not {b"..", b"."} & set(key.split(b"/"))


PIECES = st.sampled_from(
    [
        *(b"GET", b"PUT", b" ", b"/", b"HTTP/1.1", b"\r\n", b"\n", b"\r", b":", b"\0", b"a", b"\t"),
        *(b"Host: h", b"Content-Length: 3", b"Transfer-Encoding: chunked", b"\r\n\r\n"),
        *(b"%2e", b"\x80"),
    ]
)


@settings(max_examples=500, deadline=None)
@given(st.one_of(st.binary(max_size=300), st.lists(PIECES, max_size=30).map(b"".join)))
def test_never_crashes(data: bytes) -> None:
    try:
        parse_head(data)
    except HttpError:
        pass


class Llhttp:
    """What llhttp makes of the same bytes."""

    def __init__(self, data: bytes) -> None:
        self.url = b""
        self.fields: list[tuple[bytes, bytes]] = []
        self.complete = False
        self.parser = httptools.HttpRequestParser(self)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name.lower(), value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        self.complete = True


TOKEN = st.sampled_from([b"X-A", b"accept", b"Connection", b"Range", b"~!#$"])
VALUE = st.sampled_from(
    [b"", b"v", b" two words ", b"close", b"keep-alive, x", b"\xe4\t\xff", b":"]
)
FRAMING = st.sampled_from(
    [
        *(b"", b"Content-Length: 0\r\n", b"Content-Length: 7\r\n", b"Content-Length: 007\r\n"),
        *(b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding:\tchunked \r\n"),
    ]
)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([b"GET", b"PUT", b"DELETE", b"PROPFIND"]),
    st.sampled_from([b"/", b"/a%20b?c=d", b"http://h/x", b"/a//..//b"]),
    st.sampled_from([b"1.0", b"1.1"]),
    st.lists(st.tuples(TOKEN, VALUE), max_size=6),
    FRAMING,
)
def test_llhttp_agrees(
    method: bytes,
    target: bytes,
    version: bytes,
    fields: list[tuple[bytes, bytes]],
    framing: bytes,
) -> None:
    lines = b"".join(name + b":" + value + b"\r\n" for name, value in fields)
    data = method + b" " + target + b" HTTP/" + version + b"\r\nHost: h\r\n" + lines + framing
    try:
        head = ok(data + b"\r\n")
    except HttpError as error:
        assert error.status == 400
        return
    other = Llhttp(data + b"\r\n")
    assert other.complete
    assert other.url == head.target
    assert tuple(other.fields) == head.headers
    assert other.parser.get_method() == head.method
    assert other.parser.get_http_version().encode() == version


@pytest.mark.parametrize(
    "data",
    [
        b"A" * 65_536,
        b"GET / HTTP/1.1\r\n" + b"a" * 32_000,
        b"GET / HTTP/1.1\r\n" + b"a" * 32_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: h\r\n" + b"a:\r\n" * 8_000,
        b"GET /" + b"/.." * 2_000 + b" HTTP/1.1\r\nHost: h\r\n\r\n",
        b"GET /" + b"%" * 8_000 + b" HTTP/1.1\r\nHost: h\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: h\r\nX: " + b" " * 32_000 + b"\r\n\r\n",
    ],
)
def test_hostile_input_is_cheap(data: bytes) -> None:
    started = time.perf_counter()
    try:
        parse_head(data)
    except HttpError:
        pass
    assert time.perf_counter() - started < 0.05
