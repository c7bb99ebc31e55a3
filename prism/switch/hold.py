"""Keeps the packets of locked flows until their rule is unlocked; sans-I/O.

Every packet that comes by the TUN device of the switch was sent there by the classifier: its flow
was locked, or it is a bare SYN. What is done with it is decided here and in the agent; the device
is in :mod:`prism.switch.tun`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

__all__ = ["PACKET_OVERHEAD", "HoldBuffer", "HoldCounters", "Segment", "parse_segment"]

PACKET_OVERHEAD: Final = 96
"""Octets charged for each packet beside its own: what Python's objects take."""

_V4_MAPPED: Final = bytes(10) + b"\xff\xff"
_TCP: Final = 6
_FRAGMENT: Final = 44
_EXTENSIONS: Final = frozenset((0, 60))  # hop-by-hop and destination options (RFC 8200)
_MAX_EXTENSIONS: Final = 6  # as the classifier
_SYN: Final = 0x02
_ACK: Final = 0x10


class Segment(NamedTuple):
    """What is needed of a TCP segment: its flow, packed, and whether it is a bare SYN."""

    flow: bytes
    is_bare_syn: bool


def parse_segment(packet: bytes) -> Segment | None:
    """The flow of an IPv4 or IPv6 packet, client first; ``None`` if it is no whole TCP segment.

    IPv4 options, and those extension headers of IPv6 that the classifier passes over, are passed
    over. A fragment is ``None``: the classifier never holds one.
    """
    if not packet:
        return None
    version = packet[0] >> 4
    if version == 4:
        return _parse_ipv4(packet)
    if version == 6:
        return _parse_ipv6(packet)
    return None


def _parse_ipv4(packet: bytes) -> Segment | None:
    start = (packet[0] & 0x0F) * 4
    if start < 20 or len(packet) < start + 20 or packet[9] != _TCP:
        return None
    if packet[6] & 0x3F or packet[7]:
        return None
    addresses = _V4_MAPPED + packet[12:16] + _V4_MAPPED + packet[16:20]
    return _segment(packet, start, addresses)


def _parse_ipv6(packet: bytes) -> Segment | None:
    if len(packet) < 60:
        return None
    following, start = packet[6], 40
    for _ in range(_MAX_EXTENSIONS):
        if following == _TCP:
            break
        if len(packet) < start + 8:
            return None
        if following == _FRAGMENT:
            if packet[start + 2] or packet[start + 3] & 0xF9:  # not atomic (RFC 6946)
                return None
            length = 8
        elif following in _EXTENSIONS:
            length = (packet[start + 1] + 1) * 8
        else:
            return None
        following, start = packet[start], start + length
    if following != _TCP or len(packet) < start + 20:
        return None
    return _segment(packet, start, packet[8:40])


def _segment(packet: bytes, start: int, addresses: bytes) -> Segment:
    flags = packet[start + 13]
    return Segment(addresses + packet[start : start + 4], flags & (_SYN | _ACK) == _SYN)


@dataclass(slots=True)
class HoldCounters:
    """Packets, since the buffer was made."""

    held: int = 0
    released: int = 0
    dropped_flow_full: int = 0
    dropped_total_full: int = 0
    dropped_expired: int = 0


class _Queue:
    __slots__ = ("packets", "since", "size")

    def __init__(self, since: float) -> None:
        self.packets: list[bytes] = []
        self.size = 0
        self.since = since


class HoldBuffer:
    """First in, first out for every flow; bounded for each flow and in total.

    Attributes:
        counters: what has happened so far.
        size: octets held now, with their overhead.
    """

    def __init__(self, *, flow_limit: int = 262_144, total_limit: int = 67_108_864) -> None:
        """Begin empty.

        Args:
            flow_limit: octets held for one flow at most.
            total_limit: octets held for all flows at most.

        Raises:
            ValueError: a limit is not positive.
        """
        if flow_limit <= 0 or total_limit <= 0:
            raise ValueError("the limits of the hold buffer must be positive")
        self.counters = HoldCounters()
        self.size = 0
        self._flow_limit = flow_limit
        self._total_limit = total_limit
        self._queues: OrderedDict[bytes, _Queue] = OrderedDict()  # by the age of their first

    def __len__(self) -> int:
        """Flows with held packets."""
        return len(self._queues)

    def __contains__(self, flow: bytes) -> bool:
        return flow in self._queues

    def keep(self, flow: bytes, packet: bytes, now: float) -> bool:
        """Keep a packet; ``False``: there is no room, drop it.

        Args:
            flow: the packed flow it belongs to.
            packet: the whole packet.
            now: seconds, of the caller's clock.
        """
        charge = len(packet) + PACKET_OVERHEAD
        queue = self._queues.get(flow)
        if self.size + charge > self._total_limit:
            self.counters.dropped_total_full += 1
            return False
        if (0 if queue is None else queue.size) + charge > self._flow_limit:
            self.counters.dropped_flow_full += 1
            return False
        if queue is None:
            queue = self._queues[flow] = _Queue(now)
        queue.packets.append(packet)
        queue.size += charge
        self.size += charge
        self.counters.held += 1
        return True

    def release(self, flow: bytes) -> list[bytes]:
        """The packets of a flow in their order; they are no longer held."""
        queue = self._queues.pop(flow, None)
        if queue is None:
            return []
        self.size -= queue.size
        self.counters.released += len(queue.packets)
        return queue.packets

    def drop(self, flow: bytes) -> int:
        """Forget the packets of a flow; how many there were."""
        queue = self._queues.pop(flow, None)
        if queue is None:
            return 0
        self.size -= queue.size
        self.counters.dropped_expired += len(queue.packets)
        return len(queue.packets)

    def older_than(self, since: float) -> Iterator[bytes]:
        """The flows whose first packet came at ``since`` or before, oldest first."""
        for flow, queue in list(self._queues.items()):
            if queue.since > since:
                return
            yield flow
