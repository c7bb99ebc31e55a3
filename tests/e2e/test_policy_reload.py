"""The policy on a cluster: the same verdicts wherever a connection is, and reloading under load."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_bed import Bed, wait_for

CLUSTER = {"backends": 2}

POLICY = """
[policy]

[[policy.rules]]
name = "no-admin"
path_prefix = ["/admin"]
action = "deny"

[[policy.rules]]
name = "stay"
path_prefix = ["/stay"]
action = "relay"
max_body = 100

[[policy.rules]]
name = "well"
path = ["/healthz"]
action = "respond"
body = "well"
"""


def configure(bed: Bed, text: str) -> dict[str, str]:
    """Add to every node's file; what the files were."""
    before = {}
    for name in bed.nodes:
        path = bed.cluster.node(name).config
        before[name] = path.read_text()
        path.write_text(before[name] + text)
    return before


def reload(bed: Bed) -> None:
    """SIGHUP to every worker, until all have applied or refused what they read."""
    counts = {}
    for name in bed.nodes:
        for status in bed.cluster.statuses(name):
            counts[status["name"]] = sum(status["reloads"].values())
            os.kill(status["pid"], signal.SIGHUP)

    def all_have() -> bool:
        now = [status for name in bed.nodes for status in bed.cluster.statuses(name)]
        return all(sum(status["reloads"].values()) > counts[status["name"]] for status in now)

    wait_for(all_have, 10)


@pytest.fixture(scope="module")
def ruled(shared: Bed) -> Bed:
    configure(shared, POLICY)
    reload(shared)
    return shared


def test_the_frontend_and_the_owners_say_the_same(ruled: Bed) -> None:
    keys = [ruled.key(node, "policy") for node in ruled.backends]
    for key in keys:
        ruled.store(key, 5000)
    with ruled.client.open() as conn:
        first = conn.request("GET", "/admin/x")
        assert (first.status, first.node.partition("/")[0]) == (403, "fe1")
        for key, node in zip(keys, ruled.backends, strict=True):
            assert conn.request("GET", key).node.partition("/")[0] == node
            for path in ("/admin", "/x/../admin/y", "/ADMIN", "/x/..;/admin"):
                refused = conn.request("GET", path)
                assert (refused.status, refused.node.partition("/")[0]) == (403, node)
            health = conn.request("GET", "/healthz")
            assert (health.status, health.body) == (200, b"well")
    assert ruled.counters("fe1")["decisions"]["no-admin deny"] >= 1
    assert ruled.counters("be1")["decisions"]["no-admin deny"] >= 4


ALPHABET = [
    "/",
    "/",
    ".",
    "..",
    ";",
    "%2e",
    "%2F",
    "%5c",
    "%25",
    "%61",
    "admin",
    "ADMIN",
    "x",
    "stay",
]


def test_random_paths_get_one_verdict_wherever_the_connection_is(ruled: Bed) -> None:
    """The frontend's, on a new connection, and those of the backends that own one."""
    chance = random.Random(6)
    targets = ["/" + "".join(chance.choices(ALPHABET, k=chance.randint(1, 7))) for _ in range(80)]
    answers: dict[str, set[int]] = {target: set() for target in targets}
    for target in targets:
        answers[target].add(ruled.client.once("GET", target).status)
        for node in ruled.backends:
            with ruled.client.open() as conn:
                key = ruled.key(node, "verdict")
                assert conn.request("PUT", key, b"x").node.partition("/")[0] == node
                answers[target].add(conn.request("GET", target).status)
    assert {target: found for target, found in answers.items() if len(found) > 1} == {}
    assert sum(found == {403} for found in answers.values()) >= 5
    assert sum(found == {404} for found in answers.values()) >= 10


def test_relaying_keeps_the_connection(ruled: Bed) -> None:
    path = ruled.key("be2", "stay")
    before = ruled.switch("handoffs"), ruled.relays().get("policy", 0)
    with ruled.client.open() as conn:
        assert conn.request("PUT", path, b"x" * 50).status in (200, 201, 204)
        assert conn.request("GET", path).body == b"x" * 50
    assert (ruled.switch("handoffs"), ruled.relays()["policy"]) == (before[0], before[1] + 2)
    assert ruled.client.once("PUT", path, b"x" * 101).status == 413
    assert ruled.client.once("GET", path).body == b"x" * 50


