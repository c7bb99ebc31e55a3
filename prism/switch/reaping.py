"""Deletes the rules of nodes that are dead, and lets their clients know.

A node is dead when its lease has run out, when it has ended it, or when the table was adopted
with rules of a node that nobody knows. Clients of a dead node are provoked, see
:mod:`prism.switch.provoke`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from prism.switch.base import Node, RuleStore

__all__ = ["ReapCounters", "Reaper"]

_BATCH: Final = 256
_PAUSE: Final = 0.001  # after each batch: at most some 250,000 stray segments a second


@dataclass(slots=True)
class ReapCounters:
    """What was found dead since the start."""

    expired_nodes: int = 0
    expired_rules: int = 0
    scans: int = 0


class Reaper:
    """Looks at the leases again and again.

    Attributes:
        counters: what has happened so far.
        nodes: the nodes by their id, as of the last look.
        trusted: whether an owner without a lease is dead for certain: not before the grace
            after the start is over, in which nodes that were cut off renew their leases.
    """

    def __init__(
        self,
        store: RuleStore,
        on_deleted: Callable[[bytes], object],
        *,
        interval: float = 0.1,
        grace: float = 1.0,
        full_interval: float = 60.0,
    ) -> None:
        """Prepare; :meth:`run` does the work.

        Args:
            store: the rules and nodes.
            on_deleted: told the packed flow of every rule that was deleted.
            interval: seconds between two looks at the leases.
            grace: seconds after the start in which nothing is deleted.
            full_interval: seconds between two looks for rules of nodes that are not known at all.
        """
        self.counters = ReapCounters()
        self.nodes: dict[int, Node] = {}
        self.trusted = False
        self._store = store
        self._on_deleted = on_deleted
        self._interval = interval
        self._grace = grace
        self._full_interval = full_interval
        self._ended: set[int] = set()  # dead nodes whose rules are gone

    def refresh(self) -> None:
        """Look at the nodes now."""
        self.nodes = {node.id: node for node in self._store.nodes()}

    def find(self, node: int) -> Node | None:
        """A node by its id; one that is not known yet is looked for."""
        found = self.nodes.get(node)
        if found is None:
            self.refresh()
            found = self.nodes.get(node)
        return found

    async def run(self) -> None:
        """Reap until cancelled."""
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self._grace)
        self.trusted = True
        next_full = loop.time()
        while True:
            self.refresh()
            dead = {node.id for node in self.nodes.values() if self._has_ended(node)}
            self._ended &= dead
            fresh = dead - self._ended
            self.counters.expired_nodes += len(fresh)
            if loop.time() >= next_full:
                await self._reap(None)
                next_full = loop.time() + self._full_interval
            elif fresh:
                await self._reap(fresh)
            self._ended |= fresh
            await asyncio.sleep(self._interval)

    def _has_ended(self, node: Node) -> bool:
        """Whether a node has no lease, after ending one that ran out."""
        return not node.alive and (node.lease == 0 or self._store.end_lease(node.id))

    def _is_dead(self, node: int) -> bool:
        known = self.nodes.get(node)
        return known is None or not known.alive

    async def _reap(self, dead: set[int] | None) -> None:
        """Delete the rules of these nodes; ``None``: of every node without a lease."""
        self.counters.scans += 1
        # A table may have a million rules: read it beside the loop.
        found = await asyncio.to_thread(self._scan, dead)
        for start in range(0, len(found), _BATCH):
            self.refresh()  # a node may have come back meanwhile
            for flow, gen, owner in found[start : start + _BATCH]:
                if self._is_dead(owner) and self._store.delete(flow, gen):
                    self.counters.expired_rules += 1
                    self._on_deleted(flow)
            await asyncio.sleep(_PAUSE)

    def _scan(self, dead: set[int] | None) -> list[tuple[bytes, int, int]]:
        nodes = self.nodes
        alive = {node.id for node in nodes.values() if node.alive}
        return [
            (rule.flow, rule.gen, rule.owner)
            for rule in self._store.rules()
            if (rule.owner not in alive if dead is None else rule.owner in dead)
        ]
