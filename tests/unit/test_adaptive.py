"""Which requests are handed over: thresholds, what is learned, and that nothing grows."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from prism.adaptive import (
    FIRST_THRESHOLD,
    HIGHEST,
    LOWEST,
    Adaptive,
    Costs,
    Learned,
    Sizes,
    pack_learned,
    unpack_learned,
)
from prism.http.head import RequestHead, parse_head

KIB, MIB = 1024, 1024 * 1024


def head(method: str = "GET", target: str = "/a/b", *fields: str) -> RequestHead:
    lines = [f"{method} {target} HTTP/1.1", "Host: x", *fields, "", ""]
    found = parse_head("\r\n".join(lines).encode())
    assert found is not None
    return found


def knowing(size: int, target: str = "/a/b") -> Adaptive:
    adaptive = Adaptive(64 * KIB)
    adaptive.answered(head(target=target), "", 200, size, 0)
    return adaptive


@pytest.mark.parametrize(
    ("request_head", "known", "pays", "reason"),
    [
        (head(), None, False, "size-unknown"),
        (head(), 4 * MIB, True, "large-key"),
        (head(), KIB, False, "small-key"),
        (head(), 64 * KIB, True, "large-key"),
        (head(target="/a/other"), 4 * MIB, True, "large-prefix"),
        (head(target="/a/other"), KIB, False, "small-prefix"),
        (head(target="/elsewhere/c"), 4 * MIB, True, "large-rule"),
        (head("HEAD"), 4 * MIB, False, "small-method"),
        (head("DELETE"), 4 * MIB, False, "small-method"),
        (head("PUT", "/a/b", "Content-Length: 5"), 4 * MIB, False, "small-upload"),
        (head("PUT", "/a/b", "Content-Length: 5000000"), None, True, "large-upload"),
        (head("POST", "/a/b", "Transfer-Encoding: chunked"), KIB, True, "length-unknown"),
        (head("GET", "/a/b", "Range: bytes=0-99"), 4 * MIB, False, "small-range"),
        (head("GET", "/a/b", "Range: bytes=0-4194303"), 4 * MIB, True, "large-range"),
        (head("GET", "/a/b", "Range: bytes=0-4194303"), KIB, False, "small-range"),
        (head("GET", "/a/b", "Range: bytes=0-4194303"), None, True, "large-range"),
        (head("GET", "/a/b", "Range: bytes=-10"), 4 * MIB, False, "small-range"),
        (head("GET", "/a/b", "Range: bytes=100-"), 4 * MIB, True, "large-range"),
        (head("GET", "/a/b", "Range: bytes=4194300-"), 4 * MIB, False, "small-range"),
        (head("GET", "/a/b", "Range: bytes=0-1,5-9"), 4 * MIB, True, "large-key"),
        (head("GET", "/a/b", "Range: bytes=9-1"), 4 * MIB, False, "small-range"),
        (head("GET", "/a/b", "Connection: upgrade", "Upgrade: websocket"), KIB, True, "upgrade"),
    ],
)
def test_verdicts(request_head, known, pays, reason):
    adaptive = Adaptive(64 * KIB) if known is None else knowing(known)
    assert adaptive.weigh(request_head) == (pays, reason)


def test_a_connection_that_will_stay_is_handed_over():
    assert knowing(KIB).weigh(head(), stays=True) == (True, "kept-alive")


def test_an_upload_tells_the_size_of_downloads():
    adaptive = Adaptive(64 * KIB)
    adaptive.answered(head("PUT", "/a/b", "Content-Length: 4194304"), "", 201, 40, 4 * MIB)
    assert adaptive.weigh(head()) == (True, "large-key")
    adaptive.answered(head("PUT", "/a/b", "Content-Length: 9"), "", 201, 40, 9)
    assert adaptive.weigh(head()) == (False, "small-key")


@pytest.mark.parametrize("status", [206, 304, 412, 416, 500, 503])
def test_partial_and_failed_responses_teach_nothing(status):
    adaptive = knowing(4 * MIB)
    assert adaptive.answered(head(), "", status, 10, 0) is None
    assert adaptive.weigh(head()) == (True, "large-key")


def test_rules_learn_apart():
    adaptive = knowing(4 * MIB)
    assert adaptive.weigh(head(), "other rule") == (False, "size-unknown")


def test_a_mixed_directory_still_knows_its_keys():
    adaptive = Adaptive(64 * KIB)
    for number in range(200):
        size = 4 * MIB if number % 2 else KIB
        adaptive.answered(head(target=f"/mix/{number}"), "", 200, size, 0)
    verdicts = [adaptive.weigh(head(target=f"/mix/{number}")).pays for number in range(200)]
    assert verdicts == [bool(number % 2) for number in range(200)]
    # What is not known yet costs less handed over, on the average.
    assert adaptive.weigh(head(target="/mix/new")) == (True, "large-prefix")


def test_what_one_node_learns_helps_another():
    backend, frontend = Adaptive(64 * KIB), Adaptive(64 * KIB)
    learned = backend.answered(head(), "rule", 200, 4 * MIB, 0)
    assert learned is not None
    for entry in unpack_learned(pack_learned([learned])):
        frontend.learn(entry)
    assert frontend.weigh(head(), "rule") == (True, "large-key")
    assert frontend.weigh(head(target="/a/z"), "rule") == (True, "large-prefix")


@given(st.binary(max_size=200))
def test_any_report_can_be_read(data):
    adaptive = Adaptive(slots=16)
    for entry in unpack_learned(data):
        assert isinstance(entry, Learned)
        adaptive.learn(entry)
    adaptive.weigh(head())


@given(st.lists(st.tuples(st.integers(1, 2**64 - 1), st.integers(0, 2**63))))
@example([(1, 9_007_199_791_611_906), (1, 1)])
def test_a_table_remembers_the_newest_of_each_slot(entries):
    sizes = Sizes(8)
    slots: dict[int, tuple[int, int]] = {}
    for name, size in entries:
        sizes.learn(name, size, 1)
        slots[name >> 1 & 7] = name, size
    for name, size in slots.values():
        assert sizes.get(name) == pytest.approx(size)


def test_nothing_grows():
    adaptive = Adaptive()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(20_000):
            adaptive.answered(head(target=f"/{number % 999}/{number}"), str(number), 200, number, 0)
        assert tracemalloc.get_traced_memory()[0] - before < 50_000
    finally:
        tracemalloc.stop()


def _measure(costs: Costs, handoff: float, fixed: float, octet: float, times: int = 400) -> None:
    for _ in range(times):
        costs.handoff(handoff)
        costs.relayed(fixed, KIB)
        costs.relayed(fixed + octet * 100 * KIB, 100 * KIB)


@pytest.mark.parametrize(
    ("handoff", "fixed", "octet", "threshold"),
    [
        (700e-6, 300e-6, 10e-9, 40_000),
        (860e-6, 300e-6, 10e-9, 56_000),
        (500e-6, 300e-6, 40e-9, LOWEST),
        (300e-6, 400e-6, 40e-9, LOWEST),
        (20e-3, 300e-6, 1e-9, HIGHEST),
    ],
)
def test_the_threshold_is_where_both_cost_the_same(handoff, fixed, octet, threshold):
    costs = Costs()
    assert costs.threshold == FIRST_THRESHOLD
    _measure(costs, handoff, fixed, octet)
    assert costs.threshold == pytest.approx(threshold, rel=0.2)
    assert costs.snapshot()["threshold"] == round(costs.threshold)


def test_slow_clients_do_not_make_relaying_look_slow():
    """Half of the responses take a hundred times as long, because their clients read slowly."""
    costs = Costs()
    for turn in range(2000):
        costs.handoff(1e-3)
        costs.relayed(300e-6, KIB)
        costs.relayed((300e-6 + 10e-9 * 100 * KIB) * (100 if turn % 2 else 1), 100 * KIB)
    assert 30_000 < costs.threshold < 140_000


def test_a_cold_start_is_not_believed():
    """The first samples of a new process are slow; the best of eight is where it starts from."""
    costs = Costs()
    for handoff in (0.009, 0.004, 0.002, 0.0006, 0.0004, 0.0005, 0.0004, 0.0006):
        costs.handoff(handoff)
    assert costs.snapshot()["handoff_us"] == 400
    costs.handoff(0.009)
    assert 400 < costs.snapshot()["handoff_us"] < 440


def test_a_given_threshold_stays():
    costs = Costs(12345)
    _measure(costs, 1e-3, 300e-6, 10e-9)
    assert costs.threshold == 12345


def test_near_the_threshold_both_are_tried_now_and_then():
    adaptive = Adaptive()
    for key, size in (("/n/below", 40 * KIB), ("/n/above", 100 * KIB), ("/n/far", 4 * MIB)):
        adaptive.answered(head(target=key), "", 200, size, 0)
    for key, tried in (("/n/below", 10), ("/n/above", 10), ("/n/far", 0)):
        verdicts = [adaptive.weigh(head(target=key)) for _ in range(640)]
        assert sum(verdict.reason == "probe" for verdict in verdicts) == tried