@pytest.mark.timeout(180, method="signal")
def test_a_hundred_reloads_under_load(make_bed: Callable[..., Bed]) -> None:
    bed = make_bed(backends=2)
    keys = [key for node in bed.backends for key in bed.keys(node, 2, "reload")]
    bodies = {key: bed.store(key, 20_000) for key in keys}
    files = configure(bed, "")
    over = threading.Event()
    failed: list[object] = []
    served = [0] * 4

    def ask(number: int) -> None:
        turn = 0
        while not over.is_set():
            try:
                with bed.client.open() as conn:
                    for _ in range(20):
                        key = keys[(number + turn) % len(keys)]
                        turn += 1
                        answer = conn.request("GET", key)
                        if (answer.status, answer.body) != (200, bodies[key]):
                            failed.append(answer)
                        served[number] += 1
            except Exception as error:
                failed.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        for number in range(100):
            for name in bed.nodes:
                path = bed.cluster.node(name).config
                path.with_suffix(".new").write_text(files[name] + POLICY * (number % 2))
                path.with_suffix(".new").replace(path)
            reload(bed)
    finally:
        over.set()
        for thread in threads:
            thread.join(30)
    assert failed == []
    assert min(served) > 0
    for name in bed.nodes:
        (status,) = bed.cluster.statuses(name)
        assert status["reloads"] == {"applied": 100, "refused": 0}


def test_a_bad_file_changes_nothing(make_bed: Callable[..., Bed]) -> None:
    bed = make_bed(backends=1)
    before = configure(bed, POLICY)
    reload(bed)
    assert bed.client.once("GET", "/admin").status == 403
    for name, text in before.items():
        bed.cluster.node(name).config.write_text(text + POLICY.replace("deny", "denny"))
    reload(bed)
    assert bed.client.once("GET", "/admin").status == 403
    for name in bed.nodes:
        (status,) = bed.cluster.statuses(name)
        assert status["reloads"] == {"applied": 1, "refused": 1}
        log = bed.cluster.node(name).log.read_text()
        assert "policy.rules[0].action" in log


EDITS = """
[policy]
"""
EDIT = """
[[policy.rules]]
name = "{0}"
path_prefix = ["/{0}"]
action = "{0}"
set_headers = {{ X-From = "prism", X-Rule = "{0}" }}
remove_headers = ["Cookie", "X-Secret"]
"""


def test_header_fields_are_set_and_removed(
    make_bed: Callable[..., Bed], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On what is relayed and on what is handed over, for the first request and for later ones."""
    monkeypatch.setenv("ILL", str(tmp_path))
    monkeypatch.chdir(Path(__file__).parent)
    bed = make_bed(backends=2, app="e2e_app:app")
    configure(bed, EDITS + EDIT.format("relay") + EDIT.format("handoff"))
    reload(bed)
    sent = [
        ("X-From", "client"),
        ("Cookie", "a=b"),
        ("x-secret", "1"),
        ("X-Secret", "2"),
        ("X-Kept", "yes"),
    ]
    handoffs = bed.total("handoffs_out")
    with bed.client.open() as conn:
        for kind in ("relay", "relay", "handoff", "handoff", "relay"):
            path = f"/{kind}/headers"
            fields = json.loads(conn.request("GET", path, headers=sent).body)
            edited = {
                name: value for name, value in fields if name.startswith("x-") or name == "cookie"
            }
            assert edited == {"x-from": "prism", "x-rule": kind, "x-kept": "yes"}, kind
            assert len([name for name, _ in fields if name == "x-from"]) == 1
        plain = dict(json.loads(conn.request("GET", "/headers", headers=sent).body))
        assert (plain["x-from"], plain["cookie"], plain["x-secret"]) == ("client", "a=b", "2")
    assert bed.relays()["policy"] == 2
    assert bed.total("handoffs_out") > handoffs
