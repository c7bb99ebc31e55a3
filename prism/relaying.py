"""Relaying a request to the node it belongs to, and to another one where that one is gone."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

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
        self._exchange: Exchange | None = None  # that goes the quick way

    def handle(self, exchange: Exchange) -> Rest:
        """Relay; see :class:`prism.http.exchange.App`."""
        place = self._place
        quick = self._node.relay.quick(exchange, place.relay_endpoint, self)
        if quick is None:
            return self._relay(exchange)
        self._exchange = exchange
        self._node.peers.loads.opened(place.name)
        return quick.ask()

    # -- what became of the quick way (prism.apps.quick.Follower) ----------------------------

    def whole(self) -> None:
        """The response is out."""
        self._node.peers.loads.closed(self._place.name)
        if self._exchange is not None:
            self._answered(self._place, self._exchange.status)

    def slowly(self, rest: Coroutine[Any, Any, None]) -> Coroutine[Any, Any, None]:
        """The same as from the beginning, but that the first attempt has begun."""
        if self._exchange is None:
            raise RuntimeError("nothing went the quick way")
        return self._relay(self._exchange, rest)

    def lost(self) -> None:
        """The client has gone."""
        self._node.peers.loads.closed(self._place.name)

    # -- the slow way -------------------------------------------------------------------------

    async def _relay(
        self, exchange: Exchange, attempt: Coroutine[Any, Any, None] | None = None
    ) -> None:
        place = self._place
        tried: set[str] = set()
        while True:
            try:
                await self._relay_to(exchange, place, attempt)
                return
            except UpstreamFailed as error:
                attempt = None
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

    async def _relay_to(
        self, exchange: Exchange, place: Place, attempt: Coroutine[Any, Any, None] | None
    ) -> None:
        health, loads = self._node.peers.health, self._node.peers.loads
        if attempt is None:
            loads.opened(place.name)
            attempt = self._node.relay.relay(exchange, place.relay_endpoint)
        try:
            await attempt
        except UpstreamFailed as error:
            health.failed(place.name, f"relaying: {error.detail}")
            raise
        finally:
            loads.closed(place.name)
        self._answered(place, exchange.status)

    def _answered(self, place: Place, status: int) -> None:
        if status in _GATEWAY:
            self._node.peers.health.failed(place.name, f"relaying: answered {status}")
        else:
            self._node.peers.health.succeeded(place.name)

    def _other(self, exchange: Exchange, error: UpstreamFailed, tried: set[str]) -> Place | None:
        """Another node to ask, where that can do no harm."""
        if exchange.started or exchange.body.received or len(tried) >= TRIES:
            return None
        if not isinstance(error, NotSent) and exchange.head.method not in _IDEMPOTENT:
            return None
        return self._node.placing.another_place(self._connection, exchange.head, frozenset(tried))
