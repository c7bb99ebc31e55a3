"""A cluster of replicators in one process: virtual time, memory for disks, a network that fails.

Every await on disk or network takes a random time, so tasks interleave in ways that a seed decides.
Disks outlive crashes; what was under way in memory does not.
"""

from __future__ import annotations

import asyncio
import random
import selectors
from typing import Any

from prism.errors import PrismError
from prism.replication.membership import Membership
from prism.replication.replicator import Replicator
from prism.replication.rules import Reply, Stage
from prism.replication.views import NO_VERSION, Message, Saved, Version

LEASE = 1.0


class _NoWaiting(selectors.SelectSelector):
    def select(self, timeout: float | None = None) -> list[Any]:
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time leaps to the next timer when nothing is left to do."""

    def __init__(self) -> None:
        super().__init__(_NoWaiting())
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self.now = max(self.now, self._scheduled[0].when())  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


class Disk:
    """What outlives a crash."""

    def __init__(self) -> None:
        self.saved = Saved()
        self.installed: dict[bytes, tuple[Version, Any]] = {}
        self.staged: dict[bytes, tuple[Version, Any]] = {}


class MemoryStorage:
    def __init__(self, world: World, disk: Disk) -> None:
        self.world, self.disk = world, disk

    @property
    def staged(self) -> dict[bytes, Version]:
        return {key: version for key, (version, _) in self.disk.staged.items()}

    async def version(self, key: bytes) -> Version:
        return self.disk.installed.get(key, (NO_VERSION, None))[0]

    async def stage(self, key: bytes, version: Version, blob: Any) -> None:
        await self.world.pause()
        self.disk.staged[key] = (version, blob)

    async def install(self, key: bytes) -> None:
        await self.world.pause()
        version, _ = self.disk.staged[key]
        assert version > self.disk.installed.get(key, (NO_VERSION, None))[0]
        self.disk.installed[key] = self.disk.staged.pop(key)

    async def unstage(self, key: bytes) -> None:
        self.disk.staged.pop(key, None)

    async def blob(self, key: bytes) -> Any:
        return self.disk.staged[key][1]

    async def installed(self, key: bytes) -> tuple[Version, Any] | None:
        return self.disk.installed.get(key)

    async def page(self, after: bytes, limit: int) -> tuple[list[tuple[bytes, Version]], bool]:
        keys = sorted(key for key in self.disk.installed if key > after)
        return [(key, self.disk.installed[key][0]) for key in keys[:limit]], len(keys) > limit

    async def put(self, key: bytes, version: Version, blob: Any) -> None:
        await self.world.pause()
        self.disk.installed[key] = (version, blob)

    async def discard(self, blob: Any) -> None:
        pass

    async def remove(self, key: bytes, version: Version) -> None:
        if self.disk.installed.get(key, (None,))[0] == version:
            del self.disk.installed[key]


class MemoryTransport:
    def __init__(self, world: World, me: str) -> None:
        self.world, self.me = world, me

    def tell(self, peer: str, message: Message) -> None:
        self.world.loop.create_task(self._tell(peer, message))

    async def _tell(self, peer: str, message: Message) -> None:
        if await self.world.hop(self.me, peer) and (node := self.world.nodes.get(peer)):
            node.on_message(message)

    async def _ask(self, peer: str, call: Any) -> Any:
        """There and back; it runs on over there when the asker is gone, or the answer is lost."""
        if not await self.world.hop(self.me, peer):
            await asyncio.sleep(LEASE / 4)
            raise PrismError("lost")
        node = self.world.nodes.get(peer)
        if node is None:
            raise PrismError("down")
        answer = await asyncio.shield(node.spawn(call(node)))
        if not await self.world.hop(peer, self.me):
            raise PrismError("answer lost")
        return answer

    async def stage(self, peer: str, stage: Stage, blob: Any) -> Reply:
        async with asyncio.timeout(LEASE):
            return await self._ask(peer, lambda node: node.on_stage(stage, blob))

    async def page(self, peer: str, epoch: int, after: bytes) -> Any:
        return await self._ask(peer, lambda node: node.on_page(self.me, epoch, after))

    async def settled(self, peer: str, epoch: int, key: bytes) -> Any:
        async def say(node: Replicator) -> Any:
            return node.on_settled(epoch, key)

        async with asyncio.timeout(LEASE):
            return await self._ask(peer, say)

    async def fetch(self, peer: str, epoch: int, key: bytes) -> Any:
        return await self._ask(peer, lambda node: node.on_fetch(epoch, key))


class World:
    def __init__(self, seed: int, names: str = "abc", replicas: int = 3) -> None:
        self.random = random.Random(seed)
        self.names, self.replicas = list(names), replicas
        self.disks = {name: Disk() for name in names}
        self.nodes: dict[str, Replicator] = {}
        self.cut: set[frozenset[str]] = set()
        self.loss = 0.0
        self.lives = 0
        self.last: dict[str, tuple[bytes, Version]] = {}
        self.acknowledged: dict[bytes, int] = {}
        self.attempted: dict[bytes, set[int]] = {}
        self.seen: dict[bytes, Version] = {}
        self.writes = self.reads = 0

    @property
    def loop(self) -> VirtualLoop:
        return asyncio.get_running_loop()  # type: ignore[return-value]

    def order(self, key: bytes) -> list[str]:
        start = key[0] % len(self.names)
        return (self.names[start:] + self.names[:start])[: self.replicas]

    async def pause(self) -> None:
        await asyncio.sleep(self.random.random() * 0.01)

    async def hop(self, source: str, target: str) -> bool:
        slow = self.random.random() < 0.02
        await asyncio.sleep(self.random.random() * (LEASE / 2 if slow else 0.02))
        return frozenset((source, target)) not in self.cut and self.random.random() >= self.loss

    def start(self, name: str) -> None:
        self.lives += 1
        disk, now = self.disks[name], self.loop.now
        membership = Membership(
            name, self.names, self.replicas, LEASE, saved=disk.saved, now=now,
            serial=self.lives << 32, spread=self.random.random,
        )  # fmt: skip

        def save(membership: Membership) -> None:
            disk.saved = membership.saved

        self.nodes[name] = Replicator(
            membership, self.order, MemoryStorage(self, disk), MemoryTransport(self, name),
            save=save, clock=lambda: self.loop.now, wall=lambda: self.loop.now,
        )  # fmt: skip
        self.nodes[name].start()

    async def crash(self, name: str) -> None:
        node = self.nodes.pop(name, None)
        if node is not None:
            await node.close()

    async def until(self, condition: Any, seconds: float = 60.0) -> None:
        end = self.loop.now + seconds
        while not condition():
            assert self.loop.now < end, {n: (r.view, r.state) for n, r in self.nodes.items()}
            await asyncio.sleep(0.05)

    def all_serve(self) -> bool:
        return len(self.nodes) == len(self.names) and all(n.serves for n in self.nodes.values())

    # -- clients: what they must never see is checked here -----------------------------------------

    async def write(self, key: bytes, number: int) -> bool:
        """One write of a number greater than all before; whether it was acknowledged."""
        self.attempted.setdefault(key, set()).add(number)
        name = self.random.choice(self.names)
        if name not in self.nodes:
            return False
        name = self.nodes[name].head(key)
        if name not in self.nodes:
            return False

        async def make(version: Version) -> tuple[int, None]:
            return number, None

        task = self.nodes[name].spawn(self.nodes[name].write(key, make, 3 * LEASE))
        try:
            await asyncio.shield(task)
        except (PrismError, TimeoutError, asyncio.CancelledError):
            return False
        self.acknowledged[key] = max(number, self.acknowledged.get(key, 0))
        self.writes += 1
        return True

    async def read(self, key: bytes) -> bool:
        """One read; it must be no older than what was acknowledged or read before it began."""
        floor, seen = self.acknowledged.get(key, 0), self.seen.get(key, NO_VERSION)
        name = self.random.choice(self.names)
        for _ in range(4):
            node = self.nodes.get(name)
            if node is None:
                return False
            reading = node.reading(key)
            if not reading.node:
                return False
            if reading.node == name:
                break
            name = reading.node
            await self.pause()
        else:
            return False
        version, number = self.disks[name].installed.get(key, (NO_VERSION, 0))
        assert number >= floor, f"{name} answers {key!r} with {number}, {floor} was acknowledged"
        assert version >= seen, f"{name} answers {key!r} with {version}, {seen} was read before"
        assert number == 0 or number in self.attempted[key]
        self.seen[key] = max(version, self.seen.get(key, NO_VERSION))
        self.reads += 1
        return True


def run(coroutine: Any) -> None:
    loop = VirtualLoop()
    try:
        loop.run_until_complete(coroutine)
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
