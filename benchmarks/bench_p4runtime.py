"""What P4Runtime costs: rules through driver, gRPC and service, against the eBPF table directly.

Needs root; takes about a minute. Both ways are measured in turns in the same run:

    python benchmarks/bench_p4runtime.py [--rounds 20] [--connections 400] [--json]

First rules in batches: the switch has them when the time stops. A batch of the eBPF table is one
operation after another, for the kernel takes them singly. Then the time to a response's first octet
on a new connection that is handed over, in two labs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench_handoff import Service, _first_octet, _service
from bench_switch import flow_of

from prism.flow import Endpoint
from prism.switch.base import Change, Rule
from prism.switch.control import Status
from prism.switch.ebpf import EbpfSwitch
from prism.switch.p4runtime import P4Driver
from prism.switch.p4runtime_pipeline import load
from prism.switch.p4runtime_session import SessionSettings
from prism.switch.p4service import P4Service
from prism.switch.p4service_table import EntryTable

BATCHES = (1, 10, 100)
EACH = 200  # rules of one kind, size and round
KINDS = ("add", "chown", "delete")


@contextlib.contextmanager
def bpffs() -> Iterator[Path]:
    """A BPF file system of its own."""
    with tempfile.TemporaryDirectory() as pins:
        subprocess.run(["mount", "-t", "bpf", "bpf", pins], check=True)
        try:
            yield Path(pins)
        finally:
            subprocess.run(["umount", "--lazy", pins], check=True)


@contextlib.contextmanager
def serving(pins: Path) -> Iterator[str]:
    """P4Runtime over another table, in a process of its own as in a cluster; where it listens."""
    context = multiprocessing.get_context("spawn")
    near, far = context.Pipe()
    process = context.Process(target=_serve, args=(pins, far), daemon=True)
    process.start()
    try:
        if not near.poll(20):
            raise SystemExit("the service does not start")
        yield f"127.0.0.1:{near.recv()}"
    finally:
        near.send(None)
        process.join(20)


def _serve(pins: Path, pipe: Connection) -> None:
    table = EbpfSwitch(pins, max_rules=4096)
    service = P4Service(EntryTable(table, load()), "127.0.0.1:0")
    service.start()
    pipe.send(service.port)
    pipe.recv()
    service.close()
    table.close()


def changes(kind: str, round_: int) -> list[Change]:
    """EACH changes of one kind; each kind follows the one before it."""
    found = []
    for number in range(EACH):
        flow = flow_of(number)
        owner, next_owner = (Endpoint(f"10.50.{n}.2", 1024 + number) for n in (3, 4))
        first = Rule(flow, 1, owner, bytes(6), 10 * round_ + 1, True, 1)
        second = first._replace(owner=2, owner_endpoint=next_owner, gen=first.gen + 1, locked=False)
        found.append(
            {
                "add": Change(flow, None, first),
                "chown": Change(flow, first, second),
                "delete": Change(flow, second, None),
            }[kind]
        )
    return found


def directly(table: EbpfSwitch, batch: Iterable[Change]) -> None:
    """Through the classifier's code, as the agent does."""
    for before, after in ((change.before, change.after) for change in batch):
        if before is None and after is not None:
            good = table.add(after) == Status.OK
        elif after is None and before is not None:
            good = table.delete(before.flow, before.gen)
        else:
            good = bool(before and after) and table.chown(before.gen, after) == Status.OK  # type: ignore[union-attr,arg-type]
        if not good:
            raise SystemExit("the table refused a change")


async def rule_times(rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each batch, by what was done and by way."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: {"ebpf": [], "p4runtime": []})
    with contextlib.ExitStack() as stack:
        pins = stack.enter_context(bpffs())
        direct = EbpfSwitch(pins / "direct", max_rules=4096)
        stack.enter_context(contextlib.closing(direct))
        address = stack.enter_context(serving(pins / "served"))
        driver = P4Driver(
            SessionSettings(address=address),
            load(),
            adopt=lambda rules, incarnation: rules or (),
            stand_by=lambda other: None,
            on_packet=lambda data: None,
            incarnation=lambda: 1,
        )
        task = asyncio.create_task(driver.run())
        try:
            async with asyncio.timeout(20):
                while not driver.ready:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            number = 0
            for _ in range(rounds + 1):
                for size in BATCHES:
                    number += 1
                    await _one_round(driver, direct, size, number, found)
                if number == len(BATCHES):  # the first round only warms up
                    found.clear()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    return found


async def _one_round(
    driver: P4Driver,
    direct: EbpfSwitch,
    size: int,
    number: int,
    found: dict[str, dict[str, list[float]]],
) -> None:
    for kind in KINDS:
        todo = changes(kind, number)
        for start in range(0, EACH, size):
            batch = todo[start : start + size]
            times = found[f"{kind}, batches of {size}"]
            began = time.perf_counter()
            directly(direct, batch)
            times["ebpf"].append(time.perf_counter() - began)
            began = time.perf_counter()
            results = await driver.apply(batch)
            times["p4runtime"].append(time.perf_counter() - began)
            if set(results) != {Status.OK}:
                raise SystemExit("the switch refused a change")


def handoff_times(connections: int) -> dict[str, list[float]]:
    """Seconds from request to first octet on new connections, both labs in turns."""
    found: dict[str, list[float]] = {"ebpf": [], "p4runtime": []}
    with (
        _service(trace=False, switch="ebpf") as plain,
        _service(trace=False, switch="p4runtime") as programmed,
    ):
        for number in range(connections + 20):
            for name, service in (("ebpf", plain), ("p4runtime", programmed)):
                took = _handed_over(service)
                if number >= 20:
                    found[name].append(took)
        for service in (plain, programmed):
            handed = service.cluster.status()["counters"]["handoffs"]
            if handed < connections * 0.9:
                raise SystemExit(f"only {handed} of {connections} connections were handed over")
    return found


def _handed_over(service: Service) -> float:
    with contextlib.closing(service.connect()) as sock:
        began = time.perf_counter()
        _first_octet(sock, service.requests["be1"])
        return time.perf_counter() - began


def summary(times: dict[str, list[float]], size: int = 1) -> dict[str, float]:
    """Medians, 99th percentiles, rates and the ratio of the medians."""
    found: dict[str, float] = {}
    for name, values in times.items():
        found[f"{name}_median_us"] = round(statistics.median(values) * 1e6, 1)
        found[f"{name}_p99_us"] = round(sorted(values)[len(values) * 99 // 100] * 1e6, 1)
        found[f"{name}_rules_per_second"] = round(size * len(values) / sum(values))
    ratio = statistics.median(times["p4runtime"]) / statistics.median(times["ebpf"])
    return found | {"ratio": round(ratio, 2)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--connections", type=int, default=400)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    results: dict[str, Any] = {"load": os.getloadavg()[0]}
    for name, times in asyncio.run(rule_times(options.rounds)).items():
        results[name] = summary(times, int(name.rpartition(" ")[2]))
    handoff = summary(handoff_times(options.connections))
    results["handoff, first octet"] = {
        name: value for name, value in handoff.items() if not name.endswith("rules_per_second")
    }
    if options.json:
        print(json.dumps(results, indent=2))
        return
    for name, value in results.items():
        print(f"{name:24} {value}")


if __name__ == "__main__":
    main()
