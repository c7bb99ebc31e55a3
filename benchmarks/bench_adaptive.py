"""Adaptive handoff against handing everything over and against relaying everything.

    python benchmarks/bench_adaptive.py [--rounds N] [--seconds S] [--rate RATE] [--backends N]

Three labs that differ in ``handoff`` only take turns under the same loads: ``split``, half of the
connections ask for objects of 1 KiB and half for objects of 4 MiB, at the same time; ``mixed``,
each connection draws from both kinds for each request. What counts are ratios between runs that
follow each other; the medians over the rounds are printed, as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from naming import lab_name
from suite.load import Load, Sample, drive

from prism.lab.cluster import Cluster

MODES = ("adaptive", "always", "never")
SMALL, LARGE = 1024, 4 * 1024 * 1024
CONNECTIONS = 16  # of each kind


def paths(size: int, count: int) -> list[str]:
    """Keys of both kinds stand in the same directory, so its average tells nothing."""
    return [f"/mixed/{number}-{size}" for number in range(count)]


KEYS = {SMALL: paths(SMALL, 64), LARGE: paths(LARGE, 16)}


class Lab:
    """One cluster in one mode, with the objects stored."""

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        self.cluster = cluster
        self.directory = directory
        self.url = cluster.url
        for size, keys in KEYS.items():
            source = directory / "object"
            source.write_bytes(os.urandom(size))
            urls = [part for key in keys for part in ("-T", str(source), cluster.url + key)]
            command = ["curl", "-sSf", "--max-time", "60", *urls]
            cluster.exec("client", command).check_returncode()

    def _drive(self, name: str, keys: list[str], connections: int, seconds: float) -> Sample:
        directory = self.directory / name
        directory.mkdir(exist_ok=True)
        namespace = self.cluster.topology.client.namespace
        return drive(namespace, self.url, Load(keys, connections=connections), seconds, directory)

    def split(self, seconds: float) -> dict[str, float]:
        """Both kinds at once, each on connections of its own."""
        with ThreadPoolExecutor(2) as pool:
            runs = [
                pool.submit(self._drive, str(size), keys, CONNECTIONS, seconds)
                for size, keys in KEYS.items()
            ]
            small, large = (run.result() for run in runs)
        return {
            "requests": small.requests + large.requests,
            "octets": small.octets + large.octets,
            "small_requests": small.requests,
            "large_octets": large.octets,
            "small_p99": small.p99,
            "failed": small.failed + large.failed,
        }

    def mixed(self, seconds: float) -> dict[str, float]:
        """Both kinds on the same connections, each request of either with the same chance."""
        keys = KEYS[SMALL] + KEYS[LARGE] * (len(KEYS[SMALL]) // len(KEYS[LARGE]))
        sample = self._drive("mixed", keys, 2 * CONNECTIONS, seconds)
        return {"requests": sample.requests, "octets": sample.octets, "failed": sample.failed}


@contextlib.contextmanager
def labs(rate: str | None, backends: int) -> Iterator[dict[str, Lab]]:
    """A lab for each mode."""
    directory = Path(tempfile.mkdtemp(prefix=f"prism-{lab_name()}-", dir="/dev/shm"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        made = {}
        for mode in MODES:
            own = directory / mode
            own.mkdir()
            cluster = Cluster(
                lab_name(),
                backends=backends,
                rate=rate,
                trace=False,
                store=own / "store",
                settings={"frontend.handoff": mode},
            )
            lock = cluster.dir.with_name(f"{cluster.name}.lock")
            stack.callback(lock.unlink, missing_ok=True)
            stack.enter_context(cluster)
            made[mode] = Lab(cluster, own)
        yield made


def measure(made: dict[str, Lab], load: str, rounds: int, seconds: float) -> dict[str, Any]:
    """Medians of each mode, and the medians of adaptive's ratio to the others, round by round."""
    runs: dict[str, list[dict[str, float]]] = {mode: [] for mode in made}
    for number in range(rounds):
        for mode in MODES if number % 2 else MODES[::-1]:
            runs[mode].append(getattr(made[mode], load)(seconds))
    names = list(runs["adaptive"][0])
    found: dict[str, Any] = {
        mode: {name: statistics.median(run[name] for run in own) for name in names}
        for mode, own in runs.items()
    }
    for other in MODES[1:]:
        pairs = list(zip(runs["adaptive"], runs[other], strict=True))
        found[f"adaptive/{other}"] = {
            name: round(statistics.median(a[name] / b[name] for a, b in pairs), 3)
            for name in names
            if name != "failed"
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Adaptive handoff against always and never.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--rate", default="200mbit")
    parser.add_argument("--backends", type=int, default=4)
    given = parser.parse_args()
    with labs(given.rate, given.backends) as made:
        for load in ("split", "mixed"):
            found = measure(made, load, given.rounds, given.seconds)
            print(json.dumps({load: found, "load average": os.getloadavg()[0]}, indent=1))
        for mode, lab in made.items():
            for status in lab.cluster.statuses("fe1"):
                choices = status["counters"]["handoff_choices"]
                print(json.dumps({mode: status["adaptive"], "choices": choices}))


if __name__ == "__main__":
    sys.exit(main())
