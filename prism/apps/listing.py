"""The listing of all objects: one page of every backend's, merged in key order."""

from __future__ import annotations

import asyncio
import heapq
import json
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any
from urllib.parse import parse_qs

from prism.errors import PrismError
from prism.http.exchange import Exchange
from prism.http.fetch import FetchError, fetch
from prism.http.head import HttpError
from prism.placement import Node

__all__ = ["PATIENCE", "Listing", "detail_of", "keys_wanted", "merge"]

PATIENCE = 10.0  # seconds for one backend's page
DEFAULT_KEYS = 1000


class Listing:
    """Answers ``GET /`` for the whole cluster; the format is the object store's.

    A listing without one backend's objects would be wrong without saying so: if a backend does
    not answer, the listing is refused (503).
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = tuple(nodes)

    async def handle(self, exchange: Exchange) -> None:
        """Ask all backends, merge, answer."""
        query = exchange.head.query
        target = b"/?" + query if query else b"/"
        answers = await asyncio.gather(*(self._page(node, target) for node in self.nodes))
        for status, body in answers:
            if status != 200:  # all are asked the same, so a bad query is bad for all
                detail = detail_of(body) if status < 500 else "a backend cannot list its objects"
                raise HttpError(status if status < 500 else 502, detail)
        page = merge((json.loads(body) for _, body in answers), keys_wanted(query))
        body = json.dumps(page).encode()
        rest = exchange.respond(200, ((b"Content-Type", b"application/json"),), body)
        if rest is not None:
            await rest

    async def _page(self, node: Node, target: bytes) -> tuple[int, bytes]:
        try:
            return await fetch(node.relay_endpoint, target, PATIENCE)
        except FetchError as error:
            raise HttpError(503, f"backend {node.name} cannot be asked: {error}") from None


def keys_wanted(query: bytes) -> int:
    """The number of keys that a query asks for; 1000 at most."""
    values = parse_qs(query.decode("latin-1")).get("max-keys", [str(DEFAULT_KEYS)])
    return min(int(values[-1]), DEFAULT_KEYS)


def detail_of(body: bytes) -> str:
    """What a backend's error document says."""
    try:
        return str(json.loads(body)["detail"])
    except (ValueError, KeyError, TypeError):
        return "a backend refuses this listing"


def merge(pages: Iterable[dict[str, Any]], max_keys: int) -> dict[str, Any]:
    """One page out of several backends' pages of up to ``max_keys`` keys each.

    A page that is cut short holds ``max_keys`` keys, so the first ``max_keys`` of all are never
    beyond where any page was cut.

    Raises:
        PrismError: a page is not in the store's format.
    """
    pages = list(pages)
    try:
        merged = heapq.merge(*(page["keys"] for page in pages), key=lambda entry: str(entry["key"]))
        keys = list(islice(merged, max_keys + 1))
        truncated = len(keys) > max_keys or any(page["truncated"] for page in pages)
    except (KeyError, TypeError):
        raise PrismError("a backend's listing is not in the object store's format") from None
    keys = keys[:max_keys]
    return {
        "keys": keys,
        "truncated": truncated,
        "next_start_after": keys[-1]["key"] if truncated and keys else None,
    }
