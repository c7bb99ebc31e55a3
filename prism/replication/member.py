"""A node as a member: it follows the views, and brings what is staged in order for each of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final

from prism.errors import PrismError
from prism.replication.interfaces import Storage, Transport
from prism.replication.membership import Membership, Out
from prism.replication.rules import KeyLocks
from prism.replication.views import Message, Version, View

__all__ = ["REDRIVES", "Member"]

log = logging.getLogger(__name__)

REDRIVES: Final = 4
"""Staged writes that are looked after at the same time."""


class Member:
    """One node's part but for reads and writes. See the module.

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
        self.lock = KeyLocks()  # around one step on a key
        self._writes = KeyLocks()  # around a whole write, at the head
        self._sections = 0
        self._idle = asyncio.Condition()
        self._changed = asyncio.Event()
        self._doubts: dict[bytes, Version] = {}
        self._since: dict[bytes, tuple[Version, float]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._adopting: asyncio.Task[None] | None = None

    # -- life -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Take part."""
        self._adopt()
        self.spawn(self._tick())
        self.spawn(self._look_after())

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

    def spawn(self, work: Any) -> asyncio.Task[Any]:
        """Have work done that ends with this part."""
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
            self._adopting = self.spawn(self._change())

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
            self.catch_up_from(self.view.epoch)
        elif self.me in self.view.serving and self._doubts:
            self.spawn(self._settle_doubts())

    async def _settle_doubts(self) -> None:
        keys = [key for key in self._doubts if self._doubtful(key)]
        for at in range(0, len(keys), REDRIVES):
            await asyncio.gather(*(self._redrive(key) for key in keys[at : at + REDRIVES]))

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
        async with self.lock(key):
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

    # -- what is a replicator's ------------------------------------------------------------------

    def catch_up_from(self, epoch: int) -> None:
        """Begin to catch up in this epoch."""
        raise NotImplementedError

    async def _redrive(self, key: bytes) -> None:
        raise NotImplementedError

    async def _look_after(self) -> None:
        raise NotImplementedError
