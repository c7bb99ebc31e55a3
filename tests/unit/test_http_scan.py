"""The scanners of plain heads against the full parsers: the same, or left to them."""

from __future__ import annotations

import gc
import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism._ext import http_scan
from prism.apps.upstream import UpstreamError, parse_response_head
from prism.http.head import HttpError, Limits, RequestHead, parse_any_head, parse_head
from prism.http.response import STATUS_LINES, status_line

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "prism/_ext/src"
LIMITS = Limits()
DATE, SERVER, TAIL = b"Date: today\r\n", b"Server: test\r\n", b"Connection: close\r\n"


def seen(head: RequestHead | None) -> object:
    return head and {name: getattr(head, name) for name in RequestHead.__slots__}


def read(parse: object, data: bytes, limits: Limits = LIMITS) -> object:
    try:
        return seen(parse(data, limits))  # type: ignore[operator]
    except HttpError as error:
        return error.status, error.detail


def same(data: bytes, limits: Limits = LIMITS) -> int:
    """Compares, and says whether the scanner took it."""
    assert read(parse_head, data, limits) == read(parse_any_head, data, limits)
    return http_scan.scan_request(data, RequestHead(), limits)


# -- requests ----------------------------------------------------------------------------------

METHODS = st.sampled_from([b"GET", b"HEAD", b"PUT", b"DELETE", b"POST", b"get", b"BREW", b"GE T"])
TARGETS = st.one_of(
    st.sampled_from([b"/", b"*", b"/a?b?c", b"/%41", b"/a//b", b"/../x", b"/a/./b", b"/.a", b"x"]),
    st.sampled_from([b"http://h/x", b"/a#b", b"/a\\b", b"/%zz", b"/%00", b"/?", b"/" + b"t" * 200]),
    st.text("/.%41a?~;\x7f\x80", max_size=8).map(lambda text: b"/" + text.encode("latin-1")),
)
NAMES = st.sampled_from(
    [
        *(b"Host", b"host", b"Content-Length", b"Connection", b"Transfer-Encoding", b"Expect"),
        *(b"Upgrade", b"Proxy-Connection", b"TE", b"Accept", b"X-~!#$", b"Keep-Alive", b"X Y", b""),
        *(b"Range", b"Prism-Origin"),
    ]
)
VALUES = st.one_of(
    st.sampled_from([b"h", b"close", b"keep-alive", b"Keep-Alive", b"0", b"12", b"chunked", b""]),
    st.sampled_from([b"h:80", b"h:", b"[::1]:80", b"a_b", b"100-continue", b"+1", b"9" * 20]),
    st.sampled_from([b"keep-alive, x", b"websocket", b"\xe4\t\xff", b"a\rb", b"\0", b"007"]),
    st.binary(max_size=4),
)
FIELDS = st.lists(
    st.tuples(NAMES, st.sampled_from([b":", b": ", b":\t ", b" :"]), VALUES, st.just(b"\r\n")).map(
        b"".join
    ),
    max_size=5,
).map(b"".join)
VERSIONS = st.sampled_from([b"1.1", b"1.1", b"1.1", b"1.0", b"2.0"])


@settings(max_examples=1500, deadline=None)
@given(METHODS, TARGETS, VERSIONS, st.booleans(), FIELDS, st.sampled_from([b"", b"x", b"GET /"]))
def test_requests_are_read_alike(
    method: bytes, target: bytes, version: bytes, host: bool, fields: bytes, behind: bytes
) -> None:
    named = b"Host: h\r\n" if host else b""
    data = method + b" " + target + b" HTTP/" + version + b"\r\n" + named + fields + b"\r\n"
    same(data + behind)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_requests_are_read_alike(data: st.DataObject) -> None:
    head = bytearray(
        b"GET /a/b?c HTTP/1.1\r\nHost: h:80\r\nAccept: */*\r\nConnection: close\r\n\r\n"
    )
    for _ in range(data.draw(st.integers(1, 2))):
        head[data.draw(st.integers(0, len(head) - 1))] = data.draw(st.integers(0, 255))
    same(bytes(head[: data.draw(st.integers(0, len(head)))]))
    same(bytes(head))


def test_usual_requests_are_not_left_to_the_full_parser() -> None:
    assert same(b"GET /a/b?c=%41 HTTP/1.1\r\nHost: h:80\r\nAccept: */*\r\n\r\n") == 1
    assert same(b"GET /a%20b HTTP/1.1\r\nHost: h\r\nConnection: Keep-Alive\r\n\r\n") == 2
    assert same(b"PUT /k HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello") == 1


def test_limits_hold() -> None:
    data = b"GET /abc HTTP/1.1\r\nHost: h\r\nA: b\r\n\r\n"
    exact = Limits(len(data), 2, 4)
    assert same(data, exact) == 1
    for limits in (Limits(len(data) - 1, 2, 4), Limits(len(data), 1, 4), Limits(len(data), 2, 3)):
        assert same(data, limits) == 0
    many = b"GET / HTTP/1.1\r\nHost: h\r\n" + b"a: b\r\n" * 80 + b"\r\n"
    assert same(many) == 0


# -- responses ---------------------------------------------------------------------------------


def expected(data: bytes, bodiless: bool) -> tuple[int, bytes, int, int]:
    """What the full parser and the writer of heads make of a response; raises UpstreamError."""
    block, _, body = data.partition(b"\r\n\r\n")
    head = parse_response_head(block + b"\r\n\r\n")
    assert head.length is not None
    names = {name.lower() for name, _ in head.headers}
    made = status_line(head.status)
    made += b"".join(b"%b: %b\r\n" % field for field in head.headers)
    made += b"" if b"date" in names else DATE
    made += b"" if b"server" in names else SERVER
    made += b"Content-Length: %d\r\n" % head.length + TAIL + b"\r\n" + body
    return head.status, made, len(body), (0 if bodiless else head.length) - len(body)


