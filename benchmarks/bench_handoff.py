"""How long a handoff takes, and where the time goes.

Run as root::

    pytest benchmarks/bench_handoff.py

Three parts: the two system-call sequences alone (export, import); the time to the response's first
octet as a client measures it, for connections that are handed over, relayed, or made to the
backend directly; and a table of the stages from the nodes' own traces.
"""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import time
from collections.abc import Iterator
from typing import Any

import pytest
from naming import lab_name
from pytest_benchmark.fixture import BenchmarkFixture
from suite.trace import stages, steps_in

from prism._ext import tcp_repair
from prism.flow import Endpoint
from prism.lab.cluster import Cluster
from prism.lab.netns import Namespace
from prism.placement import placement_from

ROUNDS = 400
SIZE = 512  # octets of the object: the response is one segment
GOAL = 150e-6  # seconds, median, idle machine


class Service:
    """A cluster with one small object on each of two backends."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.namespace = cluster.topology.namespace("client")
        self.service = cluster.topology.services(80)[0]
        placement = placement_from(cluster.config("fe1"))
        self.requests: dict[str, bytes] = {}
        for number in range(64):
            key = f"bench/{number}"
            owner = placement.choose(key).name
            if owner not in self.requests:
                self._store(key)
                self.requests[owner] = _request("GET", key)

    def connect(self, to: Endpoint | None = None) -> socket.socket:
        """A connection whose handshake is over and has settled."""
        sock = self.namespace.socket()
        sock.connect(to or self.service)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(5)
        # Accepting is not what is measured: give the frontend the time for it.
        time.sleep(0.001)
        return sock

    def _store(self, key: str) -> None:
        with contextlib.closing(self.connect()) as sock:
            head = _request("PUT", key, f"Content-Length: {SIZE}\r\n")
            sock.sendall(head + os.urandom(SIZE))
            assert sock.recv(4096).startswith(b"HTTP/1.1 2")


def _request(method: str, key: str, fields: str = "") -> bytes:
    return f"{method} /{key} HTTP/1.1\r\nHost: bench\r\n{fields}\r\n".encode()


@contextlib.contextmanager
def _service(**options: Any) -> Iterator[Service]:
    cluster = Cluster(lab_name(), backends=2, **options)
    try:
        with cluster:
            yield Service(cluster)
    finally:
        cluster.dir.with_name(f"{cluster.name}.lock").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def quiet() -> Iterator[Service]:
    """Handoffs, nothing traced: what the figures are taken from."""
    with _service(trace=False) as service:
        yield service


@pytest.fixture(scope="module")
def relaying() -> Iterator[Service]:
    """The same, as a plain proxy."""
    with _service(trace=False, settings={"frontend.handoff": "never"}) as service:
        yield service


@pytest.fixture(scope="module")
def traced() -> Iterator[Service]:
    """Handoffs with the time of each step in the logs."""
    with _service(trace=True) as service:
        yield service


# -- the system calls alone ------------------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[tuple[Namespace, socket.socket]]:
    """A namespace with two addresses, and the server's end of a connection to the first."""
    namespace = Namespace.create(lab_name())
    try:
        for host in ("10.99.0.1/32", "10.99.0.2/32", "10.99.0.3/32"):
            namespace.add_address("lo", host)
        with namespace.entered(), socket.create_server(("10.99.0.1", 80)) as listener:
            client = socket.create_connection(("10.99.0.1", 80), source_address=("10.99.0.3", 0))
            server, _ = listener.accept()
            client.sendall(_request("GET", "bench/1"))
            time.sleep(0.05)
            yield namespace, server
            client.close()
            server.close()
    finally:
        namespace.remove()


def test_export(benchmark: BenchmarkFixture, pair: tuple[Namespace, socket.socket]) -> None:
    """Freeze a connection with a request in its queue and serialise it."""
    fd = pair[1].fileno()
    benchmark.pedantic(
        tcp_repair.export_state,
        args=(fd,),
        rounds=ROUNDS,
        warmup_rounds=20,
        teardown=lambda fd: tcp_repair.resume(fd, probe=False),
    )


def test_import(benchmark: BenchmarkFixture, pair: tuple[Namespace, socket.socket]) -> None:
    """Rebuild it at another address, up to the commit."""
    state = tcp_repair.export_state(pair[1].fileno())
    made: list[tcp_repair.Imported] = []

    def rebuild() -> None:
        made.append(tcp_repair.import_state(state, "10.99.0.2", 4700))

    benchmark.pedantic(
        rebuild, rounds=ROUNDS, warmup_rounds=20, teardown=lambda: made.pop().discard()
    )
    tcp_repair.resume(pair[1].fileno(), probe=False)


# -- as a client sees it ---------------------------------------------------------------------


def _first_octet(sock: socket.socket, request: bytes) -> None:
    sock.sendall(request)
    sock.recv(4096)


