"""Which nodes are fit: checks, failures, ejections, draining, and what placement makes of it."""

from __future__ import annotations

import pytest

from prism.config import parse
from prism.config_health import CheckConfig, HealthConfig
from prism.errors import ConfigError
from prism.health import Health
from prism.pools import Pools
from prism.telemetry.metrics import Metrics

NAMES = ("be1", "be2", "be3", "be4")


class World:
    def __init__(self, names: tuple[str, ...] = NAMES, own: str = "fe1", **settings: float) -> None:
        self.now = 1000.0
        self.metrics = Metrics()
        config = HealthConfig(**settings)
        self.health = Health(config, names, own, self.metrics, lambda: self.now)
        self.names = names
        for name in names:
            self.health.linked(f"{name}/0", True)

    def avoid(self, check: CheckConfig | None = None) -> set[str]:
        return set(self.health.avoid(frozenset(self.names), check))

    def fail(self, name: str, times: int) -> None:
        for _ in range(times):
            self.health.failed(name, "handoff: timed-out")

    def changes(self) -> dict[str, int]:
        found = self.metrics.health_changes.snapshot()
        return {name: count for name, count in found.items() if not name.endswith(" linked")}


def test_nobody_is_left_out_while_all_are_fit() -> None:
    world = World()
    assert world.avoid() == set()
    names = frozenset(NAMES)
    assert world.health.avoid(names) is world.health.avoid(names)  # costs nothing
    assert {entry["state"] for entry in world.health.snapshot().values()} == {"fit"}


def test_checks_need_a_row_of_results() -> None:
    check = CheckConfig(rise=2, fall=3, path="/up")
    world = World()
    for why in ("refused", "refused", "", "refused", "refused"):
        world.health.checked("be2", check, why)
    assert world.avoid(check) == set()
    world.health.checked("be2", check, "refused")
    assert world.avoid(check) == {"be2"}
    for why in ("", "refused", ""):
        world.health.checked("be2", check, why)
    assert world.avoid(check) == {"be2"}
    world.health.checked("be2", check, "")
    assert world.avoid(check) == set()
    assert world.changes() == {"be2 down": 1, "be2 up": 1}
    assert world.metrics.health_checks.snapshot() == {"be2 failed": 6, "be2 good": 4}


def test_a_check_matters_to_the_pools_that_have_it() -> None:
    mine, yours = CheckConfig(fall=1, path="/mine"), CheckConfig(fall=1, path="/yours")
    world = World()
    world.health.checked("be1", mine, "503")
    assert world.avoid(mine) == {"be1"}
    assert world.avoid(yours) == set()
    world.health.keep_checks([yours])
    assert world.avoid(mine) == set()


def test_a_node_with_one_worker_left_has_a_link() -> None:
    world = World()
    world.health.linked("be1/1", True)
    world.health.linked("be1/0", False)
    assert world.avoid() == set()
    world.health.linked("be1/1", False)
    assert world.avoid() == {"be1"}
    world.health.linked("be1/1", True)
    assert world.avoid() == set()


def test_failures_in_a_row_eject_for_a_time_that_grows() -> None:
    world = World(eject_after=3, eject_time=10, eject_longest=35)
    world.fail("be1", 2)
    world.health.succeeded("be1")
    world.fail("be1", 2)
    assert world.avoid() == set()
    lengths = []
    for _ in range(4):
        world.fail("be1", 3)
        assert world.avoid() == {"be1"}
        began = world.now
        while world.avoid():
            world.now += 1
        lengths.append(world.now - began)
        world.health.returned()
    assert lengths == [10, 20, 35, 35]
    world.now += 100  # well for long: forgiven
    world.fail("be1", 3)
    world.now += 9
    assert world.avoid() == {"be1"}
    world.now += 1
    assert world.avoid() == set()
    world.health.returned()
    assert world.changes() == {"be1 ejected": 5, "be1 returned": 5}