RESPONSE_NAMES = st.sampled_from(
    [
        *(b"Content-Length", b"content-length", b"Connection", b"Transfer-Encoding", b"Upgrade"),
        *(b"ETag", b"Date", b"SERVER", b"Trailer", b"Keep-Alive", b"X y", b"Content-Type", b"TE"),
    ]
)
RESPONSE_FIELDS = st.lists(
    st.tuples(RESPONSE_NAMES, st.sampled_from([b":", b": "]), VALUES, st.just(b"\r\n")).map(
        b"".join
    ),
    max_size=4,
).map(b"".join)


@settings(max_examples=1500, deadline=None)
@given(
    st.sampled_from([b"200 OK", b"404 Not There", b"206 ", b"200", b"204 No", b"304 N", b"100 C",
                     b"299 Odd", b"999 X", b"20 OK", b"200 \xe4"]),
    st.sampled_from([b"1.1", b"1.1", b"1.0"]),
    st.sampled_from([b"", b"Content-Length: 3\r\n", b"Content-Length: 0\r\n"]),
    RESPONSE_FIELDS,
    st.sampled_from([b"", b"ab", b"abc", b"abcd"]),
    st.booleans(),
)  # fmt: skip
def test_responses_are_made_alike(
    status: bytes, version: bytes, length: bytes, fields: bytes, body: bytes, bodiless: bool
) -> None:
    data = b"HTTP/" + version + b" " + status + b"\r\n" + length + fields + b"\r\n" + body
    got = http_scan.rewrite_response(data, STATUS_LINES, bodiless, DATE, SERVER, TAIL)
    if isinstance(got, bytes):
        assert got == data
        return
    try:
        assert got == expected(data, bodiless)
    except UpstreamError as error:
        pytest.fail(f"the full parser refuses it: {error}")
    assert got[3] >= 0


def test_usual_responses_are_not_left_to_the_full_parser() -> None:
    data = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: keep-alive\r\nETag: x\r\n\r\nabc"
    for cut in range(len(data) - 2, len(data) + 1):
        got = http_scan.rewrite_response(data[:cut], STATUS_LINES, False, DATE, SERVER, TAIL)
        assert got == expected(data[:cut], False)
    for cut in range(len(data) - 3):
        got = http_scan.rewrite_response(data[:cut], STATUS_LINES, False, DATE, SERVER, TAIL)
        assert got == data[:cut]


def test_fields_are_joined() -> None:
    fields = ((b"a", b"1"), (b"b", b""), (b"c", b"3"))
    assert http_scan.join_fields(fields, {b"b"}) == b"a: 1\r\nc: 3\r\n"
    assert http_scan.join_fields((), ()) == b""
    with pytest.raises(TypeError):
        http_scan.join_fields(((b"a", "text"),), ())


def test_sockets() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    arguments = (STATUS_LINES, False, DATE, SERVER, TAIL)
    with ours:
        assert http_scan.quiet(ours.fileno())
        assert http_scan.receive_response(ours.fileno(), *arguments) is None
        with pytest.raises(BlockingIOError):
            http_scan.peek(ours.fileno(), 10)
        theirs.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\na")
        assert not http_scan.quiet(ours.fileno())
        assert http_scan.peek(ours.fileno(), 8) == b"HTTP/1.1"
        got = http_scan.receive_response(ours.fileno(), *arguments)
        assert isinstance(got, tuple)
        assert got[::2] == (200, 1)
        theirs.close()
        assert not http_scan.quiet(ours.fileno())
        assert http_scan.peek(ours.fileno(), 10) == b""
        assert http_scan.receive_response(ours.fileno(), *arguments) == b""
    assert not http_scan.quiet(999_999)
    with pytest.raises(OSError, match="Bad file"):
        http_scan.receive_response(999_999, *arguments)


# -- memory ------------------------------------------------------------------------------------


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_nothing_leaks() -> None:
    request = b"GET /a/b?c=d HTTP/1.1\r\nHost: h:80\r\nAccept: */*\r\nX-Long: " + b"v" * 300
    request += b"\r\n\r\n"
    response = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nETag: x\r\n\r\nabc"

    def turn(times: int) -> None:
        for _ in range(times):
            head = parse_head(request)
            assert head is not None
            http_scan.join_fields(head.headers, {b"host"})
            http_scan.rewrite_response(response, STATUS_LINES, False, DATE, SERVER, TAIL)
            http_scan.rewrite_response(response[:-9], STATUS_LINES, False, DATE, SERVER, TAIL)

    turn(2000)
    gc.collect()
    before = resident()
    turn(50_000)
    gc.collect()
    assert resident() - before < 2 << 20


@pytest.mark.parametrize("seed", [1, 2])
def test_under_the_sanitizers(tmp_path: Path, seed: int) -> None:
    target = tmp_path / "driver"
    compiler = os.environ.get("CC", "gcc")
    assert shutil.which(compiler), f"{compiler} not found: install a C compiler, or set CC"
    subprocess.run(
        [
            *(compiler, "-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror"),
            *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
            *(f"-I{SOURCES}", "-o", str(target), str(ROOT / "tests/native/http_scan_driver.c")),
            str(SOURCES / "http_scan.c"),
        ],
        check=True,
    )
    done = subprocess.run(
        [target, "30000", str(seed)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = re.fullmatch(r"turns 30000 plain (\d+)\n", done.stdout)
    assert found, done.stdout
    assert 3000 < int(found[1]) < 29_000
