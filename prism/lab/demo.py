"""The demo: one client connection that changes owners, and what each of them did.

Brings up one frontend and two backends, stores and fetches objects of several sizes with curl over
one kept-alive connection, compares every octet, and shows each handoff step by step from the
nodes' own traces. ``python -m prism.lab.demo [--tls] [NAME]``; exit code 0 only if all was as it
should be.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prism.errors import PrismError
from prism.lab.cluster import Cluster
from prism.lab.topology import namespaces_of
from prism.placement import placement_from

__all__ = ["main"]

NAME = "prism-demo"
SIZES = (1, 1024, 64 * 1024, 1024**2, 8 * 1024**2, 64 * 1024**2)
_TRACE_PATIENCE = 3.0
_WRITE_OUT = "|".join(
    (
        "%{method}",
        "%{http_code}",
        "%{num_connects}",
        "%{local_port}",
        "%{time_total}",
        "%header{server}",
    )
)


@dataclass(frozen=True, slots=True)
class Object:
    """One object of the demo."""

    key: str
    home: str
    source: Path
    copy: Path
    size: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What curl saw of one request."""

    method: str
    status: int
    connects: int
    port: int
    seconds: float
    node: str


@dataclass(frozen=True, slots=True)
class Handoff:
    """One change of owner; steps in microseconds since the request's arrival."""

    source: str
    target: str
    port: int
    steps: tuple[tuple[str, float], ...]


def make_objects(cluster: Cluster, directory: Path) -> list[Object]:
    """Random objects; neighbours live on different backends, so the connection has to move."""
    placement = placement_from(cluster.config("fe1"))
    homes = [node.name for node in placement.nodes]
    objects = []
    for number, size in enumerate(SIZES):
        home = homes[number % len(homes)]
        names = (f"/demo/{size}-{letter}" for letter in map(str, range(1000)))
        key = next(name for name in names if placement.choose(name[1:]).name == home)
        source = directory / f"source-{number}"
        source.write_bytes(os.urandom(size))
        objects.append(Object(key, home, source, directory / f"copy-{number}", size))
    return objects


