"""TLS streams over real loopback sockets, against a client made of the same record layer.

What OpenSSL's clients think of it is tested with the handshake; here the client does what no
well-behaved library can be made to do.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism._ext.tls_record import Tls
from prism.errors import ProtocolError
from prism.http.exchange import send_all
from prism.tls.peer import Peer, pack_peer, unpack_peer
from prism.tls.stream import TlsBroken, TlsStream

SUITES = {0x1301: 32, 0x1302: 48, 0x1303: 32, 0xC02B: 48, 0xC030: 48, 0xCCA9: 48}


class Bed:
    """A client's record layer and socket, and the stream at the other end."""

    def __init__(self, suite: int = 0x1301) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.client = socket.create_connection(listener.getsockname())
            sock, _ = listener.accept()
        self.client.settimeout(5)
        self.client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        secrets = os.urandom(SUITES[suite]), os.urandom(SUITES[suite])
        randoms = os.urandom(32), os.urandom(32)

        def layer(is_server: bool) -> Tls:
            if suite >> 8 == 0x13:
                return Tls.from_traffic_secrets(suite, *secrets, is_server=is_server)
            return Tls.from_master_secret(suite, secrets[0], *randoms, is_server=is_server)

        self.tls = layer(False)
        self.stream = TlsStream(sock, layer(True))

    def say(self, data: bytes) -> None:
        self.client.sendall(self.tls.seal(data))

    async def peek(self, length: int) -> bytes:
        """What is peeked at when at least ``length`` octets are there, or the end."""
        async with asyncio.timeout(5):
            while True:
                try:
                    data = self.stream.peek()
                except BlockingIOError:
                    await self.stream.readable(5)
                    continue
                if len(data) >= length or self.stream.eof:
                    return data
                self.stream.await_more(len(data))
                await self.stream.readable(5)

    async def read(self, length: int) -> bytes:
        data = b""
        async with asyncio.timeout(10):
            while len(data) < length:
                try:
                    piece = self.stream.receive(length - len(data))
                except BlockingIOError:
                    await self.stream.readable(5)
                    continue
                if not piece:
                    break
                data += piece
        return data

    async def heard(self, length: int) -> bytes:
        """``length`` octets of plaintext from the stream, at the client."""

        def hear() -> bytes:
            data, raw = b"", b""
            while len(data) < length:
                piece = self.client.recv(65536)
                if not piece:
                    break
                raw += piece
                opened = self.tls.open(raw)
                assert opened.error is None, opened.error
                raw = raw[opened.consumed :]
                data += opened.data
            return data

        return await asyncio.to_thread(hear)

    def move(self) -> None:
        """What a handoff does with the stream, without the TCP part."""
        state, pending = self.stream.export_tls(), self.stream.pending
        flow = self.stream.flow
        fd = self.stream.release()
        tls, skip, facts = TlsStream.parse_tls(state)
        self.stream = TlsStream(
            socket.socket(fileno=fd), tls, flow, pending, skip=skip, facts=facts
        )


@pytest.fixture
async def make_bed() -> AsyncIterator[Any]:
    beds: list[Bed] = []

    def make(suite: int = 0x1301) -> Bed:
        beds.append(Bed(suite))
        return beds[-1]

    yield make
    for bed in beds:
        bed.stream.abort()
        bed.client.close()


@pytest.mark.parametrize("suite", SUITES, ids=hex)
async def test_both_ways_and_moved_in_between(make_bed: Any, suite: int) -> None:
    bed = make_bed(suite)
    for turn in range(4):
        bed.say(b"first-%d" % turn + b"second-%d" % turn)  # two messages in one record
        assert await bed.peek(15) == b"first-%dsecond-%d" % (turn, turn)
        bed.stream.consume(7)
        bed.move()  # with a record half read
        assert await bed.peek(8) == b"second-%d" % turn
        await send_all(bed.stream, b"answer-%d" % turn, 5)
        bed.stream.consume(8)
        assert await bed.heard(8) == b"answer-%d" % turn


