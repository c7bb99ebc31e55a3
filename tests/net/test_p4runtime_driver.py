"""The driver against the soft switch's real service: the same table as without it."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from p4_bed import CLIENTS, OWNERS, SERVICES, Controller, World, directly, make_world, operation

from prism.errors import SwitchError
from prism.flow import Endpoint, Flow
from prism.switch.base import Change, Rule
from prism.switch.control import Status
from prism.switch.p4runtime_messages import p4
from prism.switch.p4runtime_pipeline import load
from prism.switch.p4runtime_rules import Codec
from prism.switch.p4service import P4Service

pytestmark = pytest.mark.net


@pytest.fixture
async def world() -> AsyncIterator[World]:
    if os.geteuid() != 0:
        pytest.fail("this test loads eBPF programs and needs root")
    async with make_world() as found:
        yield found


async def test_random_changes_end_in_equal_tables(world: World) -> None:
    random.seed(9)
    controller = await world.join()
    await controller.ready()
    for number in range(1, 60):
        batch: dict[bytes, Change] = {}
        for step in range(random.randint(1, 12)):
            change = operation(controller.rules, 1000 * number + step)
            batch.setdefault(change.flow, change)
        await controller.change(*batch.values())
        for change in batch.values():
            directly(world.direct, change)
        assert sorted(world.served.rules()) == sorted(world.direct.rules())
    assert sorted(world.served.rules()) == sorted(controller.rules.values())
    assert controller.driver.counters.refused == 0


async def test_a_backup_takes_over_with_all_rules(world: World) -> None:
    random.seed(3)
    first = await world.join(2)
    await first.ready()
    for number in range(1, 40):
        await first.change(operation(first.rules, number))
    backup = await world.join(1)
    await asyncio.sleep(0.2)
    assert not backup.driver.ready
    with pytest.raises(SwitchError):
        await backup.driver.apply([operation({}, 5)])
    await first.close()
    await backup.ready()
    assert backup.rules == first.rules
    assert backup.driver.counters.repairs == 0
    await backup.change(operation(backup.rules, 99))
    assert sorted(world.served.rules()) == sorted(backup.rules.values())


async def test_who_is_not_the_primary_any_more_stands_by(world: World) -> None:
    first = await world.join(1)
    await first.ready()
    await first.change(operation({}, 1))
    second = await world.join(2)
    await second.ready()
    async with asyncio.timeout(15):
        while first.driver.ready or first.primary.is_set():  # told so, without having written
            await asyncio.sleep(0.01)
    await second.change(operation(second.rules, 2))
    await second.close()
    await first.ready()
    assert first.rules == second.rules
    assert first.driver.counters.sessions == 1


async def test_what_went_wrong_in_the_switch_is_repaired(world: World) -> None:
    controller = await world.join()
    await controller.ready()
    random.seed(1)
    for number in range(1, 20):
        await controller.change(operation(controller.rules, number))
    await controller.close()
    table = world.service.table
    speakers = {layout.to_client.table.id for layout in table.pipeline.layouts}
    lost = [key for key, _ in table.read(0) if key.table in speakers][::2]
    for key in lost:
        table._put(key, None)
    again = await world.join()
    await again.ready()
    assert again.driver.counters.repairs == len(lost) > 0
    assert sorted(world.served.rules()) == sorted(again.rules.values())


async def test_a_new_connection_outbids_the_one_before(world: World) -> None:
    """A write that is still on its way over the old one is refused then."""
    controller = await world.join()
    await controller.ready()
    elections = []
    for sessions in (1, 2, 3):
        async with asyncio.timeout(15):
            while controller.driver.counters.sessions != sessions or not controller.driver.ready:
                await asyncio.sleep(0.01)
        primary = world.service._primary()
        assert primary is not None and primary.election is not None
        elections.append(primary.election)
        controller.driver._messages.put_nowait(None)  # as when the connection is lost
    assert elections[0] < elections[1] < elections[2]


async def test_a_rule_is_written_last_and_deleted_first(world: World) -> None:
    """So a batch that a target cuts off leaves no client between two owners."""
    controller = await world.join()
    await controller.ready()
    codec = Codec(load())
    batches: list[list[tuple[int, bool]]] = []
    write = controller.driver._write

    async def spy(session: Any, updates: Any) -> Any:
        batches.append([(update.kind, codec.is_rule(update.key)) for update in updates])
        return await write(session, updates)

    controller.driver._write = spy  # type: ignore[method-assign]
    flow = Flow(Endpoint(CLIENTS[1], 1000), Endpoint(SERVICES[1], 80)).pack()
    one, two = (Endpoint(host, 4700) for host in OWNERS[1])
    rule = Rule(flow, 1, one, bytes(6), 10, False, 1)
    moved = rule._replace(owner=2, owner_endpoint=two, gen=11)
    for change in (Change(flow, None, rule), Change(flow, rule, moved), Change(flow, moved, None)):
        await controller.change(change)
    insert, modify, delete = p4.Update.INSERT, p4.Update.MODIFY, p4.Update.DELETE
    added, owned, deleted = batches
    assert added == [(insert, False), (insert, False), (insert, True)]
    # the former owner is locked, the new one may speak, and then the client's packets go there
    assert owned == [(modify, False), (insert, False), (modify, True)]
    assert deleted[-2:] == [(delete, True), (delete, False)]


async def test_former_owners_stay_silent_for_a_moment(world: World) -> None:
    controller = await world.join()
    await controller.ready()
    flow = Flow(Endpoint(CLIENTS[0], 1000), Endpoint(SERVICES[0], 80)).pack()
    one, two = (Endpoint(host, 4700) for host in OWNERS[0])
    rule = Rule(flow, 1, one, bytes(6), 10, True, 1)
    moved = rule._replace(owner=2, owner_endpoint=two, gen=11, locked=False)
    await controller.change(Change(flow, None, rule))
    await controller.change(Change(flow, rule, moved))
    entries = dict(world.service.table.read(0))
    codec = Codec(load())
    former = entries.pop(codec.speaker(rule))
    lock = codec.rule_tables[codec.speaker(rule).table][0].lock
    assert (former.action, former.params) == (lock, b"")
    assert entries.keys() == codec.entries(moved).keys()
    async with asyncio.timeout(10):
        while len(world.service.table) != 3:
            await asyncio.sleep(0.05)
    assert list(world.served.rules()) == [moved]


class Silent(P4Service):
    """A switch that takes a stream and never says a word."""

    def StreamChannel(self, requests: Any, context: Any) -> Iterator[Any]:
        yield from (None for _ in requests if False)


async def test_a_switch_that_stays_silent_is_tried_again(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    service = Silent(world.service.table, "127.0.0.1:0")
    service.start()
    controller = Controller(f"127.0.0.1:{service.port}", timeout=0.3)
    try:
        async with asyncio.timeout(15):
            while controller.driver.counters.sessions < 3:
                await asyncio.sleep(0.02)
        assert not controller.driver.ready
        told = [record.getMessage() for record in caplog.records]
        assert sum("does not say who is its primary" in text for text in told) == 1
    finally:
        await controller.close()
        service.close()


async def test_a_full_switch_is_told(world: World) -> None:
    controller = await world.join()
    await controller.ready()
    service = Endpoint(SERVICES[0], 80)
    changes = [
        Change(flow, None, Rule(flow, 1, service, bytes(6), 10, True, 1))
        for flow in (Flow(Endpoint(CLIENTS[0], 1 + n), service).pack() for n in range(260))
    ]
    results = await controller.driver.apply(changes)
    assert results == [Status.OK] * 256 + [Status.FULL] * 4
    assert len(list(world.served.rules())) == 256
    assert len(world.service.table) == 512
