"""Many handshakes at once: time-outs, floods, leaks, and what is written down about them."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import ssl
from pathlib import Path

import pytest
from tls_world import HandClient, Pki, Serving, client_context, get


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
