"""Pools: the sets of nodes that requests are placed in, each with a placement of its own."""

from __future__ import annotations

from pydantic import ValidationError

from prism.config import Config
from prism.config_health import CheckConfig
from prism.config_placement import PlacementConfig
from prism.errors import ConfigError
from prism.loads import Loads
from prism.placement import Node, Placement, placement_of

__all__ = ["Pool", "Pools"]


class Pool:
    """A set of nodes and how to choose among them.

    Attributes:
        name: the pool's; empty for that of all nodes.
        placement: chooses.
        names: of the nodes.
        check: how they are checked.
        failover: whether requests for a node that is not fit are placed at another one.
    """

    __slots__ = ("check", "failover", "name", "names", "placement")

    def __init__(
        self, name: str, placement: Placement, check: CheckConfig, *, failover: bool
    ) -> None:
        self.name = name
        self.placement = placement
        self.check = check
        self.failover = failover
        self.names = frozenset(node.name for node in placement.nodes)

    def node(self, name: str) -> Node | None:
        """The node of that name, if it is in the pool."""
        return next((node for node in self.placement.nodes if node.name == name), None)


class Pools:
    """All pools of a configuration.

    Attributes:
        all: the pool of all nodes, under ``[placement]``.
        nodes: all nodes.
        loads: how many connections they have.
    """

    def __init__(self, config: Config, loads: Loads | None = None) -> None:
        self.loads = loads or Loads()
        self._health = config.health
        self._objects = config.cluster.serves == "objects"
        self.nodes = tuple(map(Node.of, config.nodes))
        by_name = {node.name: node for node in self.nodes}
        self._members = {"": self.nodes} | {
            entry.name: tuple(by_name[name] for name in entry.nodes) for entry in config.pools
        }
        self._settings = {"": config.placement} | {
            entry.name: entry.placement or config.placement for entry in config.pools
        }
        self._checks: dict[str, CheckConfig] = {"": config.health} | {
            entry.name: entry.health or config.health for entry in config.pools
        }
        self._pools: dict[tuple[str, str], Pool] = {}
        for name in self._members:
            self.get(name)
        self.all = self.get("")

    def get(self, name: str, placement: str = "") -> Pool:
        """A pool, if wanted under another placement than its own.

        Raises:
            ConfigError: there is no such pool, or no such placement.
        """
        pool = self._pools.get((name, placement))
        if pool is None:
            pool = self._pools[name, placement] = self._make(name, placement)
        return pool

    def _make(self, name: str, placement: str) -> Pool:
        members = self._members.get(name)
        if members is None:
            raise ConfigError(f"there is no pool {name!r}: add a [[pools]] entry")
        settings = self._settings[name]
        if placement:
            try:
                changed = settings.model_dump() | {"name": placement, "function": None}
                settings = PlacementConfig.model_validate(changed)
            except ValidationError:
                raise ConfigError(f"there is no placement {placement!r}") from None
        made = placement_of(settings, members, self.loads)
        failover = self._health.failover
        if failover is None:  # who has not got an object must not say that there is none
            failover = not self._objects
        failover = (failover or not made.keyed) and not settings.replicated  # replicas have views
        return Pool(name, made, self._checks[name], failover=failover)

    def checks(self) -> set[tuple[Node, CheckConfig]]:
        """Which node is to be checked how; twice, where pools differ about it."""
        return {
            (node, self._checks[name]) for name, nodes in self._members.items() for node in nodes
        }
