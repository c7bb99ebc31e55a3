"""Replicated objects: writes along a chain, reads at any replica, whatever fails in between.

One :class:`Replicator` is one node's part: it keeps the membership (``replication_membership.py``),
passes writes along chains, decides which node may answer a read, and has the node catch up after
it was away (``replication_catchup.py``). Disk and network are behind :class:`Storage` and
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
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol, TypeVar

from prism.errors import PrismError
from prism.replication_catchup import CatchUp, Page
from prism.replication_membership import Membership, Out
from prism.replication_rules import (
    DONE,
    STALE,
    UNKNOWN,
    KeyLocks,
    Outcome,
    Reply,
    Stage,
    arrival,
    chain_of,
    tail_of,
)
from prism.replication_views import NO_VERSION, Message, Version, View

__all__ = ["NotHead", "Refusal", "Replicator", "Storage", "Transport", "Unavailable"]

log = logging.getLogger(__name__)
T = TypeVar("T")

_RETRY: Final = 0.05  # seconds between two tries along a chain that has not changed
_REDRIVES: Final = 4  # staged writes that are looked after at the same time


class Unavailable(PrismError):
    """The write's outcome is not known, or it cannot be made now: the client may repeat it."""


class NotHead(Unavailable):
    """Another node is the head of this key's chain, or nobody is just now."""


class Refusal(PrismError):
    """A replica's disk does not take the write; nobody has it.

    Attributes:
        status: the HTTP status to answer.
    """

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class Storage(Protocol):
    """One node's objects.

    A blob is an object's octets, in whatever form storage and transport agree on.
    """

    staged: Mapping[bytes, Version]
    """What is staged, by key; one version of a key at most."""

    async def version(self, key: bytes) -> Version:
        """The installed version, of a deletion too; ``NO_VERSION``: there is none."""

    async def stage(self, key: bytes, version: Version, blob: Any) -> None:
        """Keep durably, invisible, in the place of what is staged; raises :class:`Refusal`."""

    async def install(self, key: bytes) -> None:
        """Make what is staged visible, durably."""

    async def unstage(self, key: bytes) -> None:
        """Throw away what is staged."""

    async def blob(self, key: bytes) -> Any:
        """What is staged, for a transport; it closes it."""

    async def installed(self, key: bytes) -> tuple[Version, Any] | None:
        """What is installed, for a transport; it closes it."""

    async def page(self, after: bytes, limit: int) -> tuple[list[tuple[bytes, Version]], bool]:
        """Up to ``limit`` installed versions behind a key, in order; whether there are more."""

    async def put(self, key: bytes, version: Version, blob: Any) -> None:
        """Install at once, in the place of what is installed; what is staged stays."""

    async def remove(self, key: bytes, version: Version) -> None:
        """Forget a key that still has this version, without leaving a mark of deletion."""


class Transport(Protocol):
    """The way to the other nodes. What fails raises :class:`~prism.errors.PrismError`."""

    def tell(self, peer: str, message: Message) -> None:
        """Send a message about views, if possible; it may be lost."""

    async def stage(self, peer: str, stage: Stage, blob: Any) -> Reply:
        """Pass a write on."""

    async def page(self, peer: str, epoch: int, after: bytes) -> Page:
        """A page of the versions that this node should have, as seen by ``peer``."""

    async def fetch(self, peer: str, epoch: int, key: bytes) -> tuple[Version, Any] | None:
        """An installed object."""


class Reading(NamedTuple):
    """Where a read is to be answered: the node's name, empty if nobody can now."""

    node: str
    why: str


