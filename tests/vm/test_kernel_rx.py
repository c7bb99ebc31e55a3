"""Uploads that the kernel opens (TLS_RX): the stream, its exits, and records that are no good."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from kernel_tls_bed import (
    PATIENCE,
    SUITES,
    Client,
    Hosts,
    Server,
    heard,
    hosts_for_all,
    move,
    open_pair,
    wait_movable,
)

from prism.tls import offload
from prism.tls.kernel_probe import Support, probe
from prism.tls.offload import RECEIVE_FROM, KernelTlsStream
from prism.tls.stream import TlsBroken

UPLOAD = hashlib.shake_128(b"upload").digest(100_000)
HEAD = b"GET /next HTTP/1.1\r\n\r\n"


@pytest.fixture(scope="module")
def lab() -> Iterator[Hosts]:
    with hosts_for_all() as made:
        yield made


@pytest.fixture(autouse=True)
def _any_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a KeyUpdate every kernel can receive TLS 1.3: tried, although not done by default."""
    ciphers, why = probe().ciphers, probe().why
    monkeypatch.setattr(offload, "probe", lambda: Support(ciphers, why, True))


async def upload(client: Client, stream: KernelTlsStream, data: bytes = UPLOAD) -> None:
    """A body that is declared to be large enough."""
    stream.expect(RECEIVE_FROM)
    sending = asyncio.create_task(asyncio.to_thread(client.say, data))
    got = b""
    async with asyncio.timeout(PATIENCE):
        while len(got) < len(data):
            try:
                got += stream.receive(65536)
            except BlockingIOError:
                await asyncio.sleep(0.005)
        await sending
    assert got == data


async def receiving(lab: Hosts, suite: int = 0xC02B) -> tuple[Client, KernelTlsStream]:
    """A stream that has received an upload through the kernel."""
    client, stream = open_pair(lab, suite)
    stream.receives = True
    await upload(client, stream)
    assert stream.opened_by_kernel
    return client, stream


@pytest.mark.parametrize("suite", SUITES, ids=hex)
async def test_up_and_down_and_on_to_the_next_owner(lab: Hosts, tmp_path: Path, suite: int) -> None:
    """What is in the queue before, what comes after, then sealing, and the next head pending."""
    file = tmp_path / "file"
    file.write_bytes(UPLOAD)
    client, stream = open_pair(lab, suite)
    client.start()
    with file.open("rb") as source:
        server = Server(source.fileno())
        for turn in range(2):
            stream.receives = True
            client.say(b"HEAD" + UPLOAD[:20_000])
            assert (await heard(stream, 4))[:4] == b"HEAD"
            stream.consume(4)
            got = await heard(stream, 1)
            stream.consume(len(got))
            stream.expect(RECEIVE_FROM)
            assert stream.opened_by_kernel
            client.say(UPLOAD[20_000:])
            async with asyncio.timeout(PATIENCE):
                while len(got) < len(UPLOAD):
                    try:
                        got += stream.receive(65536)
                    except BlockingIOError:
                        await asyncio.sleep(0.005)
            assert got == UPLOAD
            server.sent = 0
            await server.run(stream, len(UPLOAD), 0)
            assert stream.in_kernel
            client.say(HEAD)
            assert await heard(stream, len(HEAD)) == HEAD
            await wait_movable(stream)
            assert stream.pending == HEAD
            stream, _ = move(lab, stream, (turn + 1) % 3)
            assert not stream.opened_by_kernel
            assert stream.peek() == HEAD
            stream.consume(len(HEAD))
    stream.close()
    client.finish()
    assert bytes(client.heard) == 2 * UPLOAD
    assert client.alert == 0


async def test_an_incomplete_record_keeps_the_connection(lab: Hosts) -> None:
    client, stream = await receiving(lab)
    assert stream.movable
    record = client.tls.seal(HEAD)
    client.sock.sendall(record[:10])
    await asyncio.sleep(0.2)
    assert stream.unsettled
    assert not stream.movable
    with pytest.raises(OSError, match="part of a TLS record"):
        stream.export_tls()
    client.sock.sendall(record[10:])
    async with asyncio.timeout(PATIENCE):
        while stream.unsettled:
            await asyncio.sleep(0.01)
    assert stream.movable
    assert stream.pending == HEAD
    stream.abort()
    client.sock.close()


