"""Placement: balance, stability, agreement."""

from __future__ import annotations

import timeit
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism.config import NodeConfig, parse
from prism.config_placement import PlacementConfig
from prism.errors import ConfigError
from prism.flow import Endpoint
from prism.loads import Loads
from prism.placement import (
    Chosen,
    LeastConnections,
    Node,
    NoNode,
    Partitioned,
    PlacementFault,
    Replicated,
    RoundRobin,
    placement_from,
    placement_of,
)

KEYS = [f"/bucket/object-{number}" for number in range(20_000)]


def nodes(*weights: float) -> list[Node]:
    return [Node(f"be{i}", f"10.0.0.{i}", weight=w) for i, w in enumerate(weights, 1)]


@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (1, 2, 3), (0.5, 0.5, 4)])
def test_shares_are_in_proportion_to_weights(weights: tuple[float, ...]) -> None:
    placement = Partitioned(nodes(*weights))
    counts = Counter(placement.choose(key).name for key in KEYS)
    for index, weight in enumerate(weights, 1):
        expected = len(KEYS) * weight / sum(weights)
        assert counts[f"be{index}"] == pytest.approx(expected, rel=0.06)


def test_without_a_node_only_its_keys_move() -> None:
    everyone = nodes(1, 2, 1, 1)
    before, after = Partitioned(everyone), Partitioned(everyone[:2] + everyone[3:])
    moved_to = Counter()
    for key in KEYS:
        home = before.choose(key)
        if home.name == "be3":
            moved_to[after.choose(key).name] += 1
            assert before.choose(key, {"be3"}) == after.choose(key)
        else:
            assert after.choose(key) == home
    assert set(moved_to) == {"be1", "be2", "be4"}


@given(st.text(), st.permutations(range(5)))
def test_nodes_agree_whatever_the_order_of_their_lists(key: str, order: list[int]) -> None:
    everyone = nodes(1, 1, 2, 1, 3)
    mine = Partitioned(everyone)
    yours = Partitioned([everyone[index] for index in order])
    assert mine.choose(key) == yours.choose(key)


@given(st.text(st.characters()))
def test_equal_weights_choose_as_weighted_ones_do(key: str) -> None:
    plain = Partitioned(nodes(1, 1, 1))
    weighted = Partitioned(nodes(1, 1, 1))
    weighted._weighted = True
    assert plain.choose(key) == weighted.choose(key)


def test_keys_with_any_octets_have_a_home() -> None:
    assert Partitioned(nodes(1, 1)).choose("/\udcff\udc80\x00") in nodes(1, 1)


@pytest.mark.parametrize("kind", [Partitioned, RoundRobin, lambda n: LeastConnections(n, Loads())])
def test_nodes_to_avoid_are_avoided_until_none_is_left(kind: type) -> None:
    placement = kind(nodes(1, 1, 1))
    chosen = {placement.choose(key, {"be1", "be3"}).name for key in KEYS[:50]}
    assert chosen == {"be2"}
    with pytest.raises(NoNode):
        placement.choose("/", {"be1", "be2", "be3"})
    with pytest.raises(ConfigError, match="nodes"):
        kind([])


def test_round_robin_is_smooth_and_weighted() -> None:
    placement = RoundRobin(nodes(2, 1, 1))
    turns = [placement.choose("").name for _ in range(8)]
    assert turns == ["be1", "be2", "be3", "be1"] * 2


def test_least_connections_fills_the_emptiest() -> None:
    loads = Loads()
    placement = LeastConnections(nodes(1, 1, 2), loads)
    counts: Counter[str] = Counter()
    for _ in range(40):
        node = placement.choose("")
        loads.handed_over(node.worker_names[0])
        counts[node.name] += 1
    assert counts == {"be1": 10, "be2": 10, "be3": 20}
    loads.told("be1/0", 0)  # its clients have gone
    assert [placement.choose("").name for _ in range(3)] == ["be1"] * 3


def test_loads_are_what_nodes_tell_and_what_they_cannot_know_yet() -> None:
    loads = Loads()
    loads.told("be1/0", 3)
    loads.told("be1/1", 4)
    loads.opened("be1")  # an offer is on its way
    assert loads.of("be1") == 8
    loads.handed_over("be1/1")  # taken, and not told of yet
    loads.closed("be1")
    assert loads.of("be1") == 8
    loads.told("be1/1", 5)
    assert loads.of("be1") == 8
    loads.told("be1/0", 0)
    assert loads.snapshot() == {"be1": 5}
    loads.lost("be1/1")
    assert loads.of("be1") == loads.of("be2") == 0
    for _ in range(9):
        loads.closed("be1")  # never below zero
    assert loads.of("be1") == 0


