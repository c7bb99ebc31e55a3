"""The driver against the soft switch's real service: the same table as without it."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Iterable, Sequence

import pytest
from switch_bed import bpffs

from prism.errors import SwitchError
from prism.flow import Endpoint, Flow
from prism.switch.base import Change, Rule
from prism.switch.control import Status
from prism.switch.ebpf import EbpfSwitch
from prism.switch.p4runtime import P4Driver
from prism.switch.p4runtime_pipeline import load
from prism.switch.p4runtime_session import SessionSettings
from prism.switch.p4service import P4Service
from prism.switch.p4service_table import EntryTable

pytestmark = pytest.mark.net
CLIENTS = ("198.51.100.7", "2001:db8::7")
SERVICES = ("192.0.2.80", "2001:db8::80")
OWNERS = (("10.50.3.2", "10.50.4.2"), ("fd50:3::2", "fd50:4::2"))


class Controller:
    """A driver, and what it has told."""

    def __init__(self, address: str, priority: int = 1) -> None:
        self.rules: dict[bytes, Rule] = {}
        self.primary = asyncio.Event()
        self.driver = P4Driver(
            SessionSettings(address=address, election_id=(priority, 1)),
            load(),
            adopt=self.adopt,
            stand_by=lambda other: self.primary.clear(),
            on_packet=lambda data: None,
            incarnation=lambda: 4711,
        )
        self.task = asyncio.create_task(self.driver.run())

    def adopt(self, rules: Sequence[Rule] | None, incarnation: int) -> Iterable[Rule]:
        if rules is not None:
            self.rules = {rule.flow: rule for rule in rules}
        self.primary.set()
        return self.rules.values()

    async def ready(self) -> None:
        async with asyncio.timeout(15):
            while not self.driver.ready:
                await asyncio.sleep(0.01)

    async def change(self, *changes: Change) -> None:
        assert set(await self.driver.apply(changes)) == {Status.OK}
        for change in changes:
            self.rules.pop(change.flow, None)
            if change.after is not None:
                self.rules[change.flow] = change.after

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


class World:
    """A served table and one beside it that is changed directly."""

    def __init__(self, stores: list[EbpfSwitch], service: P4Service) -> None:
        self.served, self.direct = stores
        self.service = service
        self.address = f"127.0.0.1:{service.port}"
        self.controllers: list[Controller] = []

    async def join(self, priority: int = 1) -> Controller:
        self.controllers.append(Controller(self.address, priority))
        return self.controllers[-1]


@pytest.fixture
async def world() -> AsyncIterator[World]:
    if os.geteuid() != 0:
        pytest.fail("this test loads eBPF programs and needs root")
    with bpffs() as pins:
        stores = [EbpfSwitch(pins / name, max_rules=256) for name in ("served", "direct")]
        service = P4Service(EntryTable(stores[0], load()), "127.0.0.1:0")
        service.start()
        found = World(stores, service)
        yield found
        for controller in found.controllers:
            await controller.close()
        service.close()
        for store in stores:
            store.close()


def operation(rules: dict[bytes, Rule], number: int) -> Change:
    """A random change of a random flow, as the rule table makes them."""
    family, port = random.randrange(2), 1000 + random.randrange(20)
    service = Endpoint(SERVICES[family], 80)
    flow = Flow(Endpoint(CLIENTS[family], port), service).pack()
    before = rules.get(flow)
    owner = random.choice([service, *(Endpoint(host, 4700 + port) for host in OWNERS[family])])
    mac = random.randbytes(6)
    if before is None:
        after: Rule | None = Rule(
            flow, random.randrange(1, 9), owner, mac, number, random.random() < 0.5, number
        )
    elif random.random() < 0.25:
        after = None
    elif random.random() < 0.5:
        after = before._replace(locked=not before.locked)
    else:
        after = before._replace(
            owner=random.randrange(1, 9),
            owner_endpoint=owner,
            owner_mac=mac,
            gen=before.gen + 1,
            locked=random.random() < 0.3,
        )
    return Change(flow, before, after)


def directly(store: EbpfSwitch, change: Change) -> None:
    if change.before is None and change.after is not None:
        assert store.add(change.after) == Status.OK
    elif change.before is not None and change.after is None:
        assert store.delete(change.flow, change.before.gen)
    elif change.before is not None and change.after is not None:
        assert store.chown(change.before.gen, change.after) == Status.OK


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


async def test_former_owners_stay_silent_for_a_moment(world: World) -> None:
    controller = await world.join()
    await controller.ready()
    flow = Flow(Endpoint(CLIENTS[0], 1000), Endpoint(SERVICES[0], 80)).pack()
    one, two = (Endpoint(host, 4700) for host in OWNERS[0])
    rule = Rule(flow, 1, one, bytes(6), 10, True, 1)
    moved = rule._replace(owner=2, owner_endpoint=two, gen=11, locked=False)
    await controller.change(Change(flow, None, rule))
    await controller.change(Change(flow, rule, moved))
    assert len(world.service.table) == 4
    async with asyncio.timeout(10):
        while len(world.service.table) != 3:
            await asyncio.sleep(0.05)
    assert list(world.served.rules()) == [moved]


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
