"""Kernel TLS under a stream: its records, its sequence numbers, and moving between two hosts."""

from __future__ import annotations

import asyncio
import hashlib
import socket
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

from prism._ext import tcp_repair
from prism._ext.tls_record import RX, TX
from prism.doctor import CHECKS, examine
from prism.tls.kernel import SOL_TLS, TCP_ULP, TLS_TX
from prism.tls.kernel_probe import probe
from prism.tls.offload import KERNEL_FROM, KernelTlsStream, check
from prism.tls.stream import TlsBroken, TlsStream

PIECE = 256 * 1024
MOVES = 3
TLS_RX = 2


@pytest.fixture(scope="module")
def lab() -> Iterator[Hosts]:
    with hosts_for_all() as made:
        yield made


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kernel-tls") / "file"
    path.write_bytes(hashlib.shake_128(b"file").digest((MOVES + 1) * PIECE))
    return path


def kernel_seq(stream: TlsStream) -> int:
    """The sequence number that the kernel would seal the next record with."""
    size = len(stream.tls.crypto_info(TX))
    return int.from_bytes(stream.sock.getsockopt(SOL_TLS, TLS_TX, size)[-8:])


def test_the_kernel_can(capsys: pytest.CaptureFixture[str]) -> None:
    assert probe().why == ""
    assert probe().ciphers == {"AES-128-GCM", "AES-256-GCM", "CHACHA20-POLY1305"}
    check("kernel")
    (finding,) = examine([each for each in CHECKS if each.name == "kernel TLS"])
    assert finding.ok, finding
    assert "CHACHA20-POLY1305" in finding.detail


