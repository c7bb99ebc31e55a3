"""A reference model of ``p4/prism.p4``: tables as dictionaries, packets as octets.

Written from the P4 program alone. It says what a target that runs the program does with a frame;
``test_p4_model.py`` holds the eBPF switch against it. Where the two differ on purpose:

=============================  ===============================  ================================
packet                         P4 program                       eBPF switch
=============================  ===============================  ================================
bare SYN, flow with a rule     plain forwarding (the frontend)  held, and the owner is asked;
                               or to the CPU (`bare_syn`)       dropped where nobody asks
flow locked                    dropped                          held (dropped where nobody holds)
damaged IPv4 header, or a      dropped                          left to the kernel, which drops
header cut short                                                what IP forbids
TCP behind IPv6 extensions     plain forwarding                 as any TCP
two VLAN tags                  bridged                          as any TCP
=============================  ===============================  ================================

A bare SYN of a locked flow is dropped here, and asked about there.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

CPU_PORT = 255
REASON_LOCAL, REASON_HOPS, REASON_BARE_SYN = 1, 2, 3
_SYN, _ACK = 0x02, 0x10
_RULE_TABLES = ("to_owner_v4", "to_client_v4", "to_owner_v6", "to_client_v6")


class Call(NamedTuple):
    """An entry's action and its parameters."""

    action: str
    params: tuple[int, ...] = ()


class Out(NamedTuple):
    """A frame and the port that it leaves by; ``reason`` is for frames to the CPU."""

    port: int
    data: bytes
    reason: int = 0


class _Drop(Exception):
    pass


def folded(total: int) -> int:
    """A one's complement sum in 16 bits."""
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def words(data: bytes) -> int:
    """The sum of the 16-bit words, unfolded."""
    return sum(struct.unpack(f"!{len(data) // 2}H", data))


def adjusted(check: int, old: bytes, new: bytes) -> int:
    """RFC 1624, equation 3."""
    inverse = bytes(octet ^ 0xFF for octet in old)
    return 0xFFFF ^ folded((0xFFFF ^ check) + words(inverse) + words(new))


@dataclass
class _Frame:
    """Where a frame's headers are; ``tcp`` is 0 where there is none to look at."""

    data: bytearray
    l3: int = 0
    ether_type: int = 0
    tcp: int = 0
    version: int = 0

    def need(self, end: int) -> None:
        if len(self.data) < end:
            raise _Drop("cut short")

    def half(self, at: int) -> int:
        return int.from_bytes(self.data[at : at + 2], "big")

    @property
    def size(self) -> int:
        """Octets of an address."""
        return 4 if self.version == 4 else 16

    def address_at(self, source: bool) -> int:
        return self.l3 + (12 if self.version == 4 else 8) + (0 if source else self.size)

    def end(self, source: bool) -> tuple[int, int]:
        """Source or destination: address and port, as numbers."""
        at = self.address_at(source)
        address = int.from_bytes(self.data[at : at + self.size], "big")
        return address, self.half(self.tcp + (0 if source else 2))


def parsed(data: bytes) -> _Frame:
    """The parser; raises :class:`_Drop` where a header is cut short or makes no sense."""
    frame = _Frame(bytearray(data))
    frame.need(14)
    frame.l3, frame.ether_type = 14, frame.half(12)
    if frame.ether_type == 0x8100:
        frame.need(18)
        frame.l3, frame.ether_type = 18, frame.half(16)
    at = frame.l3
    if frame.ether_type == 0x0806:
        frame.need(at + 28)
    elif frame.ether_type == 0x0800:
        frame.need(at + 20)
        length = (data[at] & 0xF) * 4
        if data[at] >> 4 != 4 or length < 20:
            raise _Drop("no IPv4 header")
        frame.need(at + length)
        frame.version = 4
        if data[at + 9] == 6 and not frame.half(at + 6) & 0x3FFF:
            frame.tcp = at + length
    elif frame.ether_type == 0x86DD:
        frame.need(at + 40)
        if data[at] >> 4 != 6:
            raise _Drop("no IPv6 header")
        frame.version = 6
        if data[at + 6] == 6:
            frame.tcp = at + 40
    if frame.tcp:
        frame.need(frame.tcp + 20)
    return frame


