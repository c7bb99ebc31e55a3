"""ASGI applications on our exchanges: a FastAPI one, and callables that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import websockets
from http_loop import serving

from prism.apps.asgi import AsgiApp
from prism.errors import ConfigError

HERE = Path(__file__).parent


@contextlib.asynccontextmanager
async def running(app: str = "asgi_app:app", directory: Path = HERE) -> AsyncIterator[int]:
    hosted = AsgiApp(app, directory)
    await hosted.start()
    try:
        async with serving(hosted) as port:
            yield port
            hosted.stop()
    finally:
        await hosted.close()


class Client:
    """Raw HTTP, so that every octet counts."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def ask(self, method: str, path: str, *fields: str, body: bytes = b"") -> Any:
        lines = [f"{method} {path} HTTP/1.1", "Host: h", *fields]
        if body:
            lines.append(f"Content-Length: {len(body)}")
        self.writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        return await self.answer(method)

    async def answer(self, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 20)
        lines = head.decode().split("\r\n")
        fields = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines[1:] if line)}
        return int(lines[0].split()[1]), fields, await self._body(fields, method)

    async def _body(self, fields: dict[str, str], method: str) -> bytes:
        if method == "HEAD":
            return b""
        if "content-length" in fields:
            return await self.reader.readexactly(int(fields["content-length"]))
        body = b""
        while size := int(await self.reader.readline(), 16):
            body += await self.reader.readexactly(size)
            await self.reader.readexactly(2)
        await self.reader.readexactly(2)
        return body


@contextlib.asynccontextmanager
async def client(port: int) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()


async def test_one_connection_many_requests() -> None:
    async with running() as port, client(port) as c:
        status, fields, body = await c.ask("GET", "/whoami", "X-User: ada", "Prism-Origin: forged")
        told = json.loads(body)
        assert (status, told["user"], told["greeting"]) == (200, "ada", "hello")
        assert told["client"] == list(c.writer.get_extra_info("sockname"))
        assert (told["scheme"], told["server"][1]) == ("http", port)
        assert told["headers"] == ["host", "x-user"]
        assert int(fields["content-length"]) == len(body)
        assert (await c.ask("GET", "/whoami"))[0] == 401
        status, fields, body = await c.ask("GET", "/download/1000000")
        assert (status, len(body)) == (200, 1_000_000)
        assert fields["transfer-encoding"] == "chunked"
        status, fields, body = await c.ask("GET", "/download/300000?declared=true")
        assert (len(body), "transfer-encoding" in fields) == (300_000, False)
        data = os.urandom(3_000_000)
        status, _, body = await c.ask("PUT", "/upload/a%20b", body=data)
        assert json.loads(body) == {
            "name": "a b", "size": len(data), "sha256": hashlib.sha256(data).hexdigest(),
        }  # fmt: skip
        status, fields, body = await c.ask("HEAD", "/download/5?declared=true")
        assert (status, body) in ((405, b""), (200, b""))
        assert (await c.ask("GET", "/fails"))[0] == 500
        assert (await c.ask("GET", "/whoami", "X-User: b"))[0] == 200, "the connection goes on"


async def test_pathsend_is_offered_and_sends_the_file(tmp_path: Path) -> None:
    data = os.urandom(5_000_000)
    (tmp_path / "f").write_bytes(data)
    async with running() as port, client(port) as c:
        status, fields, body = await c.ask("GET", f"/file?path={tmp_path / 'f'}")
        assert (status, body == data) == (200, True)
        assert fields["content-length"] == str(len(data))
        status, fields, body = await c.ask(
            "GET", f"/file?path={tmp_path / 'f'}", "Range: bytes=5-9"
        )
        assert (status, body) == (206, data[5:10])
        assert (await c.ask("GET", f"/file?path={tmp_path / 'none'}"))[0] == 500


async def test_an_expectation_is_answered_when_the_body_is_asked_for() -> None:
    async with running() as port, client(port) as c:
        c.writer.write(
            b"PUT /upload/x HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n"
            b"Expect: 100-continue\r\n\r\n"
        )
        assert await c.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        c.writer.write(b"abc")
        status, _, body = await c.answer()
        assert (status, json.loads(body)["size"]) == (200, 3)


async def test_background_tasks_do_not_hold_the_connection() -> None:
    async with running() as port, client(port) as c:
        before = (await c.ask("GET", "/events"))[2].count(b"background")
        started = asyncio.get_running_loop().time()
        assert (await c.ask("GET", "/background"))[0] == 200
        assert (await c.ask("GET", "/events"))[2].count(b"background") == before
        assert asyncio.get_running_loop().time() - started < 10
    sys.modules["asgi_app"].events.index("background")  # and close() waited for it


