"""The userspace server's answers: the common suite, and what a driver adds to it."""

from __future__ import annotations

import asyncio
import os
import threading
import time
import uuid
from collections.abc import Iterator, Sequence

import pytest
from control_conformance import ControlConformance, ControlNode, fresh_flow, fresh_name

from prism.errors import SwitchError
from prism.flow import Endpoint
from prism.lab.netns import Namespace
from prism.switch.base import Change, DataPlane, Rule
from prism.switch.client import SwitchClient
from prism.switch.control import Message, Op, Status
from prism.switch.server import SwitchServer
from prism.switch.table import RuleTable

pytestmark = pytest.mark.net


class UserspaceBed:
    """A server in a thread, listening on the loopback of a namespace."""

    def __init__(self, *, driver: DataPlane | None = None, table: RuleTable | None = None) -> None:
        if os.geteuid() != 0:
            pytest.fail("this test makes a network namespace and needs root")
        self.key = os.urandom(16)
        self.space = Namespace.create(f"pt-{uuid.uuid4().hex[:6]}-switch")
        self._stop: asyncio.Event
        self._loop: asyncio.AbstractEventLoop
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready, driver, table))
        self._thread.start()
        assert ready.wait(5)

    def _run(
        self, ready: threading.Event, driver: DataPlane | None, table: RuleTable | None
    ) -> None:
        async def serve() -> None:
            self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            self.server = SwitchServer(
                Endpoint("127.0.0.1", 0), self.key, driver=driver, table=table
            )
            with self.space.entered():
                await self.server.start()
            self.control = self.server.endpoint
            ready.set()
            await self._stop.wait()
            await self.server.close()

        asyncio.run(serve())

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(5)
        self.space.remove()

    def node(self, name: str) -> ControlNode:
        return ControlNode(self.space, self.control, self.key, name, Endpoint("10.50.3.2", 8080))

    def rule(self, flow: bytes) -> Rule | None:
        return self.server.table.get(flow)

    def drops(self) -> dict[str, int]:
        counters = self.server.counters
        return {"bad": counters.bad_format + counters.bad_mac, "replay": counters.replay}


@pytest.fixture(scope="module")
def bed() -> Iterator[UserspaceBed]:
    bed = UserspaceBed()
    yield bed
    bed.close()


class TestControl(ControlConformance):
    pass


def test_rules_end_with_the_lease_of_their_owner(bed: UserspaceBed) -> None:
    node, flow = bed.node(fresh_name()).hello(300), fresh_flow()
    other = bed.node(fresh_name()).hello()
    kept = fresh_flow()
    other.ask(Op.ADD, kept)
    assert node.ask(Op.ADD, flow).status == Status.OK
    deadline = time.monotonic() + 3
    while bed.rule(flow.pack()) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert bed.rule(kept.pack()) is not None
    assert node.ask(Op.GET, flow).status == Status.DENIED
    node.close()
    other.close()


async def test_a_long_list_comes_in_pages(bed: UserspaceBed) -> None:
    owner = bed.node(fresh_name()).hello()
    added = [fresh_flow() for _ in range(45)]
    flows = [flow.pack() for flow in added]
    for flow in added:
        owner.send(owner.request(Op.ADD, flow))
    assert {owner.answer().status for _ in added} == {Status.OK}
    client = SwitchClient(fresh_name(), bed.control, bed.key, Endpoint("127.0.0.1", 80))
    with bed.space.entered():
        await client.start()
    try:
        listed = [rule.flow async for rule in client.list(owner.id)]
        assert listed == flows
        assert {rule.owner async for rule in client.list()} >= {owner.id}
        assert [rule async for rule in client.list(12345)] == []
    finally:
        await client.close()
        owner.close()


class Driver:
    """A data plane that takes its time, and fails when told."""

    def __init__(self) -> None:
        self.rules: dict[bytes, Rule] = {}
        self.batches: list[int] = []
        self.refuse: set[bytes] = set()
        self.broken = False
        self.pause = 0.0

    async def apply(self, changes: Sequence[Change]) -> Sequence[Status]:
        await asyncio.sleep(self.pause)
        if self.broken:
            raise SwitchError("the switch cannot be reached")
        self.batches.append(len(changes))
        results = []
        for change in changes:
            assert self.rules.get(change.flow) == change.before
            good = change.flow not in self.refuse
            if good and change.after is None:
                del self.rules[change.flow]
            elif good and change.after is not None:
                self.rules[change.flow] = change.after
            results.append(Status.OK if good else Status.FULL)
        return results


