"""Replicated objects: writes along a chain, reads at any replica, whatever fails in between.

One :class:`Replicator` is one node's part: it follows the views (``member.py`` over
``membership.py``), passes writes along chains, decides which node may answer a read, and has the
node catch up after it was away (``catchup.py``). Disk and network are behind :class:`Storage` and
:class:`Transport`. The protocol and its failure model are in ``docs/replication.md``.

A write is *staged* (on disk, invisible) at one replica after the other along the chain; the last
one *installs* it (makes it visible), which is the commit point, and the others do when they hear of
it on the way back. So a replica that has nothing staged for a key has its latest version, and one
that has asks the tail.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple, TypeVar

from prism.errors import PrismError
from prism.replication.catchup import CatchUp
from prism.replication.interfaces import NotHead, Page, Refusal, Settled, Unavailable
from prism.replication.member import REDRIVES, Member
from prism.replication.rules import (
    DONE,
    STALE,
    UNKNOWN,
    Outcome,
    Reply,
    Stage,
    arrival,
    chain_of,
    tail_of,
)
from prism.replication.views import NO_VERSION, Version, View

__all__ = ["Reading", "Replicator"]

log = logging.getLogger(__name__)
T = TypeVar("T")

_RETRY: Final = 0.05  # seconds between two tries along a chain that has not changed


class Reading(NamedTuple):
    """Where a read is to be answered: the node's name, empty if nobody can now."""

    node: str
    why: str


