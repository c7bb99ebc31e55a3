"""Connections that move between two hosts carrying the same address, with a router between."""

from __future__ import annotations

import hashlib
import selectors
import socket
import threading
from collections.abc import Iterator

import pytest
from tcp_bed import (
    ADDRESSES,
    CLOSE_WAIT,
    Bed,
    MakeNamespace,
    Sniffer,
    bed,
    connect,
    listen,
    numbers,
    pattern,
    receive,
    tcp_info,
    until,
)

pytestmark = pytest.mark.net

TOTAL = 20 << 20
HANDOFFS = 6


@pytest.fixture
def lab(make_namespace: MakeNamespace) -> Iterator[Bed]:
    with bed(make_namespace) as made:
        yield made


def open_pair(
    lab: Bed, version: int, rcvbuf: int | None = None
) -> tuple[socket.socket, socket.socket]:
    with listen(lab.servers[0], ADDRESSES[version]) as listener:
        client = connect(lab.client, ADDRESSES[version], rcvbuf=rcvbuf)
        server, _ = listener.accept()
    return client, server


class Transfer:
    """The server's half of a transfer both ways: what it has read and written so far."""

    def __init__(self, outgoing: bytes) -> None:
        self.outgoing = memoryview(outgoing)
        self.written = self.read = 0
        self.digest = hashlib.sha256()

    def run(self, sock: socket.socket, until_octets: int) -> None:
        """Serve until this many octets have gone each way, at least."""
        sock.setblocking(False)
        selector = selectors.DefaultSelector()
        selector.register(sock, selectors.EVENT_READ | selectors.EVENT_WRITE)
        with selector:
            while self.read < until_octets or self.written < until_octets:
                ((_, events),) = selector.select(8) or [(None, 0)]
                assert events, "the transfer stands still"
                if events & selectors.EVENT_READ:
                    part = sock.recv(1 << 18)
                    self.read += len(part)
                    self.digest.update(part)
                wanted = min(self.written + (1 << 18), until_octets)
                if events & selectors.EVENT_WRITE and self.written < wanted:
                    self.written += sock.send(self.outgoing[self.written : wanted])
                if self.written >= until_octets:
                    selector.modify(sock, selectors.EVENT_READ)


