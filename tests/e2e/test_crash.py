"""kill -9 of each part in turn, while clients are busy."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from e2e_bed import Bed, wait_for
from e2e_http import Cut, Sink, digest

CLIENTS = 20
SIZE = 3 << 20
PACE = 1.2e6  # octets a second: a download takes 2.5 s


class Downloads:
    """Twenty slow downloads, spread over the backends; whoever asks for outcomes hurries them."""

    def __init__(self, bed: Bed, pool: ThreadPoolExecutor, pace: float = PACE) -> None:
        self.bed = bed
        self.pace = pace
        self.hurry = threading.Event()
        self.nodes = [bed.backends[n % len(bed.backends)] for n in range(CLIENTS)]
        self.paths = {node: bed.key(node, "crash") for node in bed.backends}
        self.hashes = {node: digest(bed.store(path, SIZE)) for node, path in self.paths.items()}
        self.begun = threading.Barrier(CLIENTS + 1)
        self.results: list[Future[tuple[str, float]]] = [
            pool.submit(self._one, node) for node in self.nodes
        ]
        self.begun.wait(10)

    def _one(self, node: str) -> tuple[str, float]:
        with self.bed.client.open(rcvbuf=16_384) as conn:
            conn.send(conn.start("GET", self.paths[node]))
            head = conn.response_head()
            self.begun.wait(10)
            if head.status != 200:
                return f"status {head.status}", time.monotonic()
            sink = Sink()
            try:
                left = int(head.headers["content-length"])
                while left:
                    piece = min(left, 65536)
                    conn.take(piece, sink, 0 if self.hurry.is_set() else self.pace)
                    left -= piece
            except (Cut, OSError) as error:
                return f"cut: {error}", time.monotonic()
            whole = sink.hash.hexdigest() == self.hashes[node]
            return "whole" if whole else "wrong octets", time.monotonic()

    def outcomes(self) -> list[str]:
        self.hurry.set()
        return [future.result(30)[0] for future in self.results]


@pytest.fixture
def pool() -> ThreadPoolExecutor:
    with ThreadPoolExecutor(CLIENTS + 4) as made:
        yield made


def test_frontend_dies(make_bed: Callable[..., Bed], pool: ThreadPoolExecutor) -> None:
    """What was handed over does not notice; a frontend that starts again serves new clients."""
    bed = make_bed(backends=3)
    downloads = Downloads(bed, pool)
    bed.cluster.kill("fe1")
    assert downloads.outcomes() == ["whole"] * CLIENTS
    bed.cluster.restart("fe1")
    handoffs = bed.switch("handoffs")
    for node in bed.backends:
        assert bed.client.once("GET", downloads.paths[node]).sha256 == downloads.hashes[node]
    assert bed.switch("handoffs") - handoffs == 3
    assert wait_for(lambda: bed.rules() == 0, 5.0)


def test_agent_dies(make_bed: Callable[..., Bed], pool: ThreadPoolExecutor) -> None:
    """The data plane goes on without the agent; the next agent finds the rules and goes on."""
    bed = make_bed(backends=3)
    downloads = Downloads(bed, pool, PACE / 8)  # they outlast the agent's start on a busy machine
    rules = bed.rules()
    assert rules >= CLIENTS
    bed.cluster.kill("switch")
    time.sleep(0.3)
    path = downloads.paths["be1"]
    assert bed.client.once("GET", path).sha256 == downloads.hashes["be1"]
    bed.cluster.restart("switch")
    assert bed.rules() >= CLIENTS
    assert downloads.outcomes() == ["whole"] * CLIENTS
    for name in bed.nodes:  # where the agent answers them, they hear of it within a second or so
        assert wait_for(lambda name=name: bed.cluster.statuses(name)[0]["switch_reachable"], 10.0)
    handoffs = bed.switch("handoffs")
    for node in bed.backends:
        answer = bed.client.once("GET", downloads.paths[node])
        assert (answer.sha256, answer.node) == (downloads.hashes[node], f"{node}/0")
    assert bed.switch("handoffs") - handoffs == 3
    assert wait_for(lambda: bed.rules() == 0, 20.0)


def test_backend_dies(make_bed: Callable[..., Bed], pool: ThreadPoolExecutor) -> None:
    """Its clients learn it within two seconds, nobody else does, and its rules go."""
    bed = make_bed(backends=3)
    downloads = Downloads(bed, pool)
    idle = [bed.client.connect() for _ in range(6)]
    for number, conn in enumerate(idle):
        node = bed.backends[number % 3]
        assert conn.request("GET", downloads.paths[node]).status == 200
    died = time.monotonic()
    bed.cluster.kill("be2")
    for number, conn in enumerate(idle):
        if bed.backends[number % 3] == "be2":
            conn.sock.settimeout(2.0)
            try:
                assert conn.sock.recv(1) == b""
            except ConnectionResetError:
                pass
    assert time.monotonic() - died < 2.0
    for node, future in zip(downloads.nodes, downloads.results, strict=True):
        outcome, ended = future.result(30)
        if node == "be2":
            assert outcome.startswith("cut"), outcome
            assert ended - died < 2.0
        else:
            assert outcome == "whole"
    for number, conn in enumerate(idle):
        node = bed.backends[number % 3]
        if node != "be2":
            assert conn.request("GET", downloads.paths[node]).sha256 == downloads.hashes[node]
        conn.close()
    assert wait_for(lambda: bed.rules() == 0, 5.0), bed.rules()
    began = time.monotonic()
    assert bed.client.once("GET", downloads.paths["be2"]).status in (502, 503, 504)
    assert time.monotonic() - began < 5.0
    bed.cluster.restart("be2")
    answer = bed.client.once("GET", downloads.paths["be2"])
    assert answer.sha256 == downloads.hashes["be2"]


def test_backend_stops_answering(make_bed: Callable[..., Bed]) -> None:
    """A frozen backend loses its lease; a client that waits for it is told."""
    bed = make_bed(backends=2, settings={"cluster.lease": 0.5})
    path = bed.key("be1", "frozen")
    bed.store(path, 1000)
    with bed.client.open() as conn:
        assert conn.request("GET", path).status == 200
        pid = bed.cluster.node("be1").pid
        os.kill(pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            assert wait_for(lambda: bed.rules() == 0, 4.0)
            conn.sock.settimeout(4.0)
            with pytest.raises((ConnectionResetError, Cut)):
                conn.request("GET", path)
            assert time.monotonic() - began < 4.0
        finally:
            os.kill(pid, signal.SIGCONT)
    assert wait_for(lambda: bed.client.once("GET", path).status == 200, 5.0)


def test_backend_dies_with_a_frozen_connection(make_bed: Callable[..., Bed]) -> None:
    """A socket in repair mode dies without a word: the backend's next life tells the client."""
    bed = make_bed(
        backends=2, settings={"backend.handoff_deadline_ms": 10_000.0, "cluster.lease": 10.0}
    )
    first, second = (bed.key(node, "frozen") for node in bed.backends)
    for path in (first, second):
        bed.store(path, 1000)
    pid = bed.cluster.node("be1").pid
    with bed.client.open(timeout=15.0) as conn:
        assert conn.request("GET", second).status == 200
        os.kill(pid, signal.SIGSTOP)
        try:
            conn.send(conn.start("GET", first))
            time.sleep(0.2)  # be2 has frozen the connection, and waits for be1's answer
            bed.cluster.kill("be2")
            bed.cluster.restart("be2")
            with pytest.raises((ConnectionResetError, Cut)):
                conn.response()
        finally:
            os.kill(pid, signal.SIGCONT)
    assert wait_for(lambda: bed.rules() == 0)
    for path in (first, second):
        assert bed.client.once("GET", path).status == 200