@dataclass
class Model:
    """A switch that runs the program.

    ``tables`` are by name: key (numbers in the order of the fields) -> call. Of the two LPM tables
    a key is (address, prefix length). ``bare_syn`` is that table's default action.
    """

    tables: dict[str, dict[tuple[int, ...], Call]] = field(default_factory=dict)
    bare_syn: str = "syn_to_frontend"
    flood: tuple[int, ...] = ()

    def rules(self, entries: Mapping[tuple[str, tuple[int, ...]], Call]) -> None:
        """Have exactly these entries in the tables that rules are made of."""
        for name in _RULE_TABLES:
            self.tables[name] = {}
        for (name, key), call in entries.items():
            self.tables[name][key] = call

    def _lookup(self, table: str, *key: int) -> Call | None:
        return self.tables.get(table, {}).get(key)

    def _longest(self, frame: _Frame) -> Call | None:
        bits = frame.size * 8
        at = frame.address_at(False)
        address = int.from_bytes(frame.data[at : at + frame.size], "big")
        routes = self.tables.get("ipv4_lpm" if frame.version == 4 else "ipv6_lpm", {})
        for length in range(bits, -1, -1):
            prefix = address >> (bits - length) << (bits - length)
            if call := routes.get((prefix, length)):
                return call
        return None

    def process(self, data: bytes, port: int) -> list[Out]:
        """What comes out for a frame that comes in by ``port``; nothing: it is dropped."""
        try:
            return self._process(data, port)
        except _Drop:
            return []

    def _process(self, data: bytes, port: int) -> list[Out]:
        frame = parsed(data)
        if frame.version == 4:
            header = bytes(frame.data[frame.l3 : frame.l3 + (frame.data[frame.l3] & 0xF) * 4])
            if 0xFFFF ^ folded(words(header[:10] + header[12:])) != frame.half(frame.l3 + 10):
                raise _Drop("damaged")
        if frame.tcp and (reason := self._apply_rule(frame)):
            return [Out(CPU_PORT, bytes(frame.data), reason)]
        if frame.ether_type == 0x0806 and (answer := self._answer_arp(frame)):
            return [Out(port, answer)]
        if frame.data[0] & 1:
            return [Out(to, self._finished(frame)) for to in self.flood if to != port]
        if self._lookup("my_mac", int.from_bytes(frame.data[:6], "big")):
            if reason := self._route(frame):
                return [Out(CPU_PORT, self._finished(frame), reason)]
            return self._bridge(frame, routed=True)
        return self._bridge(frame, routed=False)

    def _apply_rule(self, frame: _Frame) -> int:
        """Rewrite; returns why the CPU gets the packet."""
        key = frame.end(True) + frame.end(False)
        family = f"v{frame.version}"
        call = self._lookup(f"to_owner_{family}", *key)
        from_client = call is not None
        call = call or self._lookup(f"to_client_{family}", *key)
        if call is None:
            return 0
        if call.action == "lock":
            raise _Drop("locked")
        if from_client and frame.data[frame.tcp + 13] & (_SYN | _ACK) == _SYN:
            return REASON_BARE_SYN if self.bare_syn == "syn_to_cpu" else 0
        if call.action == f"send_to_owner_{family}":
            self._rewrite(frame, False, call.params)
        elif call.action == f"speak_as_service_{family}":
            self._rewrite(frame, True, call.params)
        return 0

    def _rewrite(self, frame: _Frame, source: bool, params: tuple[int, ...]) -> None:
        address, port = params
        at, port_at = frame.address_at(source), frame.tcp + (0 if source else 2)
        new = address.to_bytes(frame.size, "big"), port.to_bytes(2, "big")
        old = bytes(frame.data[at : at + frame.size] + frame.data[port_at : port_at + 2])
        check = adjusted(frame.half(frame.tcp + 16), old, b"".join(new))
        frame.data[frame.tcp + 16 : frame.tcp + 18] = check.to_bytes(2, "big")
        frame.data[at : at + frame.size] = new[0]
        frame.data[port_at : port_at + 2] = new[1]

    def _answer_arp(self, frame: _Frame) -> bytes | None:
        arp = frame.data[frame.l3 : frame.l3 + 28]
        call = self._lookup("arp", int.from_bytes(arp[24:28], "big"))
        if arp[:4] != b"\0\1\x08\0" or arp[6:8] != b"\0\1" or call is None:
            return None
        mac = call.params[0].to_bytes(6, "big")
        answer = arp[:6] + b"\0\2" + mac + arp[24:28] + arp[8:14] + arp[14:18]
        between = frame.data[12 : frame.l3]
        return bytes(arp[8:14] + mac + between + answer + frame.data[frame.l3 + 28 :])

    def _route(self, frame: _Frame) -> int:
        """Next hop's MAC address, one hop less; returns why the CPU gets the packet."""
        if not frame.version:
            return REASON_LOCAL
        call = self._longest(frame)
        if call is not None and call.action == "to_cpu":
            return REASON_LOCAL
        hops = frame.l3 + (8 if frame.version == 4 else 7)
        if frame.data[hops] <= 1:
            return REASON_HOPS
        if call is None or call.action != "via":
            raise _Drop("no route")
        frame.data[hops] -= 1
        neighbour = self._lookup("next_hops", *call.params)
        if neighbour is None:
            raise _Drop("no neighbour")
        frame.data[:6] = neighbour.params[0].to_bytes(6, "big")
        return 0

    def _bridge(self, frame: _Frame, routed: bool) -> list[Out]:
        call = self._lookup("bridge", int.from_bytes(frame.data[:6], "big"))
        if call is None:
            raise _Drop("unknown MAC address")
        (port,) = call.params
        mac = self._lookup("port_mac", port)
        if routed and mac:
            frame.data[6:12] = mac.params[0].to_bytes(6, "big")
        return [Out(port, self._finished(frame))]

    def _finished(self, frame: _Frame) -> bytes:
        if frame.version == 4:
            at, length = frame.l3, (frame.data[frame.l3] & 0xF) * 4
            frame.data[at + 10 : at + 12] = bytes(2)
            check = 0xFFFF ^ folded(words(bytes(frame.data[at : at + length])))
            frame.data[at + 10 : at + 12] = check.to_bytes(2, "big")
        return bytes(frame.data)
