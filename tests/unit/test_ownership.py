"""Rules whose removal goes wrong: they are asked after until they are gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from prism import reconcile
from prism.flow import Endpoint, Flow
from prism.monitor.base import Gone, Reason
from prism.ownership import Ownership
from prism.reconcile import Reconciler
from prism.switch.control import Op, Status
from prism.telemetry.metrics import Metrics

CLIENT, SERVICE = Endpoint("10.0.0.9", 40_000), Endpoint("10.0.0.80", 80)
LOCAL = Endpoint("10.0.1.1", 4700)
KEY = Flow(CLIENT, SERVICE).pack()
ME = 7


class Table:
    """One rule, and a list of answers that are lost though what they answer is done.

    Attributes:
        gen: the rule's generation, 0: there is none.
        lost: operations whose next answer does not arrive.
    """

    id = ME

    def __init__(self, gen: int, *, locked: bool = False, lost: tuple[int, ...] = ()) -> None:
        self.gen = gen
        self.locked = locked
        self.lost = list(lost)
        self.asked: list[int] = []

    def _answer(self, status: Status) -> Any:
        return SimpleNamespace(
            flow=KEY,
            status=status,
            gen=self.gen,
            owner=ME,
            locked=self.locked,
            owner_endpoint=LOCAL,
        )

    def _apply(self, op: int, gen: int) -> Any:
        self.asked.append(op)
        status = Status.OK if self.gen else Status.NOENT
        if op == Op.CHOWN and gen + 1 == self.gen:
            pass  # done before: a repetition
        elif self.gen and op in (Op.CHOWN, Op.DELETE) and gen != self.gen:
            status = Status.STALE
        elif self.gen and op == Op.CHOWN:
            self.gen, self.locked = self.gen + 1, False
        elif self.gen and op == Op.DELETE:
            self.gen = 0
        if op in self.lost:
            self.lost.remove(op)
            return None
        return self._answer(status)

    async def request(self, op: int, _flow: bytes, *, gen: int = 0, **_: Any) -> Any:
        return self._apply(op, gen)

    def submit(self, op: int, _flow: bytes, done: Callable[[Any], None], *, gen: int = 0) -> None:
        done(self._apply(op, gen))

    async def list(self, _owner: int) -> AsyncIterator[Any]:
        if self.gen:
            yield self._answer(Status.OK)


class Silent:
    """A provoker that says nothing."""

    def provoke(self, _flow: bytes) -> None: ...

    def close(self) -> None: ...


class Watch:
    """A monitor that is told by the test."""

    def __init__(self) -> None:
        self.on_gone: Callable[[Gone], None] = lambda _: None

    def watch(self, _fd: int, _local: Endpoint, _peer: Endpoint, on_gone: Any) -> None:
        self.on_gone = on_gone

    def forget(self, _local: Endpoint, _peer: Endpoint) -> None: ...

    def alive(self, _local: Endpoint, _peer: Endpoint) -> bool:
        return True


def _node(table: Table) -> Any:
    return SimpleNamespace(
        switch=table,
        connections={},
        keeps_rules=True,
        alive=lambda *_: False,
        in_transit=lambda _: False,
    )


@pytest.mark.parametrize("lost", [(), (Op.CHOWN,), (Op.DELETE,), (Op.CHOWN, Op.DELETE, Op.GET)])
async def test_leftovers_go_whatever_is_lost(
    monkeypatch: pytest.MonkeyPatch, lost: tuple[int, ...]
) -> None:
    """An unlocking whose answer is lost has changed the generation: the removal comes too late."""
    monkeypatch.setattr(reconcile, "Provoker", Silent)
    monkeypatch.setattr(reconcile, "PAUSE", 0.001)
    monkeypatch.setattr(reconcile, "ANSWER_TIME", 0.001)
    table = Table(5, locked=True, lost=lost)
    reconciler = Reconciler(_node(table))
    reconciler.start()
    async with asyncio.timeout(10):
        while table.gen:
            await asyncio.sleep(0.001)
    await reconciler.close()
    assert not table.lost


@pytest.mark.parametrize("gen", [5, 6])
async def test_a_rule_of_another_generation_is_asked_after(gen: int) -> None:
    """What the switch does not remove is not forgotten."""
    table, watch, unsure = Table(gen), Watch(), []
    ownership = Ownership(
        table,  # type: ignore[arg-type]
        watch,  # type: ignore[arg-type]
        Metrics(),
        stopping=lambda: False,
        unsure=unsure.append,
    )
    ownership.begin(KEY, 5, LOCAL, CLIENT, 0)
    assert ownership.alive(KEY)
    watch.on_gone(Gone(LOCAL, CLIENT, Reason.UNKNOWN, time_wait=False))
    assert not ownership.rules
    assert unsure == ([] if gen == 5 else [KEY])
    assert table.gen == (0 if gen == 5 else gen)