@pytest.fixture
def driven() -> Iterator[tuple[UserspaceBed, Driver]]:
    driver = Driver()
    bed = UserspaceBed(driver=driver)
    yield bed, driver
    bed.close()


def test_the_data_plane_is_programmed_before_the_answer(
    driven: tuple[UserspaceBed, Driver],
) -> None:
    bed, driver = driven
    driver.pause = 0.02
    a, b, flow = bed.node("a").hello(), bed.node("b").hello(), fresh_flow()
    gen = a.ask(Op.ADD, flow, locked=True).gen
    assert driver.rules[flow.pack()].locked
    assert b.ask(Op.CHOWN, flow, gen=gen).status == Status.OK
    assert driver.rules[flow.pack()].owner == b.id
    assert b.ask(Op.DELETE, flow, gen=gen + 1).status == Status.OK
    assert driver.rules == {}
    for node in (a, b):
        node.close()


def test_changes_made_meanwhile_go_together(driven: tuple[UserspaceBed, Driver]) -> None:
    bed, driver = driven
    driver.pause = 0.05
    node = bed.node("a").hello()
    for _ in range(40):
        node.send(node.request(Op.ADD, fresh_flow()))
    assert {node.answer().status for _ in range(40)} == {Status.OK}
    assert sum(driver.batches) == len(driver.rules) == 40
    assert len(driver.batches) <= 4
    node.close()


def test_operations_on_a_flow_under_way_wait_their_turn(
    driven: tuple[UserspaceBed, Driver],
) -> None:
    bed, driver = driven
    driver.pause = 0.05
    a, b, flow = bed.node("a").hello(), bed.node("b").hello(), fresh_flow()
    gen = a.ask(Op.ADD, flow, locked=True).gen
    replies: dict[str, Message] = {}
    for node in (b, a):  # both want it; the one who asked first gets it
        node.send(node.request(Op.CHOWN, flow, gen=gen))
        time.sleep(0.01)
    replies = {"a": a.answer(), "b": b.answer()}
    assert (replies["b"].status, replies["a"].status) == (Status.OK, Status.STALE)
    assert replies["a"].owner == b.id
    for node in (a, b):
        node.close()


def test_who_waited_for_a_change_that_failed_may_have_it(
    driven: tuple[UserspaceBed, Driver],
) -> None:
    bed, driver = driven
    a, b, flow = bed.node("a").hello(), bed.node("b").hello(), fresh_flow()
    gen = a.ask(Op.ADD, flow, locked=True).gen
    driver.pause, driver.refuse = 0.1, {flow.pack()}
    b.send(b.request(Op.CHOWN, flow, gen=gen))
    time.sleep(0.02)
    a.send(a.request(Op.CHOWN, flow, gen=gen))
    assert b.answer().status == Status.FULL
    driver.refuse = set()
    assert a.answer().status == Status.OK
    assert driver.rules[flow.pack()].owner == a.id
    for node in (a, b):
        node.close()


def test_what_the_data_plane_refuses_does_not_stand(
    driven: tuple[UserspaceBed, Driver],
) -> None:
    bed, driver = driven
    node, flow, other = bed.node("a").hello(), fresh_flow(), fresh_flow()
    gen = node.ask(Op.ADD, flow).gen
    driver.refuse = {flow.pack(), other.pack()}
    refused = node.ask(Op.LOCK, flow, gen=gen)
    assert (refused.status, refused.locked, refused.gen) == (Status.FULL, False, gen)
    assert node.ask(Op.ADD, other).status == Status.FULL
    assert bed.rule(other.pack()) is None
    driver.refuse = set()
    assert node.ask(Op.LOCK, flow, gen=gen).status == Status.OK
    assert node.ask(Op.ADD, other).status == Status.OK
    assert driver.rules == {rule.flow: rule for rule in bed.server.table.rules()}
    node.close()


def test_a_data_plane_out_of_reach_gives_no_answer(
    driven: tuple[UserspaceBed, Driver],
) -> None:
    bed, driver = driven
    node, flow = bed.node("a").hello(), fresh_flow()
    driver.broken = True
    node.send(node.request(Op.ADD, flow, cookie=9))
    assert node.silent()
    assert bed.rule(flow.pack()) is None
    driver.broken = False
    assert node.ask(Op.ADD, flow, cookie=9).status == Status.OK
    node.close()
