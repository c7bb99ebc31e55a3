"""Replication: several writers of one key, who wait for each other while views change."""

from __future__ import annotations

import asyncio

import pytest
from replication_world import LEASE, World, run

from prism.errors import PrismError
from prism.replication.interfaces import NotHead, Unavailable
from prism.replication.views import Version

PATIENCE = 3 * LEASE + 2  # seconds that a client's write may take
KEYS = [b"%d" % number for number in range(9)]
WRITERS = 3  # of each key


class Writers:
    """Clients that write the same keys as others do, and note what is refused."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.refused: list[str] = []
        self.done = 0
        self._over = asyncio.Event()
        self._tasks = [asyncio.ensure_future(self._go(key)) for key in KEYS for _ in range(WRITERS)]

    async def stop(self) -> None:
        self._over.set()
        await asyncio.gather(*self._tasks)

    async def _go(self, key: bytes) -> None:
        while not self._over.is_set():
            try:
                await self._write(key)
                self.done += 1
            except PrismError as error:
                self.refused.append(f"{key!r}: {error}")
            await self.world.pause()

    async def _write(self, key: bytes) -> None:
        """One write, wherever there is somebody who takes it: what a node's app does."""
        world = self.world
        end = world.loop.now + PATIENCE

        async def make(version: Version) -> tuple[int, None]:
            return self.done, None

        while True:
            name = world.nodes[world.random.choice(list(world.nodes))].head(key)
            node = world.nodes.get(name)
            try:
                if node is not None:
                    await node.spawn(node.write(key, make, end - world.loop.now))
                    return
            except NotHead:
                if world.loop.now >= end:
                    raise
            await world.pause()


async def _drained_one_after_the_other(seed: int, replicas: int, *, restart: bool) -> list[str]:
    world = World(seed, "abc", replicas)
    for name in world.names:
        world.start(name)
    await world.until(world.all_serve)
    writers = Writers(world)
    for name in world.names:
        await asyncio.sleep(LEASE / 2)
        node = world.nodes[name]
        assert await node.spawn(node.leave(3 * LEASE))
        await asyncio.sleep(LEASE / 2)
        if restart:
            await world.crash(name)
            world.start(name)
        else:
            node.stay()
        await world.until(world.all_serve)
    await asyncio.sleep(LEASE / 2)
    await writers.stop()
    assert writers.done > 300
    for name in world.names:
        await world.crash(name)
    return writers.refused


@pytest.mark.parametrize("restart", [False, True], ids=["undone", "restarted"])
@pytest.mark.parametrize("replicas", [2, 3])
def test_no_write_is_refused_while_nodes_are_drained(replicas: int, restart: bool) -> None:
    """A node that is to be the head waits for what the former head has begun."""

    async def story() -> None:
        for seed in range(3):
            assert await _drained_one_after_the_other(seed, replicas, restart=restart) == []

    run(story())


def test_who_cannot_have_its_turn_in_time_is_told_so() -> None:
    """A bound on waiting: nothing was done then, and those before it are not disturbed."""

    async def story() -> None:
        world = World(1, "abc", 2)
        for name in world.names:
            world.start(name)
        await world.until(world.all_serve)
        node = world.nodes[world.nodes["a"].head(b"0")]
        made: list[int] = []
        go_on = asyncio.Event()

        async def write(number: int, seconds: float) -> None:
            async def make(version: Version) -> tuple[int, None]:
                made.append(number)
                await go_on.wait()
                return number, None

            await node.spawn(node.write(b"0", make, seconds))

        first = asyncio.ensure_future(write(1, PATIENCE))
        await asyncio.sleep(0.1)
        second = asyncio.ensure_future(write(2, PATIENCE))
        with pytest.raises(Unavailable, match="other writes of this key are under way"):
            async with asyncio.timeout(2.0):
                await write(3, 0.5)
        go_on.set()
        await asyncio.gather(first, second)
        assert made == [1, 2]
        assert world.disks[node.me].installed[b"0"][1] == 2
        for name in world.names:
            await world.crash(name)

    run(story())
