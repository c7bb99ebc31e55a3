"""The replicated store: real backends that are killed or stand still under load, and come back."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from e2e_bed import Bed, wait_for
from e2e_history import DELETE_EACH, Load
from e2e_http import Client, Response, digest, payload

from prism.apps.objects import Objects
from prism.flow import Endpoint

LEASE = {"cluster.lease": 1.5}  # shorter than by default, so that the tests are
CLUSTER = {"placement": "replicated", "replicas": 2}


def state(bed: Bed, node: str) -> str:
    return "".join(status["replication"]["state"] for status in bed.cluster.statuses(node))


def replicas(bed: Bed, path: str) -> list[str]:
    return [node.name for node in bed.placement.order(path.lstrip("/"))]  # type: ignore[attr-defined]


def on_disk(bed: Bed, node: str, path: str) -> Any:
    """What a node's disk has of a key: its facts, or ``None``."""
    backend = bed.cluster.config(node).backend
    assert backend is not None
    objects = Objects(backend.store, durable=False)
    try:
        return objects.meta(path.lstrip("/").encode())
    finally:
        objects.close()


def straight(bed: Bed, node: str, path: str) -> Response:
    """A read that a node is asked for directly."""
    backend = bed.cluster.config(node).backend
    assert backend is not None
    to = Endpoint(backend.address, backend.relay_port)
    return Client(bed.client.namespace, to).once("GET", path)


def agree(bed: Bed, path: str) -> bool:
    """Whether all replicas of a key have the same on their disks."""
    return len({on_disk(bed, node, path) for node in replicas(bed, path)}) == 1


def test_each_object_is_on_so_many_backends(shared: Bed) -> None:
    bodies = {f"/each/{n}": payload(n, 1 + 3000 * n) for n in range(12)}
    for path, body in bodies.items():
        assert shared.client.once("PUT", path, body).status == 201
        assert shared.client.once("PUT", path, body).status == 204
    with shared.client.open() as conn:  # handed from node to node
        for path, body in bodies.items():
            answer = conn.request("GET", path)
            assert answer.sha256 == digest(body)
            assert answer.node.partition("/")[0] in replicas(shared, path)
    for path, body in bodies.items():
        have = [node for node in shared.backends if on_disk(shared, node, path) is not None]
        assert sorted(have) == sorted(replicas(shared, path)) and len(have) == 2
        assert len({on_disk(shared, node, path) for node in have}) == 1
        for node in shared.backends:  # who has it answers, the other one passes it on
            answer = straight(shared, node, path)
            assert answer.sha256 == digest(body)
            assert answer.node.partition("/")[0] in (have if node not in have else [node])


def test_reads_are_spread_over_the_replicas(shared: Bed) -> None:
    shared.store("/spread", 500)
    seen: set[str] = set()

    def all_seen() -> bool:
        seen.add(shared.client.once("GET", "/spread").node.partition("/")[0])
        return seen >= set(replicas(shared, "/spread"))

    assert wait_for(all_seen, 10.0)
    assert seen == set(replicas(shared, "/spread"))


def test_conditions_ranges_and_deletion(shared: Bed) -> None:
    path = "/semantics"
    first = shared.client.once("PUT", path, b"0123456789", headers=[("If-None-Match", "*")])
    assert first.status == 201
    again = shared.client.once("PUT", path, b"x", headers=[("If-None-Match", "*")])
    assert again.status == 412
    etag = first.headers["etag"]
    part = shared.client.once("GET", path, headers=[("Range", "bytes=2-4")])
    assert (part.status, part.body) == (206, b"234")
    second = shared.client.once("PUT", path, b"second", headers=[("If-Match", etag)])
    assert second.status == 204
    assert shared.client.once("PUT", path, b"third", headers=[("If-Match", etag)]).status == 412
    bad = shared.client.once(
        "PUT", path, b"x", headers=[("Content-MD5", "AAAAAAAAAAAAAAAAAAAAAA==")]
    )
    assert bad.status == 400
    head = shared.client.once("HEAD", path)
    assert head.headers["content-length"] == "6" and head.headers["etag"] == second.headers["etag"]
    assert shared.client.once("DELETE", path).status == 204
    assert shared.client.once("DELETE", path).status == 404
    for node in shared.backends:
        assert straight(shared, node, path).status == 404
    assert shared.client.once("PUT", path, b"again").status == 201


def test_a_large_object_is_streamed(shared: Bed) -> None:
    body = payload("large", 24 << 20)
    before = {node: shared.memory(node) for node in shared.backends}
    assert shared.client.once("PUT", "/large", body).status == 201
    assert shared.client.once("GET", "/large").sha256 == digest(body)
    assert agree(shared, "/large")
    for node in shared.backends:
        assert shared.memory(node) - before[node] < 12 << 20


