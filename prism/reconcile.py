"""Looks after rules that a node and the switch may see differently.

The occasions: a node starts and the switch still has rules of its last life; a handoff gave up
without knowing what the switch had done (rule 7 of ``handoff/machine.py``); the switch has lost
its table; the node was late to renew its lease, and was perhaps taken for dead. Everything here
is repeated until the switch answers, and bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from prism.errors import SwitchError
from prism.flow import Flow
from prism.switch.control import Message, Op, Status
from prism.switch.provoke import ANSWER_TIME, Provoker

if TYPE_CHECKING:
    from prism.node import Node

__all__ = ["Reconciler"]

log = logging.getLogger(__name__)

PAUSE = 0.5  # seconds between two rounds
MAX_FLOWS = 65536  # flows waiting to be looked at; what is beyond is left to the lease
PROVOCATIONS = 2  # of each client: a stray segment may be lost, or be one too many to be answered
_BATCH = 256  # stray segments, and then a moment for other work


class Reconciler:
    """One node's housekeeping of rules."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._flows: set[bytes] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._checking = False

    def start(self) -> None:
        """Remove what an earlier life of this node has left in the switch."""
        self._spawn(self._remove_leftovers())

    def check(self, flow: bytes) -> None:
        """Bring the rule of a flow in line with the connection, when the switch answers again."""
        if len(self._flows) >= MAX_FLOWS:
            log.error("too many unsure rules; leaving one to the lease")
            return
        self._flows.add(flow)
        if not self._checking:
            self._checking = True
            self._spawn(self._check_all())

    def table_lost(self) -> None:
        """The switch has a new, empty table: add the rules again."""
        log.warning("the switch has lost its rules; adding this node's again")
        self._spawn(self._node.restore_rules())

    def lapsed(self) -> None:
        """The lease was renewed late: connections without a rule cannot be reached any more."""
        flows = [flow for flow, c in self._node.connections.items() if c.gen]
        log.warning("the lease had run out; looking after %d rules", len(flows))
        for flow in flows:
            self.check(flow)

    async def close(self) -> None:
        """Stop."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, work: object) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _remove_leftovers(self) -> None:
        switch = self._node.switch
        while True:
            try:
                rules = [rule async for rule in switch.list(switch.id)]
                break
            except SwitchError as error:
                log.debug("cannot list this node's rules yet: %s", error)
                await asyncio.sleep(PAUSE)
        dead = [rule for rule in rules if not self._node.alive(rule.flow, rule.gen)]
        if dead:
            await self._bury(dead)
            log.info("removed %d rules of an earlier life", len(dead))

    async def _bury(self, rules: Sequence[Message]) -> None:
        """Remove rules without a connection, and make their clients ask after the connections.

        The kernel ends the connections of a process that dies, but not those that were in repair
        mode, on their way from one node to another: their clients would wait for ever.

        The rules stay while the answers come: they lead to this host, whose kernel resets what it
        does not know, and only an owner's reset gets through. With its rule removed in between it
        would be dropped as a former owner's. Later answers go to the frontends, who reset as well.
        """
        graves = [(rule, await self._unlock(rule)) for rule in rules]
        try:
            provoker = Provoker()
        except SwitchError as error:
            log.warning("clients of lost connections are not told of their end: %s", error)
        else:
            with contextlib.closing(provoker):
                for _ in range(PROVOCATIONS):
                    await self._provoke(provoker, rules)
                    await asyncio.sleep(ANSWER_TIME)
        for rule, gen in graves:
            reply = await self._node.switch.request(Op.DELETE, rule.flow, gen=gen)
            if not _settles(reply):  # not answered, or the flow is in use again
                self.check(rule.flow)

    async def _unlock(self, rule: Message) -> int:
        """Let a rule's packets through, for a locked one swallows them; its generation then."""
        while rule.locked:
            reply = await self._node.switch.request(
                Op.CHOWN, rule.flow, gen=rule.gen, endpoint=rule.owner_endpoint
            )
            if reply is not None:
                return reply.gen if reply.status == Status.OK else rule.gen
            await asyncio.sleep(PAUSE)
        return rule.gen

    @staticmethod
    async def _provoke(provoker: Provoker, rules: Sequence[Message]) -> None:
        """Send each client a segment as the owner, whose packets the switch makes the service's."""
        for count, rule in enumerate(rules, 1):
            provoker.provoke(Flow(Flow.unpack(rule.flow).client, rule.owner_endpoint).pack())
            if count % _BATCH == 0:
                await asyncio.sleep(0.001)

    async def _check_all(self) -> None:
        try:
            while self._flows:
                orphans: list[Message] = []
                for flow in list(self._flows):
                    if await self._check_one(flow, orphans):
                        self._flows.discard(flow)
                if orphans:
                    await self._bury(orphans)
                await asyncio.sleep(PAUSE)
        finally:
            self._checking = False

    async def _check_one(self, flow: bytes, orphans: list[Message]) -> bool:
        """Whether this flow needs no further look; its rule may have to be buried."""
        node = self._node
        if node.in_transit(flow):
            return False
        rule = await node.switch.request(Op.GET, flow)
        if rule is None:
            return False
        if node.in_transit(flow):  # it began while the switch was asked
            return False
        connection = node.connections.get(flow)
        if rule.status != Status.OK:
            if connection is not None and connection.gen:
                connection.close(abort=True)
            return True
        if rule.owner != node.switch.id:
            if connection is not None:
                connection.close(abort=True)
            return True
        if connection is None:
            orphans.append(rule)
            return True
        reply = await node.switch.request(Op.CHOWN, flow, gen=rule.gen, endpoint=connection.local)
        if reply is None or reply.status != Status.OK:
            return False
        if node.keeps_rules:
            node.rule_changed(connection, reply.gen)
            return True
        return _settles(await node.switch.request(Op.DELETE, flow, gen=reply.gen))


def _settles(reply: Message | None) -> bool:
    """Whether an answer to DELETE leaves nothing to ask: it came, and was not of another state."""
    return reply is not None and reply.status != Status.STALE