def _fresh(benchmark: BenchmarkFixture, service: Service, to: Endpoint | None = None) -> float:
    """A new connection for each request; seconds at the median."""
    socks: list[socket.socket] = []

    def setup() -> tuple[tuple[socket.socket, bytes], dict[str, Any]]:
        socks.append(service.connect(to))
        return (socks[-1], service.requests["be1"]), {}

    benchmark.pedantic(
        _first_octet,
        setup=setup,
        rounds=ROUNDS,
        warmup_rounds=50,
        teardown=lambda *_: socks.pop().close(),
    )
    return float(benchmark.stats.stats.median)


def _report(benchmark: BenchmarkFixture, what: str, seconds: float) -> None:
    benchmark.extra_info["median_us"] = round(seconds * 1e6, 1)
    print(f"\n{what}: {seconds * 1e6:.0f} us at the median")


def test_first_octet_handed_over(benchmark: BenchmarkFixture, quiet: Service) -> None:
    """Request out to response in, the connection changing hands in between."""
    median = _fresh(benchmark, quiet)
    assert quiet.cluster.status()["counters"]["handoffs"] >= ROUNDS
    _report(benchmark, f"handed over (goal {GOAL * 1e6:.0f} us)", median)


def test_first_octet_moving_between_backends(benchmark: BenchmarkFixture, quiet: Service) -> None:
    """One kept-alive connection whose every request belongs to the other backend."""
    turns = 0
    with contextlib.closing(quiet.connect()) as sock:

        def setup() -> tuple[tuple[socket.socket, bytes], dict[str, Any]]:
            nonlocal turns
            turns += 1
            time.sleep(0.001)
            return (sock, quiet.requests[f"be{1 + turns % 2}"]), {}

        benchmark.pedantic(_first_octet, setup=setup, rounds=ROUNDS, warmup_rounds=50)
    _report(benchmark, "from backend to backend", float(benchmark.stats.stats.median))


def test_first_octet_kept(benchmark: BenchmarkFixture, quiet: Service) -> None:
    """A kept-alive connection whose owner has the object: what all later requests cost."""
    with contextlib.closing(quiet.connect()) as sock:

        def setup() -> tuple[tuple[socket.socket, bytes], dict[str, Any]]:
            time.sleep(0.001)
            return (sock, quiet.requests["be1"]), {}

        benchmark.pedantic(_first_octet, setup=setup, rounds=ROUNDS, warmup_rounds=50)
    _report(benchmark, "no handoff needed", float(benchmark.stats.stats.median))


def test_first_octet_relayed(benchmark: BenchmarkFixture, relaying: Service) -> None:
    """The same through a frontend that relays."""
    median = _fresh(benchmark, relaying)
    assert relaying.cluster.status()["counters"]["relays"] >= ROUNDS
    _report(benchmark, "relayed", median)


def test_first_octet_direct(benchmark: BenchmarkFixture, quiet: Service) -> None:
    """The same asked of the backend itself: what no proxy can be faster than."""
    place = quiet.cluster.config("fe1").nodes[0]
    median = _fresh(benchmark, quiet, Endpoint(place.address, place.relay_port))
    _report(benchmark, "asked directly", median)


# -- where the time goes ---------------------------------------------------------------------


def _stages(traced: Service, rounds: int) -> dict[str, list[float]]:
    """Seconds of each stage, from the traces; the whole, as the client has seen it, is the last."""
    seen: dict[str, float] = {}
    for _ in range(rounds):
        with contextlib.closing(traced.connect()) as sock:
            host, port = sock.getsockname()
            began = time.perf_counter()
            _first_octet(sock, traced.requests["be1"])
            seen[f"{host}:{port}->{traced.service}"] = time.perf_counter() - began
    time.sleep(0.2)
    nodes = traced.cluster.nodes
    outs = steps_in(nodes["fe1"].log, "handoff-out")
    return stages(seen, outs, steps_in(nodes["be1"].log, "handoff-in"))


def test_stages(traced: Service, capsys: pytest.CaptureFixture[str]) -> None:
    """A table of the stages' medians and shares."""
    _stages(traced, 50)
    found = _stages(traced, ROUNDS)
    totals = list(found.values())[-1] if found else []
    # On a busy machine some are relayed instead; their connections have no stages.
    assert len(totals) > ROUNDS * 0.1
    whole = statistics.median(totals)
    with capsys.disabled():
        print(f"\n\nA handoff, traced, {len(totals)} times")
        print(f"  {'stage':42s} {'median':>8s} {'share':>10s} {'best tenth':>14s}")
        for name, values in found.items():
            middle, best = statistics.median(values), statistics.quantiles(values, n=10)[0]
            share = 100 * middle / whole
            print(f"  {name:42s} {middle * 1e6:8.1f} us {share:6.1f} % {best * 1e6:11.1f} us")
