"""Looks after rules that a node and the switch may see differently.

The occasions: a node starts and the switch still has rules of its last life; a handoff gave up
without knowing what the switch had done (rule 7 of ``handoff/machine.py``); the switch has lost
its table; the node was late to renew its lease, and was perhaps taken for dead. Everything here
is repeated until the switch answers, and bounded.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from prism.errors import SwitchError
from prism.flow import Flow
from prism.switch.control import Message, Op, Status
from prism.switch.provoke import Provoker

if TYPE_CHECKING:
    from prism.node import Node

__all__ = ["Reconciler"]

log = logging.getLogger(__name__)

PAUSE = 0.5  # seconds between two rounds
MAX_FLOWS = 65536  # flows waiting to be looked at; what is beyond is left to the lease


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
        if not dead:
            return
        try:
            provoker: Provoker | None = Provoker()
        except SwitchError as error:
            log.warning("clients of an earlier life are not told of its end: %s", error)
            provoker = None
        for rule in dead:
            await self._bury(rule, provoker)
        if provoker is not None:
            provoker.close()
        log.info("removed %d rules of an earlier life", len(dead))

    async def _bury(self, rule: Message, provoker: Provoker | None) -> None:
        """Remove a rule of an earlier life, and make its client ask after the connection.

        The kernel ends the connections of a process that dies, but not those that were in repair
        mode, on their way from one node to another: their clients would wait for ever.
        """
        switch, gen = self._node.switch, rule.gen
        if rule.locked:  # nothing would get through
            reply = await switch.request(Op.CHOWN, rule.flow, gen=gen, endpoint=rule.owner_endpoint)
            if reply is not None and reply.status == Status.OK:
                gen = reply.gen
        if provoker is not None:
            # As the owner, whose packets the switch makes the service's. What the client answers
            # is reset here, or by a frontend when the rule is gone by then.
            client = Flow.unpack(rule.flow).client
            provoker.provoke(Flow(client, rule.owner_endpoint).pack())
        reply = await switch.request(Op.DELETE, rule.flow, gen=gen)
        if not _settles(reply):  # not answered, or changed by a request whose answer was lost
            self.check(rule.flow)

    async def _check_all(self) -> None:
        try:
            while self._flows:
                for flow in list(self._flows):
                    if await self._check_one(flow):
                        self._flows.discard(flow)
                await asyncio.sleep(PAUSE)
        finally:
            self._checking = False

    async def _check_one(self, flow: bytes) -> bool:
        """Whether this flow needs no further look."""
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
            return await self._delete(rule)
        reply = await node.switch.request(Op.CHOWN, flow, gen=rule.gen, endpoint=connection.local)
        if reply is None or reply.status != Status.OK:
            return False
        if node.keeps_rules:
            node.rule_changed(connection, reply.gen)
            return True
        return await self._delete(reply)

    async def _delete(self, rule: Message) -> bool:
        """Whether the rule is gone; where it has changed meanwhile it is looked at again."""
        return _settles(await self._node.switch.request(Op.DELETE, rule.flow, gen=rule.gen))


def _settles(reply: Message | None) -> bool:
    """Whether an answer to DELETE leaves nothing to ask: it came, and was not of another state."""
    return reply is not None and reply.status != Status.STALE
