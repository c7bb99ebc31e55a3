"""Drivers of the soft switch's real P4Runtime service, and a table beside it changed directly."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

from switch_bed import bpffs

from prism.flow import Endpoint, Flow
from prism.switch.base import Change, Rule
from prism.switch.control import Status
from prism.switch.ebpf import EbpfSwitch
from prism.switch.p4runtime import P4Driver
from prism.switch.p4runtime_pipeline import load
from prism.switch.p4runtime_session import SessionSettings
from prism.switch.p4service import P4Service
from prism.switch.p4service_table import EntryTable

CLIENTS = ("198.51.100.7", "2001:db8::7")
SERVICES = ("192.0.2.80", "2001:db8::80")
OWNERS = (("10.50.3.2", "10.50.4.2"), ("fd50:3::2", "fd50:4::2"))


class Controller:
    """A driver, and what it has told."""

    def __init__(self, address: str, priority: int = 1, **settings: Any) -> None:
        self.rules: dict[bytes, Rule] = {}
        self.primary = asyncio.Event()
        self.driver = P4Driver(
            SessionSettings(address=address, election_id=(priority, 1), **settings),
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


@contextlib.asynccontextmanager
async def make_world() -> AsyncIterator[World]:
    """Needs root."""
    with bpffs() as pins:
        stores = [EbpfSwitch(pins / name, max_rules=256) for name in ("served", "direct")]
        service = P4Service(EntryTable(stores[0], load()), "127.0.0.1:0")
        service.start()
        found = World(stores, service)
        try:
            yield found
        finally:
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