@pytest.mark.parametrize("version", [4, 6])
def test_twenty_megabytes_each_way_over_six_handoffs(lab: Bed, version: int) -> None:
    upload, download = pattern(TOTAL), pattern(TOTAL, 1)
    client, server = open_pair(lab, version)
    client.settimeout(20)
    sniffer = Sniffer(lab.client)
    feeder = threading.Thread(daemon=True, target=lambda: client.sendall(upload))
    got: list[bytes] = []
    reader = threading.Thread(daemon=True, target=lambda: got.append(receive(client, TOTAL)))
    transfer = Transfer(download)
    carried = 0
    feeder.start()
    reader.start()
    for handoff in range(HANDOFFS):
        transfer.run(server, (handoff + 1) * TOTAL // (HANDOFFS + 1))
        server = lab.hand_over(server, version, to=(handoff + 1) % 2)
        carried += int(numbers(server)["receive_queue"]) + int(numbers(server)["send_queue"])
    transfer.run(server, TOTAL)
    reader.join(20)
    feeder.join(20)
    assert transfer.digest.digest() == hashlib.sha256(upload).digest()
    assert hashlib.sha256(got[0]).digest() == hashlib.sha256(download).digest()
    assert carried > 0  # the queues had something in them
    assert not [flags for flags, _, _ in sniffer.segments() if flags & Sniffer.RST]
    sniffer.close()
    server.close()
    assert client.recv(1) == b""
    client.close()


@pytest.mark.parametrize("version", [4, 6])
def test_segment_size_is_the_connections(lab: Bed, version: int) -> None:
    client, server = open_pair(lab, version)
    before = tcp_info(server)["segment"]
    assert before > 1400
    with client, lab.hand_over(server, version, to=1) as new:
        assert tcp_info(new)["segment"] == before
        sniffer = Sniffer(lab.servers[1])
        new.sendall(bytes(9 * before))
        assert receive(client, 9 * before) == bytes(9 * before)
        sent = [length for _, length, out in sniffer.segments() if out and length]
        assert len(sent) <= 9
        sniffer.close()


@pytest.mark.parametrize("version", [4, 6])
def test_slow_client_gets_what_two_owners_wrote(lab: Bed, version: int) -> None:
    client, server = open_pair(lab, version, rcvbuf=8192)
    stream = pattern(12 << 20)
    server.setblocking(False)
    written = 0
    with pytest.raises(BlockingIOError):
        while written < len(stream):
            written += server.send(stream[written : written + 100_000])
    told = numbers(server)
    assert int(told["unsent"]) > 10_000
    server = lab.hand_over(server, version, to=1)
    server = lab.hand_over(server, version, to=0)
    with client, server:
        assert server.getsockopt(socket.SOL_SOCKET, 72) == 0  # SO_BUF_LOCK
        assert receive(client, written) == stream[:written]


@pytest.mark.parametrize("version", [4, 6])
def test_pipelined_requests_wait_to_be_read(lab: Bed, version: int) -> None:
    client, server = open_pair(lab, version)
    requests = b"".join(b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n" % i for i in range(1000))
    client.sendall(requests)
    read = receive(server, 28)
    until(lambda: numbers(server)["receive_queue"] == len(requests) - 28)
    for to in (1, 0, 1):
        server = lab.hand_over(server, version, to)
    with client, server:
        server.settimeout(3)
        assert read + receive(server, len(requests) - 28) == requests


@pytest.mark.parametrize("rp_filter", [0, 1, 2])
@pytest.mark.parametrize("version", [4, 6])
def test_half_closed_client_is_served_elsewhere(lab: Bed, version: int, rp_filter: int) -> None:
    for server_namespace in lab.servers:
        for device in ("all", "lo", "up"):
            server_namespace.sysctl(f"ipv4/conf/{device}/rp_filter", rp_filter)
    client, server = open_pair(lab, version)
    client.sendall(pattern(3000))
    client.shutdown(socket.SHUT_WR)
    until(lambda: tcp_info(server)["state"] == CLOSE_WAIT)
    sniffer = Sniffer(lab.client)
    server = lab.hand_over(server, version, to=1)
    server = lab.hand_over(server, version, to=0)
    assert tcp_info(server)["state"] == CLOSE_WAIT
    with client:
        server.settimeout(3)
        assert receive(server, 4000) == pattern(3000)
        server.sendall(pattern(100_000))
        server.close()
        assert receive(client, 200_000) == pattern(100_000)
        seen = sniffer.segments()
        assert not [flags for flags, _, _ in seen if flags & Sniffer.RST]
    sniffer.close()


def test_half_closed_with_unsent_octets(lab: Bed) -> None:
    client, server = open_pair(lab, 4, rcvbuf=8192)
    client.shutdown(socket.SHUT_WR)
    until(lambda: tcp_info(server)["state"] == CLOSE_WAIT)
    stream = pattern(300_000)
    server.setblocking(False)
    written = server.send(stream)
    assert int(numbers(server)["unsent"]) > 0
    with client:
        server = lab.hand_over(server, 4, to=1)
        server.settimeout(3)

        def finish() -> None:
            with server:
                server.sendall(stream[written:])

        writer = threading.Thread(daemon=True, target=finish)
        writer.start()
        assert receive(client, 400_000) == stream
        writer.join(3)


def test_reset_by_a_client_that_left_reaches_the_new_owner(lab: Bed) -> None:
    client, server = open_pair(lab, 4)
    new = lab.hand_over(server, 4, to=1)
    client.close()
    new.settimeout(3)
    assert new.recv(10) == b""
    new.sendall(b"x")
    until(lambda: tcp_info(new)["state"] == 7)
    new.close()
