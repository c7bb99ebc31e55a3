"""What went over the client's wire: a packet socket that keeps heads until it is asked.

Nothing reads while the test runs: the kernel queues the first octets of each packet, so watching
costs the watched as little as can be. A queue that overflowed fails the test.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from prism.flow import unpack_address
from prism.lab.netns import Namespace

ETH_P_ALL = 3
SOL_PACKET = 263
PACKET_STATISTICS = 6
SO_RCVBUFFORCE = 33
SO_TIMESTAMPNS = 35
SNAP = 160  # Ethernet, IPv6 and TCP with all its options
QUEUE = 1 << 29

FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16


class Packet(NamedTuple):
    time: float
    outgoing: bool  # from the client
    src: tuple[str, int]
    dst: tuple[str, int]
    flags: int
    seq: int
    ack: int
    size: int  # payload


@dataclass
class Side:
    """One direction of a connection."""

    packets: int = 0
    octets: int = 0
    resent: int = 0  # segments that repeat octets sent before
    fins: int = 0
    rsts: int = 0
    high: int | None = None
    gaps: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Talk:
    """One connection, named by the client's address and port."""

    out: Side = field(default_factory=Side)
    back: Side = field(default_factory=Side)
    packets: list[Packet] = field(default_factory=list)


class Capture:
    """Packets on a device of a namespace."""

    def __init__(self, namespace: Namespace, device: str = "eth0") -> None:
        with namespace.entered():
            self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            self._sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, QUEUE)
            self._sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
            self._sock.bind((device, ETH_P_ALL))
        self._sock.setblocking(False)
        self.packets: list[Packet] = []

    def stop(self) -> list[Packet]:
        """Read everything; raises where the kernel had to drop some."""
        with contextlib.suppress(BlockingIOError):
            while True:
                data, notes, _, address = self._sock.recvmsg(SNAP, 64)
                packet = _parse(data, _stamp(notes), address[2] == socket.PACKET_OUTGOING)
                if packet is not None:
                    self.packets.append(packet)
        _, dropped = struct.unpack("II", self._sock.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
        self._sock.close()
        if dropped:
            raise RuntimeError(f"the capture lost {dropped} packets")
        return self.packets

    def talks(self) -> dict[tuple[str, int], Talk]:
        """The connections, with what each direction did."""
        talks: dict[tuple[str, int], Talk] = defaultdict(Talk)
        for packet in self.packets:
            talk = talks[packet.src if packet.outgoing else packet.dst]
            talk.packets.append(packet)
            _account(talk.out if packet.outgoing else talk.back, packet)
        return dict(talks)


@contextlib.contextmanager
def capturing(namespace: Namespace) -> Iterator[Capture]:
    capture = Capture(namespace)
    try:
        yield capture
    finally:
        capture.stop()


def _account(side: Side, packet: Packet) -> None:
    side.packets += 1
    side.octets += packet.size
    side.fins += bool(packet.flags & FIN)
    side.rsts += bool(packet.flags & RST)
    if packet.flags & SYN:
        side.high, side.gaps = None, []  # a new connection on the same ports
    span = packet.size + bool(packet.flags & SYN) + bool(packet.flags & FIN)
    if not span or packet.flags & RST:
        return
    end = (packet.seq + span) & 0xFFFFFFFF
    if side.high is not None and packet.seq != side.high:
        if (packet.seq - side.high) & 0xFFFFFFFF < 1 << 31:
            side.gaps.append((side.high, packet.seq))  # overtook another one on the way
        elif not _fills(side.gaps, packet.seq, end):
            side.resent += 1
    if side.high is None or (end - side.high) & 0xFFFFFFFF < 1 << 31:
        side.high = end


def _fills(gaps: list[tuple[int, int]], start: int, end: int) -> bool:
    """Whether a segment is what was missing, or a part of it; takes it out of the gaps."""
    for number, (low, high) in enumerate(gaps):
        if (start - low) & 0xFFFFFFFF < (high - low) & 0xFFFFFFFF:
            rest = [(low, start), (end, high)]
            gaps[number : number + 1] = [
                gap for gap in rest if 0 < (gap[1] - gap[0]) & 0xFFFFFFFF < 1 << 31
            ]
            return True
    return False


def _stamp(notes: list[tuple[int, int, bytes]]) -> float:
    for level, kind, data in notes:
        if level == socket.SOL_SOCKET and kind == SO_TIMESTAMPNS:
            seconds, nanoseconds = struct.unpack("qq", data[:16])
            return float(seconds) + nanoseconds / 1e9
    return 0.0


def _parse(data: bytes, time: float, outgoing: bool) -> Packet | None:
    """A TCP segment over Ethernet; None for anything else."""
    kind = int.from_bytes(data[12:14])
    if kind == 0x0800 and data[23] == socket.IPPROTO_TCP:
        at = 14 + (data[14] & 15) * 4
        total = int.from_bytes(data[16:18]) - (at - 14)
        src, dst = socket.inet_ntoa(data[26:30]), socket.inet_ntoa(data[30:34])
    elif kind == 0x86DD and data[20] == socket.IPPROTO_TCP:
        at = 54
        total = int.from_bytes(data[18:20])
        src, dst = unpack_address(data[22:38]), unpack_address(data[38:54])
    else:
        return None
    sport, dport, seq, ack, offset, flags = struct.unpack_from("!HHIIBB", data, at)
    size = total - (offset >> 4) * 4
    return Packet(time, outgoing, (src, sport), (dst, dport), flags, seq, ack, size)