async def test_peeking_takes_nothing(make_bed: Any) -> None:
    bed = make_bed()
    bed.say(b"a")
    bed.say(b"b")
    assert await bed.peek(2) == b"ab"
    assert bed.stream.tls.read_seq == 0
    bed.move()
    assert await bed.peek(2) == b"ab"
    bed.stream.consume(1)
    assert bed.stream.tls.read_seq == 1


async def test_tiny_records_do_not_fill_the_queue(make_bed: Any) -> None:
    """A head of 8,000 octets in as many records has 180 kB of them."""
    bed = make_bed()
    head = os.urandom(8000)
    sender = asyncio.create_task(
        asyncio.to_thread(lambda: [bed.say(head[i : i + 1]) for i in range(len(head))])
    )
    assert await bed.peek(len(head)) == head
    await sender
    bed.move()
    assert bed.stream.pending  # the exception: what was taken out travels in the clear
    assert await bed.read(len(head)) == head


async def test_an_incomplete_record_does_not_spin(make_bed: Any) -> None:
    bed = make_bed()
    record = bed.tls.seal(b"x" * 1000)
    bed.client.sendall(record[:500])
    await bed.stream.readable(5)
    with pytest.raises(TimeoutError):
        for _ in range(3):  # it may wake once or twice in vain, not again and again
            with pytest.raises(BlockingIOError):
                bed.stream.peek()
            await bed.stream.readable(0.05)
    bed.client.sendall(record[500:])
    assert await bed.peek(1000) == b"x" * 1000


async def test_a_key_update_is_followed_and_answered(make_bed: Any) -> None:
    bed = make_bed()
    bed.say(b"old")
    bed.client.sendall(bed.tls.key_update(True))
    bed.say(b"new")
    assert await bed.peek(6) == b"oldnew"
    bed.move()  # the KeyUpdate is still in the queue
    assert await bed.read(6) == b"oldnew"
    await send_all(bed.stream, b"answer", 5)
    assert await bed.heard(6) == b"answer"
    assert bed.tls.read_seq == 1  # it came under the new key


async def test_an_asked_for_key_update_goes_out_at_once(make_bed: Any) -> None:
    bed = make_bed()
    bed.client.sendall(bed.tls.key_update(True))
    await bed.stream.readable(5)
    with pytest.raises(BlockingIOError):
        while True:
            bed.stream.peek()
            await bed.stream.readable(0.1)
    bed.client.settimeout(1)
    assert bed.tls.open(bed.client.recv(1000)).records == 1


@pytest.mark.parametrize("fault", ["flip", "plain", "oversize", "replay"])
async def test_a_bad_record_gets_its_alert(make_bed: Any, fault: str) -> None:
    bed = make_bed()
    good = bed.tls.seal(b"good")
    bed.client.sendall(good)
    assert await bed.read(4) == b"good"
    record = bytearray(bed.tls.seal(b"bad"))
    if fault == "flip":
        record[-1] ^= 1
    elif fault == "plain":
        record = bytearray(b"GET / HTTP/1.1\r\n\r\n")
    elif fault == "oversize":
        record = bytearray(b"\x17\x03\x03\x41\x01" + bytes(0x4101))
    else:
        record = bytearray(good)
    bed.client.sendall(record)
    with pytest.raises(TlsBroken):
        await bed.peek(1)
    answer = bed.tls.open(bed.client.recv(1000))
    assert answer.alert == {"flip": 20, "plain": 10, "oversize": 22, "replay": 20}[fault]
    assert repr(bed.stream.tls) == "<Tls wiped>"
    with pytest.raises(OSError):
        bed.stream.peek()


async def test_what_came_before_a_bad_record_is_served(make_bed: Any) -> None:
    bed = make_bed()
    bed.client.sendall(bed.tls.seal(b"good") + b"\x17\x03\x03\x00\x20" + bytes(32))
    assert await bed.read(4) == b"good"
    with pytest.raises(TlsBroken):
        await bed.peek(1)


