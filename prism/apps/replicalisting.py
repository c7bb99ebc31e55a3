"""The listing of all objects where they are replicated: the newest version of each key, once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any, Final

from prism.apps.listing import PATIENCE, detail_of, keys_wanted
from prism.errors import PrismError
from prism.http.exchange import Exchange
from prism.http.fetch import FetchError, fetch
from prism.http.head import HttpError
from prism.placement import Node
from prism.replicas import Replicas

__all__ = ["ReplicaListing", "merge_replicas"]

_PAUSE: Final = 0.1  # seconds, at most, until the backends are asked once more


class ReplicaListing:
    """Answers ``GET /`` for the whole cluster, from all backends that serve.

    All have to answer, in the same view: of each key one of them has the newest version then. While
    a view changes, they are asked again.
    """

    def __init__(self, replicas: Replicas, nodes: Sequence[Node]) -> None:
        self.replicas = replicas
        self.nodes = tuple(nodes)

    async def handle(self, exchange: Exchange) -> None:
        """Ask, merge, answer."""
        query = exchange.head.query
        target = b"/?" + query if query else b"/"
        deadline = asyncio.get_running_loop().time() + self.replicas.patience
        while (pages := await self._pages(target)) is None:
            if asyncio.get_running_loop().time() >= deadline:
                retry = ((b"Retry-After", b"1"),)
                raise HttpError(503, "not all backends that serve can list their objects", retry)
            await self.replicas.changed(_PAUSE)
        body = json.dumps(merge_replicas(pages, keys_wanted(query))).encode()
        rest = exchange.respond(200, ((b"Content-Type", b"application/json"),), body)
        if rest is not None:
            await rest

    async def _pages(self, target: bytes) -> list[dict[str, Any]] | None:
        """The pages of all that serve; ``None``: not all have answered, in one view."""
        view = self.replicas.view
        asked = [node for node in self.nodes if node.name in view.serving]
        if not asked:
            return None
        answers = await asyncio.gather(
            *(fetch(node.relay_endpoint, target, PATIENCE) for node in asked),
            return_exceptions=True,
        )
        pages: list[dict[str, Any]] = []
        for answer in answers:
            if isinstance(answer, FetchError):
                return None
            if isinstance(answer, BaseException):
                raise answer
            status, body = answer
            if 400 <= status < 500:  # all are asked the same, so a bad query is bad for all
                raise HttpError(status, detail_of(body))
            if status != 200:
                return None
            pages.append(json.loads(body))
        return pages if all(page.get("epoch") == view.epoch for page in pages) else None


def merge_replicas(pages: Sequence[dict[str, Any]], limit: int) -> dict[str, Any]:
    """One page out of those of all replicas.

    Keys are told as far as all pages go. A page that is cut short may consist of deleted keys, so
    there may be fewer than ``limit``, and more behind them.

    Raises:
        PrismError: a page is not in the store's format.
    """
    try:
        newest: dict[str, dict[str, Any]] = {}
        for page in pages:
            for entry in page["keys"]:
                had = newest.get(entry["key"])
                if had is None or tuple(had["version"]) < tuple(entry["version"]):
                    newest[entry["key"]] = entry
        ends = [page["keys"][-1]["key"].encode() for page in pages if page["truncated"]]
    except (KeyError, TypeError, IndexError, AttributeError):
        raise PrismError("a backend's listing is not in the object store's format") from None
    ordered = sorted(newest.values(), key=lambda entry: entry["key"].encode())
    end = min(ends) if ends else None
    within = [entry for entry in ordered if end is None or entry["key"].encode() <= end]
    live = [entry for entry in within if not entry["deleted"]]
    keys = live[:limit]
    truncated = len(live) > limit or end is not None
    last = keys[-1]["key"] if len(live) > limit else (end.decode() if end is not None else None)
    return {
        "keys": [
            {name: value for name, value in entry.items() if name not in ("version", "deleted")}
            for entry in keys
        ],
        "truncated": truncated,
        "next_start_after": last if truncated else None,
    }