async def test_a_failure_in_a_body_is_seen_by_the_client() -> None:
    async with running() as port, client(port) as c:
        c.writer.write(b"GET /fails-late HTTP/1.1\r\nHost: h\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            answer = await asyncio.wait_for(c.reader.read(), 20)
            assert not answer.endswith(b"0\r\n\r\n")


async def test_a_broken_body_is_the_clients_fault() -> None:
    async with running() as port, client(port) as c:
        status, _, _ = await c.ask(
            "PUT", "/upload/x", "Transfer-Encoding: chunked", "X: y\r\n\r\nnonsense"
        )
        assert status == 400


async def test_an_application_hears_of_a_client_that_goes() -> None:
    async with running() as port:
        async with client(port) as c:
            c.writer.write(b"GET /until-gone HTTP/1.1\r\nHost: h\r\n\r\n")
            events = sys.modules["asgi_app"].events
            while "waiting" not in events:
                await asyncio.sleep(0.01)
        async with asyncio.timeout(20):
            while "gone" not in events:
                await asyncio.sleep(0.01)


async def test_a_pipelined_request_is_no_disconnect_and_is_answered() -> None:
    async with running() as port, client(port) as c:
        one = b"GET /download/200000 HTTP/1.1\r\nHost: h\r\n\r\n"
        c.writer.write(one * 3)
        for _ in range(3):
            assert len((await c.answer())[2]) == 200_000


async def test_websockets() -> None:
    async with running() as port:
        url = f"ws://127.0.0.1:{port}/echo"
        async with websockets.connect(url, subprotocols=["a"], max_size=None) as socket:  # type: ignore[list-item]
            assert socket.subprotocol == "a"
            for message in ("text", b"octets", "x" * 3_000_000, b"y" * 3_000_000):
                await socket.send(message)
                assert await asyncio.wait_for(socket.recv(), 20) == message
        async with client(port) as c:
            status, _, _ = await c.ask(
                "GET", "/closed", "Connection: upgrade", "Upgrade: websocket",
                "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            )  # fmt: skip
            assert status == 403
    assert "closed 1000" in sys.modules["asgi_app"].events


async def test_websockets_are_told_of_a_restart() -> None:
    hosted = AsgiApp("asgi_app:app", HERE)
    await hosted.start()
    async with serving(hosted) as port:
        async with websockets.connect(f"ws://127.0.0.1:{port}/echo") as socket:
            hosted.stop()
            with pytest.raises(websockets.ConnectionClosed) as closed:
                await asyncio.wait_for(socket.recv(), 20)
            assert closed.value.rcvd is not None and closed.value.rcvd.code == 1012
        await hosted.close()


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("", "Attribute"),
        ("import nothing_of_this_name", "nothing_of_this_name"),
        ("1 / 0", "ZeroDivisionError"),
        (
            "async def app(scope, receive, send):\n"
            "    await receive()\n"
            "    await send({'type': 'lifespan.startup.failed', 'message': 'no database'})\n",
            "does not start",
        ),
    ],
)
async def test_what_cannot_start_says_why(tmp_path: Path, source: str, problem: str) -> None:
    name = f"app_{hashlib.sha256(source.encode()).hexdigest()[:8]}"
    (tmp_path / f"{name}.py").write_text(source)
    hosted = AsgiApp(f"{name}:app", tmp_path)
    try:
        with pytest.raises(ConfigError, match=problem):
            await hosted.start()
        await hosted.close()
    finally:
        sys.path.remove(str(tmp_path))


SILENT = """
async def app(scope, receive, send):
    if scope["type"] != "http":
        raise RuntimeError("only http")
    if scope["path"] == "/twice":
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.start", "status": 200})
    if scope["path"] == "/injects":
        await send({"type": "http.response.start", "status": 200,
                    "headers": [(b"a", b"b\\r\\nc: d")]})
        await send({"type": "http.response.body", "body": b""})
    if scope["path"] == "/short":
        await send({"type": "http.response.start", "status": 200,
                    "headers": [(b"content-length", b"10")]})
        await send({"type": "http.response.body", "body": b"12345"})
"""


async def test_misbehaving_applications_are_contained(tmp_path: Path) -> None:
    (tmp_path / "silent_app.py").write_text(SILENT)
    async with running("silent_app:app", tmp_path) as port:
        async with client(port) as c:
            for path in ("/", "/twice", "/injects"):
                assert (await c.ask("GET", path))[0] == 500, path
        async with client(port) as c:
            c.writer.write(b"GET /short HTTP/1.1\r\nHost: h\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                assert not (await asyncio.wait_for(c.reader.read(), 20)).endswith(b"1234567890")
    sys.path.remove(str(tmp_path))
