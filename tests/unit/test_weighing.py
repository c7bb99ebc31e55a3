"""Which connections move although their request is small: those that ask often, and crowds."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from prism.config import BackendConfig, FrontendConfig
from prism.config_health import CheckConfig
from prism.handoff.channel import Channel
from prism.http.connection import Connection
from prism.http.head import parse_head
from prism.loads import Loads
from prism.placement import Node, Partitioned
from prism.policy.decision import AUTO, Action, Decision
from prism.pools import Pool
from prism.telemetry.metrics import Metrics
from prism.weighing import Weigher

NODES = (Node("be1", "10.0.0.1"), Node("be2", "10.0.0.2"), Node("be3", "10.0.0.3", weight=4.0))
HEAD = parse_head(b"GET /a/b HTTP/1.1\r\nHost: x\r\n\r\n")
SERVING = {"name": "be1", "address": "10.0.0.1", "handoff_threshold": 65536}


class World:
    """A node's weigher, and what it goes by."""

    def __init__(self, kind: type[FrontendConfig | BackendConfig], **settings: Any) -> None:
        self.metrics, self.loads, self.owned = Metrics(), Loads(), 0
        channel = SimpleNamespace(shared=SimpleNamespace(on_report=None))
        self.weigher = Weigher(
            kind.model_validate(SERVING | settings),
            cast(Channel, channel),
            self.metrics,
            self.loads,
            lambda: self.owned,
        )
        self.pool = Pool("", Partitioned(NODES), CheckConfig(), failover=False)

    def handed_over(self, reason: str) -> int:
        """How often the counters say so."""
        return self.metrics.handoff_choices.snapshot().get(f"handoff {reason}", 0)

    def ask(self, requests: int, to: int = 1, decision: Decision = AUTO) -> str:
        """Why a small request is relayed; empty: the connection is handed over."""
        connection = SimpleNamespace(
            requests=requests, head=HEAD, decision=decision, place=NODES[to]
        )
        return self.weigher.why_relay(cast(Connection, connection), self.pool)


def test_a_frontend_hands_over_who_asks_often() -> None:
    world = World(FrontendConfig)
    assert [bool(world.ask(requests)) for requests in (0, 1, 15, 16, 17)] == [
        True,
        True,
        True,
        False,
        False,
    ]
    assert world.handed_over("frequent") == 2


def test_after_how_many_is_a_setting() -> None:
    assert not World(FrontendConfig, handoff_after=3).ask(3)
    never = World(FrontendConfig, handoff_after=0)
    assert never.ask(1_000_000) == "size-unknown"
    never.weigher.use(FrontendConfig.model_validate(SERVING | {"handoff_after": 2}))
    assert not never.ask(2)


def test_a_rule_goes_first() -> None:
    world = World(FrontendConfig)
    assert world.ask(100, decision=replace(AUTO, action=Action.RELAY)) == "policy"


@pytest.mark.parametrize("mode", ["never", "always"])
def test_other_modes_are_not_changed(mode: str) -> None:
    world = World(FrontendConfig, handoff=mode)
    assert world.ask(100) == ("configured" if mode == "never" else "")


def test_a_backend_does_not_count_requests() -> None:
    assert World(BackendConfig).ask(100) == "size-unknown"


@pytest.mark.parametrize(
    ("owned", "theirs", "moves"),
    [
        (2, 0, False),  # a few more do not matter
        (3, 0, True),
        (19, 16, False),
        (20, 16, True),
        (10, 40, False),
    ],
)
def test_a_crowd_is_spread(owned: int, theirs: int, moves: bool) -> None:
    world = World(BackendConfig)
    world.owned = owned
    world.loads.told("be2/0", theirs)
    assert world.ask(1) == ("" if moves else "size-unknown")
    assert world.handed_over("crowded") == moves


def test_a_stronger_node_has_more() -> None:
    """40 connections for a weight of 4 are as many as 10."""
    world = World(BackendConfig)
    world.owned = 16
    world.loads.told("be3/0", 40)
    assert not world.ask(1, to=2)
    world.loads.told("be3/0", 56)
    assert world.ask(1, to=2)


def test_handing_over_empties_a_crowd_by_half() -> None:
    """What has been handed over counts at once, before the other node tells of it."""
    world = World(BackendConfig)
    world.owned = 64
    world.loads.told("be2/0", 0)
    while not world.ask(1):
        world.owned -= 1
        world.loads.handed_over("be2/0")
    assert 30 <= world.owned <= 36
    assert world.owned + world.loads.of("be2") == 64


def test_a_node_that_is_not_in_the_pool() -> None:
    world = World(BackendConfig, name="be9")
    world.owned = 100
    assert world.ask(1) == "size-unknown"
