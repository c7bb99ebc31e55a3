"""Nodes that are not fit: found by checks and by failures, left out, drained; and back again."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from e2e_bed import Bed, bed, wait_for
from e2e_http import Client, Conn, Response
from e2e_tls import tls_client

HERE = Path(__file__).parent
SETTINGS = {
    "health.path": "/healthz",
    "health.interval": 0.2,
    "health.timeout": 5.0,
    "health.fall": 2,
    "health.eject_after": 2,
    "health.eject_time": 1.0,
    "frontend.handoff_deadline_ms": 600,
}


@contextlib.contextmanager
def application(directory: Path, **options: object) -> Iterator[Bed]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ILL", str(directory))
        patch.chdir(HERE)
        with bed(app="e2e_app:app", **options) as found:
            yield found


@pytest.fixture(scope="module")
def apps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Bed, Path]]:
    directory = tmp_path_factory.mktemp("ill")
    with application(directory, settings=SETTINGS, tls=True) as found:
        yield found, directory


def health(bed: Bed, node: str, of: str) -> str:
    (status,) = bed.cluster.statuses(node)
    return str(status["health"][of]["state"])


def fit(bed: Bed, of: str) -> bool:
    """Whether all others find a node fit."""
    return all(health(bed, node, of) == "fit" for node in bed.nodes if node != of)


def second(bed: Bed, path: str) -> str:
    """The backend that comes second for a key."""
    return bed.placement.choose(path.lstrip("/"), {bed.owner(path)}).name


def answered_by(bed: Bed, path: str) -> str:
    answer = bed.client.once("GET", path)
    assert (answer.status, answer.body) == (200, path.encode())
    return answer.node.partition("/")[0]


def test_a_node_whose_application_is_ill_is_left_out(apps: tuple[Bed, Path]) -> None:
    """Active checks: its keys are the second node's until it is well again."""
    bed, directory = apps
    keys = bed.keys("be2", 4, "ill")
    assert wait_for(lambda: fit(bed, "be2"))
    assert {answered_by(bed, key) for key in keys} == {"be2"}
    before = Counter(bed.counters("fe1")["health_changes"])
    ill = directory / bed.cluster.node("be2").address
    ill.touch()
    try:
        down = [node for node in bed.nodes if node != "be2"]
        assert wait_for(lambda: all(health(bed, node, "be2") == "down" for node in down), 10)
        assert [answered_by(bed, key) for key in keys] == [second(bed, key) for key in keys]
        assert bed.cluster.status()["nodes"]["be2"]["health"] == "down"
        others = bed.keys("be1", 4, "ill")
        assert {answered_by(bed, key) for key in others} == {"be1"}
    finally:
        ill.unlink()
    assert wait_for(lambda: fit(bed, "be2"), 10)
    assert {answered_by(bed, key) for key in keys} == {"be2"}
    counters = bed.counters("fe1")
    changed = Counter(counters["health_changes"]) - before
    assert (changed["be2 down"], changed["be2 up"]) == (1, 1)
    assert counters["health_checks"]["be2 failed"] >= 2
    log = bed.cluster.node("fe1").log.read_text()
    assert "node be2: down: GET /healthz: 503" in log
    assert "node be2: up" in log


def test_a_node_that_stands_still_is_ejected(apps: tuple[Bed, Path]) -> None:
    """Its link is up for seconds still; every request is answered, by another node.

    On a very slow machine the link is given up before there were failures enough.
    """
    bed, _ = apps
    key = bed.key("be3", "still")
    assert wait_for(lambda: fit(bed, "be3"))
    assert answered_by(bed, key) == "be3"
    before = Counter(bed.counters("fe1")["health_changes"])
    os.killpg(bed.cluster.node("be3").pid, signal.SIGSTOP)
    try:
        other = second(bed, key)

        def ejected() -> bool:
            assert answered_by(bed, key) == other
            changed = Counter(bed.counters("fe1")["health_changes"]) - before
            return bool({"be3 ejected", "be3 unlinked"} & changed.keys())

        assert wait_for(ejected, 15)
    finally:
        os.killpg(bed.cluster.node("be3").pid, signal.SIGCONT)
    assert wait_for(lambda: fit(bed, "be3"), 20)
    assert answered_by(bed, key) == "be3"


