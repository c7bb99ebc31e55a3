"""Placement: which backend a key belongs to, and which worker of it takes a connection.

Frontends and backends place by the same rules from the same list of nodes, so they agree on a
key's home without talking to each other.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from xxhash import xxh3_64_intdigest

from prism.config import Config, NodeConfig, PlacementConfig
from prism.errors import ConfigError, PrismError
from prism.flow import Endpoint
from prism.loading import load_function
from prism.loads import Loads

__all__ = [
    "Chosen",
    "LeastConnections",
    "NoNode",
    "Node",
    "Partitioned",
    "PlaceFunction",
    "Placement",
    "PlacementFault",
    "Replicated",
    "RoundRobin",
    "placement_from",
    "placement_of",
]

log = logging.getLogger(__name__)

_TWO_64 = float(1 << 64)


class NoNode(PrismError):
    """Every node is to be avoided: there is nobody to place a request at."""


@dataclass(frozen=True, slots=True)
class Node:
    """A backend, as its peers know it."""

    name: str
    address: str
    address6: str | None = None
    handoff_port: int = 4800
    relay_port: int = 8080
    workers: int = 1
    weight: float = 1.0
    replication_port: int = 4600
    worker_names: tuple[str, ...] = field(init=False, repr=False, compare=False)
    handoff_endpoints: tuple[Endpoint, ...] = field(init=False, repr=False, compare=False)
    relay_endpoint: Endpoint = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        workers = range(self.workers)
        put = object.__setattr__
        put(self, "worker_names", tuple(f"{self.name}/{i}" for i in workers))
        put(
            self,
            "handoff_endpoints",
            tuple(Endpoint(self.address, self.handoff_port + i) for i in workers),
        )
        put(self, "relay_endpoint", Endpoint(self.address, self.relay_port))

    @classmethod
    def of(cls, config: NodeConfig) -> Node:
        """The node a ``[[nodes]]`` entry describes."""
        return cls(
            config.name,
            config.address,
            config.address6,
            config.handoff_port,
            config.relay_port,
            config.workers,
            config.weight,
            config.replication_port,
        )

    @property
    def replication_endpoint(self) -> Endpoint:
        """Where it replicates."""
        return Endpoint(self.address, self.replication_port)

    def worker_for(self, flow: bytes) -> int:
        """The worker that takes the connection ``flow`` (packed): the same one every time."""
        return xxh3_64_intdigest(flow) % self.workers if self.workers > 1 else 0

    def serves(self, address: str) -> bool:
        """Whether the node can own a flow to a service ``address``: it needs the same family."""
        return (":" in self.address) == (":" in address) or (
            self.address6 is not None and ":" in address
        )


class Placement(Protocol):
    """Chooses nodes. Not thread-safe: a worker process has one thread that places.

    Attributes:
        nodes: those it chooses from.
        keyed: a request belongs to the node that its key leads to; if not, every node may serve it.
    """

    nodes: tuple[Node, ...]
    keyed: bool

    def choose(self, key: str, avoid: Container[str] = ()) -> Node:
        """The node for ``key`` (a request's path), none of the names in ``avoid``.

        Raises:
            NoNode: all are to be avoided.
        """


class _Base:
    """The nodes."""

    keyed = False

    def __init__(self, nodes: Iterable[Node]) -> None:
        self.nodes = tuple(nodes)
        if not self.nodes:
            raise ConfigError("a placement needs at least one node: add [[nodes]] entries")


class Partitioned(_Base):
    """Rendezvous hashing: each key belongs to the node with the highest weighted hash.

    Without one node only its keys move, each to the node that came second (Thaler and
    Ravishankar, 1998); a node's share is in proportion to its weight.
    """

    keyed = True

    def __init__(self, nodes: Iterable[Node]) -> None:
        super().__init__(nodes)
        self._seeds = tuple((xxh3_64_intdigest(node.name.encode()), node) for node in self.nodes)
        # The logarithm keeps the order of the hashes, so equal weights need none.
        self._weighted = len({node.weight for node in self.nodes}) > 1

    def choose(self, key: str, avoid: Container[str] = ()) -> Node:
        """As :meth:`Placement.choose`."""
        data = key.encode("utf-8", "surrogatepass")
        best: Node | None = None
        highest = -1.0
        for seed, node in self._seeds:
            if avoid and node.name in avoid:
                continue
            score: float = xxh3_64_intdigest(data, seed)
            if self._weighted:
                # (score + 1/2) / 2**64 is strictly between 0 and 1 but for rounding up to 1.
                score = node.weight / max(-math.log((score + 0.5) / _TWO_64), 1e-18)
            if score > highest:
                highest, best = score, node
        if best is None:
            raise NoNode("no backend is left to place this request at")
        return best


class RoundRobin(_Base):
    """Each node in turn, smoothly by weight: 2:1 gives A B A, never A A B."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        super().__init__(nodes)
        self._credit = [0.0] * len(self.nodes)

    def choose(self, key: str, avoid: Container[str] = ()) -> Node:
        """As :meth:`Placement.choose`; the key does not matter."""
        credit, best, total = self._credit, -1, 0.0
        for index, node in enumerate(self.nodes):
            if avoid and node.name in avoid:
                continue
            credit[index] += node.weight
            total += node.weight
            if best < 0 or credit[index] > credit[best]:
                best = index
        if best < 0:
            raise NoNode("no backend is left to place this request at")
        credit[best] -= total
        return self.nodes[best]


class LeastConnections(_Base):
    """The node with the fewest connections for its weight; ties go round.

    Args:
        nodes: to choose from.
        loads: how many connections each has.
    """

    def __init__(self, nodes: Iterable[Node], loads: Loads) -> None:
        super().__init__(nodes)
        self._loads = loads
        self._next = 0

    def choose(self, key: str, avoid: Container[str] = ()) -> Node:
        """As :meth:`Placement.choose`; the key does not matter."""
        nodes, count = self.nodes, len(self.nodes)
        best: Node | None = None
        lowest = math.inf
        for step in range(count):
            node = nodes[(self._next + step) % count]
            if avoid and node.name in avoid:
                continue
            load = (self._loads.of(node.name) + 1) / node.weight
            if load < lowest:
                lowest, best = load, node
        if best is None:
            raise NoNode("no backend is left to place this request at")
        self._next = (self._next + 1) % count
        return best


PlaceFunction = Callable[[str, tuple[Node, ...]], "Node | str"]
"""From a key and the nodes that are fit to one of them, or its name."""


class Replicated(Partitioned):
    """Each key on several nodes: those with the highest weighted hashes, in that order.

    Without one node, only keys that it has move.
    """

    def __init__(self, nodes: Iterable[Node], replicas: int) -> None:
        super().__init__(nodes)
        self.replicas = min(replicas, len(self.nodes))

    def order(self, key: str) -> tuple[Node, ...]:
        """The replicas of ``key``, the preferred one first."""
        found: list[Node] = []
        names: set[str] = set()
        for _ in range(self.replicas):
            node = self.choose(key, names)
            names.add(node.name)
            found.append(node)
        return tuple(found)


class PlacementFault(PrismError):
    """An operator's placement function has failed; the log has its traceback."""


class Chosen(_Base):
    """An operator's function. What it raises or returns by mistake fails one request, not more."""

    keyed = True

    def __init__(self, nodes: Iterable[Node], function: PlaceFunction) -> None:
        super().__init__(nodes)
        self._function = function

    def choose(self, key: str, avoid: Container[str] = ()) -> Node:
        """As :meth:`Placement.choose`.

        Raises:
            NoNode: as there.
            PlacementFault: the function failed.
        """
        fit = tuple(node for node in self.nodes if node.name not in avoid) if avoid else self.nodes
        if not fit:
            raise NoNode("no backend is left to place this request at")
        try:
            found = self._function(key, fit)
            name = found.name if isinstance(found, Node) else found
            node = next((node for node in fit if node.name == name), None)
            if node is None:
                raise ValueError(f"it returned {found!r}, which is none of the nodes it was given")
        except Exception:
            log.exception("the placement function failed")
            raise PlacementFault("the placement function failed") from None
        return node


def placement_from(config: Config) -> Placement:
    """The placement that ``[placement]`` and ``[[nodes]]`` describe.

    Raises:
        ConfigError: there are no nodes, or the function cannot be loaded.
    """
    return placement_of(config.placement, map(Node.of, config.nodes))


def placement_of(
    settings: PlacementConfig, nodes: Iterable[Node], loads: Loads | None = None
) -> Placement:
    """A placement over some of the nodes.

    Args:
        settings: which.
        nodes: to choose from.
        loads: how many connections they have; by default nothing is known.

    Raises:
        ConfigError: there are no nodes, or the function cannot be loaded.
    """
    if settings.replicated:
        return Replicated(nodes, settings.replicas)
    if settings.name == "round-robin":
        return RoundRobin(nodes)
    if settings.name == "least-connections":
        return LeastConnections(nodes, loads or Loads())
    if settings.function is not None:
        where = "placement.function"
        return Chosen(nodes, load_function(where, settings.function, settings.function_dir))
    return Partitioned(nodes)
