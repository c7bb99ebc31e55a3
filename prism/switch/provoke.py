"""A stray segment that makes a client ask after its connection.

When a node has died, its clients may wait for ever: nobody is left who could reset their
connections. A segment outside the client's window makes its kernel answer with an ACK (RFC 9293,
section 3.10.7.4), which the switch, with the rule gone, forwards to the frontend, whose kernel
knows no such connection and resets it. Nobody needs to know a sequence number for that.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import struct
from collections import deque
from typing import Final

from prism.errors import SwitchError
from prism.flow import FLOW_SIZE

__all__ = ["ANSWER_TIME", "Provoker", "checksum", "stray_segment"]

ANSWER_TIME: Final = 0.6
"""Seconds for an answer; Linux answers one segment a half second (tcp_invalid_ratelimit)."""
_MOST_AGAIN: Final = 65_536  # clients that wait to be provoked a second time
_BATCH: Final = 256  # of these at once

_V4_MAPPED: Final = bytes(10) + b"\xff\xff"
_ACK: Final = 0x10
_TCP: Final = 6
_HOPS: Final = 64
_IPV4 = struct.Struct("!BBHHHBBH4s4s")
_IPV6 = struct.Struct("!IHBB16s16s")
_TCP_HEADER = struct.Struct("!HHIIBBHHH")


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of an even number of octets."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def stray_segment(flow: bytes) -> bytes:
    """An IP packet with an empty ACK segment from a flow's service to its client.

    Its numbers are random: as good as always outside the window, and harmless inside.

    Raises:
        ValueError: ``flow`` has not 36 octets.
    """
    if len(flow) != FLOW_SIZE:
        raise ValueError(f"a packed flow has {FLOW_SIZE} octets, not {len(flow)}")
    client, service = flow[:16], flow[16:32]
    is_v4 = client.startswith(_V4_MAPPED)
    if is_v4:
        client, service = client[12:], service[12:]
    client_port, service_port = struct.unpack("!HH", flow[32:])
    seq, ack = secrets.randbits(32), secrets.randbits(32)
    size = _TCP_HEADER.size

    def header(check: int) -> bytes:
        return _TCP_HEADER.pack(service_port, client_port, seq, ack, 5 << 4, _ACK, 0, check, 0)

    pseudo = service + client + struct.pack("!HH", _TCP, size)
    segment = header(checksum(pseudo + header(0)))
    if not is_v4:
        return _IPV6.pack(6 << 28, size, _TCP, _HOPS, service, client) + segment
    # The kernel fills in the identification and the checksum of the header (raw(7)).
    return _IPV4.pack(0x45, 0, 20 + size, 0, 0, _HOPS, _TCP, 0, service, client) + segment


class Provoker:
    """Sends stray segments from raw sockets, which may name any source (raw(7)).

    Attributes:
        sent: segments sent.
        errors: segments that could not be sent.
    """

    def __init__(self) -> None:
        """Open the sockets, in the network namespace of the calling thread.

        Raises:
            SwitchError: no privilege (CAP_NET_RAW).
        """
        self.sent = 0
        self.errors = 0
        self._again: deque[tuple[float, bytes]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        try:
            self._v4 = socket.socket(
                socket.AF_INET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_RAW
            )
        except OSError as error:
            raise SwitchError(f"cannot open a raw socket: {error}; it needs CAP_NET_RAW") from error
        self._v6: socket.socket | None
        try:
            self._v6 = socket.socket(
                socket.AF_INET6, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_RAW
            )
        except OSError:  # a kernel without IPv6 has no flows of it
            self._v6 = None

    def provoke(self, flow: bytes) -> bool:
        """Send one stray segment to the client of a packed flow; whether it went out."""
        segment = stray_segment(flow)
        try:
            if segment[0] >> 4 == 4:
                self._v4.sendto(segment, (socket.inet_ntop(socket.AF_INET, flow[12:16]), 0))
            elif self._v6 is not None:
                self._v6.sendto(segment, (socket.inet_ntop(socket.AF_INET6, flow[:16]), 0))
        except OSError:  # no route, a full queue: the client finds out when it sends next
            self.errors += 1
            return False
        self.sent += 1
        return True

    def insist(self, flow: bytes) -> None:
        """Send one now and one later, for a segment may be lost, or be one too many to be answered.

        Not of more than 65,536 clients at a time: those beyond are provoked once. Needs a running
        event loop.
        """
        self.provoke(flow)
        if len(self._again) < _MOST_AGAIN:
            loop = asyncio.get_running_loop()
            self._again.append((loop.time() + ANSWER_TIME, flow))
            if self._timer is None:
                self._timer = loop.call_later(ANSWER_TIME, self._provoke_again, loop)

    def _provoke_again(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = loop.time()
        for _ in range(_BATCH):
            if not self._again or self._again[0][0] > now:
                break
            self.provoke(self._again.popleft()[1])
        if self._again:
            due = max(self._again[0][0], now + 0.001)  # a moment for other work
            self._timer = loop.call_at(due, self._provoke_again, loop)

    def close(self) -> None:
        """Close the sockets; nobody is provoked again. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._again.clear()
        self._v4.close()
        if self._v6 is not None:
            self._v6.close()
