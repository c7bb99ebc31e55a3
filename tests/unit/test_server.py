"""Relaying to unmodified servers: upgrades, splicing, and what the server hears of the client."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import websockets
from http_loop import serving
from test_asgi import client, running
from test_relay import ask, get, parts, upstream

from prism.apps.passing import SPLICE_FROM
from prism.apps.relay import Relay
from prism.apps.server import UnmodifiedServer
from prism.config_nodes import BackendConfig
from prism.flow import Endpoint, Flow
from prism.http.exchange import Exchange
from prism.http.head import parse_head
from prism.http.origin import Origin, origin_field, take_origin

CLIENT = Origin(Endpoint("fd00::7", 1234), Endpoint("10.0.0.80", 443), True)


def from_afar(exchange: Exchange) -> None:
    """The request came from another client, over TLS, by way of another node."""
    exchange.origin = CLIENT


@contextlib.asynccontextmanager
async def server(address: Endpoint, **keys: Any) -> AsyncIterator[tuple[int, UnmodifiedServer]]:
    config = BackendConfig(name="be1", address="127.0.0.1", upstream=address, **keys)
    app = UnmodifiedServer(config)
    await app.start()
    async with serving(app, from_afar) as port:
        yield port, app
    await app.close()


def local(port: int) -> Endpoint:
    return Endpoint("127.0.0.1", port)


async def test_websockets_pass_two_relays() -> None:
    nodes = Relay(forwarding="origin")
    async with running() as app, server(local(app)) as (backend, hosted):
        async with serving(nodes.to(local(backend))) as port:
            url = f"ws://127.0.0.1:{port}/echo"
            async with websockets.connect(url, max_size=None) as socket_:
                for message in ("text", b"y" * 2_000_000, b""):
                    await socket_.send(message)
                    assert await asyncio.wait_for(socket_.recv(), 20) == message
            async with websockets.connect(url) as socket_:
                hosted.stop()
                with pytest.raises(websockets.ConnectionClosed):
                    await asyncio.wait_for(socket_.recv(), 20)
        nodes.close()


async def test_only_websockets_upgrades_are_passed_on() -> None:
    async def tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen = await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(seen) + seen)
        writer.close()

    async def switch(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 101 x\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n")
        writer.close()

    fields = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: x")
    async with upstream(tell) as address, server(address) as (port, _):
        _, _, body = parts(await ask(port, get("/", *fields)))
        assert b"pgrade" not in body
        assert b"HTTP2" not in body.upper()
    async with upstream(switch) as address, server(address) as (port, _):
        status, _, _ = parts(await ask(port, get("/", *fields)))
        assert status == 502


@pytest.mark.parametrize(
    ("mode", "wanted"),
    [
        ("x-forwarded", [b"X-Forwarded-For: 9.9.9.9, fd00::7", b"X-Forwarded-Proto: https"]),
        ("forwarded", [b'Forwarded: for="[fd00::7]";proto=https', b"x-forwarded-for: 9.9.9.9"]),
        ("none", [b"x-forwarded-for: 9.9.9.9"]),
    ],
)
async def test_a_server_hears_of_the_client(mode: str, wanted: list[bytes]) -> None:
    seen = b""

    async def look(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal seen
        seen = await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 204 OK\r\n\r\n")
        writer.close()

    async with upstream(look) as address, server(address, upstream_forwarded=mode) as (port, _):
        sent = ("X-Forwarded-For: 9.9.9.9", "X-Forwarded-Proto: ftp", "Prism-Origin: x y z")
        assert parts(await ask(port, get("/", *sent)))[0] == 204
    lines = seen.split(b"\r\n")
    assert b"Host: h" in lines
    assert b"Via: 1.1 prism" in lines
    assert set(wanted) <= set(lines)
    assert b"ftp" not in seen or mode != "x-forwarded"
    assert b"rism-" not in seen


async def test_a_server_hears_of_the_client_by_the_proxy_protocol() -> None:
    heads = []

    async def look(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readexactly(12 + 4 + 36))
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    def six(exchange: Exchange) -> None:
        exchange.origin = Origin(Endpoint("fd00::7", 1234), Endpoint("fd00::80", 443), True)

    async with upstream(look) as address:
        config = BackendConfig(
            name="be1", address="127.0.0.1", upstream=address, upstream_proxy_protocol=True
        )
        app = UnmodifiedServer(config)
        async with serving(app, six) as port:
            answers = await ask(port, get("/") * 3)
            assert answers.count(b"HTTP/1.1 200 OK") == 3
        await app.close()
    ends = (
        socket.inet_pton(socket.AF_INET6, "fd00::7"),
        socket.inet_pton(socket.AF_INET6, "fd00::80"),
    )
    header = b"\r\n\r\n\0\r\nQUIT\n\x21\x21\x00\x24" + b"".join(ends) + b"\x04\xd2\x01\xbb"
    assert heads == [header] * 3, "each request has a connection that is its client's alone"


@pytest.mark.parametrize("size", [SPLICE_FROM - 1, SPLICE_FROM + 1, 20_000_000])
async def test_large_bodies_come_whole(size: int, tmp_path: Path) -> None:
    data = os.urandom(size)
    (tmp_path / "f").write_bytes(data)
    before = len(list(Path("/proc/self/fd").iterdir()))
    async with running() as app, server(local(app)) as (port, _), client(port) as c:
        for _ in range(2):
            _, _, body = await c.ask("GET", f"/file?path={tmp_path / 'f'}")
            assert hashlib.sha256(body).digest() == hashlib.sha256(data).digest()
        _, _, body = await c.ask("PUT", "/upload/x", body=data)
        assert json.loads(body)["sha256"] == hashlib.sha256(data).hexdigest()
    await asyncio.sleep(0)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1


async def test_a_spliced_body_that_is_cut_short_is_seen_cut_short() -> None:
    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9000000\r\n\r\n" + bytes(5_000_000))
        writer.close()

    async with upstream(cut) as address, server(address) as (port, _):
        with contextlib.suppress(ConnectionError):
            assert len(await ask(port, get("/"))) < 9_000_000


def test_where_a_request_came_from_is_told_and_taken() -> None:
    for origin in (CLIENT, Origin(Endpoint("10.0.0.1", 1), Endpoint("10.0.0.80", 80), False)):
        name, value = origin_field(origin)
        request = b"GET / HTTP/1.1\r\nHost: h\r\n%b: %b\r\nA: b\r\n\r\n" % (name, value)
        head = parse_head(request)
        assert head is not None
        assert take_origin(head) == origin
        assert head.headers == ((b"host", b"h"), (b"a", b"b"))
    for value in (b"", b"x y", b"1.2.3.4:5 6.7.8.9 http", b"1.2.3.4:x 6.7.8.9:1 http", b"\xff"):
        head = parse_head(b"GET / HTTP/1.1\r\nHost: h\r\nPrism-Origin: %b\r\n\r\n" % value)
        assert head is not None
        assert take_origin(head) is None
        assert head.get(b"prism-origin") is None
    assert Flow(CLIENT.client, CLIENT.client).pack()
