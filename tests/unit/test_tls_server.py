"""Many handshakes at once: time-outs, floods, leaks, and what is written down about them."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import ssl
from pathlib import Path
from typing import Any

import pytest
from tls_world import HandClient, Pki, Serving, client_context, get

from prism.tls.established import Established
from prism.tls.stream import TlsStream


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def entry(pki: Pki) -> dict[str, str]:
    return pki.issue("one", "a.test")


async def test_a_silent_client_times_out_while_others_are_served(entry: dict[str, str]) -> None:
    async with Serving({"certificates": [entry], "handshake_timeout": 0.5}) as server:
        context = client_context(None)
        loop = asyncio.get_running_loop()
        silent = HandClient(server.port, context)
        halfway = HandClient(server.port, context)
        await halfway.send(halfway.step()[:50])
        begun = loop.time()
        await asyncio.gather(*(server.get(context) for _ in range(50)))
        assert await silent.end() == b""
        # What it has sent lies unread in the queue, so that the kernel resets the connection.
        assert await halfway.end() in (b"", b" reset")
        assert 0.4 < loop.time() - begun < 1.5
        assert server.server.timeouts == 2
        assert server.server.failures.snapshot() == {"timed out": 2}
        assert server.server.handshakes.total == 50


async def test_a_client_that_stops_after_its_hello_times_out(entry: dict[str, str]) -> None:
    async with Serving({"certificates": [entry], "handshake_timeout": 0.2}) as server:
        client = HandClient(server.port, client_context(None))
        await client.send(client.step())
        await server.until(1, seconds=1)
        assert server.server.timeouts == 1
        later = HandClient(server.port, client_context(None))  # the timer runs anew
        await server.until(2, seconds=1)
        assert server.server.timeouts == 2
        client.sock.close()
        later.sock.close()


@pytest.mark.parametrize("hello", [False, True])
async def test_a_flood_of_half_open_handshakes(entry: dict[str, str], hello: bool) -> None:
    async with Serving({"certificates": [entry], "max_handshakes": 64}) as server:
        context = client_context(None)
        clients = []
        for number in range(500):
            clients.append(HandClient(server.port, context))
            if hello:
                await clients[-1].send(clients[-1].step())
            if number % 100 == 99:
                assert (await server.get(context)).version == "TLSv1.3"
                assert len(server.server) <= 64
        assert server.server.handshakes.total == 5
        assert server.server.crowded_out >= 500 - 64
        for client in clients:
            client.sock.close()
        await server.until(505)
        assert len(server.server) == 0


async def test_closing_ends_what_is_under_way(entry: dict[str, str]) -> None:
    async with Serving({"certificates": [entry]}) as server:
        clients = [HandClient(server.port, client_context(None)) for _ in range(3)]
        refused = HandClient(server.port, client_context(None, alpn=["h2"]))
        await refused.send(refused.step())
        await server.until(1)
        server.server.close()
        server.server.close()
        assert server.ended == [None] * 4
        late = HandClient(server.port, client_context(None))
        assert await late.end() == b""
        assert server.ended == [None] * 5
        for client in (*clients, refused):
            assert await client.end() in (b"", b"\x15\x03\x03\x00\x02\x02\x78")


async def test_a_refused_client_that_does_not_leave_is_left(entry: dict[str, str]) -> None:
    async with Serving({"certificates": [entry]}) as server:
        before = open_files()
        quiet, talking = (HandClient(server.port, client_context(None)) for _ in range(2))
        await quiet.send(b"GET / HTTP/1.1\r\n\r\n")
        await talking.send(b"GET / HTTP/1.1\r\n\r\n")
        await server.until(2)
        with pytest.raises(ConnectionError):
            for _ in range(200):
                await talking.send(bytes(4096))
                await asyncio.sleep(0.001)
        async with asyncio.timeout(2):
            while open_files() > before + 2:
                await asyncio.sleep(0.02)
        quiet.sock.close()
        talking.sock.close()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def resident() -> int:
    """Octets of memory in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_nothing_is_left_behind(entry: dict[str, str]) -> None:
    async with Serving({"certificates": [entry], "max_handshakes": 8}) as server:
        context, other = client_context(None), client_context(None, alpn=["h2"])

        def some() -> None:
            for _ in range(40):
                get(server.port, context)
                with pytest.raises(ssl.SSLError):
                    get(server.port, other)
                socket.create_connection(("127.0.0.1", server.port)).close()

        await asyncio.to_thread(some)
        gc.collect()
        gc.disable()
        try:
            files, memory, things = open_files(), resident(), len(gc.get_objects())
            for _ in range(5):
                await asyncio.to_thread(some)
            await server.until(6 * 120)
            server.ended.clear()
            server.sequences.clear()
            server.fragments.clear()
            await asyncio.sleep(0.05)
            assert open_files() <= files
            assert resident() - memory < 3 << 20
            assert len(gc.get_objects()) - things < 300, "handshakes leave cycles behind"
        finally:
            gc.enable()