@pytest.mark.parametrize(
    ("share", "names", "ejected"), [(0.5, 4, 2), (0.5, 3, 1), (0.5, 1, 0), (0, 4, 0), (1, 4, 4)]
)
def test_at_most_a_share_is_ejected(share: float, names: int, ejected: int) -> None:
    world = World(NAMES[:names], eject_after=1, eject_share=share)
    for name in world.names:
        world.fail(name, 5)
    states = [world.health.state(name) for name in world.names]
    assert states.count("ejected") == ejected
    if ejected == names:
        assert world.avoid() == set()  # somebody has to


def test_ejection_can_be_turned_off() -> None:
    world = World(eject_after=0)
    world.fail("be1", 1000)
    assert world.avoid() == set()


def test_who_drains_is_left_out_until_its_workers_come_back() -> None:
    world = World()
    world.health.told("be1/0", True)
    world.health.linked("be1/0", False)  # it has ended
    assert world.health.state("be1") == "draining"
    world.health.linked("be1/0", True)
    world.health.told("be1/0", False)
    assert world.avoid() == set()
    assert world.changes() == {"be1 draining": 1, "be1 unlinked": 1}


def test_where_all_are_unfit_those_that_drain_are_left_out() -> None:
    world = World()
    for name in NAMES:
        world.health.linked(f"{name}/0", False)
    assert world.avoid() == set()
    world.health.told("be3/0", True)
    assert world.avoid() == {"be3"}
    for name in NAMES:
        world.health.told(f"{name}/0", True)
    assert world.avoid() == set()


def test_a_node_knows_of_itself() -> None:
    world = World(own="be1")
    assert world.health.state("be1") == "fit"
    world.health.linked("be1/0", False)
    world.fail("be1", 100)
    assert world.avoid() == set()
    world.health.drain(True)
    assert world.avoid() == {"be1"}
    world.health.drain(False)
    assert world.avoid() == set()


def test_other_nodes_come_and_go() -> None:
    world = World()
    world.health.linked("be1/0", False)
    world.health.use(HealthConfig(), ("be1", "be9"))
    assert world.health.state("be1") == "unlinked"
    assert world.health.state("be9") == "unlinked"
    assert world.health.state("be2") == "fit"  # nothing is known of it
    for call in (world.health.succeeded, lambda name: world.health.failed(name, "")):
        call("be2")


CONFIG = f"""
[cluster]
key = "{"ab" * 16}"
control = "10.0.0.1:4760"
serves = "SERVES"
[[nodes]]
name = "be1"
address = "10.0.0.2"
[[nodes]]
name = "be2"
address = "10.0.0.3"
[[pools]]
name = "turns"
nodes = ["be1"]
placement = {{ name = "round-robin" }}
health = {{ path = "/up", interval = 5 }}
[health]
"""


@pytest.mark.parametrize(
    ("serves", "keys", "keyed", "turns"),
    [
        ("objects", "", False, True),
        ("application", "", True, True),
        ("objects", "failover = true", True, True),
        ("application", "failover = false", False, True),
    ],
)
def test_which_pools_fail_over(serves: str, keys: str, keyed: bool, turns: bool) -> None:
    pools = Pools(parse(CONFIG.replace("SERVES", serves) + keys))
    assert (pools.all.failover, pools.get("turns").failover) == (keyed, turns)
    found = {(node.name, check.path, check.interval) for node, check in pools.checks()}
    assert found == {("be1", None, 1), ("be2", None, 1), ("be1", "/up", 5)}


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ("rise = 0", "health.rise"),
        ('path = "up"', "health.path"),
        ("eject_share = 2", "health.eject_share"),
        ("eject_longest = 1", "eject_longest is shorter"),
        ("intervall = 1", "health.intervall"),
    ],
)
def test_what_cannot_be_is_told(keys: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse(CONFIG.replace("SERVES", "objects") + keys)
