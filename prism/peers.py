"""The other nodes, as one node sees them: the links to them, and who is better left alone now."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic

from prism.checking import Checker
from prism.config import Config
from prism.config_health import HealthConfig
from prism.handoff.channel import Channel
from prism.handoff.link import Link
from prism.handoff.wire import State
from prism.health import Health
from prism.loads import Loads
from prism.placement import Node, Placement
from prism.pools import Pool, Pools
from prism.telemetry.metrics import Metrics

__all__ = ["Peers"]

# Seconds for which a worker that did not answer gets no further offers: at the first time, when it
# may just be busy, and at most; doubled each time until it answers again.
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0


class Peers:
    """Links to every worker of every backend but this process's own node."""

    def __init__(
        self, config: Config, channel: Channel, own_node: str, metrics: Metrics | None = None
    ) -> None:
        self.loads = Loads()
        self.pools = Pools(config, self.loads)
        names = (node.name for node in self.pools.nodes)
        self.health = Health(config.health, names, own_node, metrics or Metrics())
        self.checker = Checker(self.health)
        self.own_node = own_node
        self.on_draining: Callable[[str], None] = lambda worker: None
        self._channel = channel
        channel.shared.on_link = self._on_link
        channel.shared.on_state = self._on_state
        self._links: dict[str, Link] = {}
        self._paused: dict[str, tuple[float, float]] = {}  # until when, and for how long

    @property
    def placement(self) -> Placement:
        """The placement over all nodes."""
        return self.pools.all.placement

    def connect(self) -> None:
        """Begin to keep the links up."""
        for node in self.pools.nodes:
            if node.name == self.own_node:
                continue
            for name, endpoint in zip(node.worker_names, node.handoff_endpoints, strict=True):
                if name not in self._links:
                    self._links[name] = self._channel.link(name, endpoint)
        self.checker.use(self.pools.checks())

    def change(self, pools: Pools, health: HealthConfig) -> None:
        """Place by other pools from now on. Links to nodes that left stay, unused."""
        self.pools = pools
        self.health.use(health, (node.name for node in pools.nodes))
        for name, link in self._links.items():
            self.health.linked(name, link.connected)
        self.connect()

    async def close(self) -> None:
        """End the checks."""
        await self.checker.close()

    def choose(self, pool: Pool, key: str, avoid: frozenset[str] = frozenset()) -> Node:
        """The node of a pool for a key, among those that are fit, and none of ``avoid``.

        Raises:
            NoNode: there is none.
            PlacementFault: an operator's function failed.
        """
        if pool.failover:
            avoid |= self.health.avoid(pool.names, pool.check)
        return pool.placement.choose(key, avoid)

    def _on_link(self, worker: str, up: bool) -> None:
        self.health.linked(worker, up)
        if not up:
            self.loads.lost(worker)

    def _on_state(self, worker: str, state: State) -> None:
        if state.draining:
            self.on_draining(worker)
        self.health.told(worker, state.draining)
        self.loads.told(worker, state.connections)

    async def wait_connected(self, seconds: float) -> None:
        """Wait until every link is up, ``seconds`` at most."""
        waiting = (link.wait_connected(seconds) for link in self._links.values())
        await asyncio.gather(*waiting)

    def link(self, node: Node, flow: bytes) -> tuple[str, Link | None]:
        """The worker of ``node`` for this flow, and the link to it if it can be used now."""
        name = node.worker_names[node.worker_for(flow)]
        link = self._links.get(name)
        if link is None or not link.connected:
            return name, None
        if self._paused and self._is_paused(name):
            return name, None
        return name, link

    def pause(self, name: str) -> None:
        """A worker did not answer: make no offers to it for a while."""
        now = monotonic()
        until, length = self._paused.get(name, (0.0, FIRST_PAUSE / 2))
        if now >= until:
            length = min(length * 2, LONGEST_PAUSE)
            self._paused[name] = (now + length, length)

    def answered(self, name: str) -> None:
        """A worker has answered: its next failure is a first one."""
        if self._paused:
            self._paused.pop(name, None)

    def _is_paused(self, name: str) -> bool:
        return name in self._paused and monotonic() < self._paused[name][0]

    def status(self) -> dict[str, bool]:
        """Which workers can be offered connections now."""
        return {
            name: link.connected and not self._is_paused(name) for name, link in self._links.items()
        }