def test_kill_in_mid_handoff(make_bed: Callable[..., Bed], pool: ThreadPoolExecutor) -> None:
    """Backends die again and again under load: every request ends, nothing hangs or leaks."""
    bed = make_bed(backends=3)
    paths = [bed.key(node, "mid") for node in bed.backends]
    hashes = {path: digest(bed.store(path, 20_000)) for path in paths}
    stop = threading.Event()

    def load() -> tuple[int, int, float]:
        good = bad = 0
        longest = 0.0
        while not stop.is_set():
            began = time.monotonic()
            try:
                with bed.client.open(timeout=6.0) as conn:
                    for path in paths * 3:
                        answer = conn.request("GET", path)
                        if answer.status == 200:
                            assert answer.sha256 == hashes[path]
                            good += 1
                        else:
                            assert answer.status in (502, 503, 504)
                            bad += 1
            except (Cut, ConnectionResetError, BrokenPipeError):
                bad += 1
            longest = max(longest, time.monotonic() - began)
        return good, bad, longest

    clients = [pool.submit(load) for _ in range(6)]
    for _ in range(3):
        time.sleep(0.6)
        bed.cluster.kill("be3")
        time.sleep(0.4)
        bed.cluster.restart("be3")
    time.sleep(0.5)
    stop.set()
    results = [client.result(20) for client in clients]
    assert sum(good for good, _, _ in results) > 300
    assert max(longest for _, _, longest in results) < 5.0
    assert wait_for(lambda: bed.rules() == 0, 6.0), bed.rules()
