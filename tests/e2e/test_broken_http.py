"""Requests that are none: refused by the frontend, never seen by a backend."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from e2e_bed import Bed
from e2e_http import Conn, Cut, digest

CLUSTER = {"backends": 2}
HOST = b"Host: 10.77.0.80\r\n"
GET = b"GET /x HTTP/1.1\r\n" + HOST

BROKEN: dict[str, tuple[bytes, set[int]]] = {
    "no method": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", {400}),
    "unknown method": (b"BREW /x HTTP/1.1\r\n" + HOST + b"\r\n", {501}),
    "method in lower case": (b"get /x HTTP/1.1\r\n" + HOST + b"\r\n", {501}),
    "connect": (b"CONNECT be1:80 HTTP/1.1\r\n" + HOST + b"\r\n", {400, 501}),
    "no version": (b"GET /x\r\n\r\n", {400}),
    "version 2": (b"GET /x HTTP/2.0\r\n" + HOST + b"\r\n", {505}),
    "two blanks": (b"GET  /x HTTP/1.1\r\n" + HOST + b"\r\n", {400}),
    "no host": (b"GET /x HTTP/1.1\r\n\r\n", {400}),
    "two hosts": (GET + HOST + b"\r\n", {400}),
    "bad host": (b"GET /x HTTP/1.1\r\nHost: a b\r\n\r\n", {400}),
    "bare LF": (b"GET /x HTTP/1.1\nHost: x\n\n", {400}),
    "bare LF in a field": (GET + b"A: b\nC: d\r\n\r\n", {400}),
    "bare CR": (GET + b"A: b\rC: d\r\n\r\n", {400}),
    "NUL in a value": (GET + b"A: b\0c\r\n\r\n", {400}),
    "NUL in the target": (b"GET /x\0y HTTP/1.1\r\n" + HOST + b"\r\n", {400}),
    "escaped NUL": (b"GET /x%00y HTTP/1.1\r\n" + HOST + b"\r\n", {400}),
    "broken escape": (b"GET /x%zz HTTP/1.1\r\n" + HOST + b"\r\n", {400}),
    "above the root": (b"GET /../etc/passwd HTTP/1.1\r\n" + HOST + b"\r\n", {400}),
    "escaped above the root": (b"GET /%2e%2e/etc HTTP/1.1\r\n" + HOST + b"\r\n", {400}),
    "blank before the colon": (GET + b"A : b\r\n\r\n", {400}),
    "folded field": (GET + b"A: b\r\n c\r\n\r\n", {400}),
    "no colon": (GET + b"A\r\n\r\n", {400}),
    "two lengths": (GET + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab", {400}),
    "a list of lengths": (GET + b"Content-Length: 1, 2\r\n\r\nab", {400}),
    "length and chunked": (
        GET + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        {400},
    ),
    "negative length": (GET + b"Content-Length: -1\r\n\r\n", {400}),
    "length with a sign": (GET + b"Content-Length: +1\r\n\r\na", {400}),
    "length in hexadecimal": (GET + b"Content-Length: 0x10\r\n\r\n", {400}),
    "length beyond all bounds": (GET + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n", {400, 413}),
    "unknown coding": (GET + b"Transfer-Encoding: gzip\r\n\r\n", {501}),
    "chunked not last": (GET + b"Transfer-Encoding: chunked, gzip\r\n\r\n", {400}),
    "chunked twice": (GET + b"Transfer-Encoding: chunked, chunked\r\n\r\n", {400}),
    "disguised chunked": (GET + b"Transfer-Encoding: \x0bchunked\r\n\r\n", {400}),
    "long target": (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", {414}),
    "endless target": (b"GET /" + b"x" * 100_000, {414}),
    "long head": (GET + b"A: " + b"b" * 20_000 + b"\r\n\r\n", {431}),
    "many fields": (GET + b"A: b\r\n" * 200 + b"\r\n", {431}),
    "ten megabytes of head": (GET + (b"A: " + b"b" * 997 + b"\r\n") * 10_000, {431}),
    "unknown expectation": (GET + b"Expect: a-miracle\r\n\r\n", {417}),
}
SEEN_BY_BACKENDS = ("handoffs_in", "accepted", "requests", "bad_requests", "connections_refused")


def _backends(bed: Bed) -> list[Any]:
    return [
        {name: value for name, value in bed.counters(node).items() if name in SEEN_BY_BACKENDS}
        for node in bed.backends
    ]


def _answer(conn: Conn, request: bytes) -> int:
    """Send what the server will take of it, and read its answer."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        conn.send(request)
    answer = conn.response()
    with contextlib.suppress(ConnectionResetError):
        assert conn.at_end(), "the connection stays open after a broken request"
    return answer.status