def test_the_listing_tells_each_key_once(shared: Bed) -> None:
    keys = [f"list/{n:03}" for n in range(30)]
    for key in keys:
        shared.client.once("PUT", f"/{key}", b"x")
    for key in keys[::3]:
        assert shared.client.once("DELETE", f"/{key}").status == 204
    wanted = [key for key in keys if key not in keys[::3]]
    told: list[str] = []
    after = ""
    for _ in range(40):
        page = json.loads(
            shared.client.once("GET", f"/?prefix=list/&max-keys=7&start-after={after}").body
        )
        assert len(page["keys"]) <= 7
        assert all(set(e) == {"key", "size", "etag", "last_modified"} for e in page["keys"])
        told += [entry["key"] for entry in page["keys"]]
        if not page["truncated"]:
            break
        after = page["next_start_after"]
    assert told == wanted


def kv(bed: Bed, *arguments: str) -> subprocess.Popen[str]:
    program = Path(__file__).parents[2] / "examples/replicated_kv/kv.py"
    command = [sys.executable, str(program), bed.cluster.url, *arguments]
    return bed.cluster.popen("client", command, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return out.strip()


def test_the_key_value_example_counts_exactly(shared: Bed) -> None:
    said(kv(shared, "set", "colour", '"green"'))
    assert said(kv(shared, "get", "colour")) == '"green"'
    counters = [kv(shared, "add", "visits", str(amount)) for amount in (1, 10, 100, 1000)]
    for process in counters:
        said(process)
    assert said(kv(shared, "get", "visits")) == "1111"
    assert said(kv(shared, "keys")).split() == ["colour", "visits"]
    said(kv(shared, "del", "colour"))
    assert said(kv(shared, "get", "colour")) == "null"


def fail_and_return(bed: Bed, load: Load, fault: Callable[[], None], back: Callable[[], None]):
    """Let be2 fail under load, wait for it to be left out, and for it to serve again."""
    assert wait_for(lambda: load.count(0.0, 1e18)[1] > 40, 20.0)
    began = time.monotonic()
    fault()

    def out() -> bool:
        views = [
            status["replicas"] for name in ("be1", "be3") for status in bed.cluster.statuses(name)
        ]
        return len(views) == 2 and all("be2" not in view["serving"] for view in views)

    assert wait_for(out, 20.0)
    left_out = time.monotonic()
    assert wait_for(lambda: min(load.count(left_out, 1e18)) > 40, 20.0)
    back()
    assert wait_for(lambda: state(bed, "be2") == "serving", 30.0), state(bed, "be2")
    returned = time.monotonic()
    assert wait_for(lambda: min(load.count(returned, 1e18)) > 40, 20.0)
    return began, left_out


def settle_and_compare(bed: Bed, load: Load) -> None:
    """After the load: nothing acknowledged is lost, and all replicas have the same."""
    for history in load.histories:
        path = history.key
        last = max(write.number for write in history.acknowledged())
        assert wait_for(lambda path=path: agree(bed, path), 10.0), path  # type: ignore[misc]
        for node in bed.backends:
            answer = straight(bed, node, path)
            assert answer.node == f"{node}/0"
            if answer.status == 200:
                assert int(answer.body) >= last
            else:
                assert answer.status == 404
                assert len(history.begun) // DELETE_EACH * DELETE_EACH >= last


def test_a_replica_is_killed_and_comes_back(make_bed: Callable[..., Bed]) -> None:
    """No acknowledged write is lost, no read goes back, reads go on; it catches up."""
    bed = make_bed(placement="replicated", replicas=3, settings=LEASE)
    untouched = {f"/untouched/{n}": bed.store(f"/untouched/{n}", 100) for n in range(20)}
    keys = [f"/load/{n}" for n in range(5)]
    assert {replicas(bed, key)[0] for key in keys} >= {"be2"}
    assert {replicas(bed, key)[2] for key in keys} >= {"be2"}
    with Load(bed.client, keys) as load:

        def kill() -> None:
            bed.cluster.kill("be2", signal.SIGKILL)
            for path, body in untouched.items():  # nobody writes these: reads go on at once
                assert bed.client.once("GET", path).body == body
            bed.client.once("PUT", "/meanwhile/new", b"new")
            assert bed.client.once("DELETE", "/untouched/0").status == 204

        began, left_out = fail_and_return(bed, load, kill, lambda: bed.cluster.restart("be2"))
    load.check()
    assert load.count(began, left_out)[0] > 0
    answers = [read for history in load.histories for read in history.reads]
    assert [read for read in answers if read.status not in (200, 404)] == []
    settle_and_compare(bed, load)
    assert straight(bed, "be2", "/meanwhile/new").body == b"new"
    assert straight(bed, "be2", "/untouched/0").status == 404
    bed.cluster.kill("be1")  # what be2 has caught up with is good for the others, too
    for path, body in list(untouched.items())[1:6]:
        assert bed.client.once("GET", path).body == body


def test_a_replica_stands_still_and_goes_on(make_bed: Callable[..., Bed]) -> None:
    """It does not answer from what it had, when the others have gone on without it."""
    bed = make_bed(placement="replicated", replicas=3, settings=LEASE)
    pid = bed.cluster.node("be2").pid
    keys = [f"/load/{n}" for n in range(5)]
    try:
        with Load(bed.client, keys) as load:
            fail_and_return(
                bed,
                load,
                lambda: os.kill(pid, signal.SIGSTOP),
                lambda: os.kill(pid, signal.SIGCONT),
            )
    finally:
        os.kill(pid, signal.SIGCONT)
    load.check(late=True)
    settle_and_compare(bed, load)


@contextlib.contextmanager
def writing(bed: Bed, clients: int = 4) -> Iterator[list[tuple[str, int, bytes]]]:
    """Clients that write and read, all of them the same keys; no request may fail.

    Yields what they have been answered.
    """
    stop = threading.Event()
    body = payload("drain", 40_000)
    seen: list[tuple[str, int, bytes]] = []

    def client() -> None:
        while not stop.is_set():
            with bed.client.open() as conn:
                for turn in range(20):
                    path = f"/drain/{turn % 8}"
                    put = conn.request("PUT", path, body)
                    get = (
                        bed.client.once("GET", path) if closing(put) else conn.request("GET", path)
                    )
                    seen.append(("PUT", put.status, put.body))
                    seen.append(("GET", get.status, b"" if get.body == body else get.body))
                    if closing(put) or closing(get):
                        break

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(client) for _ in range(clients)]
        try:
            assert wait_for(lambda: len(seen) > 40, 20.0)
            yield seen
            count = len(seen)
            assert wait_for(lambda: len(seen) > count + 40, 20.0)
        finally:
            stop.set()
        for future in running:
            future.result(30)
    good = (("PUT", 201, b""), ("PUT", 204, b""), ("GET", 200, b""))
    assert [answer for answer in seen if answer not in good] == []