@pytest.mark.parametrize("notified", [True, False])
async def test_the_end_is_told_from_a_cut(make_bed: Any, notified: bool) -> None:
    bed = make_bed()
    bed.say(b"last")
    if notified:
        bed.client.sendall(bed.tls.close_notify())
    bed.client.shutdown(socket.SHUT_WR)
    assert await bed.read(4) == b"last"
    assert await bed.read(1) == b""
    assert bed.stream.eof
    assert bed.stream.truncated is not notified
    await send_all(bed.stream, b"the rest", 5)  # the client expects it
    assert await bed.heard(8) == b"the rest"


async def test_a_cut_in_mid_record_is_no_spin_and_a_cut(make_bed: Any) -> None:
    bed = make_bed()
    bed.client.sendall(bed.tls.seal(b"x" * 100)[:50])
    bed.client.shutdown(socket.SHUT_WR)
    assert await bed.peek(1) == b""
    assert bed.stream.eof
    assert bed.stream.truncated


async def test_closing_says_so(make_bed: Any) -> None:
    bed = make_bed()
    bed.stream.close()
    assert bed.tls.open(bed.client.recv(1000)).closed
    assert bed.client.recv(1) == b""
    assert repr(bed.stream.tls) == "<Tls wiped>"


async def test_a_slow_reader_gets_everything(make_bed: Any, tmp_path: Path) -> None:
    bed = make_bed()
    data = os.urandom(3_000_000)
    path = tmp_path / "file"
    path.write_bytes(data)
    with path.open("rb") as file:
        reader = asyncio.create_task(bed.heard(2 * len(data)))
        await send_all(bed.stream, data, 5)
        offset = 0
        while offset < len(data):
            try:
                offset += bed.stream.send_file(file.fileno(), offset, len(data) - offset)
            except BlockingIOError:
                assert not bed.stream.movable
                await bed.stream.writable(5)
        assert bed.stream.movable
        assert bed.stream.send_file(file.fileno(), len(data), 1) == 0
    assert await reader == data + data


async def test_a_record_larger_than_the_receive_buffer(make_bed: Any) -> None:
    """What the kernel has no room for is kept by the stream; then it can be moved again."""
    bed = make_bed()
    bed.stream.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    data = os.urandom(100_000)
    sending = asyncio.create_task(asyncio.to_thread(bed.say, data))
    got = await bed.read(len(data))
    await sending
    assert got == data
    assert bed.stream.movable
    bed.move()
    bed.say(b"more")
    assert await bed.peek(4) == b"more"


async def test_waiting_for_more_than_is_pending(make_bed: Any) -> None:
    """Nothing but new input ends the wait: a loop that reads again at once would stop the node."""
    bed = make_bed()
    bed.stream = TlsStream(bed.stream.sock, bed.stream.tls, None, b"5")
    assert bed.stream.peek() == b"5"
    bed.stream.await_more(1)
    with pytest.raises(TimeoutError):
        await bed.stream.readable(0.05)
    bed.say(b"\r\n")
    await bed.stream.readable(5)
    assert bed.stream.peek() == b"5\r\n"
    bed.stream.reset_lowat()
    await bed.stream.readable(5)


async def test_a_close_notify_behind_data_is_the_end(make_bed: Any) -> None:
    """Whoever waits for the rest of a head learns at once that there is none."""
    bed = make_bed()
    bed.client.sendall(bed.tls.seal(b"GET / HT") + bed.tls.close_notify())
    assert await bed.peek(8) == b"GET / HT"
    assert bed.stream.eof
    assert not bed.stream.truncated