class Replicator(Member):
    """One node's part; :class:`Member` says what it is made of.

    Attributes:
        retiring: this node takes no new writes, since it is about to leave.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.catch_up = CatchUp(self)
        self.retiring = False
        self._settled_in: dict[str, int] = {}  # the last epoch that each node has settled in
        self._awaited: dict[bytes, Version] = {}  # begun here, not known to be installed anywhere

    def catch_up_from(self, epoch: int) -> None:
        """Begin to catch up in this epoch."""
        self.catch_up.start(epoch)

    async def leave(self, seconds: float) -> bool:
        """As :meth:`Member.leave`, when the writes that this node has begun are done."""
        self.retiring = True
        deadline = self.clock() + seconds
        while self._writes and self.clock() < deadline - seconds / 2:
            await self.changed(_RETRY / 5)
        return await super().leave(deadline - self.clock())

    def stay(self) -> None:
        """Take part again, after :meth:`leave`."""
        self.retiring = False
        self.membership.stay()

    # -- reads ----------------------------------------------------------------------------------

    def reading(self, key: bytes) -> Reading:
        """Who answers a read of ``key``: this node if it can, else the best guess."""
        order, view = self.order(key), self.view
        if self.me in order and self.serves:
            if key not in self.storage.staged:
                return Reading(self.me, "clean")
            tail = tail_of(view, order)
            return Reading("" if tail == self.me and self._doubtful(key) else tail, "staged")
        others = [name for name in order if name in view.serving and name != self.me]
        return Reading(others[0] if others else "", "not-serving")

    def head(self, key: bytes) -> str:
        """Who takes writes of ``key`` in; empty: nobody can."""
        chain = chain_of(self.view, self.order(key))
        return chain[0] if chain else ""

    # -- writes ---------------------------------------------------------------------------------

    async def write(
        self, key: bytes, make: Callable[[Version], Awaitable[tuple[Any, T]]], seconds: float
    ) -> T:
        """Make a new version of ``key``; returns when all replicas that serve have it.

        Writes of a key wait for each other, in the order in which they have come.

        Args:
            key: the object's.
            make: called with the version it shall have, when the latest one before is installed
                here; returns the blob, and what to return. What it raises ends the write.
            seconds: for all of it.

        Raises:
            NotHead: this node does not take writes of this key; nothing was done.
            Refusal: a replica's disk does not take it; nothing was changed.
            Unavailable: the outcome is not known.
        """
        deadline = self.clock() + seconds
        async with contextlib.AsyncExitStack() as turn:
            try:
                await turn.enter_async_context(self._writes(key, seconds))
            except TimeoutError:
                raise Unavailable("other writes of this key are under way") from None
            while True:
                self._be_head(key)
                epoch = self.view.epoch
                await self._after_earlier(key, epoch, deadline)
                async with self.lock(key), self._section(epoch) as good:
                    if not good:
                        raise NotHead("the view is changing")
                    self._be_head(key)
                    if key not in self.storage.staged:
                        version = self._next(await self.storage.version(key))
                        blob, result = await make(version)
                        await self.storage.stage(key, version, blob)
                        break
            self._awaited[key] = version
            try:
                await self._drive(key, deadline, fresh=True)
            finally:
                self._awaited.pop(key, None)
            return result

    async def _after_earlier(self, key: bytes, epoch: int, deadline: float) -> None:
        """Have what is under way of a key brought to its end, before there is a later version.

        After a change of view the former head, and others, may have a write of it staged that has
        not come here yet. It would be superseded by a new one, and nobody could tell its client
        whether it has been in effect.
        """
        while True:
            others = [name for name in chain_of(self.view, self.order(key)) if name != self.me]
            settled = [await self._settled_at(name, epoch, key) for name in others]
            if epoch != self.view.epoch:
                raise NotHead("the view is changing")
            if all(settled) and key not in self.storage.staged:
                return
            if self.clock() >= deadline:
                raise Unavailable("an earlier write of this key is not done yet")
            if all(settled):
                with contextlib.suppress(Unavailable):  # superseded, say: look again
                    await self._drive(key, deadline, fresh=False)
                    continue
            await self.changed(_RETRY)

    async def _settled_at(self, peer: str, epoch: int, key: bytes) -> bool:
        """Whether a node is known to have nothing of a key from before this epoch."""
        if self._settled_in.get(peer) == epoch or peer in self.view.joining:
            return True
        try:
            found = await self.transport.settled(peer, epoch, key)
        except PrismError as error:
            log.debug("%s does not say whether it has settled: %s", peer, error)
            return False
        if found.all:
            self._settled_in[peer] = epoch
        return found.key

    def on_settled(self, epoch: int, key: bytes) -> Settled:
        """What the head of a chain asks before its first writes in an epoch.

        Raises:
            Unavailable: this node is not in that epoch.
        """
        self._be_in(epoch)
        return Settled(not self._doubtful(key), not self.unsettled)

    def _be_head(self, key: bytes) -> None:
        if self.retiring or self.head(key) != self.me or not self.serves:
            raise NotHead(f"{self.head(key) or 'nobody'} takes writes of this key now")

    def _next(self, last: Version) -> Version:
        self._serial = max(self._serial + 1, last.serial + 1, int(self._wall() * 1e6))
        return Version(self.view.epoch, self._serial)

    async def _drive(self, key: bytes, deadline: float, *, fresh: bool) -> None:
        """Have what is staged here installed everywhere, beginning at the head of its chain."""
        version = self.storage.staged.get(key)
        if version is None:
            return
        begun_here = fresh
        while True:
            view = self.view
            reply = await self._once(key, version, view, fresh=fresh)
            if reply.outcome is Outcome.DONE:
                return
            if reply.outcome is Outcome.REFUSED and fresh:
                raise Refusal(reply.status, reply.detail)
            if reply.outcome is Outcome.SUPERSEDED:
                if begun_here and self._awaited.get(key) != version:
                    return  # it was done by another replica's doing, before there was a later one
                raise Unavailable("a later write has come in between")
            fresh = False
            if self.clock() >= deadline:
                raise Unavailable("not all replicas have confirmed the write in time")
            if view.epoch == self.view.epoch:
                await self.changed(_RETRY)

    async def _once(self, key: bytes, version: Version, view: View, *, fresh: bool) -> Reply:
        chain = chain_of(view, self.order(key))
        if not chain:
            return UNKNOWN
        stage = Stage(view, key, version, chain)
        if chain[0] == self.me:
            reply = await self._pass_on(stage, 0)
        else:
            reply = await self._send_stage(chain[0], stage)
        return await self._settle(stage, reply, fresh=fresh)

    async def _pass_on(self, stage: Stage, index: int) -> Reply:
        """To whoever comes behind in the chain."""
        if index + 1 < len(stage.chain):
            return await self._send_stage(stage.chain[index + 1], stage)
        async with self._section(stage.view.epoch) as good:  # a chain of one
            return DONE if good else STALE

    async def _send_stage(self, peer: str, stage: Stage) -> Reply:
        async with self.lock(stage.key):
            if self.storage.staged.get(stage.key) != stage.version:
                installed = await self.storage.version(stage.key)
                return DONE if installed >= stage.version else UNKNOWN
            blob = await self.storage.blob(stage.key)
        try:
            reply = await self.transport.stage(peer, stage, blob)
        except PrismError as error:
            log.debug("%s does not confirm: %s", peer, error)
            return UNKNOWN
        if reply.view is not None:
            self._learn(reply.view)
        return reply

    async def on_stage(self, stage: Stage, blob: Any) -> Reply:
        """A write has come along its chain, or from a replica that has had it for long."""
        self._learn(stage.view)
        if self.me not in stage.chain:
            return UNKNOWN
        if self.membership.applied < stage.view.epoch:
            await self.changed(self.membership.lease)
        index = stage.chain.index(self.me)
        last = index + 1 == len(stage.chain)
        async with self.lock(stage.key), self._section(stage.view.epoch) as good:
            if not good:
                return STALE._replace(view=self.view)
            installed = await self.storage.version(stage.key)
            staged = self.storage.staged.get(stage.key, NO_VERSION)
            verdict = arrival(stage.version, installed, staged)
            if verdict.reply is not None:
                return verdict.reply
            if verdict.store:
                try:
                    await self.storage.stage(stage.key, stage.version, blob)
                except Refusal as error:
                    return Reply(Outcome.REFUSED, error.status, str(error))
            if last:
                await self._install(stage.key)
                return DONE
        reply = await self._pass_on(stage, index)
        return await self._settle(stage, reply, fresh=verdict.store)

    async def _settle(self, stage: Stage, reply: Reply, *, fresh: bool) -> Reply:
        """Do here what the rest of the chain has answered."""
        if reply.outcome not in (Outcome.DONE, Outcome.REFUSED):
            return reply
        key = stage.key
        async with self.lock(key):
            mine = self.storage.staged.get(key) == stage.version
            if reply.outcome is Outcome.DONE:
                if mine:
                    await self._install(key)
                    return DONE
                return DONE if await self.storage.version(key) >= stage.version else UNKNOWN
            if not fresh:
                return UNKNOWN  # an earlier try may have come further
            if mine:
                await self.storage.unstage(key)
            return reply

    async def _install(self, key: bytes) -> None:
        version = self.storage.staged[key]
        await self.storage.install(key)
        if self._awaited.get(key) == version:
            del self._awaited[key]

    async def _look_after(self) -> None:
        """Have what stays staged for long brought to an end."""
        while True:
            await asyncio.sleep(self.membership.lease / 2)
            now, staged = self.clock(), self.storage.staged
            self._since = {
                key: since
                if (since := self._since.get(key)) and since[0] == version
                else (version, now)
                for key, version in staged.items()
            }
            old = [
                k for k, (_, since) in self._since.items() if now - since > self.membership.lease
            ]
            if self.me in self.view.serving:
                await asyncio.gather(*(self._redrive(key) for key in old[:REDRIVES]))

    async def _redrive(self, key: bytes) -> None:
        async with self._writes(key):
            with contextlib.suppress(PrismError, OSError):
                await self._drive(key, self.clock() + self.membership.lease, fresh=False)

    # -- what nodes that join ask -----------------------------------------------------------------

    async def on_page(self, peer: str, epoch: int, after: bytes) -> Page:
        """A page of versions for a node that catches up; see :class:`CatchUp`."""
        return await self.catch_up.page_for(peer, epoch, after)

    async def on_fetch(self, epoch: int, key: bytes) -> tuple[Version, Any] | None:
        """An object for a node that catches up.

        Raises:
            Unavailable: this node is not in that epoch.
        """
        self._be_in(epoch)
        return await self.storage.installed(key)

    def _be_in(self, epoch: int) -> None:
        if self.membership.applied != epoch or self.view.epoch != epoch:
            raise Unavailable(f"{self.me} is not in epoch {epoch}")