def by_length(key: str, fit: tuple[Node, ...]) -> Node | str:
    if key == "raise":
        raise LookupError("no such shard")
    if key == "nonsense":
        return "be9"
    node = fit[len(key) % len(fit)]
    return node.name if key.startswith("name") else node


def test_a_function_chooses_and_its_faults_are_contained(caplog: pytest.LogCaptureFixture) -> None:
    placement = Chosen(nodes(1, 1, 1), by_length)
    assert placement.keyed
    assert [placement.choose(key).name for key in ("", "a", "names")] == ["be1", "be2", "be3"]
    assert placement.choose("a", {"be2"}).name == "be3"
    with pytest.raises(NoNode):
        placement.choose("a", {"be1", "be2", "be3"})
    for key, says in (("raise", "no such shard"), ("nonsense", "be9")):
        with pytest.raises(PlacementFault, match="the placement function failed"):
            placement.choose(key)
        assert says in caplog.text


def test_a_function_is_loaded_from_its_directory(tmp_path: Path) -> None:
    (tmp_path / "shards_of_mine.py").write_text("def place(key, nodes):\n    return nodes[-1]\n")
    settings = PlacementConfig(
        name="callable", function="shards_of_mine:place", function_dir=tmp_path
    )
    assert placement_of(settings, nodes(1, 1)).choose("x").name == "be2"
    for reference in ("shards_of_mine:other", "no_such_module:place", "shards_of_mine:__name__"):
        with pytest.raises(ConfigError, match=r"placement\.function"):
            placement_of(settings.model_copy(update={"function": reference}), nodes(1))


@pytest.mark.parametrize("keys", [{"name": "callable"}, {"function": "a:b"}])
def test_a_function_and_the_placement_by_one_go_together(keys: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="function goes with"):
        PlacementConfig(**keys)


def test_a_flow_keeps_its_worker_and_workers_share_evenly() -> None:
    node = Node("be1", "10.0.0.1", workers=4, handoff_port=5000)
    flows = [number.to_bytes(36, "big") for number in range(4000)]
    counts = Counter(node.worker_for(flow) for flow in flows)
    assert set(counts) == {0, 1, 2, 3}
    assert min(counts.values()) > 850
    assert all(node.worker_for(flow) == node.worker_for(bytes(flow)) for flow in flows[:50])
    assert node.handoff_endpoints[3] == Endpoint("10.0.0.1", 5003)
    assert node.worker_names[3] == "be1/3"


def test_a_node_serves_the_families_it_has_addresses_of() -> None:
    assert Node("a", "10.0.0.1").serves("192.0.2.1")
    assert not Node("a", "10.0.0.1").serves("2001:db8::1")
    assert Node("a", "10.0.0.1", "fd00::1").serves("2001:db8::1")
    assert not Node("a", "fd00::1").serves("192.0.2.1")


@pytest.mark.parametrize("kind", ["partitioned", "round-robin", "least-connections"])
def test_the_configuration_makes_the_placement(kind: str) -> None:
    config = parse(
        f"""
        [cluster]
        key = "{"ab" * 16}"
        control = "10.0.0.1:4760"
        [[nodes]]
        name = "be1"
        address = "10.0.0.2"
        weight = 3.0
        [placement]
        name = "{kind}"
        """
    )
    placement = placement_from(config)
    assert placement.choose("/x") == Node.of(NodeConfig(name="be1", address="10.0.0.2", weight=3))


def test_choosing_among_four_nodes_takes_under_two_microseconds() -> None:
    placement = Partitioned(nodes(1, 1, 1, 1))
    quickest = min(timeit.repeat(lambda: placement.choose("/b/object-4711"), number=2000, repeat=9))
    assert quickest / 2000 < 2e-6


def test_replicas_are_the_nodes_that_the_key_would_move_to() -> None:
    nodes = [Node(f"be{n}", f"10.0.0.{n}") for n in range(1, 6)]
    partitioned, replicated = Partitioned(nodes), Replicated(nodes, 3)
    for number in range(200):
        key = f"key/{number}"
        names = [node.name for node in replicated.order(key)]
        assert len(set(names)) == 3
        assert names[0] == partitioned.choose(key).name == replicated.choose(key).name
        assert names[1] == partitioned.choose(key, names[:1]).name
        assert names[2] == partitioned.choose(key, names[:2]).name
        without = Replicated([node for node in nodes if node.name != names[1]], 3)
        assert [node.name for node in without.order(key)][:2] == [names[0], names[2]]
