"""Gates: ratios to a rival measured in the same run, with slack for a noisy machine.

Each prints both sides where it fails. They are no benchmarks: those are in ``benchmarks``.
"""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import bench_tls_record
import pytest
from bench_tcp_repair import Connections
from pytest_benchmark.fixture import BenchmarkFixture
from suite.bed import Bed, Measured, keys
from suite.load import Load
from suite.pairing import ratio, rounds

from prism._ext import tcp_repair
from prism.http.head import parse_head
from prism.lab.netns import Namespace
from prism.placement import Node, Partitioned

pytestmark = [pytest.mark.net, pytest.mark.timeout(180)]

ROUNDS = 600


def say(what: str, ours: float, theirs: float, unit: str) -> str:
    return f"{what}: ours {ours:.4g} {unit}, theirs {theirs:.4g} {unit}, ratio {ours / theirs:.2f}"


@pytest.fixture
def loopback(make_namespace: Callable[[str], Namespace]) -> Iterator[Namespace]:
    namespace = make_namespace("gate")
    with namespace.entered():
        yield namespace


def bare(loopback: Namespace, directory: Path) -> tuple[float, float]:
    """Medians of the system calls alone, of export and import, in microseconds."""
    program = directory / "bare_repair"
    source = Path(__file__).with_name("bare_repair.c")
    if not program.exists():
        subprocess.run(["cc", "-O2", "-Wall", "-o", program, source], check=True)
    done = subprocess.run([program], check=True, capture_output=True, text=True, timeout=60)
    export, import_ = done.stdout.split()
    return int(export) / 1e3, int(import_) / 1e3


def test_export_and_import_against_bare_system_calls(
    benchmark: BenchmarkFixture, loopback: Namespace, tmp_path: Path
) -> None:
    """Serialising, checking and Python's share may add at most as much again."""
    connections = Connections("127.0.0.1")
    took: dict[str, list[float]] = {"export": [], "import": []}
    floor = [bare(loopback, tmp_path)]

    def move(descriptor: int) -> None:
        began = benchmark._timer()
        state = tcp_repair.export_state(descriptor)
        took["export"].append((benchmark._timer() - began) * 1e6)
        tcp_repair.close_quietly(descriptor)
        began = benchmark._timer()
        imported = tcp_repair.import_state(state, "127.0.0.1", 80)
        took["import"].append((benchmark._timer() - began) * 1e6)
        imported.discard()
        connections.end()

    benchmark.pedantic(
        move, setup=lambda: ((connections.open(),), {}), rounds=ROUNDS, warmup_rounds=50
    )
    floor.append(bare(loopback, tmp_path))
    connections.close()
    for number, (name, values) in enumerate(took.items()):
        ours = statistics.median(values)
        theirs = statistics.mean(pair[number] for pair in floor)
        assert ours <= 2.0 * theirs, say(name, ours, theirs, "us")


def test_record_layer_against_openssl(tmp_path: Path) -> None:
    """16 KiB records of AES-128-GCM, processor time on both sides."""
    cipher, suite = bench_tls_record.SUITES["TLS 1.3 AES-128-GCM"]
    file = tmp_path / "data"
    file.write_bytes(bytes(bench_tls_record.CALL))
    with file.open("rb") as opened:
        found = bench_tls_record.measure_suite(cipher, suite, 2, opened.fileno())
    theirs = found["openssl"]
    for name in ("seal", "peek"):
        assert found[name] >= 0.75 * theirs, say(name, found[name], theirs, "MB/s")


def test_placement_against_parsing(benchmark: BenchmarkFixture) -> None:
    """To decide where a request belongs costs less than to read its head."""
    nodes = [Node(f"be{number}", f"10.0.0.{number}") for number in range(1, 9)]
    placement = Partitioned(nodes)
    head = b"GET /bucket/object/%d HTTP/1.1\r\nHost: store.example\r\nAccept: */*\r\n\r\n"
    benchmark.pedantic(
        lambda: [placement.choose(f"bucket/object/{number}") for number in range(1000)],
        rounds=7,
        warmup_rounds=1,
    )
    ours = benchmark.stats.stats.median * 1e3
    samples = []
    for _ in range(7):
        began = benchmark._timer()
        for number in range(1000):
            parse_head(head % number)
        samples.append((benchmark._timer() - began) * 1e3)
    theirs = statistics.median(samples)
    assert ours <= theirs, say("placement among 8 nodes", ours, theirs, "us")


def test_throughput_against_nginx() -> None:
    """1 MiB objects of three backends, each on a link of 200 Mbit/s: the limit is 3."""
    with Bed(3) as bed:
        bed.fill((1 << 20,))
        load = Load(keys(1 << 20), connections=32)
        for system in ("prism", "nginx"):
            bed.run(system, load, 2)
        found = rounds(
            ("prism", "nginx"), 2, lambda system, number: bed.run(system, load, 4, seed=number)
        )

    def rate(run: Measured) -> float:
        return run.octets / 1e6

    against = ratio(found["prism"], found["nginx"], rate)
    ours, theirs = (statistics.median(map(rate, found[name])) for name in ("prism", "nginx"))
    assert against.median >= 2.2, say("1 MiB GET", ours, theirs, "MB/s")
