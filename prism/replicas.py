"""Which replicas there are now, as one node sees it: where reads and writes of a key go.

Every node of a cluster that replicates, frontends too, hears from each backend what view it knows,
whether it serves, and how busy it is. What comes out here is a good guess: the backend that gets a
request knows better, and passes it on where it has to.
"""

from __future__ import annotations

import asyncio
from collections.abc import Container, Sequence
from typing import Any, Final

from prism.config import Config
from prism.http.head import RequestHead
from prism.placement import Node, Replicated
from prism.replication.links import Link, Notice
from prism.replication.replicator import Replicator
from prism.replication.views import NO_VIEW, View
from prism.tls.identity import Identity

__all__ = ["Replicas", "key_text"]

READS: Final = (b"GET", b"HEAD")


def key_text(key: bytes) -> str:
    """A key as placements have it."""
    return key.decode("utf-8", "surrogateescape")


class Replicas:
    """See the module.

    Args:
        config: of a cluster that replicates.
        placement: the one over all nodes.
        identity: this node's.
        own_node: its name.

    Attributes:
        local: this node's own part, on a backend.
        links: to all other backends.
    """

    def __init__(
        self, config: Config, placement: Replicated, identity: Identity, own_node: str
    ) -> None:
        self.placement = placement
        self.own_node = own_node
        self.patience = 3 * config.cluster.lease + 2.0
        self.local: Replicator | None = None
        self._notices: dict[str, Notice] = {}
        self._sent: dict[str, int] = {}
        self._turn = 0
        self._changed = asyncio.Event()
        self.links = {
            node.name: Link(own_node, node.name, node.replication_endpoint, identity, self._heard)
            for node in placement.nodes
            if node.name != own_node
        }

    def start(self) -> None:
        """Begin to listen to the backends."""
        for link in self.links.values():
            link.start()

    async def close(self) -> None:
        """Close all connections to them."""
        await asyncio.gather(*(link.close() for link in self.links.values()))

    def _heard(self, name: str, notice: Notice | None) -> None:
        before = self._notices.pop(name, None)
        self._sent[name] = 0
        if notice is not None:
            self._notices[name] = notice
        if before is None or notice is None or before[:-1] != notice[:-1]:
            self._changed.set()
            self._changed = asyncio.Event()

    async def changed(self, seconds: float) -> None:
        """Wait until something about the backends changes; at most so long."""
        if self.local is not None:
            await self.local.changed(seconds)
            return
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            return

    # -- who is there -----------------------------------------------------------------------------

    @property
    def view(self) -> View:
        """The latest view that this node knows."""
        if self.local is not None:
            return self.local.view
        latest = max(self._notices.values(), key=lambda notice: notice.epoch, default=None)
        if latest is None:
            return NO_VIEW
        return View(latest.epoch, latest.serving, latest.joining)

    def serves(self, name: str) -> bool:
        """Whether a backend says that it serves."""
        if name == self.own_node and self.local is not None:
            return self.local.serves
        notice = self._notices.get(name)
        return notice is not None and notice.state == "serving"

    def order(self, key: bytes) -> Sequence[str]:
        """The names of a key's replicas, in order."""
        return [node.name for node in self.placement.order(key_text(key))]

    def place(
        self, head: RequestHead, avoid: Container[str] = (), unfit: Container[str] = ()
    ) -> Node:
        """The backend for a request: for writes the first live replica, for reads the least busy.

        A backend that may answer takes it itself. Where nobody seems to be there, it is the
        preferred replica: whoever is asked then waits for better times.

        Args:
            head: the request's.
            avoid: names of those that have just failed.
            unfit: names of those that better have nothing to read from them.
        """
        order = self.placement.order(key_text(head.key))
        serving = self.view.serving
        live = [
            node
            for node in order
            if node.name in serving and node.name not in avoid and self._there(node.name)
        ]
        read = head.method in READS
        if self.local is not None:
            name = self._local_choice(head.key, read=read)
            if name and name not in avoid:
                return next(node for node in order if node.name == name)
        if not live:
            return next((node for node in order if node.name not in avoid), order[0])
        if not read:
            return live[0]
        ready = [node for node in live if self.serves(node.name)] or live
        fit = [node for node in ready if node.name not in unfit] or ready
        return self._least_busy(fit)

    def _local_choice(self, key: bytes, *, read: bool) -> str:
        """What this backend knows for sure; empty: nothing."""
        replicator = self.local
        if replicator is None:
            return ""
        if not read:
            head = replicator.head(key)
            return head if head == self.own_node or self._there(head) else ""
        reading = replicator.reading(key)
        return reading.node if reading.node == self.own_node or reading.why == "staged" else ""

    def _there(self, name: str) -> bool:
        return name in self._notices or (name == self.own_node and self.local is not None)

    def _least_busy(self, nodes: Sequence[Node]) -> Node:
        self._turn += 1
        start = self._turn % len(nodes)
        turned = (*nodes[start:], *nodes[:start])
        best = min(turned, key=self._busy)
        self._sent[best.name] = self._sent.get(best.name, 0) + 1
        return best

    def _busy(self, node: Node) -> float:
        notice = self._notices.get(node.name)
        load = notice.load if notice is not None else 0
        return (load + self._sent.get(node.name, 0)) / node.weight

    def status(self) -> dict[str, Any]:
        """For the status document."""
        view = self.view
        found: dict[str, Any] = {
            "epoch": view.epoch,
            "serving": list(view.serving),
            "joining": list(view.joining),
            "nodes": {name: notice.state for name, notice in sorted(self._notices.items())},
        }
        return {"replicas": found}
