"""The relay against a real nginx, the object store, and upstreams that misbehave on purpose."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import socket
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from http_loop import serving

from prism.apps.objectstore import ObjectStore
from prism.apps.relay import Relay
from prism.apps.upstream import UpstreamError, parse_response_head
from prism.flow import Endpoint
from prism.http.exchange import Exchange

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

NGINX = """
daemon off; master_process off; worker_processes 1; pid {root}/pid; error_log {root}/error.log;
events {{ worker_connections 256; }}
http {{
  access_log off; client_body_temp_path {root}/b; proxy_temp_path {root}/p;
  fastcgi_temp_path {root}/f; uwsgi_temp_path {root}/u; scgi_temp_path {root}/s;
  server {{
    listen 127.0.0.1:{port}; listen unix:{root}/sock; root {root}/www; keepalive_requests 5;
    gzip on; gzip_min_length 1; gzip_types *; gzip_proxied any;
    location /echo {{
      return 200 "$request_uri|$http_via|$http_x_forwarded_for|$host|$http_te|$http_x_hop";
    }}
  }}
}}
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    port = free_port()
    (tmp_path / "www").mkdir()
    (tmp_path / "conf").write_text(NGINX.format(root=tmp_path, port=port))
    process = subprocess.Popen(["nginx", "-c", tmp_path / "conf", "-e", tmp_path / "error.log"])
    for _ in range(100):
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port)).close()
            break
        process.poll()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
    yield port, tmp_path
    process.terminate()
    process.wait(5)


@contextlib.asynccontextmanager
async def upstream(handler: Handler) -> AsyncIterator[Endpoint]:
    """A server that does with each connection what the test says."""
    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    try:
        yield Endpoint("127.0.0.1", server.sockets[0].getsockname()[1])
    finally:
        server.close()


@contextlib.asynccontextmanager
async def relaying(address: Endpoint | str, **settings: float) -> AsyncIterator[int]:
    relay = Relay(**settings)  # type: ignore[arg-type]
    async with serving(relay.to(address)) as port:
        yield port
    relay.close()


