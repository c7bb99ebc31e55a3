"""What a client sees segment by segment: a client made by hand, without a kernel behind it."""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

import pytest
from tcp_bed import MakeNamespace, listen, pattern, rebuild, until

from prism._ext import tcp_repair
from prism.lab.netns import Namespace, join

pytestmark = pytest.mark.net

SERVER, CLIENT = "10.97.0.1", "10.97.0.77"
FIN, SYN, ACK = 0x01, 0x02, 0x10
ISN = 0xFFFF_FF00  # the numbers wrap soon


class Segment(NamedTuple):
    sequence: int
    acknowledged: int
    flags: int
    window: int
    options: bytes
    payload: bytes

    @property
    def timestamp(self) -> int:
        """TSval; the option is the only one on established segments (after two NOPs)."""
        assert self.options[:4] == b"\1\1\x08\x0a"
        return int.from_bytes(self.options[4:8], "big")


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class HandMadeClient:
    """Speaks TCP from a packet socket: it acknowledges what the test says and nothing else."""

    def __init__(self, namespace: Namespace, mac: str) -> None:
        self._sock = namespace.run_inside(
            lambda: socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800))
        )
        self._sock.bind(("up", 0x0800))
        self._sock.settimeout(2)
        self._to = ("up", 0x0800, 0, 0, bytes.fromhex(mac.replace(":", "")))
        self._addresses = socket.inet_aton(CLIENT) + socket.inet_aton(SERVER)
        self.sequence, self.expected = ISN, 0

    def send(self, flags: int, payload: bytes = b"", options: bytes = b"") -> None:
        tcp = struct.pack(
            "!HHIIBBHHH",
            *(40_000, 80, self.sequence, self.expected),
            *((20 + len(options)) // 4 << 4, flags, 60_000, 0, 0),
        )
        tcp += options + payload
        pseudo = self._addresses + struct.pack("!HH", 6, len(tcp))
        tcp = tcp[:16] + struct.pack("!H", checksum(pseudo + tcp)) + tcp[18:]
        ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 1, 0, 64, 6, 0) + self._addresses
        ip = ip[:10] + struct.pack("!H", checksum(ip)) + ip[12:]
        self._sock.sendto(ip + tcp, self._to)
        self.sequence = (self.sequence + len(payload) + (flags & (SYN | FIN) != 0)) % 2**32

    def receive(self) -> Segment:
        while True:
            packet, address = self._sock.recvfrom(4096)
            if packet[9] == socket.IPPROTO_TCP and address[2] != socket.PACKET_OUTGOING:
                break
        total = struct.unpack_from("!H", packet, 2)[0]
        sequence, acknowledged, offset, flags, window = struct.unpack_from("!IIBBH", packet, 24)
        start = 20 + (offset >> 4) * 4
        return Segment(sequence, acknowledged, flags, window, packet[40:start], packet[start:total])

    def connect(self, options: bytes = b"") -> None:
        self.send(SYN, options=b"\2\4\5\xb4" + options)
        answer = self.receive()
        assert answer.flags == SYN | ACK
        self.expected = (answer.sequence + 1) % 2**32
        self.send(ACK, options=b"\1\1" + options[:10] if options else b"")

    def close(self) -> None:
        self._sock.close()


@pytest.fixture
def host(make_namespace: MakeNamespace) -> Namespace:
    return make_namespace("host")


@pytest.fixture
def client(make_namespace: MakeNamespace, host: Namespace) -> HandMadeClient:
    other = make_namespace("client")
    join(host, "up", other, "up")
    host.add_address("up", f"{SERVER}/24")
    with other.route() as route:
        mac = dict(route.get_links(index=other.link_index("up"))[0]["attrs"])["IFLA_ADDRESS"]
    with host.route() as route:
        index = host.link_index("up")
        server_mac = dict(route.get_links(index=index)[0]["attrs"])["IFLA_ADDRESS"]
        route.neigh("add", dst=CLIENT, lladdr=mac, ifindex=index, state=0x80)
    return HandMadeClient(other, server_mac)


def test_segment_acknowledged_in_part(host: Namespace, client: HandMadeClient) -> None:
    with listen(host, SERVER) as listener:
        client.connect()
        server, _ = listener.accept()
    server.sendall(pattern(1000))
    assert client.receive().payload == pattern(1000)
    client.expected += 400
    client.send(ACK)
    until(lambda: _queued(server) == 600)
    state = tcp_repair.export_state(server.fileno())
    told = tcp_repair.describe(state)
    assert (told["snd_una"], told["send_queue"], told["unsent"]) == (client.expected, 600, 0)
    assert state[tcp_repair.HEADER_SIZE :] == pattern(600, 400)
    with rebuild(host, server) as new:
        probe = client.receive()
        assert (probe.payload, probe.sequence) == (b"", client.expected - 1)
        client.expected += 600
        client.send(ACK)
        until(lambda: _queued(new) == 0)
        new.sendall(b"next")
        segment = client.receive()
        assert (segment.sequence, segment.payload) == (client.expected, b"next")
    client.close()


def test_restored_fin_is_acknowledged_once_more(host: Namespace, client: HandMadeClient) -> None:
    with listen(host, SERVER) as listener:
        client.connect()
        server, _ = listener.accept()
    client.send(ACK | FIN, b"last words")
    until(lambda: server.recv(100, socket.MSG_PEEK) == b"last words")
    while client.receive().acknowledged != client.sequence:
        pass
    with rebuild(host, server) as new:
        again = client.receive()
        assert (again.flags, again.acknowledged) == (ACK, client.sequence)
        assert (again.sequence, again.payload) == (client.expected, b"")
        assert new.recv(100) + new.recv(100) == b"last words"
        new.sendall(b"answer")
        assert client.receive().payload == b"answer"
    client.close()


def test_timestamps_never_go_back(host: Namespace, client: HandMadeClient) -> None:
    with listen(host, SERVER) as listener:
        client.connect(b"\x08\x0a\0\0\0\x01\0\0\0\0\1\1")
        server, _ = listener.accept()
    last = 0
    for number in range(40):
        server.sendall(b"x")
        segment = client.receive()
        while not segment.payload:
            segment = client.receive()
        if last:
            assert 0 <= (segment.timestamp - last) % 2**32 < 1000
        last = segment.timestamp
        client.expected = (client.expected + 1) % 2**32
        client.send(ACK, options=b"\1\1\x08\x0a" + struct.pack("!II", number + 2, last))
        until(lambda sock=server: _queued(sock) == 0)
        server = rebuild(host, server, probe=False)
    server.close()
    client.close()


def _queued(sock: socket.socket) -> int:
    """Octets without an acknowledgement (SIOCOUTQ would do; this also works when frozen)."""
    state = tcp_repair.describe(tcp_repair.export_state(sock.fileno()))
    tcp_repair.resume(sock.fileno(), probe=False)
    return int(state["send_queue"])