def test_a_node_that_is_gone_costs_no_request(apps: tuple[Bed, Path]) -> None:
    """From the moment of its death, all new connections are served by the others."""
    bed, _ = apps
    keys = bed.keys("be1", 6, "gone")
    assert wait_for(lambda: fit(bed, "be1"))
    bed.cluster.kill("be1")
    assert [answered_by(bed, key) for key in keys] == [second(bed, key) for key in keys]
    bed.cluster.restart("be1")
    assert wait_for(lambda: fit(bed, "be1"), 20)
    assert {answered_by(bed, key) for key in keys} == {"be1"}


class Load:
    """Clients that keep their connections, and note whatever goes wrong."""

    def __init__(self, clients: Sequence[Client], paths: list[str], count: int) -> None:
        self.failed: list[object] = []
        self.served = [0] * count
        self._clients, self._paths = clients, paths
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(count)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(30)

    def all_served(self, more: int) -> bool:
        """Whether each client gets so many answers more."""
        goal = [count + more for count in self.served]
        return bool(wait_for(lambda: all(map(int.__ge__, self.served, goal)), 20))

    def ask(self, conn: Conn, path: str, *, writes: bool) -> Response:
        """One request."""
        return conn.request("POST", path, b"x" * 3000) if writes else conn.request("GET", path)

    def good(self, answer: Response, path: str, *, writes: bool) -> bool:
        """Whether this is the answer."""
        return (answer.status, answer.body) == (200, path.encode())

    def _ask(self, number: int) -> None:
        turn = number
        conn: Conn | None = None
        while not self._over.is_set():
            path = self._paths[turn % len(self._paths)]
            writes = turn % 3 == 0
            turn += 1
            try:
                conn = conn or self._clients[number % len(self._clients)].connect()
                answer = self.ask(conn, path, writes=writes)
                if not self.good(answer, path, writes=writes):
                    self.failed.append((path, writes, answer))
                self.served[number] += 1
                if answer.headers.get("connection") == "close":
                    conn.close()
                    conn = None
            except Exception as error:
                self.failed.append(error)
                conn = None
        if conn is not None:
            conn.close()


def drain(bed: Bed, node: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "prism", "drain", node, "--lab", bed.cluster.name, *options]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


def test_draining_can_be_undone(apps: tuple[Bed, Path]) -> None:
    bed, _ = apps
    key = bed.key("be2", "undone")
    assert wait_for(lambda: fit(bed, "be2"))
    with bed.client.open() as conn:
        conn.send(conn.start("PUT", key, b"whole")[:-3])  # keeps the node from ending
        assert wait_for(lambda: bed.counters("be2")["connections"] > 0)
        assert drain(bed, "be2", "--no-wait").returncode == 0
        assert wait_for(lambda: health(bed, "fe1", "be2") == "draining")
        assert answered_by(bed, key) == second(bed, key)
        assert drain(bed, "be2", "--undo").returncode == 0
        assert wait_for(lambda: fit(bed, "be2"))
        assert answered_by(bed, key) == "be2"
        conn.send(b"ole")
        assert conn.response("PUT").status == 200


def place_by(bed: Bed, placement: str) -> None:
    """Have all nodes place so from now on."""
    for name in bed.nodes:
        path = bed.cluster.node(name).config
        text = re.sub(r'(\[placement\]\nname = )"[a-z-]+"', rf'\1"{placement}"', path.read_text())
        path.write_text(text)
        (status,) = bed.cluster.statuses(name)
        os.kill(status["pid"], signal.SIGHUP)
        done = sum(status["reloads"].values())
        assert wait_for(lambda: reloads(bed, name) > done)  # noqa: B023


def reloads(bed: Bed, node: str) -> int:
    return sum(sum(status["reloads"].values()) for status in bed.cluster.statuses(node))


