"""How a node that was away gets what it has missed before it serves again.

Rounds. In the epoch in which the node joins, when all that serve are known to be in it (so that no
write passes it by any more), it compares its versions with theirs, page by page in key order, and
makes its own state theirs: it fetches what is newer there, and forgets what is not there. What
has a version of this epoch came along a chain meanwhile, and is left alone. A round that was ended
within the epoch is good; after any change of the view, there is another one.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final

from prism.errors import PrismError
from prism.replication.interfaces import Page
from prism.replication.views import NO_VERSION, Version

if TYPE_CHECKING:
    from prism.replication.replicator import Replicator

__all__ = ["CatchUp"]

log = logging.getLogger(__name__)

_PAGE: Final = 512  # keys looked at for one page
_FETCHES: Final = 4  # objects fetched at the same time
_LOG_EVERY: Final = 5.0  # seconds


class _Round(PrismError):
    """The view has changed: begin again."""


class CatchUp:
    """One node's catching up, and what it answers to others' .

    Attributes:
        compared, fetched, removed: keys, since the start of the process.
    """

    def __init__(self, replicator: Replicator) -> None:
        self._replicator = replicator
        self._task: asyncio.Task[Any] | None = None
        self.compared = 0
        self.fetched = 0
        self.removed = 0

    def start(self, epoch: int) -> None:
        """Begin for this epoch, unless it is under way."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
        self._task = self._replicator.spawn(self._run(epoch))

    async def _run(self, epoch: int) -> None:
        replicator = self._replicator
        membership = replicator.membership
        pause = membership.lease / 4
        while membership.view.epoch == epoch:
            if not membership.settled:
                await replicator.changed(pause)
                continue
            try:
                await self._round(epoch)
            except _Round:
                return
            except (OSError, PrismError) as error:
                log.warning("catching up is interrupted: %s", error)
                await asyncio.sleep(pause)
                continue
            membership.caught_up(epoch)
            log.info("caught up in epoch %d", epoch)
            return

    async def _round(self, epoch: int) -> None:
        replicator = self._replicator
        peers = replicator.view.serving
        after, logged = b"", replicator.clock()
        while True:
            pages = await asyncio.gather(
                *(replicator.transport.page(peer, epoch, after) for peer in peers)
            )
            ends = [page.end for page in pages if page.end]
            own, more = await replicator.storage.page(after, _PAGE)
            if more:
                ends.append(own[-1][0])
            end = min(ends) if ends else b""
            theirs = _newest(dict(zip(peers, pages, strict=True)), end)
            mine = {key: version for key, version in own if not end or key <= end}
            await self._align(epoch, theirs, mine)
            self.compared += len(theirs)
            if replicator.clock() - logged > _LOG_EVERY:
                logged = replicator.clock()
                log.info("catching up: %d keys compared, %d fetched", self.compared, self.fetched)
            if not end:
                return
            after = end

    async def _align(
        self, epoch: int, theirs: dict[bytes, tuple[Version, str]], mine: dict[bytes, Version]
    ) -> None:
        wanted = [
            (key, version, peer)
            for key, (version, peer) in theirs.items()
            if (had := mine.get(key, NO_VERSION)) < version or (had > version and had.epoch < epoch)
        ]
        for at in range(0, len(wanted), _FETCHES):
            await asyncio.gather(
                *(self._fetch(epoch, *entry) for entry in wanted[at : at + _FETCHES])
            )
        for key, version in mine.items():
            if key not in theirs and version.epoch < epoch:
                self._check(epoch)
                async with self._replicator.lock(key):
                    await self._replicator.storage.remove(key, version)
                self.removed += 1

    async def _fetch(self, epoch: int, key: bytes, version: Version, peer: str) -> None:
        replicator = self._replicator
        found = await replicator.transport.fetch(peer, epoch, key)
        if found is None:  # a mark of deletion whose time was over
            return
        try:
            if not await self._take(epoch, key, *found):
                return
        finally:
            await replicator.storage.discard(found[1])
        self.fetched += 1

    async def _take(self, epoch: int, key: bytes, version: Version, blob: Any) -> bool:
        """Install what was fetched, unless something newer came along the chain meanwhile."""
        storage = self._replicator.storage
        self._check(epoch)
        async with self._replicator.lock(key):
            had = await storage.version(key)
            if had.epoch >= epoch or had == version:
                return False
            await storage.put(key, version, blob)
            if storage.staged.get(key, version) < version or storage.staged.get(key) == version:
                await storage.unstage(key)
        return True

    def _check(self, epoch: int) -> None:
        if self._replicator.view.epoch != epoch:
            raise _Round("the view has changed")

    async def page_for(self, peer: str, epoch: int, after: bytes) -> Page:
        """What ``peer`` should have of the keys behind ``after``.

        Raises:
            PrismError: this node is not in that epoch, or does not serve in it.
        """
        replicator = self._replicator
        view = replicator.view
        here = view.epoch == epoch == replicator.membership.applied
        if not here or replicator.me not in view.serving:
            raise PrismError(f"{replicator.me} does not serve in epoch {epoch}")
        if replicator.unsettled:
            raise PrismError(f"{replicator.me} is still settling writes of an earlier epoch")
        found, more = await replicator.storage.page(after, _PAGE)
        entries = [(key, version) for key, version in found if peer in replicator.order(key)]
        return Page(entries, found[-1][0] if more else b"")


def _newest(pages: dict[str, Page], end: bytes) -> dict[bytes, tuple[Version, str]]:
    """The newest version of each key up to ``end``, and who has it."""
    newest: dict[bytes, tuple[Version, str]] = {}
    for peer, page in pages.items():
        for key, version in page.entries:
            if end and key > end:
                break
            if key not in newest or newest[key][0] < version:
                newest[key] = (version, peer)
    return newest