async def ask(port: int, data: bytes, *, end: bool = True) -> bytes:
    """Sends ``data`` and returns everything until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    if end:
        writer.write_eof()
    try:
        return await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()


def get(path: str = "/", *fields: str, method: str = "GET") -> bytes:
    lines = "".join(f"{field}\r\n" for field in ("Host: h", *fields))
    return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode()


def parts(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    fields = dict(line.split(": ", 1) for line in lines[1:])
    return int(lines[0].split()[1]), {k.lower(): v for k, v in fields.items()}, body


async def curl(port: int, path: str, *args: str) -> tuple[int, dict[str, str], bytes]:
    process = await asyncio.create_subprocess_exec(
        "curl", "-sS", "-i", "--raw", "--path-as-is", "--max-time", "20", "-H", "Expect:", *args,
        f"http://127.0.0.1:{port}{path}",
        stdout=subprocess.PIPE,
    )  # fmt: skip
    out, _ = await process.communicate()
    assert process.returncode == 0
    return parts(out)


# -- nginx ----------------------------------------------------------------------------------


async def test_files_from_nginx(nginx: tuple[int, Path]) -> None:
    nginx_port, root = nginx
    whole = os.urandom(5_000_000)
    (root / "www" / "file").write_bytes(whole)
    for address in (Endpoint("127.0.0.1", nginx_port), str(root / "sock")):
        async with relaying(address) as port:
            status, fields, body = await curl(port, "/file")
            assert (status, body == whole) == (200, True)
            assert "via" not in fields
            assert fields["server"].startswith("nginx")
            etag = fields["etag"]
            status, fields, body = await curl(port, "/file", "-r", "10-19")
            assert (status, body) == (206, whole[10:20])
            status, fields, body = await curl(port, "/file", "-I")
            assert (status, fields["content-length"], body) == (200, "5000000", b"")
            status, fields, body = await curl(port, "/file", "-H", f"If-None-Match: {etag}")
            assert (status, body) == (304, b"")
            status, fields, body = await curl(port, "/file", "-H", "Accept-Encoding: gzip")
            assert (status, fields["transfer-encoding"]) == (200, "chunked")
            assert body.endswith(b"\r\n0\r\n\r\n")
            assert (await curl(port, "/none"))[0] == 404


async def test_many_requests_on_kept_connections(nginx: tuple[int, Path]) -> None:
    """nginx closes after 5 requests: stale connections must never be seen by clients."""
    nginx_port, root = nginx
    (root / "www" / "file").write_bytes(b"content")
    async with relaying(Endpoint("127.0.0.1", nginx_port)) as port:
        answer = await ask(port, get("/file") * 43)
        assert answer.count(b"HTTP/1.1 200 OK\r\n") == 43
        assert answer.count(b"content") == 43


async def test_what_nginx_is_told(nginx: tuple[int, Path]) -> None:
    async with relaying(Endpoint("127.0.0.1", nginx[0])) as port:
        fields = ("Via: 1.0 a", "X-Forwarded-For: 1.2.3.4", "TE: x", "Connection: x-hop, te",
                  "X-Hop: secret")  # fmt: skip
        _, _, body = parts(await ask(port, get("/echo?a=%20b", *fields)))
        assert body == b"/echo?a=%20b|1.0 a, 1.1 prism|1.2.3.4, 127.0.0.1|h||"
        _, _, body = parts(await ask(port, get("http://other/echo/%41")))
        assert body == b"/echo/%41|1.1 prism|127.0.0.1|other||"
        _, _, body = parts(await ask(port, get("/x/%2e%2e//echo/%20%2Fa?q")))
        assert body.startswith(b"/echo/%20/a?q|")
        answer = await ask(port, b"GET /echo HTTP/1.0\r\n\r\n")
        assert parts(answer)[2].endswith(b"|127.0.0.1||")
        assert parts(answer)[1]["connection"] == "close"


# -- the object store as upstream -----------------------------------------------------------


async def test_uploads_and_downloads(tmp_path: Path) -> None:
    store = ObjectStore(tmp_path)
    body = os.urandom(6_000_000)
    file = tmp_path / "file"
    file.write_bytes(body)
    async with serving(store) as store_port, relaying(Endpoint("127.0.0.1", store_port)) as port:
        for extra in ((), ("-H", "Transfer-Encoding: chunked"), ("-H", "Expect: 100-continue")):
            status, fields, _ = await curl(port, "/k", "-T", str(file), *extra)
            if status == 100:
                continue
            assert status in (201, 204)
            assert fields["etag"] == f'"{hashlib.md5(body).hexdigest()}"'
        assert (await curl(port, "/k"))[2] == body
        answer = await ask(
            port,
            get("/s", "Content-Length: 2", method="PUT")
            + b"ab"
            + get("/s")
            + get("/", method="PUT"),
        )
        assert re.findall(rb"HTTP/1.1 ([0-9]{3})", answer) == [b"201", b"200", b"405"]
        assert b"\r\n\r\nab" in answer
        cut = get("/cut", "Content-Length: 100", method="PUT") + b"half"
        with pytest.raises(ConnectionResetError):
            await ask(port, cut)
        bad = get("/bad", "Transfer-Encoding: chunked", method="PUT") + b"zz\r\n"
        assert parts(await ask(port, bad))[0] == 400
        assert (await curl(port, "/cut"))[0] == (await curl(port, "/bad"))[0] == 404
    store.close()


async def test_expect_continue_is_the_upstreams_to_answer(tmp_path: Path) -> None:
    store = ObjectStore(tmp_path, max_size=1000)
    fields = ("Expect: 100-continue", "Content-Length: 5000")
    async with serving(store) as store_port, relaying(Endpoint("127.0.0.1", store_port)) as port:
        answer = await ask(port, get("/k", *fields, method="PUT"), end=False)
        assert answer.startswith(b"HTTP/1.1 413 ")
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(get("/k", "Expect: 100-continue", "Content-Length: 3", method="PUT"))
        started = time.monotonic()
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert time.monotonic() - started < 0.5
        writer.write(b"abc")
        assert (await reader.readline()).startswith(b"HTTP/1.1 201 ")
        writer.close()
    store.close()


# -- upstreams that answer as the test says ----------------------------------------------------


def answering(*answers: bytes, close: bool = True) -> Handler:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            for answer in answers:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(answer)
                await writer.drain()
            if not close:
                await reader.read()
        writer.close()

    return handle


@pytest.mark.parametrize(
    ("answer", "status", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", 200, b"abc"),
        (b"HTTP/1.1 200 OK\r\n\r\nuntil the end", 200, b"d\r\nuntil the end\r\n0\r\n\r\n"),
        (b"HTTP/1.0 200 OK\r\n\r\nold", 200, b"3\r\nold\r\n0\r\n\r\n"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
        (b"HTTP/1.1 299 Odd\r\nContent-Length: 0\r\n\r\n", 299, b""),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x\r\nabc\r\n0\r\nT: 1\r\n\r\n",
            200,
            b"3\r\nabc\r\n0\r\n\r\n",
        ),
        (b"", 502, None),
        (b"SMTP ready\r\n\r\n", 502, None),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc", 502, None),
        (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\nabc", 502, None),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            502,
            None,
        ),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nx", 502, None),
        (b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", 502, None),
        (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000, 502, None),
        (b"HTTP/1.1 102 P\r\n\r\n" * 30, 502, None),
    ],
)
async def test_responses(answer: bytes, status: int, body: bytes | None) -> None:
    async with upstream(answering(answer)) as address, relaying(address) as port:
        whole = await ask(port, get())
        final = whole[whole.rindex(b"HTTP/1.1 ") :]
        got, fields, content = parts(final)
        assert got == status
        if body is None:
            assert fields["content-type"] == "application/json"
        else:
            assert content == body


async def test_interim_responses_are_passed_on() -> None:
    answer = (
        b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nConnection: x-y\r\nX-Y: no\r\n\r\na"
    )
    async with upstream(answering(answer, answer)) as address, relaying(address) as port:
        got = await ask(port, get())
        assert got.startswith(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 200 OK\r\n")
        assert b"X-Y" not in got
        assert not (await ask(port, b"GET / HTTP/1.0\r\n\r\n")).startswith(b"HTTP/1.1 103")


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\nzz\r\n",
    ],
)
async def test_a_cut_off_response_is_seen_as_cut_off(answer: bytes) -> None:
    async with upstream(answering(answer)) as address, relaying(address) as port:
        with pytest.raises(ConnectionResetError):
            await ask(port, get(), end=False)


async def test_a_stale_connection_is_replaced() -> None:
    """The upstream resets kept connections exactly when they are used again."""
    connections = 0
    ok = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(ok)
            await reader.readuntil(b"\r\n\r\n")
        writer.close()

    async with upstream(once) as address, relaying(address) as port:
        answer = await ask(port, get() * 3)
        assert answer.count(b"ok") == 3
        assert connections == 3
        # What may have had an effect is not repeated.
        post = get("/", "Content-Length: 0", method="POST")
        answer = await ask(port, post)
        assert answer.startswith(b"HTTP/1.1 502 ")


async def test_failures_and_time_outs() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with relaying(Endpoint("127.0.0.1", free_port())) as port:
        status, _, body = parts(await ask(port, get()))
        assert status == 502
        assert b"Connection refused" in body
        assert b"127.0.0.1" not in body
    async with relaying("/nonexistent/socket") as port:
        assert parts(await ask(port, get()))[0] == 502
    async with upstream(silent) as address:
        async with relaying(address, response_timeout=0.1) as port:
            assert parts(await ask(port, get()))[0] == 504
        async with relaying(address, max_connections=1, connect_timeout=0.1) as port:
            first = asyncio.ensure_future(ask(port, get()))
            await asyncio.sleep(0.05)
            assert parts(await ask(port, get()))[0] == 503
            first.cancel()
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        async with relaying(Endpoint(*full.getsockname()), connect_timeout=0.2) as port:
            assert parts(await ask(port, get()))[0] == 504
        for filler in fillers:
            filler.close()


async def test_a_client_reset_ends_the_upstream_connection() -> None:
    ended = asyncio.Event()
    asked = asyncio.Event()

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.set()
        with contextlib.suppress(ConnectionError):
            await reader.read()
        ended.set()
        writer.close()

    async with upstream(wait) as address, relaying(address) as port:
        client = socket.create_connection(("127.0.0.1", port))
        client.sendall(get())
        await asyncio.wait_for(asked.wait(), 2)
        assert not ended.is_set()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        await asyncio.wait_for(ended.wait(), 2)


async def test_an_early_answer_to_an_upload() -> None:
    refusal = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno"
    async with upstream(answering(refusal)) as address, relaying(address) as port:
        request = get("/", "Content-Length: 30000000", method="PUT") + bytes(500_000)
        answer = await ask(port, request, end=False)
        assert parts(answer)[0] == 403
        assert parts(answer)[1]["connection"] == "close"


async def test_back_pressure_both_ways() -> None:
    """Neither a slow upstream nor a slow client makes the relay hold a body."""
    size = 60_000_000
    sent = 0

    async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        with contextlib.suppress(ConnectionError):
            while sent < size:
                writer.write(bytes(100_000))
                sent += 100_000
                await writer.drain()
        writer.close()

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    async with upstream(pour) as address, relaying(address) as port:
        before = resident()
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=65536)
        writer.write(get())
        await asyncio.sleep(0.5)
        stuck = sent
        await asyncio.sleep(0.2)
        assert stuck == sent < size / 2
        assert resident() - before < 12_000_000
        await reader.readuntil(b"\r\n\r\n")
        got = 0
        while got < size:
            got += len(await reader.read(1 << 20))
        writer.close()


async def test_extra_fields_replace_the_clients() -> None:
    seen = b""

    async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal seen
        seen = await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
        writer.close()

    async with upstream(note) as address:
        relay = Relay()

        class App:
            def handle(self, exchange: Exchange) -> object:
                return relay.relay(exchange, address, ((b"X-Prism-Hop", b"1"),))

        async with serving(App()) as port:  # type: ignore[arg-type]
            await ask(port, get("/", "X-Prism-Hop: 7"))
        assert seen.count(b"rism-") == 1
        assert b"X-Prism-Hop: 1\r\n" in seen


def test_response_heads() -> None:
    head = parse_response_head(
        b"HTTP/1.1 200 OK\r\nA: b\r\nKeep-Alive: x\r\nContent-Length:0\r\n\r\n"
    )
    assert head == (200, [(b"A", b"b")], 0, False, True, b"")
    with pytest.raises(UpstreamError):
        parse_response_head(b"HTTP/1.1 200 OK\r\nA\0: b\r\n\r\n")
