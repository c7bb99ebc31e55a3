"""Relaying a request to the node it belongs to, and to another one where that one is gone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prism.apps.upstream import NotSent, UpstreamFailed
from prism.http.connection import Connection
from prism.http.exchange import Exchange, Rest
from prism.placement import Node as Place

if TYPE_CHECKING:
    from prism.node import Node

__all__ = ["Relaying"]

TRIES = 3  # nodes that are asked for one request
_GATEWAY = (502, 503, 504)
_IDEMPOTENT = frozenset(b"GET HEAD PUT DELETE OPTIONS".split())


class Relaying:
    """The app of one request that is relayed; tells the node's health what came of it.

    Args:
        node: that relays.
        connection: whose request it is.
        place: where it belongs.
    """

    def __init__(self, node: Node, connection: Connection, place: Place) -> None:
        self._node = node
        self._connection = connection
        self._place = place

    def handle(self, exchange: Exchange) -> Rest:
        """Relay; see :class:`prism.http.exchange.App`."""
        return self._relay(exchange)

    async def _relay(self, exchange: Exchange) -> None:
        place = self._place
        tried: set[str] = set()
        while True:
            try:
                await self._relay_to(exchange, place)
                return
            except UpstreamFailed as error:
                tried.add(place.name)
                other = self._other(exchange, error, tried)
                if other is None:
                    raise
            self._node.metrics.relays.add("failover")
            if other.name == self._node.serving.name:
                head = exchange.head
                rest = self._node.own_app(self._connection, head).handle(exchange)
                if rest is not None:
                    await rest
                return
            place = other

    async def _relay_to(self, exchange: Exchange, place: Place) -> None:
        health, loads = self._node.peers.health, self._node.peers.loads
        loads.opened(place.name)
        try:
            await self._node.relay.relay(exchange, place.relay_endpoint)
        except UpstreamFailed as error:
            health.failed(place.name, f"relaying: {error.detail}")
            raise
        finally:
            loads.closed(place.name)
        if exchange.status in _GATEWAY:
            health.failed(place.name, f"relaying: answered {exchange.status}")
        else:
            health.succeeded(place.name)

    def _other(self, exchange: Exchange, error: UpstreamFailed, tried: set[str]) -> Place | None:
        """Another node to ask, where that can do no harm."""
        if exchange.started or exchange.body.received or len(tried) >= TRIES:
            return None
        if not isinstance(error, NotSent) and exchange.head.method not in _IDEMPOTENT:
            return None
        return self._node.another_place(self._connection, exchange.head, frozenset(tried))
