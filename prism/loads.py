"""How many client connections each backend has, as far as one node can know.

Backends tell their callers how many connections they own (``STATE``, docs/protocol.md). Between two
such messages a node adds what it has handed over itself since, and what is on its way or being
relayed. So connections count from the decision until their end, whoever sent them there.
"""

from __future__ import annotations

from collections import Counter

from prism.handoff.connection import node_of

__all__ = ["Loads"]


class Loads:
    """Counts by node and worker; sans-I/O."""

    __slots__ = ("_since", "_told", "_under_way")

    def __init__(self) -> None:
        self._told: dict[str, dict[str, int]] = {}
        self._since: dict[str, dict[str, int]] = {}
        self._under_way: Counter[str] = Counter()

    def of(self, node: str) -> int:
        """The connections of a node."""
        count = self._under_way[node]
        for counts in (self._told, self._since):
            if node in counts:
                count += sum(counts[node].values())
        return count

    def opened(self, node: str) -> None:
        """A handoff to ``node``, or a request relayed there, has begun."""
        self._under_way[node] += 1

    def closed(self, node: str) -> None:
        """It has ended."""
        self._under_way[node] = max(0, self._under_way[node] - 1)

    def handed_over(self, worker: str) -> None:
        """A worker has one more connection, which it has not told of yet."""
        since = self._since.setdefault(node_of(worker), {})
        since[worker] = since.get(worker, 0) + 1

    def told(self, worker: str, connections: int) -> None:
        """A worker says how many it has; its answers to all earlier handoffs came before."""
        node = node_of(worker)
        self._told.setdefault(node, {})[worker] = connections
        self._since.get(node, {}).pop(worker, None)

    def lost(self, worker: str) -> None:
        """There is no link to a worker any more: nothing is known."""
        node = node_of(worker)
        for counts in (self._told, self._since):
            counts.get(node, {}).pop(worker, None)

    def snapshot(self) -> dict[str, int]:
        """By node, for the status document."""
        names = {*self._told, *self._since, *self._under_way}
        return {name: self.of(name) for name in sorted(names)}