async def test_no_secret_is_written_down(
    entry: dict[str, str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    keylog = tmp_path / "keys"
    async with Serving({"certificates": [entry]}) as server:
        shown = ""
        for version in ("1.2", "1.3"):
            context = client_context(None, version)
            context.keylog_filename = str(keylog)
            await server.get(context)
            shown += f"{server.last!r} {server.last}"
            refused = client_context(None, version, alpn=["h2"])
            refused.keylog_filename = str(keylog)
            with pytest.raises(ssl.SSLError):
                await server.get(refused)
        client = HandClient(server.port, context)
        await client.send(client.step())
        await client.receive_flight()
        shown += "".join(repr(each) for each in server.server._pending)
        shown += f"{server.server.snapshot()} {caplog.text} {capfd.readouterr()}"
        client.sock.close()
    assert "TLS handshake failed: no application protocol" in shown
    secrets = [line.split()[2] for line in keylog.read_text().splitlines() if line[0] != "#"]
    assert len(secrets) >= 5
    for secret in secrets:
        assert secret not in shown.lower()
        assert repr(bytes.fromhex(secret))[2:-1] not in shown


async def finished(port: int, ended: list[Any]) -> HandClient:
    """A client after its handshake, that the server has put into a list."""
    client = HandClient(port, client_context(None))
    await client.send(client.step())
    await client.send(await client.receive_flight())
    async with asyncio.timeout(5):
        while not ended:
            await asyncio.sleep(0.005)
    return client


@pytest.mark.parametrize("waits", [False, True])
async def test_the_watch_goes_over_to_the_stream(entry: dict[str, str], waits: bool) -> None:
    loop = asyncio.get_running_loop()
    ended: list[tuple[TlsStream, int]] = []
    seen = asyncio.Event()
    async with Serving({"certificates": [entry]}) as server:

        def done(sock: socket.socket, established: Established | None) -> None:
            assert established is not None
            stream = TlsStream(sock, established.tls)
            stream.watch()
            ended.append((stream, sock.fileno()))

        server._done = done  # type: ignore[method-assign]
        client = await finished(server.port, ended)
        stream, fd = ended[0]
        if waits:
            stream.on_readable(seen.set)
            await asyncio.sleep(0.02)
            assert not seen.is_set()
            await client.send(b"\x17\x03\x03")
            async with asyncio.timeout(5):
                await seen.wait()
        stream.close()
        assert not loop.remove_reader(fd)
        client.sock.close()


async def test_a_watch_that_nobody_takes_over_ends_at_the_first_input(
    entry: dict[str, str],
) -> None:
    loop = asyncio.get_running_loop()
    ended: list[socket.socket] = []
    async with Serving({"certificates": [entry]}) as server:
        server._done = lambda sock, _: ended.append(sock)  # type: ignore[method-assign]
        client = await finished(server.port, ended)
        await client.send(b"\x17\x03\x03")
        await asyncio.sleep(0.05)
        assert ended[0].recv(9, socket.MSG_PEEK) == b"\x17\x03\x03"
        assert not loop.remove_reader(ended[0].fileno())
        ended[0].close()
        client.sock.close()
