"""Marks of deletion, and how they go: when nothing older than they can come any more.

A deletion leaves a mark in the object's place, so that an older write of the key which is still on
its way counts as older. When all nodes serve, and the mark is ten minutes old, there is none.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final

from prism.apps.keytree import walk
from prism.apps.replicadisk import Disk
from prism.replication.replicator import Replicator
from prism.replication.views import Version

__all__ = ["Marks"]

AGE: Final = 600.0  # seconds that a mark stays at least
_EACH: Final = 60.0  # seconds between two looks whether there is something to do
_PAGE: Final = 512  # keys looked at in one go
_PAUSE: Final = 0.05  # seconds between two of those


class Marks:
    """What removes a node's marks.

    Args:
        replicator: the node's part.
        disk: where the marks are.
    """

    def __init__(self, replicator: Replicator, disk: Disk) -> None:
        self._replicator = replicator
        self._disk = disk

    async def keep_few(self) -> None:
        """Remove old ones, for ever."""
        while True:
            await asyncio.sleep(_EACH)
            if self._disk.marked and self._all_serve():
                self._disk.marked = False
                await self.remove_old(AGE)

    def _all_serve(self) -> bool:
        replicator = self._replicator
        return len(replicator.view.serving) == len(replicator.membership.nodes)

    async def remove_old(self, age: float) -> None:
        """Remove those that are older than ``age`` seconds, while all nodes serve."""
        after: bytes | None = b""
        while after is not None:
            found, after = await self._disk.run(self._page, after, time.time() - age)
            for key, version in found:
                if not self._all_serve():
                    self._disk.marked = True
                    return
                async with self._replicator.lock(key):
                    if key not in self._disk.staged:
                        await self._disk.remove(key, version)
            await asyncio.sleep(_PAUSE)

    def _page(self, after: bytes, until: float) -> tuple[list[tuple[bytes, Version]], bytes | None]:
        """Old marks among the next keys, and the last of these; ``None``: there are no more."""
        found: list[tuple[bytes, Version]] = []
        for number, key in enumerate(walk(self._disk.tree, b"", after, _PAGE), 1):
            meta = self._disk.meta(key)
            if meta is not None and meta.deleted:
                if meta.modified < until:
                    found.append((key, meta.version))
                else:
                    self._disk.marked = True
            if number == _PAGE:
                return found, key
        return found, None
