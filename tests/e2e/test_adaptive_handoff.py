"""Adaptive handoff: what pays is handed over, what does not is relayed, wherever the client is."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from pathlib import Path

import pytest
from e2e_bed import Bed, wait_for
from e2e_http import digest, payload
from e2e_tls import tls_client

KIB, MIB = 1024, 1024 * 1024
CLUSTER = {
    "backends": 3,
    "tls": True,
    "settings": {"frontend.handoff": "adaptive", "frontend.handoff_threshold": 64 * KIB},
}
ROOT = Path(__file__).parents[2]


def choices(bed: Bed, node: str) -> Counter[str]:
    return Counter(bed.counters(node).get("handoff_choices", {}))


def test_uploads_and_what_they_teach(shared: Bed) -> None:
    """A declared length decides at once; the key's size is known from then on."""
    before, handoffs = choices(shared, "fe1"), shared.switch("handoffs")
    small, large = shared.key("be1", "up-small"), shared.key("be1", "up-large")
    shared.store(small, KIB)
    shared.store(large, MIB)
    assert choices(shared, "fe1") - before == {"relay small-upload": 1, "handoff large-upload": 1}
    assert shared.switch("handoffs") - handoffs == 1
    shared.client.once("GET", small)
    assert (choices(shared, "fe1") - before)["relay small-key"] == 1


def test_backends_tell_what_they_have_sent(shared: Bed) -> None:
    """The frontend never sees a large object of a connection that has moved; it knows of it."""
    key, other = shared.key("be2", "told"), shared.key("be2", "first")
    data = payload(other, MIB)
    with shared.client.open() as conn:
        assert conn.request("PUT", other, data).status == 201  # be2 has the connection now
        assert conn.request("PUT", key, data).status == 201

    def known() -> bool:
        before = choices(shared, "fe1")
        assert shared.client.once("GET", key).sha256 == digest(data)
        return "handoff large-key" in choices(shared, "fe1") - before

    assert wait_for(known)


def test_a_connection_at_a_backend(shared: Bed) -> None:
    """What belongs elsewhere is relayed from there when small, and takes it along when large."""
    sizes = {"be1": MIB, "be2": KIB, "be3": MIB}
    paths = {node: shared.key(node, "moving") for node in sizes}
    bodies = {node: shared.store(paths[node], size) for node, size in sizes.items()}

    def taught() -> bool:
        """The backends have heard of the sizes, too."""
        with shared.client.open() as conn:
            for node in ("be1", "be2", "be3"):
                assert conn.request("GET", paths[node]).sha256 == digest(bodies[node])
        after = choices(shared, "be1")
        return {"relay small-key", "handoff large-key"} <= after.keys()

    assert wait_for(taught)
    before, relays = choices(shared, "be1"), Counter(shared.counters("be1")["relays"])
    with shared.client.open() as conn:
        answers = [conn.request("GET", paths[node]) for node in ("be1", "be2", "be1", "be3")]
    assert [answer.sha256 for answer in answers] == [
        digest(bodies[node]) for node in ("be1", "be2", "be1", "be3")
    ]
    assert [answer.node for answer in answers] == ["be1/0", "be2/0", "be1/0", "be3/0"]
    assert choices(shared, "be1") - before == {"relay small-key": 1, "handoff large-key": 1}
    assert Counter(shared.counters("be1")["relays"]) - relays == {"small-key": 1}


def test_the_same_over_tls(shared: Bed) -> None:
    """Uploads by their length, downloads by what they are known to be; wherever they go, whole."""
    client = tls_client(shared)
    sizes = {"be1": KIB, "be2": MIB, "be3": KIB}
    paths = {node: shared.key(node, "tls") for node in sizes}
    before, handoffs = choices(shared, "fe1"), shared.switch("handoffs")
    for node, size in sizes.items():
        assert client.once("PUT", paths[node], payload(node, size)).status == 201
    assert choices(shared, "fe1") - before == {"relay small-upload": 2, "handoff large-upload": 1}
    with client.open() as conn:
        for node in ("be1", "be2", "be1", "be3", "be2"):  # relayed, handed over, relayed by be2 ...
            answer = conn.request("GET", paths[node])
            assert (answer.status, answer.sha256) == (200, digest(payload(node, sizes[node])))
            assert answer.node == f"{node}/0"
    assert shared.switch("handoffs") - handoffs == 2
    assert (choices(shared, "fe1") - before)["handoff large-key"] == 1