def transfer(cluster: Cluster, objects: list[Object]) -> list[Answer]:
    """Store and fetch everything with one curl, so over one connection.

    Raises:
        PrismError: curl failed.
    """
    parts = []
    trust = f'cacert = "{cluster.ca_file}"\n' if cluster.ca_file else ""
    for entry in objects:
        url = f'url = "{cluster.url}{entry.key}"\nwrite-out = "{_WRITE_OUT}\\n"\nsilent\n{trust}'
        parts.append(f'{url}upload-file = "{entry.source}"\noutput = "/dev/null"\n')
        parts.append(f'{url}output = "{entry.copy}"\n')
    done = cluster.exec(
        "client",
        ["curl", "--max-time", "60", "--config", "-"],
        input="next\n".join(parts),
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode != 0:
        raise PrismError(f"curl ended with {done.returncode}: {done.stderr.strip()}")
    return [_answer(line) for line in done.stdout.splitlines()]


def _answer(line: str) -> Answer:
    method, status, connects, port, seconds, server = line.split("|")
    node = server.partition("(")[2].rstrip(")")
    return Answer(method, int(status), int(connects), int(port), float(seconds), node)


def traces(cluster: Cluster) -> Iterator[dict[str, Any]]:
    """The trace events of all nodes."""
    for name, node in cluster.nodes.items():
        for line in node.log.read_text().splitlines():
            entry: dict[str, Any] = json.loads(line)
            if "event" in entry:
                yield entry | {"name": name}


def handoffs(cluster: Cluster, wanted: int) -> list[Handoff]:
    """The handoffs in their order, both sides' steps together; waits for the last lines."""
    deadline = time.monotonic() + _TRACE_PATIENCE
    while True:
        events = list(traces(cluster))
        taken = {
            (e["flow"], e["gen"]): e for e in events if e["event"] == "handoff-in" and e["gen"]
        }
        given = [e for e in events if e["event"] == "handoff-out" and e["outcome"] == "gone"]
        # The change of owner adds one to the generation.
        pairs = [(e, taken.get((e["flow"], e["gen"] + 1))) for e in given]
        found = [(out, into) for out, into in pairs if into is not None]
        if len(found) >= wanted or time.monotonic() > deadline:
            return [_merge(out, into) for out, into in sorted(found, key=lambda p: p[0]["gen"])]
        time.sleep(0.05)


def _merge(out: dict[str, Any], into: dict[str, Any]) -> Handoff:
    steps = [*out["steps"].items(), *into["steps"].items()]
    ordered = tuple((name, ns / 1000) for name, ns in sorted(steps, key=lambda step: step[1]))
    port = int(out["flow"].partition("->")[0].rpartition(":")[2])
    return Handoff(out["process"], into["process"], port, ordered)


def problems(objects: list[Object], answers: list[Answer], moves: list[Handoff]) -> list[str]:
    """Everything that is not as it should be."""
    found = []
    expected = [(method, entry) for entry in objects for method in ("PUT", "GET")]
    if len(answers) != len(expected):
        found.append(f"{len(answers)} answers to {len(expected)} requests")
    for answer, (method, entry) in zip(answers, expected, strict=False):
        wanted = (method, 201 if method == "PUT" else 200, f"{entry.home}/0")
        if (answer.method, answer.status, answer.node) != wanted:
            found.append(f"{method} {entry.key}: {answer.status} from {answer.node or 'nobody'}")
    found += [f"{each.key}: the copy differs" for each in objects if not _same(each)]
    if sum(answer.connects for answer in answers) != 1:
        found.append(f"{sum(answer.connects for answer in answers)} connections instead of one")
    if len(moves) != len(objects):
        found.append(f"{len(moves)} handoffs instead of {len(objects)}")
    return found


def _same(entry: Object) -> bool:
    return entry.copy.is_file() and _digest(entry.source) == _digest(entry.copy)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_text(size: int) -> str:
    """``64 KiB``."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024 or unit == "MiB":
            return f"{size} {unit}"
        size //= 1024
    return ""


def show(
    console: Console, objects: list[Object], answers: list[Answer], moves: list[Handoff]
) -> None:
    """The timeline: requests, and the handoffs between them."""
    table = Table(title="One client connection", title_justify="left", box=None)
    for heading in ("request", "size", "status", "answered by", "ms"):
        table.add_column(heading, justify="right" if heading in ("size", "ms") else "left")
    rows = zip(answers, (entry for entry in objects for _ in range(2)), strict=False)
    owner, queue = "fe1/0", list(moves)
    for answer, entry in rows:
        if answer.node != owner and queue:
            move = queue.pop(0)
            table.add_row(Text(f"  {move.source} hands over to {move.target}", style="cyan"))
        owner = answer.node
        table.add_row(
            f"{answer.method} {entry.key}",
            size_text(entry.size),
            str(answer.status),
            answer.node,
            f"{answer.seconds * 1000:.1f}",
        )
    console.print(table)
    console.print()
    steps = Table(
        title="The handoffs: microseconds from the request's arrival to the end of each step",
        title_justify="left",
        box=None,
    )
    steps.add_column("from")
    steps.add_column("to")
    steps.add_column("steps")
    for move in moves:
        # No-break spaces: a step and its number stay on one line.
        text = "  ".join(f"{name}\N{NO-BREAK SPACE}{us:.0f}" for name, us in move.steps)
        steps.add_row(move.source, move.target, text)
    console.print(steps)


def summarise(
    console: Console, cluster: Cluster, objects: list[Object], moves: list[Handoff]
) -> None:
    """What it came to."""
    status = cluster.status()
    total = size_text(sum(entry.size for entry in objects))
    owned = sorted(dict(move.steps).get("activate", 0.0) for move in moves)
    middle = f"{owned[len(owned) // 2]:.0f}" if owned else "-"
    counters = "  ".join(f"{key} {value}" for key, value in status["counters"].items())
    console.print(f"\n{len(objects)} objects ({total}) stored and fetched; digests compared.")
    console.print(f"New owner ready {middle} microseconds after the request arrived (median).")
    console.print(f"rules {status['rules']}  {counters}")


def main(name: str = NAME, *, tls: bool = False) -> int:
    """Run the demo in a lab of this name, with ``tls`` over HTTPS; the exit code."""
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    try:
        with Cluster(name, backends=2, tls=tls) as cluster:
            nodes = ", ".join(cluster.nodes)
            console.print(f"Cluster {name} is up ({nodes}); the service is {cluster.url}\n")
            directory = cluster.dir / "demo"
            directory.mkdir()
            objects = make_objects(cluster, directory)
            answers = transfer(cluster, objects)
            moves = handoffs(cluster, len(objects))
            show(console, objects, answers, moves)
            summarise(console, cluster, objects, moves)
            wrong = problems(objects, answers, moves)
    except (PrismError, OSError, subprocess.SubprocessError, ValueError) as error:
        console.print(f"demo: {error}", style="red")
        return 1
    except KeyboardInterrupt:
        console.print("demo: interrupted; everything has been taken down")
        return 130
    wrong += [f"left behind: {left.name}" for left in namespaces_of(name)]
    for problem in wrong:
        console.print(f"wrong: {problem}", style="red")
    console.print("Everything taken down. " + ("All good." if not wrong else "Not good."))
    return 1 if wrong else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/demo", description="One client connection that changes owners, step by step."
    )
    parser.add_argument("--tls", action="store_true", help="over HTTPS")
    parser.add_argument("name", nargs="?", default=NAME, help="of the lab (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    arguments = _arguments()
    sys.exit(main(arguments.name, tls=arguments.tls))
