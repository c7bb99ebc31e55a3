"""Asks the owner of a flow whether its connection still exists, for a client's bare SYN.

The switch's data plane sends a bare SYN on a flow with a rule here instead of forwarding it: the
client may be using its port again, or somebody may be forging (docs/protocol.md, "Ask"). Sans-I/O
but for the timers, which are the event loop's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from prism.flow import Endpoint
from prism.switch.base import Node, PacketStore, Rule
from prism.switch.control import AGENT, Message, Op, Status

__all__ = ["ASK_DELAYS", "AskCounters", "Asker"]

ASK_DELAYS: Final = (0.05, 0.06, 0.09)
"""Seconds to wait for the answer to each QUERY: 200 ms together, then the SYN is dropped."""


@dataclass(slots=True)
class AskCounters:
    """What became of the SYNs since the start."""

    asked: int = 0
    alive: int = 0
    gone: int = 0
    owner_dead: int = 0
    unanswered: int = 0
    overflows: int = 0


class _Ask:
    __slots__ = ("attempt", "packet", "rule", "sequences", "timer")

    def __init__(self, packet: bytes, rule: Rule) -> None:
        self.packet = packet
        self.rule = rule
        self.attempt = 0
        self.sequences: list[int] = []
        self.timer: asyncio.TimerHandle | None = None


class Asker:
    """The questions that are open, one for each flow at most.

    Attributes:
        counters: what has happened so far.
    """

    def __init__(
        self,
        store: PacketStore,
        find: Callable[[int], Node | None],
        send: Callable[[Message, Endpoint], None],
        inject: Callable[[bytes], object],
        *,
        limit: int = 4096,
    ) -> None:
        """Begin with no question.

        Args:
            store: the rules.
            find: a node by its id, ``None`` if there is none.
            send: sends a message to a node.
            inject: puts a packet back into the switch.
            limit: questions open at once; more SYNs are dropped.
        """
        self.counters = AskCounters()
        self._store = store
        self._find = find
        self._send = send
        self._inject = inject
        self._limit = limit
        self._asks: dict[bytes, _Ask] = {}
        self._sequences: dict[int, bytes] = {}
        self._seq = time.time_ns()

    def ask(self, rule: Rule, packet: bytes, *, trust_leases: bool) -> None:
        """Ask the rule's owner; the SYN waits, and its repetitions are dropped meanwhile.

        Args:
            rule: the flow's rule.
            packet: the SYN.
            trust_leases: whether an owner without lease is dead for certain.
        """
        if rule.flow in self._asks:
            return
        owner = self._find(rule.owner)
        if trust_leases and (owner is None or not owner.alive):
            self.counters.owner_dead += 1
            self._store.delete(rule.flow, rule.gen)
            self._inject(packet)
            return
        if len(self._asks) >= self._limit:
            self.counters.overflows += 1
            return
        self.counters.asked += 1
        ask = self._asks[rule.flow] = _Ask(packet, rule)
        self._try(ask)

    def on_reply(self, reply: Message) -> None:
        """Take an owner's answer; one to no question is ignored."""
        flow = self._sequences.get(reply.seq)
        ask = None if flow is None else self._asks.get(flow)
        if ask is None or reply.flow != flow or reply.node != AGENT:
            return
        rule = ask.rule
        if reply.owner != rule.owner or reply.status not in (Status.OK, Status.NOENT):
            return
        self._forget(ask)
        if reply.status == Status.OK:
            self.counters.alive += 1
            self._store.pass_syn(rule.flow)
        else:
            self.counters.gone += 1
            self._store.delete(rule.flow, rule.gen)  # the owner has, unless its DELETE was lost
        self._inject(ask.packet)

    def close(self) -> None:
        """Drop every question."""
        for ask in list(self._asks.values()):
            self._forget(ask)

    def _try(self, ask: _Ask) -> None:
        seq = self._seq
        self._seq = seq + 1
        ask.sequences.append(seq)
        self._sequences[seq] = ask.rule.flow
        owner = self._find(ask.rule.owner)
        if owner is not None:
            rule = ask.rule
            query = Message(Op.QUERY, AGENT, seq, flow=rule.flow, owner=rule.owner, gen=rule.gen)
            self._send(query, owner.endpoint)
        delay = ASK_DELAYS[ask.attempt]
        ask.timer = asyncio.get_running_loop().call_later(delay, self._on_timeout, ask)

    def _on_timeout(self, ask: _Ask) -> None:
        ask.attempt += 1
        if ask.attempt < len(ASK_DELAYS):
            self._try(ask)
            return
        self.counters.unanswered += 1
        self._forget(ask)

    def _forget(self, ask: _Ask) -> None:
        if ask.timer is not None:
            ask.timer.cancel()
        for seq in ask.sequences:
            self._sequences.pop(seq, None)
        self._asks.pop(ask.rule.flow, None)