@pytest.mark.parametrize("how", ["close", "abort"])
async def test_a_bad_record_behind_half_a_head(make_bed: Any, how: str) -> None:
    """Whoever waits for the rest is told; the client gets the alert and an end without a reset."""
    bed = make_bed()
    good, bad = bed.tls.seal(b"GET / HTT"), bytearray(bed.tls.seal(b"P/1.1"))
    bad[-1] ^= 1
    bed.client.sendall(good + bad + bytes(10_000))
    await bed.stream.readable(5)
    assert bed.stream.peek() == b"GET / HTT"
    bed.stream.await_more(9)
    await bed.stream.readable(5)
    with pytest.raises(TlsBroken):
        bed.stream.peek()
    assert bed.stream.alert == 20
    getattr(bed.stream, how)()
    assert bed.tls.open(bed.client.recv(1000)).alert == 20
    assert bed.client.recv(1) == b""


async def test_no_reset_after_a_close_notify(make_bed: Any) -> None:
    """The client ends the connection properly, so it is told goodbye properly."""
    bed = make_bed()
    bed.client.sendall(bed.tls.close_notify())
    bed.client.shutdown(socket.SHUT_WR)
    assert await bed.peek(1) == b""
    bed.stream.close()
    assert await bed.heard(1) == b""
    assert bed.tls.read_closed
    assert bed.client.recv(1) == b""


async def test_a_close_notify_taken_together_with_data(make_bed: Any) -> None:
    bed = make_bed()
    bed.client.sendall(bed.tls.seal(b"all") + bed.tls.close_notify())
    assert await bed.read(3) == b"all"
    bed.move()
    assert bed.stream.peek() == b""
    assert bed.stream.eof
    assert not bed.stream.truncated


async def test_the_end_without_close_notify_behind_data(make_bed: Any) -> None:
    bed = make_bed()
    bed.say(b"GET / HT")
    bed.client.shutdown(socket.SHUT_WR)
    assert await bed.peek(9) == b"GET / HT"
    assert bed.stream.eof
    assert bed.stream.truncated


@given(
    st.builds(Peer, st.text(), st.text(), st.lists(st.text()).map(tuple), st.text()),
    st.integers(0, 2000),
)
def test_what_is_known_of_the_client_travels(peer: Peer, more: int) -> None:
    assert unpack_peer(pack_peer(peer)) == peer
    many = peer._replace(names=(*peer.names, *(f"DNS:n{i}.example" for i in range(more))))
    unpacked = unpack_peer(pack_peer(many))
    assert unpacked.names == many.names[: len(unpacked.names)]
    assert len(pack_peer(many)) <= 8192


@given(st.binary())
def test_facts_that_make_no_sense_are_nobody(facts: bytes) -> None:
    assert isinstance(unpack_peer(facts), Peer)


@pytest.mark.parametrize("state", [b"", b"\x01", b"\x02" + bytes(100), b"\x01" + bytes(300)])
def test_a_bad_state_is_refused(state: bytes) -> None:
    with pytest.raises(ProtocolError):
        TlsStream.parse_tls(state)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 3000), min_size=1, max_size=8),
    st.lists(st.integers(1, 2500), min_size=1, max_size=12),
    st.lists(st.integers(1, 4000), min_size=1, max_size=12),
)
def test_any_cut_of_records_segments_and_reads(
    records: list[int], segments: list[int], reads: list[int]
) -> None:
    async def run() -> None:
        bed = Bed()
        data = os.urandom(sum(records))
        raw, at = b"", 0
        for length in records:
            raw += bed.tls.seal(data[at : at + length])
            at += length
        got, turn = b"", 0
        while raw or len(got) < len(data):
            cut = segments[turn % len(segments)]
            bed.client.sendall(raw[:cut])
            raw = raw[cut:]
            try:
                piece = bed.stream.peek(reads[turn % len(reads)])
                bed.stream.consume(len(piece))
                got += piece
            except BlockingIOError:
                pass
            if turn % 3 == 0 and bed.stream.movable:
                bed.move()
            turn += 1
            assert turn < 100_000
        assert got == data
        bed.stream.abort()
        bed.client.close()

    asyncio.run(run())