def test_who_asks_often_is_handed_over(shared: Bed) -> None:
    """After 16 small requests the frontend is rid of a connection, which goes on as before."""
    path, other = shared.key("be1", "often"), shared.key("be2", "often")
    data = {one: shared.store(one, KIB) for one in (path, other)}
    before, handoffs = choices(shared, "fe1"), shared.switch("handoffs")
    with shared.client.open() as conn:
        for turn in range(40):
            asked = other if turn % 4 == 3 else path
            answer = conn.request("GET", asked)
            assert (answer.status, answer.sha256) == (200, digest(data[asked]))
    moved = choices(shared, "fe1") - before
    assert moved == {"relay small-key": 16, "handoff frequent": 1}
    assert shared.switch("handoffs") - handoffs == 1


def test_a_crowd_at_one_backend_is_spread(shared: Bed) -> None:
    """Many connections that uploads have brought to one backend, and now want little of others."""
    large = shared.key("be1", "crowd")
    body = payload(large, 64 * KIB)
    small = {node: shared.key(node, "crowd-small") for node in ("be2", "be3")}
    for path in small.values():
        shared.store(path, KIB)
    with contextlib.ExitStack() as stack:
        conns = [stack.enter_context(shared.client.open()) for _ in range(30)]
        for conn in conns:
            assert conn.request("PUT", large, body).status in (201, 204)
        assert wait_for(lambda: shared.cluster.statuses("be2")[0]["loads"].get("be1", 0) >= 30)
        for turn in range(6):
            for number, conn in enumerate(conns):
                path = small[("be2", "be3")[(turn + number) % 2]]
                answer = conn.request("HEAD", path)
                assert (answer.status, answer.headers["content-length"]) == (200, str(KIB))
        assert choices(shared, "be1")["handoff crowded"] >= 10
        counts = [shared.cluster.statuses(node)[0]["rules_owned"] for node in ("be1", "be2", "be3")]
    assert sum(counts) == 30
    assert max(counts) <= 15, counts  # of 30 that were at be1


def test_what_is_chosen_shows_in_the_status(shared: Bed) -> None:
    (status,) = shared.cluster.statuses("fe1")
    assert status["adaptive"]["mode"] == "adaptive"
    assert status["adaptive"]["threshold"] == 64 * KIB
    counters = status["counters"]["handoff_choices"]
    handed = sum(count for name, count in counters.items() if name.startswith("handoff "))
    assert handed >= status["counters"]["handoffs_out"] > 0
    json.dumps(status)


@pytest.mark.slow
@pytest.mark.timeout(240, method="signal")
def test_mixed_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the clients want 1 KiB, half 4 MiB: adaptive beats both ways that treat them alike.

    More in all than handing everything over, in requests; than relaying everything, in both
    requests and octets. Runs follow each other and are added up, until the sums say so.
    """
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from bench_adaptive import labs

    sums = {mode: Counter[str]() for mode in ("adaptive", "always", "never")}
    with labs("200mbit", 3) as made:
        for _ in range(5):
            for mode, lab in made.items():
                run = lab.split(2)
                assert run["failed"] == 0, (mode, run)
                sums[mode].update({name: round(run[name]) for name in ("requests", "octets")})
            adaptive, always, never = (sums[mode] for mode in ("adaptive", "always", "never"))
            if (
                adaptive["requests"] > 1.1 * always["requests"]
                and adaptive["octets"] > 0.9 * always["octets"]
                and adaptive["requests"] > 1.1 * never["requests"]
                and adaptive["octets"] > 1.3 * never["octets"]
            ):
                return
    pytest.fail(f"adaptive does not beat the others: {sums}")
