"""What a chain is, and what becomes of a write that arrives at a replica. No I/O."""

from __future__ import annotations

import asyncio
import contextlib
import enum
from collections.abc import AsyncIterator, Sequence
from typing import Final, NamedTuple

from prism.replication.views import NO_VERSION, Version, View

__all__ = [
    "DONE",
    "STALE",
    "SUPERSEDED",
    "UNKNOWN",
    "Arrival",
    "KeyLocks",
    "Outcome",
    "Reply",
    "Stage",
    "arrival",
    "chain_of",
    "tail_of",
]


class Outcome(enum.IntEnum):
    """What has become of a write at a replica and behind it."""

    DONE = 0  # installed there and behind
    STALE = 1  # another epoch there: nothing done
    REFUSED = 2  # not kept, there or behind
    SUPERSEDED = 3  # a later version is there
    UNKNOWN = 4  # kept perhaps: to be tried again


class Reply(NamedTuple):
    """The answer to a :class:`Stage`.

    Attributes:
        status, detail: an HTTP status and its text, with ``REFUSED``.
        view: the sender's, with ``STALE``.
    """

    outcome: Outcome
    status: int = 0
    detail: str = ""
    view: View | None = None


DONE: Final = Reply(Outcome.DONE)
STALE: Final = Reply(Outcome.STALE)
SUPERSEDED: Final = Reply(Outcome.SUPERSEDED)
UNKNOWN: Final = Reply(Outcome.UNKNOWN)


class Stage(NamedTuple):
    """A write on its way along a chain."""

    view: View
    key: bytes
    version: Version
    chain: tuple[str, ...]


def chain_of(view: View, order: Sequence[str]) -> tuple[str, ...]:
    """Who gets a write of a key with these replicas, in this order; empty: nobody can.

    The head serves, since it gives the version. The tail serves, too, where there are two that do,
    since it is asked by those that do not know yet. Nodes that join are in between.
    """
    serving = [name for name in order if name in view.serving]
    if not serving:
        return ()
    joining = [name for name in order if name in view.joining]
    return (serving[0], *joining, *serving[1:])


def tail_of(view: View, order: Sequence[str]) -> str:
    """The last replica that serves; empty: none does."""
    serving = [name for name in order if name in view.serving]
    return serving[-1] if serving else ""


class Arrival(NamedTuple):
    """What to do with a write that arrives: answer at once, or keep it (``store``) and go on."""

    reply: Reply | None
    store: bool


def arrival(version: Version, installed: Version, staged: Version) -> Arrival:
    """The rule for a write of ``version`` where these versions are.

    ============  ===========  ==================================================
    installed     staged       then
    ============  ===========  ==================================================
    the same      any          it is done here and behind
    later         any          superseded
    earlier       the same     go on: it was here before, its answer was lost
    earlier       later        superseded
    earlier       earlier      stage it, in the place of what is staged
    ============  ===========  ==================================================
    """
    if installed == version:
        return Arrival(DONE, False)
    if installed > version or staged > version:
        return Arrival(SUPERSEDED, False)
    return Arrival(None, staged != version or staged == NO_VERSION)


class KeyLocks:
    """A lock for each key that is in use."""

    def __init__(self) -> None:
        self._locks: dict[bytes, tuple[asyncio.Lock, int]] = {}

    def __len__(self) -> int:
        return len(self._locks)

    @contextlib.asynccontextmanager
    async def __call__(self, key: bytes, seconds: float | None = None) -> AsyncIterator[None]:
        """Hold the key's lock; whoever has asked first gets it first.

        Args:
            key: whose lock.
            seconds: how long to wait for it at most; ``None``: for ever.

        Raises:
            TimeoutError: others have had it for that long.
        """
        lock, users = self._locks.get(key) or (asyncio.Lock(), 0)
        self._locks[key] = (lock, users + 1)
        try:
            async with asyncio.timeout(seconds):
                await lock.acquire()
            try:
                yield
            finally:
                lock.release()
        finally:
            lock, users = self._locks[key]
            if users == 1:
                del self._locks[key]
            else:
                self._locks[key] = (lock, users - 1)