async def test_a_record_read_in_part_keeps_the_connection(lab: Hosts) -> None:
    client, stream = await receiving(lab)
    client.say(HEAD)
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                assert stream.receive(5) == HEAD[:5]
                break
            except BlockingIOError:
                await asyncio.sleep(0.01)
    assert not stream.movable
    assert stream.peek() == HEAD[5:]
    assert stream.movable
    stream.abort()
    client.sock.close()


@pytest.mark.parametrize("suite", [0x1301, 0xCCA8], ids=hex)
async def test_a_flipped_bit(lab: Hosts, suite: int) -> None:
    client, stream = await receiving(lab, suite)
    client.start()
    record = bytearray(client.tls.seal(b"x" * 1000))
    record[100] ^= 1
    client.sock.sendall(bytes(record) + client.tls.seal(b"more"))
    with pytest.raises(TlsBroken, match="authenticate"):
        await heard(stream, 1)
    assert stream.alert == 20
    assert not stream.movable
    with pytest.raises(OSError):
        stream.send(b"nothing more")
    stream.close()
    for thread in client._threads:
        thread.join(PATIENCE)
    assert client.alert == 20
    client.sock.close()


async def test_a_close_notify_ends_the_upload(lab: Hosts) -> None:
    client, stream = await receiving(lab)
    client.start()
    client.sock.sendall(client.tls.seal(b"last") + client.tls.close_notify())
    assert await heard(stream, 4) == b"last"
    stream.consume(4)
    assert await ended(stream) == b""
    assert stream.eof
    assert not stream.truncated
    assert stream.send(b"answer") == 6
    stream.close()
    client.finish()
    assert bytes(client.heard) == b"answer"


async def test_a_cut_is_seen(lab: Hosts) -> None:
    client, stream = await receiving(lab)
    client.sock.sendall(client.tls.seal(b"incomplete")[:-3])
    client.sock.close()
    assert await ended(stream) == b""
    assert stream.eof
    assert stream.truncated
    stream.close()


async def ended(stream: KernelTlsStream) -> bytes:
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                return stream.receive(1000)
            except BlockingIOError:
                await asyncio.sleep(0.01)


async def test_a_key_update_in_the_upload(lab: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel cannot change keys, TLS 1.3 is not received by it, and nothing is lost."""
    monkeypatch.setattr(offload, "probe", probe)
    client, stream = open_pair(lab, 0x1301)
    client.start()
    stream.receives = True
    await upload(client, stream)
    assert stream.opened_by_kernel == probe().rekey
    before = client.tls.read_seq
    client.sock.sendall(client.tls.key_update(True))
    await upload(client, stream)
    assert stream.send(b"under the next key") == 18
    await wait_movable(stream)
    stream, _ = move(lab, stream, 1)
    await upload(client, stream)
    stream.close()
    client.finish()
    assert bytes(client.heard) == b"under the next key"
    assert client.alert == 0
    assert before == 0 < client.tls.read_seq <= 2  # the record and the close_notify, since then


async def test_both_keys_are_changed_in_the_kernel(
    lab: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sealing, too, has gone over: answered in place, or by moving, but answered."""
    monkeypatch.setattr(offload, "probe", probe)
    (tmp_path / "file").write_bytes(UPLOAD)
    client, stream = open_pair(lab, 0x1301)
    client.start()
    with (tmp_path / "file").open("rb") as source:
        await Server(source.fileno()).run(stream, len(UPLOAD), 0)
        assert stream.in_kernel
        client.say(HEAD)
        client.sock.sendall(client.tls.key_update(True))
        client.say(HEAD)
        for _ in range(2):
            await heard(stream, len(HEAD))
            stream.consume(len(HEAD))
        if not probe().rekey:
            stream, _ = move(lab, stream, 1)
        await Server(source.fileno()).run(stream, len(UPLOAD), 0)
    stream.close()
    client.finish()
    assert bytes(client.heard) == 2 * UPLOAD
    assert client.alert == 0
