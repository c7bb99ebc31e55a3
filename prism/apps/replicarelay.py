"""Relaying to replicas: where one cannot be reached, to another one, or to the same once more."""

from __future__ import annotations

import asyncio
from urllib.parse import quote_from_bytes

from prism.apps.relay import Relay
from prism.apps.upstream import HOP_BY_HOP, NotSent
from prism.flow import Endpoint
from prism.http.exchange import Exchange, Rest
from prism.http.head import HttpError, RequestHead
from prism.placement import Node
from prism.replicas import READS, Replicas

__all__ = ["MAX_PASSES", "ReplicaRelay", "forwarded_head", "may_repeat", "passes_of"]

MAX_PASSES = 4
"""How many nodes pass a request on, one to the other, before the last one waits instead."""

_FIELD = b"prism-passes"
_MADE_ANEW = HOP_BY_HOP | {b"host", b"content-length", b"expect", _FIELD}
_PAUSE = 0.1  # seconds, at most, until a failed request is tried elsewhere


def passes_of(head: RequestHead) -> int:
    """How many nodes have passed a request on already."""
    value = head.get(_FIELD) or b"0"
    return int(value) if len(value) <= 2 and value.isdigit() else MAX_PASSES


class ReplicaRelay:
    """The app that relays a request to a replica.

    What cannot have had any effect is tried again while a view changes: reads, and writes of which
    nothing was sent.
    """

    def __init__(self, replicas: Replicas, relay: Relay, first: Node | None = None) -> None:
        self._replicas = replicas
        self._relay = relay
        self._first = first

    def handle(self, exchange: Exchange) -> Rest:
        """Relay the request."""
        return self._handle(exchange)

    async def _handle(self, exchange: Exchange) -> None:
        replicas = self._replicas
        deadline = asyncio.get_running_loop().time() + replicas.patience
        node = self._first or replicas.place(exchange.head)
        tried: set[str] = set()
        while True:
            try:
                await self.once(exchange, node)
                return
            except HttpError as error:
                over = asyncio.get_running_loop().time() >= deadline
                if over or not may_repeat(exchange, error):
                    raise
            tried.add(node.name)
            node = replicas.place(exchange.head, tried)
            if node.name in tried:
                tried.clear()
                await replicas.changed(_PAUSE)
                node = replicas.place(exchange.head)

    async def once(self, exchange: Exchange, node: Node) -> None:
        """Relay to one node; raises as :meth:`Relay.relay`."""
        passes = passes_of(exchange.head) + 1
        extra = ((b"Prism-Passes", b"%d" % passes),)
        await self._relay.relay(exchange, node.relay_endpoint, extra)


def may_repeat(exchange: Exchange, error: HttpError) -> bool:
    """Whether a request that failed so on the way to another node can be made again."""
    if exchange.started or exchange.body.received or error.status not in (502, 503, 504):
        return False
    return exchange.head.method in READS or isinstance(error, NotSent)


def forwarded_head(head: RequestHead, endpoint: Endpoint, size: int) -> bytes:
    """The head by which a request goes on whose body of ``size`` octets has been read already."""
    target = b"/" + quote_from_bytes(head.key).encode()
    fields = [field for field in head.headers if field[0] not in _MADE_ANEW]
    fields += [
        (b"Content-Length", b"%d" % size),
        (b"Connection", b"close"),
        (_FIELD, b"%d" % (passes_of(head) + 1)),
    ]
    lines = b"".join(b"%b: %b\r\n" % field for field in fields)
    return b"%b %b HTTP/1.1\r\nHost: %b\r\n%b\r\n" % (
        head.method,
        target,
        str(endpoint).encode(),
        lines,
    )
