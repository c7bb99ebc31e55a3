"""Replication: what clients may see whatever crashes, is lost, late or cut off."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from replication_world import LEASE, World, run

from prism.replication.rules import Outcome, arrival, chain_of, tail_of
from prism.replication.views import Version, View

KEYS = [b"0", b"1", b"2", b"3"]
FAULTS = st.lists(
    st.tuples(
        st.sampled_from(
            ("crash", "restart", "cut", "isolate", "heal", "loss", "wait", "wipe", "leave", "stay")
        ),
        st.integers(0, 4),
        st.integers(0, 4),
        st.sampled_from((0.02, 0.3, 1.0, 2.5)),
    ),
    max_size=8,
)


def test_chain_begins_and_ends_with_who_serves() -> None:
    view = View(3, ("a", "c"), ("b",))
    assert chain_of(view, ("a", "b", "c")) == ("a", "b", "c")
    assert chain_of(view, ("b", "c", "a")) == ("c", "b", "a")
    assert tail_of(view, ("b", "c", "a")) == "a"
    assert chain_of(View(3, ("c",), ("b",)), ("b", "c")) == ("c", "b")
    assert chain_of(view, ("b",)) == () and tail_of(view, ("b",)) == ""


@pytest.mark.parametrize(
    ("installed", "staged", "outcome", "store"),
    [
        ((1, 1), (0, 0), None, True),
        ((1, 1), (1, 2), None, True),
        ((1, 1), (1, 5), None, False),
        ((1, 1), (1, 9), Outcome.SUPERSEDED, False),
        ((1, 5), (0, 0), Outcome.DONE, False),
        ((2, 0), (0, 0), Outcome.SUPERSEDED, False),
    ],
)
def test_arrival(installed: tuple[int, int], staged: tuple[int, int], outcome: Outcome | None,
                 store: bool) -> None:  # fmt: skip
    found = arrival(Version(1, 5), Version(*installed), Version(*staged))
    assert (found.reply and found.reply.outcome) == outcome
    assert found.store is store


async def _clients(world: World, stop: asyncio.Event) -> None:
    number = 0

    async def writer(key: bytes) -> None:
        nonlocal number
        while not stop.is_set():
            number += 1
            await world.write(key, number)
            await asyncio.sleep(world.random.random() * 0.3)

    async def reader() -> None:
        while not stop.is_set():
            await world.read(world.random.choice(KEYS))
            await asyncio.sleep(world.random.random() * 0.1)

    await asyncio.gather(*(writer(key) for key in KEYS), *(reader() for _ in range(2)))


async def _fault(world: World, kind: str, one: int, other: int, seconds: float) -> None:
    names = world.names
    name, peer = names[one % len(names)], names[other % len(names)]
    if kind == "crash":
        await world.crash(name)
    elif kind == "wipe" and world.all_serve():  # one lost disk at a time is within the model
        await world.crash(name)
        world.disks[name].__init__()  # type: ignore[misc]
        world.start(name)
    elif kind == "restart" and name not in world.nodes:
        world.start(name)
    elif kind == "leave" and name in world.nodes:
        node = world.nodes[name]
        node.spawn(node.leave(3 * LEASE))
    elif kind == "stay" and name in world.nodes:
        world.nodes[name].stay()
    elif kind == "cut" and name != peer:
        world.cut.add(frozenset((name, peer)))
    elif kind == "isolate":  # clients go on asking it
        world.cut |= {frozenset((name, each)) for each in names if each != name}
    elif kind == "heal":
        world.cut.clear()
        world.loss = 0.0
    elif kind == "loss":
        world.loss = 0.2
    await asyncio.sleep(seconds)


def _agree(world: World) -> bool:
    """Whether nothing is under way, and all replicas have the same."""
    disks = world.disks
    return not any(disk.staged for disk in disks.values()) and all(
        len({disks[name].installed.get(key) for name in world.order(key)}) == 1 for key in KEYS
    )


async def _at_last(world: World, call: Any) -> None:
    """Until it succeeds; a change of view that the last fault has begun may still come."""
    for number in range(200):
        if await call(number):
            return
        await asyncio.sleep(LEASE / 4)
    raise AssertionError("the cluster does not recover")


async def _story(seed: int, names: str, replicas: int, faults: list[tuple[str, int, int, float]]):
    world = World(seed, names, replicas)
    for name in names:
        world.start(name)
    await world.until(world.all_serve)
    stop = asyncio.Event()
    clients = asyncio.ensure_future(_clients(world, stop))
    for fault in faults:
        await _fault(world, *fault)
        if clients.done():
            break
    world.cut.clear()
    world.loss = 0.0
    stop.set()
    await clients
    for name in names:
        if name not in world.nodes:
            world.start(name)
    await asyncio.sleep(3 * LEASE)  # whoever is about to leave has asked to
    for node in world.nodes.values():
        node.stay()
    await world.until(lambda: world.all_serve() and _agree(world))
    for key in KEYS:  # after all that, writes and reads go on
        await _at_last(world, lambda number, key=key: world.write(key, (1 << 40) + number))
        await _at_last(world, lambda _, key=key: world.read(key))
    for name in names:
        await world.crash(name)
    return world


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32), st.sampled_from([("abc", 3), ("abc", 2), ("abcde", 3)]), FAULTS)
def test_nothing_acknowledged_is_lost_and_no_read_goes_back(
    seed: int, cluster: tuple[str, int], faults: list[tuple[str, int, int, float]]
) -> None:
    run(_story(seed, *cluster, faults))