class Replicator:
    """One node's part. See the module.

    Args:
        membership: this node's.
        order: the replicas of a key, always the same, in the order of preference.
        storage: where objects are.
        transport: the way to the others.
        save: puts the membership's ``saved`` on disk.
        clock: monotonic, seconds.
        wall: seconds since 1970.
    """

    def __init__(
        self,
        membership: Membership,
        order: Callable[[bytes], Sequence[str]],
        storage: Storage,
        transport: Transport,
        *,
        save: Callable[[Membership], None],
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.me = membership.me
        self.membership = membership
        self.order = order
        self.storage = storage
        self.transport = transport
        self.clock = clock
        self._save = save
        self._wall = wall
        self._serial = 0
        self._locks = KeyLocks()  # around one step on a key
        self._writes = KeyLocks()  # around a whole write, at the head
        self._sections = 0
        self._idle = asyncio.Condition()
        self._changed = asyncio.Event()
        self._doubts: dict[bytes, Version] = {}
        self._since: dict[bytes, tuple[Version, float]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._adopting: asyncio.Task[None] | None = None
        self.catch_up = CatchUp(self)

    # -- life -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Take part."""
        self._adopt()
        self._spawn(self._tick())
        self._spawn(self._look_after())

    async def close(self) -> None:
        """Stop at once; what is staged stays so."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def leave(self, seconds: float) -> bool:
        """Have this node left out, in good order; whether that was agreed on in time."""
        self.membership.leave()
        self._send(self.membership.tick(self.clock()))
        deadline = self.clock() + seconds
        while self.me in self.membership.view.serving and self.clock() < deadline:
            await self.changed(0.1)
        return self.me not in self.membership.view.members

    def _spawn(self, work: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # -- views ----------------------------------------------------------------------------------

    @property
    def view(self) -> View:
        """The latest known."""
        return self.membership.view

    @property
    def serves(self) -> bool:
        """Whether this node may answer now."""
        return self.membership.serves(self.clock())

    @property
    def state(self) -> str:
        """``serving``, ``joining`` or ``away``; ``waiting`` for a lease, or ``leaving``."""
        view = self.view
        if self.membership.leaving:
            return "leaving"
        if self.me in view.serving:
            return "serving" if self.serves else "waiting"
        return "joining" if self.me in view.joining else "away"

    async def changed(self, seconds: float) -> None:
        """Wait for a change of the view, of its being applied, or of the lease; at most so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    def on_message(self, message: Message) -> None:
        """A message about views has come."""
        self._step(lambda: self.membership.receive(message, self.clock()))

    def _learn(self, view: View) -> None:
        if view.epoch > self.view.epoch:
            self._step(lambda: self.membership.learn(view))

    def _step(self, step: Callable[[], Out]) -> None:
        before = self.view.epoch, self.serves
        out = step()
        self._send(out)
        if before[0] != self.view.epoch:
            log.info("the view is now %s", self.view)
            self._adopt()
        if before != (self.view.epoch, self.serves):
            self._notify()

    def _send(self, out: Out) -> None:
        if self.membership.unsaved:
            self._save(self.membership)
            self.membership.unsaved = False
        for peer, message in out:
            self.transport.tell(peer, message)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _tick(self) -> None:
        while True:
            self._step(lambda: self.membership.tick(self.clock()))
            await asyncio.sleep(self.membership.lease / 10)

    def _adopt(self) -> None:
        if self._adopting is None or self._adopting.done():
            self._adopting = self._spawn(self._change())

    async def _change(self) -> None:
        """Bring what is staged in order for each new view, then say so."""
        while self.membership.applied != (view := self.view).epoch:
            async with self._idle:
                await self._idle.wait_for(lambda: not self._sections)
            try:
                for key in list(self.storage.staged):
                    await self._rearrange(key, view)
            except (OSError, PrismError) as error:
                log.error("cannot change to view %d yet: %s", view.epoch, error)
                await asyncio.sleep(self.membership.lease / 2)
                continue
            if view.epoch == self.view.epoch:
                self._step(lambda view=view: self._finished(view))  # type: ignore[misc]
                self._notify()
        if self.me in self.view.joining:
            self.catch_up.start(self.view.epoch)
        elif self.me in self.view.serving and self._doubts:
            self._spawn(self._settle_doubts())

    async def _settle_doubts(self) -> None:
        keys = [key for key in self._doubts if self._doubtful(key)]
        for at in range(0, len(keys), _REDRIVES):
            await asyncio.gather(*(self._redrive(key) for key in keys[at : at + _REDRIVES]))

    def _doubtful(self, key: bytes) -> bool:
        """Whether nobody can say yet if what is staged here was committed before this epoch."""
        return key in self._doubts and self._doubts[key] == self.storage.staged.get(key)

    @property
    def unsettled(self) -> bool:
        """Whether there are keys in doubt; they block those that catch up."""
        self._doubts = {key: self._doubts[key] for key in self._doubts if self._doubtful(key)}
        return bool(self._doubts)

    def _finished(self, view: View) -> Out:
        self.membership.finished(view.epoch)
        return self.membership.tick(self.clock())

    async def _rearrange(self, key: bytes, view: View) -> None:
        async with self._locks(key):
            version = self.storage.staged.get(key)
            if version is None:
                return
            if self.me not in view.serving:
                await self.storage.unstage(key)  # whoever serves has it, or will
            else:
                # A former tail may have installed it, and answered reads with it, or not: it goes
                # along the chain of this epoch first.
                self._doubts[key] = version

    @contextlib.asynccontextmanager
    async def _section(self, epoch: int) -> AsyncIterator[bool]:
        """A stretch in which the node stays in this epoch; yields whether it is in it."""
        membership = self.membership
        self._sections += 1
        try:
            yield membership.view.epoch == membership.applied == epoch
        finally:
            self._sections -= 1
            if not self._sections:
                async with self._idle:
                    self._idle.notify_all()

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
        async with self._writes(key):
            self._be_head(key)
            if key in self.storage.staged:
                await self._drive(key, deadline, fresh=False)
            async with self._locks(key), self._section(self.view.epoch) as good:
                if not good:
                    raise NotHead("the view is changing")
                self._be_head(key)
                if key in self.storage.staged:
                    raise Unavailable("another write of this key is under way")
                version = self._next(await self.storage.version(key))
                blob, result = await make(version)
                await self.storage.stage(key, version, blob)
            await self._drive(key, deadline, fresh=True)
            return result

    def _be_head(self, key: bytes) -> None:
        if self.head(key) != self.me or not self.serves:
            raise NotHead(f"{self.head(key) or 'nobody'} takes writes of this key now")

    def _next(self, last: Version) -> Version:
        self._serial = max(self._serial + 1, last.serial + 1, int(self._wall() * 1e6))
        return Version(self.view.epoch, self._serial)

    async def _drive(self, key: bytes, deadline: float, *, fresh: bool) -> None:
        """Have what is staged here installed everywhere, beginning at the head of its chain."""
        version = self.storage.staged.get(key)
        if version is None:
            return
        while True:
            view = self.view
            reply = await self._once(key, version, view, fresh=fresh)
            if reply.outcome is Outcome.DONE:
                return
            if reply.outcome is Outcome.REFUSED and fresh:
                raise Refusal(reply.status, reply.detail)
            if reply.outcome is Outcome.SUPERSEDED:
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
        async with self._locks(stage.key):
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
        async with self._locks(stage.key), self._section(stage.view.epoch) as good:
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
                await self.storage.install(stage.key)
                return DONE
        reply = await self._pass_on(stage, index)
        return await self._settle(stage, reply, fresh=verdict.store)

    async def _settle(self, stage: Stage, reply: Reply, *, fresh: bool) -> Reply:
        """Do here what the rest of the chain has answered."""
        if reply.outcome not in (Outcome.DONE, Outcome.REFUSED):
            return reply
        key = stage.key
        async with self._locks(key):
            mine = self.storage.staged.get(key) == stage.version
            if reply.outcome is Outcome.DONE:
                if mine:
                    await self.storage.install(key)
                    return DONE
                return DONE if await self.storage.version(key) >= stage.version else UNKNOWN
            if not fresh:
                return UNKNOWN  # an earlier try may have come further
            if mine:
                await self.storage.unstage(key)
            return reply

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
                await asyncio.gather(*(self._redrive(key) for key in old[:_REDRIVES]))

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
        if self.membership.applied != epoch or self.view.epoch != epoch:
            raise Unavailable(f"{self.me} is not in epoch {epoch}")
        return await self.storage.installed(key)