@pytest.mark.parametrize("placement", ["partitioned", "round-robin"])
def test_draining_under_load_fails_no_request(apps: tuple[Bed, Path], placement: str) -> None:
    """Connections in use move with their next request, and those that wait for one as they are."""
    bed, _ = apps
    assert all(wait_for(lambda: fit(bed, node), 20) for node in bed.backends)  # noqa: B023
    place_by(bed, placement)
    paths = [path for node in bed.backends for path in bed.keys(node, 3, "drain")]
    clients = (bed.client, tls_client(bed))
    idle = [client.connect() for client in clients for _ in range(6)]
    path = bed.key("be2", "idle")
    for conn in idle:
        assert conn.request("GET", path).status == 200
    owned = bed.counters("be2")["connections"]
    assert owned >= 4
    with Load(clients, paths, 6) as load:
        assert load.all_served(20)
        ran = drain(bed, "be2")
        assert ran.returncode == 0, ran.stderr
        assert "be2/0: has ended" in ran.stdout
        assert load.all_served(20)
    assert load.failed == []
    process = bed.cluster.node("be2").process
    assert process is not None
    assert process.wait(10) == 0
    for conn in idle:
        answer = conn.request("GET", path)
        assert answer.status == 200
        assert answer.node.partition("/")[0] in ("be1", "be3")
        conn.close()
    assert health(bed, "fe1", "be2") in ("draining", "unlinked")
    bed.cluster.restart("be2")
    assert wait_for(lambda: fit(bed, "be2"), 20)
    place_by(bed, "partitioned")
    assert answered_by(bed, path) == "be2"
    assert bed.no_unexpected_errors() == []


@pytest.mark.parametrize("placement", ["least-connections", "round-robin"])
def test_where_new_connections_go(apps: tuple[Bed, Path], placement: str) -> None:
    """Evenly; and those of clients that have gone count no more for the fewest."""
    bed, _ = apps
    assert all(wait_for(lambda: fit(bed, node), 20) for node in bed.backends)  # noqa: B023
    place_by(bed, placement)
    try:
        assert wait_for(lambda: not any(bed.cluster.statuses("fe1")[0]["loads"].values()), 10)
        conns: list[tuple[str, Conn]] = []

        def open_some(count: int) -> Counter[str]:
            opened = []
            for number in range(count):
                conn = bed.client.connect()
                answer = conn.request("GET", f"/even/{number}")
                opened.append((answer.node.partition("/")[0], conn))
            conns.extend(opened)
            return Counter(node for node, _ in opened)

        assert open_some(9) == dict.fromkeys(bed.backends, 3)
        for node, conn in conns:
            if node == "be1":
                conn.close()
        assert wait_for(lambda: bed.cluster.statuses("fe1")[0]["loads"].get("be1") == 0)
        expected = (
            {"be1": 3} if placement == "least-connections" else dict.fromkeys(bed.backends, 1)
        )
        assert open_some(3) == expected
        for _, conn in conns:
            conn.close()
    finally:
        place_by(bed, "partitioned")


def test_a_drained_frontend_hands_its_connections_on(apps: tuple[Bed, Path]) -> None:
    """Those that wait for a request, and those that have half of one already."""
    bed, _ = apps
    conns = [client.connect() for client in (bed.client, tls_client(bed)) for _ in range(4)]
    half = 20
    for conn in conns:
        request = conn.start("GET", "/moved")
        conn.send(request[:half])
    idle = [tls_client(bed).connect() for _ in range(4)]
    assert wait_for(lambda: bed.counters("fe1")["connections"] >= len(conns + idle))
    ran = drain(bed, "fe1")
    assert ran.returncode == 0, ran.stderr
    for conn in conns + idle:
        conn.send(conn.start("GET", "/moved")[half if conn in conns else 0 :])
        answer = conn.response()
        assert (answer.status, answer.node.partition("/")[0]) == (200, bed.owner("/moved"))
        conn.close()
    with pytest.raises(ConnectionRefusedError):
        bed.client.connect()
    bed.cluster.restart("fe1")
    assert wait_for(lambda: answered_by(bed, "/moved") == bed.owner("/moved"))
