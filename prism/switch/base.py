"""What a switch's rule table looks like to the processes beside it.

The table lives in the kernel (:mod:`prism.switch.ebpf`) or in this process
(:mod:`prism.switch.table`); the agent, the lister and the metrics work over either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple, Protocol

from prism.flow import Endpoint
from prism.switch.control import Status

__all__ = ["Change", "DataPlane", "Event", "EventKind", "Node", "PacketStore", "Rule", "RuleStore"]


class Rule(NamedTuple):
    """One rule as it stands.

    ``flow`` is packed; ``gen`` the generation; ``cookie`` what its ADD came with.
    """

    flow: bytes
    owner: int
    owner_endpoint: Endpoint
    owner_mac: bytes
    gen: int
    locked: bool
    cookie: int = 0


class Node(NamedTuple):
    """One node with a HELLO.

    ``endpoint`` is where the last one came from (a QUERY goes there), ``lease`` the seconds
    granted (0: it has left), ``age`` the seconds since the last HELLO.
    """

    id: int
    endpoint: Endpoint
    lease: float
    age: float

    @property
    def alive(self) -> bool:
        """Whether the lease is running."""
        return self.lease > 0 and self.age <= self.lease


class EventKind(IntEnum):
    """What happened to a rule with held packets (``enum prism_event_kind``)."""

    UNLOCKED = 1
    CHOWNED = 2
    DELETED = 3


class Event(NamedTuple):
    """Something happened to a rule with held packets."""

    kind: int
    flow: bytes
    locked: bool
    gen: int
    owner: int
    held: int


class RuleStore(Protocol):
    """A rule table; ``get`` and ``delete`` are quick, ``rules`` may be long."""

    def rules(self) -> Iterable[Rule]:
        """All rules; those that come or go meanwhile may be missing."""

    def get(self, flow: bytes) -> Rule | None:
        """The rule of a packed flow."""

    def delete(self, flow: bytes, gen: int) -> bool:
        """Delete a rule if it still has this generation; whether it was deleted."""

    def nodes(self) -> Sequence[Node]:
        """All nodes that ever said HELLO and are not forgotten."""

    def end_lease(self, node: int) -> bool:
        """Deny a node everything until its next HELLO; ``False`` if its lease is running."""


class PacketStore(RuleStore, Protocol):
    """A rule table that also holds packets and asks about SYNs: the kernel's."""

    @property
    def events_fd(self) -> int:
        """Readable (epoll) when there are events."""

    def read_events(self) -> Iterator[Event]:
        """The events that are there; does not wait."""

    def heartbeat(self) -> None:
        """Tell the data plane that somebody holds packets and answers asks."""

    def pass_syn(self, flow: bytes) -> None:
        """Let the next bare SYN of this flow through to the owner."""


class Change(NamedTuple):
    """One flow's rule before and after; ``None`` where there is none."""

    flow: bytes
    before: Rule | None
    after: Rule | None


class DataPlane(Protocol):
    """A switch that a control server programs (a P4 target)."""

    async def apply(self, changes: Sequence[Change]) -> Sequence[Status]:
        """Bring the data plane from ``before`` to ``after``; ``OK``, ``FULL`` or ``INVALID`` each.

        Changes of one call are of different flows. One that fails leaves ``before`` in force.

        Raises:
            SwitchError: the data plane cannot be reached; none of the changes is in force.
        """
