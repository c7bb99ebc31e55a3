"""Takes the packets that the classifier sends to the agent, and puts them back in time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from prism.switch.base import PacketStore, Rule
from prism.switch.hold import HoldBuffer, parse_segment
from prism.switch.tun import Tun

__all__ = ["Holder"]

_READ_BATCH: Final = 256
_CHECK_LIMIT: Final = 1024  # flows looked at in one check
_CHECK_INTERVAL: Final = 0.02


class Holder:
    """Moves packets between the TUN device and the hold buffer.

    A packet whose flow is not locked any more goes straight back. The others wait for the event
    that their rule was unlocked; a check every 20 ms, while there are any, makes up for an event
    that was lost, and drops what has waited too long.

    Attributes:
        strangers: packets that are no TCP segments of a flow; dropped.
        refused: packets of locked flows that were dropped because nothing is to be held.
        missed: flows released by the check, for want of an event.
    """

    def __init__(
        self,
        store: PacketStore,
        tun: Tun,
        buffer: HoldBuffer,
        on_syn: Callable[[Rule, bytes], None],
        *,
        hold: bool = True,
        hold_time: float = 1.0,
    ) -> None:
        """Prepare; :meth:`start` begins to read.

        Args:
            store: the rules and their events.
            tun: the device.
            buffer: where packets wait.
            on_syn: takes bare SYNs of flows with a rule that is not locked.
            hold: ``False``: drop the packets of locked flows.
            hold_time: seconds a packet waits at most.
        """
        self.strangers = 0
        self.refused = 0
        self.missed = 0
        self._store = store
        self._tun = tun
        self._buffer = buffer
        self._on_syn = on_syn
        self._hold = hold
        self._hold_time = hold_time
        self._check_timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop

    def start(self) -> None:
        """Begin to read packets and events."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._tun.fd, self._on_packets)
        self._loop.add_reader(self._store.events_fd, self._on_events)

    def close(self) -> None:
        """Put everything back and stop. The device stays open."""
        self._loop.remove_reader(self._tun.fd)
        self._loop.remove_reader(self._store.events_fd)
        if self._check_timer is not None:
            self._check_timer.cancel()
            self._check_timer = None
        for flow in list(self._buffer.older_than(float("inf"))):
            self.release(flow)

    def release(self, flow: bytes) -> None:
        """Put the packets of a flow back into the switch, in their order."""
        write = self._tun.write
        for packet in self._buffer.release(flow):
            write(packet)

    def _on_packets(self) -> None:
        read = self._tun.read
        for _ in range(_READ_BATCH):
            packet = read()
            if packet is None:
                return
            self._on_packet(packet)

    def _on_packet(self, packet: bytes) -> None:
        segment = parse_segment(packet)
        if segment is None:
            self.strangers += 1
            return
        flow = segment.flow
        rule = self._store.get(flow)
        if rule is not None and rule.locked:
            self._keep(flow, packet)
            return
        if flow in self._buffer:  # unlocked, and the event is still to come: keep the order
            self.release(flow)
        if rule is not None and segment.is_bare_syn:
            self._on_syn(rule, packet)
        else:
            self._tun.write(packet)

    def _keep(self, flow: bytes, packet: bytes) -> None:
        if not self._hold:
            self.refused += 1
            return
        self._buffer.keep(flow, packet, self._loop.time())
        if self._check_timer is None:
            self._check_timer = self._loop.call_later(_CHECK_INTERVAL, self._check)

    def _on_events(self) -> None:
        for event in self._store.read_events():
            self.release(event.flow)

    def _check(self) -> None:
        now = self._loop.time()
        oldest = now - self._hold_time
        expired = set(self._buffer.older_than(oldest))
        for count, flow in enumerate(self._buffer.older_than(now - _CHECK_INTERVAL)):
            if count == _CHECK_LIMIT:
                break
            rule = self._store.get(flow)
            if rule is None or not rule.locked:
                self.missed += 1
                self.release(flow)
            elif flow in expired:
                self._buffer.drop(flow)
        self._check_timer = (
            self._loop.call_later(_CHECK_INTERVAL, self._check) if len(self._buffer) else None
        )