def drain(bed: Bed, node: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "prism", "drain", node, "--lab", bed.cluster.name, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_replica_is_drained_and_restarted_under_load(make_bed: Callable[..., Bed]) -> None:
    """It has itself left out first, and its connections go on elsewhere: no request fails.

    The heads of the keys' chains change twice, with writes under way.
    """
    bed = make_bed(placement="replicated", replicas=2)
    with writing(bed):
        ran = drain(bed, "be2")
        assert ran.returncode == 0, ran.stderr
        bed.cluster.restart("be2")
        assert wait_for(lambda: state(bed, "be2") == "serving", 30.0)


def test_draining_a_replica_can_be_undone_under_load(make_bed: Callable[..., Bed]) -> None:
    """It joins and catches up again; what it has been doing goes on, and no request fails."""
    bed = make_bed(placement="replicated", replicas=2)
    own = bed.key("be2", "undone")
    with bed.client.open() as conn, writing(bed) as seen:
        conn.send(conn.start("PUT", own, b"whole")[:-3])  # keeps the node from ending
        assert wait_for(lambda: bed.counters("be2")["connections"] > 0)
        assert drain(bed, "be2", "--no-wait").returncode == 0
        assert wait_for(lambda: "be2" not in serving(bed, "be1"), 10.0)
        assert bed.client.once("PUT", "/meanwhile", b"new").status == 201
        count = len(seen)
        assert wait_for(lambda: len(seen) > count + 40, 20.0)
        ran = drain(bed, "be2", "--undo")
        assert (ran.returncode, "is not drained" in ran.stdout) == (0, True), ran.stderr
        assert wait_for(lambda: state(bed, "be2") == "serving", 30.0), state(bed, "be2")
        assert "be2" in serving(bed, "be1")
        conn.send(b"ole")
        assert conn.response("PUT").status == 201
    paths = [own, "/meanwhile", *(f"/drain/{number}" for number in range(8))]
    assert any(replicas(bed, path)[0] == "be2" for path in paths)
    for path in paths:
        assert wait_for(lambda path=path: agree(bed, path), 10.0), path  # type: ignore[misc]
        assert len({straight(bed, node, path).sha256 for node in bed.backends}) == 1
    assert straight(bed, "be2", own).body == b"whole"
    assert bed.no_unexpected_errors() == []


def serving(bed: Bed, node: str) -> list[str]:
    """Who serves, as a node sees it."""
    (status,) = bed.cluster.statuses(node)
    return list(status["replicas"]["serving"])


def closing(answer: Response) -> bool:
    return answer.headers.get("connection") == "close"


@pytest.mark.parametrize("lost", ["be1"])
def test_a_lost_disk_is_filled_again(make_bed: Callable[..., Bed], lost: str) -> None:
    bed = make_bed(placement="replicated", replicas=2, settings=LEASE)
    bodies = {f"/key/{n}": bed.store(f"/key/{n}", 2000) for n in range(30)}
    bed.cluster.kill(lost)
    backend = bed.cluster.config(lost).backend
    assert backend is not None
    backend.store.rename(backend.store.with_name("lost"))
    bed.cluster.restart(lost)
    assert wait_for(lambda: state(bed, lost) == "serving", 30.0)
    for path, body in bodies.items():
        assert agree(bed, path)
        assert straight(bed, lost, path).sha256 == digest(body)
