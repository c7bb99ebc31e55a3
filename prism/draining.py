"""Emptying a node without a failed request, before it ends (``prism-proxy drain``).

The node tells its callers that it is going: they place nothing here any more. Its connections go
to other nodes, at their next request or, where they wait for one, at once; what cannot go is
answered here with ``Connection: close``. When nothing is left, or the time is up, it is done.
"""

from __future__ import annotations

import asyncio
import logging
from time import monotonic
from typing import TYPE_CHECKING

from prism.errors import PrismError
from prism.handoff.wire import State as NodeState
from prism.http.connection import Connection, State
from prism.http.exchange import App, Exchange, Rest

if TYPE_CHECKING:
    from prism.node import Node

__all__ = ["Draining", "LastAnswer", "Teller"]

log = logging.getLogger(__name__)

PAUSE = 1.0  # seconds between two messages about connections
SETTLE = 0.5  # seconds until all callers have heard of it, and act accordingly
_TURN = 0.02  # seconds
_AGAIN = 0.5  # seconds until an idle connection that nobody took is offered again
_MOVING = 64  # idle connections on their way at a time


class Teller:
    """Tells a node's callers how it is (``STATE``, docs/protocol.md)."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._timer: asyncio.TimerHandle | None = None

    def changed(self) -> None:
        """A connection came or went: tell of it soon."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(PAUSE, self.tell)

    def tell(self) -> None:
        """Tell now.

        The same number may be news: callers count what they have handed over since the last time.
        """
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        node = self._node
        node.channel.tell(NodeState(node.peers.health.draining, node.owned))

    def close(self) -> None:
        """Tell nothing more."""
        if self._timer is not None:
            self._timer.cancel()


class LastAnswer:
    """An app that answers as another does, and has the connection end with it."""

    def __init__(self, app: App) -> None:
        self._app = app

    def handle(self, exchange: Exchange) -> Rest:
        """See :class:`prism.http.exchange.App`."""
        exchange.keep_alive = False
        return self._app.handle(exchange)


class Draining:
    """The draining of one node.

    Attributes:
        done: set when the node may end.
    """

    def __init__(self, node: Node) -> None:
        self.done = asyncio.Event()
        self._node = node
        self._task: asyncio.Task[None] | None = None
        self._again: dict[bytes, float] = {}  # connections that nobody took: when to try again

    @property
    def active(self) -> bool:
        """Whether the node is being drained."""
        return self._node.peers.health.draining

    def begin(self, seconds: float) -> None:
        """Begin, and be done after ``seconds`` at most."""
        if self.active:
            return
        log.info("%s is drained, within %g s", self._node.name, seconds)
        self._set(True)
        self._node.refuse_new(seconds)
        self._task = asyncio.get_running_loop().create_task(self._empty(seconds))

    def undo(self) -> None:
        """Stay after all; too late when it is done."""
        if not self.active or self.done.is_set():
            return
        if self._task is not None:
            self._task.cancel()
        log.info("%s is not drained any more", self._node.name)
        self._node.accept_again()
        self._set(False)

    def close(self) -> None:
        """The node ends."""
        if self._task is not None:
            self._task.cancel()

    def _set(self, draining: bool) -> None:
        self._node.peers.health.drain(draining)
        self._node.teller.tell()

    async def _empty(self, seconds: float) -> None:
        began = monotonic()
        while (passed := monotonic() - began) < seconds:
            self._move_idle()
            if passed > SETTLE and not self._node.busy():
                break
            await asyncio.sleep(_TURN)
        else:
            log.warning("%s: %d connections did not go in time", self._node.name, self._node.owned)
        self.done.set()

    def _move_idle(self) -> None:
        """Hand on connections that wait for a request; some at a time."""
        node, now = self._node, monotonic()
        self._again = {key: due for key, due in self._again.items() if due > now}
        for connection in list(node.connections.values()):
            if len(node.moving) >= _MOVING:
                return
            if connection.relayed_in or connection.state is not State.IDLE:
                continue
            if connection.key not in self._again and not self._move(connection):
                self._again[connection.key] = now + _AGAIN

    def _move(self, connection: Connection) -> bool:
        """Hand a connection on, to any node that can have it; whether there is one."""
        node = self._node
        pool = node.peers.pools.all
        unfit = node.peers.health.avoid(pool.names, pool.check) | {node.serving.name}
        try:
            place = pool.placement.choose(connection.key.hex(), unfit)
        except PrismError:
            return False
        name, link = node.peers.link(place, connection.key)
        if link is None or not place.serves(connection.flow.service.host):
            return False
        if node.placing.why_not_anywhere(connection):
            return False
        self._again[connection.key] = monotonic() + _AGAIN  # in case that it is not taken
        connection.stream.reset_lowat()
        node.hand_over(connection, link, name)
        return True