@pytest.mark.parametrize("name", BROKEN)
def test_broken_requests(shared: Bed, name: str) -> None:
    """The status that RFC 9110 and RFC 9112 ask for, then the end; no backend hears of it."""
    request, wanted = BROKEN[name]
    seen, before, control = _backends(shared), shared.snapshot(), shared.switch("add")
    refused = shared.counters("fe1")["bad_requests"]
    with shared.client.open() as conn:
        status = _answer(conn, request)
    assert status in wanted
    shared.assert_clean(before, timeout=7.0)
    assert _backends(shared) == seen
    assert shared.switch("add") == control
    now = shared.counters("fe1")["bad_requests"]
    assert now.get(str(status), 0) == refused.get(str(status), 0) + 1


def test_broken_requests_one_octet_at_a_time(shared: Bed) -> None:
    """The same when it trickles in."""
    seen = _backends(shared)
    for name in ("bare LF", "two lengths", "unknown method", "NUL in a value"):
        request, wanted = BROKEN[name]
        with shared.client.open() as conn:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                conn.send_slowly(request, pause=0.0)
            assert conn.response().status in wanted
    assert _backends(shared) == seen


@pytest.mark.parametrize("name", ["bare LF", "length and chunked", "long head", "above the root"])
def test_broken_request_on_a_connection_that_moved(shared: Bed, name: str) -> None:
    """Its owner is a backend now, which is as strict."""
    path = shared.key("be1", "moved")
    data = shared.store(path, 100)
    before = shared.snapshot()
    with shared.client.open() as conn:
        assert conn.request("GET", path).sha256 == digest(data)
        request, wanted = BROKEN[name]
        assert _answer(conn, request) in wanted
    shared.assert_clean(before, timeout=7.0, closed_by_backend=1)


@pytest.mark.parametrize(
    "body",
    [
        b"zz\r\nab\r\n0\r\n\r\n",
        b"-1\r\n\r\n",
        b"5\r\nabcdeXX0\r\n\r\n",
        b"2\nab\n0\n\n",
        b"ffffffffffffffffff\r\n",
        b"1" * 5000,
    ],
)
def test_broken_chunks(shared: Bed, body: bytes) -> None:
    """A good head with a broken body: 400, the end, and nothing stored."""
    path = shared.key("be2", "chunks")
    before = shared.snapshot()
    with shared.client.open() as conn:
        conn.send(conn.head("PUT", path, [("Transfer-Encoding", "chunked")]) + body)
        try:
            assert conn.response("PUT").status == 400
        except (Cut, ConnectionResetError):
            pytest.fail("closed without an answer")
    assert shared.client.once("GET", path).status == 404
    shared.assert_clean(before, timeout=7.0, closed_by_backend=1)


def test_body_that_is_too_large(shared: Bed) -> None:
    """Declared larger than an object may be: 413 before the body is sent."""
    path = shared.key("be1", "huge")
    before = shared.snapshot()
    with shared.client.open() as conn:
        conn.send(conn.head("PUT", path, [("Content-Length", str(10**15))]))
        assert conn.response("PUT").status == 413
    shared.assert_clean(before, timeout=7.0, closed_by_backend=1)
