"""Where a request is answered: the policy's word, the node it belongs to, whether to hand over."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prism.http.connection import Connection
from prism.http.head import RequestHead
from prism.placement import Node as Place
from prism.placement import NoNode
from prism.policy.decision import AUTO, Action, Decision
from prism.tls.stream import TlsStream

if TYPE_CHECKING:
    from prism.node import Node

__all__ = ["MAX_HOPS", "Placing"]

MAX_HOPS = 4  # owners a connection may pass for one request; then it is relayed


class Placing:
    """Decides for one node; changes nothing but counters."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def decide(self, connection: Connection, head: RequestHead) -> Decision:
        """What the policy says; once for each request, on each node that it comes to.

        What a node relays has been decided about there.
        """
        if self._node.policy.trivial or connection.relayed_in:
            return AUTO
        stream = connection.stream
        facts = stream.facts if isinstance(stream, TlsStream) else b""
        decision = self._node.policy.decide(head, connection.flow.client.host, facts)
        self._node.metrics.decisions.add(decision.rule or "default", decision.action.value)
        return decision

    def place_for(self, connection: Connection, head: RequestHead) -> Place:
        """The node a request belongs to; this one, wherever it may be served here as well.

        Raises:
            NoNode: there is none for it.
            ConfigError: the decision names a pool or a placement that there is not.
        """
        decision = connection.decision
        pool = self._node.peers.pools.get(decision.pool, decision.placement)
        name = decision.node
        if not name and not pool.placement.keyed and self._node.serving.name in pool.names:
            name = "" if self._node.draining.active else self._node.serving.name
        if name:
            node = pool.node(name)
            if node is None:
                raise NoNode(f"node {name} is not in the pool of this request")
            return node
        if self._node.replicas is not None:
            unfit = self._node.peers.health.avoid(pool.names, pool.check)
            return self._node.replicas.place(head, unfit=unfit)
        return self._node.peers.choose(pool, head.key.decode("utf-8", "surrogateescape"))

    def another_place(
        self, connection: Connection, head: RequestHead, tried: frozenset[str]
    ) -> Place | None:
        """Where else a request may go, if its nodes so far did not answer; ``None``: nowhere.

        Raises:
            ConfigError: as for :meth:`place_for`.
        """
        decision = connection.decision
        pool = self._node.peers.pools.get(decision.pool, decision.placement)
        if decision.node or not pool.failover:
            return None
        try:
            return self._node.peers.choose(pool, head.key.decode("utf-8", "surrogateescape"), tried)
        except NoNode:
            return None

    def why_not(self, connection: Connection, place: Place) -> str:
        """Why the connection should rather not be handed over to ``place``; empty: it should."""
        if connection.hops >= MAX_HOPS:
            return "too-many-hops"
        if not place.serves(connection.flow.service.host):
            return "address-family"
        if self._node.peers.health.is_draining(place.name):
            return "draining"
        decision = connection.decision
        why = self.why_not_anywhere(connection)
        if why or (self._node.draining.active and decision.action is not Action.RELAY):
            return why  # from a node that is going, all go that can
        pool = self._node.peers.pools.get(decision.pool, decision.placement)
        return self._node.weigher.why_relay(connection, pool)

    def why_not_anywhere(self, connection: Connection) -> str:
        """Why the connection cannot be handed over now, wherever it goes; empty: it can."""
        if not self._node.switch.reachable:
            return "switch-unreachable"
        if connection.key in self._node.moving:
            return "handoff-pending"
        if not connection.stream.movable:
            return "output-pending"
        return ""