@pytest.mark.parametrize("suite", SUITES, ids=hex)
async def test_moving_while_data_flows_both_ways(lab: Hosts, file: Path, suite: int) -> None:
    client, stream = open_pair(lab, suite)
    content, wanted = file.read_bytes(), b""
    client.start(content[::-1])
    carried = {"send_queue": 0, "receive_queue": 0}
    with file.open("rb") as source:
        server = Server(source.fileno())
        for turn in range(MOVES + 1):
            start, end = turn * PIECE, (turn + 1) * PIECE
            before = stream.tls.write_seq
            # The first record of each owner is made in the process, the others in the kernel.
            assert not stream.in_kernel
            while server.sent == start:
                server.send(stream, 1000)
                await asyncio.sleep(0)
            await server.run(stream, end, end - PIECE // 2 if turn < MOVES else end)
            assert stream.in_kernel
            records = 1 + -(-(PIECE - 1000) // 16384)
            assert stream.tls.write_seq == kernel_seq(stream) >= before + records
            wanted += content[start:end]
            if turn < MOVES:
                while stream.unsent() or not stream.movable:
                    server.receive(stream)  # it may have taken a part of a record out of the queue
                    await asyncio.sleep(0.002)
                last = b"%d" % turn * 8_000
                wanted += last
                records = stream.tls.write_seq + 1
                stream, told = move(lab, stream, (turn + 1) % 3, last)
                assert stream.tls.write_seq == records
                for queue in carried:
                    carried[queue] += int(str(told[queue]))
    assert stream.movable  # takes the sequence number over
    written = stream.tls.write_seq
    stream.close()
    client.finish()
    assert hashlib.sha256(client.heard).digest() == hashlib.sha256(wanted).digest()
    assert hashlib.sha256(server.got).digest() == hashlib.sha256(content[::-1]).digest()
    assert client.alert == 0
    assert client.tls.read_seq == written + 1  # and the close_notify
    assert carried["send_queue"] > 0, carried
    assert carried["receive_queue"] > 0, carried


async def in_kernel(
    lab: Hosts, file: Path, rcvbuf: int = 1 << 18
) -> tuple[Client, KernelTlsStream]:
    """A stream that has gone over to the kernel."""
    client, stream = open_pair(lab, 0x1301, rcvbuf)
    with file.open("rb") as source:
        assert stream.send_file(source.fileno(), 0, KERNEL_FROM) > 0
    assert stream.in_kernel
    return client, stream


async def test_what_the_kernel_keeps_back_keeps_the_connection(lab: Hosts, file: Path) -> None:
    """Where the queue is full in the middle of a record, which is not so for each window."""
    held = False
    for window in (8192, 6000, 10_000, 5000, 12_000, 7000):
        client, stream = open_pair(lab, 0x1301, rcvbuf=window)
        with file.open("rb") as source:
            sent = stream.send_file(source.fileno(), 0, KERNEL_FROM)
            with pytest.raises(BlockingIOError):
                while True:  # nobody reads
                    sent += stream.send_file(source.fileno(), 0, PIECE)
        held = not stream.movable
        client.start()
        await wait_movable(stream)
        stream.close()
        client.finish()
        assert len(client.heard) == sent
        if held:
            break
    assert held


async def test_a_full_queue_is_sent_on(lab: Hosts, file: Path) -> None:
    """A sender that waits until it can write need not wait for ever."""
    client, stream = open_pair(lab, 0x1301)
    size, full = file.stat().st_size, False
    with file.open("rb") as source:
        for _ in range(4):
            sent = 0
            while sent < size:
                try:
                    sent += stream.send_file(source.fileno(), sent, size - sent)
                except BlockingIOError:
                    if not full:
                        client.start()  # not before: it might read as fast as we send
                    full = True
                    await stream.writable(10)
    assert full
    stream.close()
    client.finish()
    assert bytes(client.heard) == 4 * file.read_bytes()


async def test_an_open_record_keeps_the_connection(lab: Hosts, file: Path) -> None:
    client, stream = await in_kernel(lab, file)
    await wait_movable(stream)
    assert stream.send(b"open", more=True) == 4
    assert not stream.movable
    assert stream.send(b" and shut") == 9
    assert stream.movable
    client.start()
    stream.close()
    client.finish()
    assert bytes(client.heard[-13:]) == b"open and shut"


async def test_a_frozen_connection_goes_on_in_the_kernel(lab: Hosts, file: Path) -> None:
    """As after a handoff that was taken back."""
    client, stream = await in_kernel(lab, file)
    client.start()
    await wait_movable(stream)
    tcp_repair.export_state(stream.fileno())
    before = stream.export_tls()
    tcp_repair.resume(stream.fileno())
    assert stream.send(b"back") == 4
    assert stream.movable
    assert stream.export_tls() != before
    stream.close()
    client.finish()
    assert bytes(client.heard[-4:]) == b"back"
    assert client.alert == 0


async def test_a_key_update_has_it_move(lab: Hosts, file: Path) -> None:
    client, stream = await in_kernel(lab, file)
    client.start(b"GET")
    assert await heard(stream, 3) == b"GET"
    assert not stream.must_move(False)
    assert stream.must_move(True) == (not probe().rekey)  # there may be one in a body
    stream.consume(3)
    client.sock.sendall(client.tls.key_update(True))
    client.sock.sendall(client.tls.seal(b"GET"))
    assert await heard(stream, 3) == b"GET"
    assert stream.must_move(False) == (not probe().rekey)
    stream, _ = move(lab, stream, 1)
    assert not stream.must_move(False)
    assert await heard(stream, 3) == b"GET"
    stream.consume(3)
    with file.open("rb") as source:
        server = Server(source.fileno())
        await server.run(stream, PIECE, 0)  # behind our own KeyUpdate, under a new key
    assert stream.in_kernel
    stream.close()
    client.finish()
    assert bytes(client.heard[KERNEL_FROM:]) == file.read_bytes()[:PIECE]
    assert client.alert == 0


async def test_a_key_update_between_requests(lab: Hosts, file: Path) -> None:
    client, stream = await in_kernel(lab, file)
    client.start(b"GET")
    assert await heard(stream, 3) == b"GET"
    stream.consume(3)
    client.sock.sendall(client.tls.key_update(True))
    async with asyncio.timeout(PATIENCE):
        while stream.tls.read_seq:  # the next key's numbers begin at 0
            with pytest.raises(BlockingIOError):
                stream.peek()
            await asyncio.sleep(0.01)
    assert stream.must_move(False) == stream.tls.owes == (not probe().rekey)
    if stream.tls.owes:
        with pytest.raises(TlsBroken):
            stream.send(b"not before it is answered")
    await wait_movable(stream)
    stream, _ = move(lab, stream, 1)
    assert stream.send(b"now") == 3
    stream.close()
    client.finish()
    assert bytes(client.heard[-3:]) == b"now"


async def test_a_broken_record_is_told_by_the_kernel(lab: Hosts, file: Path) -> None:
    client, stream = await in_kernel(lab, file)
    client.start()
    client.sock.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
    with pytest.raises(TlsBroken):
        await heard(stream, 1)
    stream.shutdown_write()
    client.finish()
    assert client.alert == 20  # bad_record_mac
    stream.close()


async def test_a_half_closed_connection_stays_in_the_process(lab: Hosts, file: Path) -> None:
    """The kernel takes no connection whose client has finished sending."""
    client, stream = open_pair(lab, 0x1301)
    client.sock.shutdown(socket.SHUT_WR)
    client.start()
    with file.open("rb") as source:
        await asyncio.sleep(0.1)
        server = Server(source.fileno())
        async with asyncio.timeout(PATIENCE):
            while server.sent < PIECE:
                server.send(stream, PIECE - server.sent)
                await asyncio.sleep(0.002)
    assert not stream.in_kernel
    stream.close()
    client.finish()
    assert bytes(client.heard) == file.read_bytes()[:PIECE]


async def test_what_the_kernel_has_not_given_cannot_be_carried(lab: Hosts) -> None:
    client, stream = open_pair(lab, 0x1301)
    stream.sock.setsockopt(socket.IPPROTO_TCP, TCP_ULP, b"tls")
    tcp_repair.export_state(stream.fileno())  # the layer alone is in nobody's way
    tcp_repair.resume(stream.fileno())
    stream.sock.setsockopt(SOL_TLS, TLS_RX, stream.tls.crypto_info(RX))
    tcp_repair.export_state(stream.fileno())  # nor are the keys, while the queues are empty
    tcp_repair.resume(stream.fileno())
    client.sock.sendall(client.tls.seal(b"unread"))
    await asyncio.sleep(0.2)
    with pytest.raises(tcp_repair.NotCarriable, match="TLS_RX"):
        tcp_repair.export_state(stream.fileno())
    stream.abort()
    client.sock.close()
