"""A cluster with what tests ask of it: clients, owners of keys, counters, leaks."""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from e2e_http import Client, payload
from e2e_leaks import Snapshot, memory, settle

from prism.lab.cluster import Cluster
from prism.placement import placement_from


class Bed:
    """A running cluster under test."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        service, service6 = cluster.topology.services(80)
        namespace = cluster.topology.namespace("client")
        self.client = Client(namespace, service)
        self.client6 = Client(namespace, service6)
        self.placement = placement_from(cluster.config("fe1"))
        self._objects: dict[str, bytes] = {}

    # -- who owns what --------------------------------------------------------------------------

    def owner(self, key: str) -> str:
        """The backend that a key belongs to."""
        return self.placement.choose(key.lstrip("/")).name

    def keys(self, node: str, count: int = 1, prefix: str = "key") -> list[str]:
        """Paths of keys that belong to a backend."""
        found: list[str] = []
        number = 0
        while len(found) < count:
            path = f"/{prefix}/{number}"
            number += 1
            if self.owner(path) == node:
                found.append(path)
        return found

    def key(self, node: str, prefix: str = "key") -> str:
        return self.keys(node, 1, prefix)[0]

    def store(self, path: str, size: int) -> bytes:
        """Put an object there; what it is made of."""
        data = payload(path, size)
        answer = self.client.once("PUT", path, data)
        assert answer.status in (200, 201, 204), answer
        return data

    # -- what the processes tell ----------------------------------------------------------------

    def counters(self, node: str) -> dict[str, Any]:
        """A node's counters, added up over its workers."""
        total: dict[str, Any] = {}
        if node == "switch" and "plane" in self.cluster.nodes:
            total |= self.counters("plane")  # what holds packets; the agent tells the rest
            total.pop("rules")
        for status in self.cluster.statuses(node):
            _add(total, status["counters"])
        return total

    @property
    def backends(self) -> list[str]:
        return [site.role for site in self.cluster.topology.backends]

    @property
    def nodes(self) -> list[str]:
        return [site.role for site in self.cluster.topology.nodes]

    def total(self, name: str) -> int:
        """A counter, added up over all frontends and backends."""
        return int(sum(flat(self.counters(node).get(name, 0)) for node in self.nodes))

    def switch(self, name: str) -> int:
        """A counter of the switch."""
        counters = self.counters("switch")
        return int(counters.get(name, counters["data_plane"].get(name)))

    def rules(self) -> int:
        return self.switch("rules")

    @property
    def slow_rules(self) -> bool:
        """Whether a change of a rule takes about a millisecond, and is answered by a process."""
        return self.cluster.options.switch == "p4runtime"

    def relays(self) -> dict[str, int]:
        """Why frontends relayed, and how often."""
        return dict(self.counters("fe1")["relays"])

    def events(self, node: str, name: str) -> list[dict[str, Any]]:
        """A node's trace events of one name."""
        found = []
        for line in self.cluster.node(node).log.read_text().splitlines():
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if entry.get("event") == name:
                    found.append(entry)
        return found

    def pids(self) -> dict[str, int]:
        """Every process of the cluster, supervisors and workers."""
        found = {}
        for name, node in self.cluster.nodes.items():
            if node.alive:
                workers = {str(s["name"]): int(s["pid"]) for s in self.cluster.statuses(name)}
                if node.pid not in workers.values():
                    found[name] = node.pid
                found |= workers
        return found

    def memory(self, node: str) -> int:
        """Octets that a node's worker processes have for themselves."""
        return sum(memory(int(status["pid"])) for status in self.cluster.statuses(node))

    def stores(self) -> list[Path]:
        return [self.cluster.config(name).backend.store for name in self.backends]  # type: ignore[union-attr]

    def reconfigure(self, node: str, *changes: tuple[str, str]) -> None:
        """Change a node's configuration file (old text, new text) and start it again."""
        path = self.cluster.node(node).config
        text = path.read_text()
        for old, new in changes:
            assert old in text, f"{old!r} is not in {path}"
            text = text.replace(old, new)
        path.write_text(text)
        self.cluster.restart(node)

    # -- leaks ----------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        topology = self.cluster.topology
        roles = ["client", "switch", *self.nodes]
        return Snapshot.take(
            self.cluster.name,
            self.pids(),
            {role: topology.namespace(role) for role in roles},
            self.rules(),
            self.stores(),
            [node.relay_endpoint for node in self.placement.nodes],
            sum(status["relaying"]["idle"] for status in self.statuses()),
        )

    def statuses(self) -> list[dict[str, Any]]:
        """What each worker of the frontends and backends tells."""
        return [status for node in self.nodes for status in self.cluster.statuses(node)]

    def assert_clean(
        self, before: Snapshot, timeout: float = 5.0, *, closed_by_backend: int = 0
    ) -> None:
        """Nothing may be left that was not there before.

        But for the rules of connections that a backend has closed first: they stay for TIME_WAIT.
        And for connections between nodes that are kept for the next request to be relayed.
        """
        if closed_by_backend:
            before.counts["rules"] += closed_by_backend
        left, details = settle(before, self.snapshot, timeout)
        assert left == {}, details

    def no_unexpected_errors(self) -> list[str]:
        """Lines of the logs that tell of faults in Prism itself."""
        bad = []
        for name, node in self.cluster.nodes.items():
            for line in node.log.read_text(errors="replace").splitlines():
                if '"level": "error"' in line or '"critical"' in line or "Traceback" in line:
                    bad.append(f"{name}: {line[:2000]}")
        return bad


def flat(value: Any) -> int | float:
    """A counter's sum over its labels."""
    return sum(value.values()) if isinstance(value, dict) else value


def _add(total: dict[str, Any], more: dict[str, Any]) -> None:
    for name, value in more.items():
        if isinstance(value, dict):
            _add(total.setdefault(name, {}), value)
        elif isinstance(value, int | float):
            total[name] = total.get(name, 0) + value


@contextlib.contextmanager
def bed(**options: Any) -> Iterator[Bed]:
    """Bring a cluster of an unused name up, and down again; its logs must tell of no faults."""
    options.setdefault("backends", 3)
    options.setdefault("switch", os.environ.get("PRISM_E2E_SWITCH", "ebpf"))
    cluster = Cluster(f"e2e-{uuid.uuid4().hex[:6]}", **options)
    pids: dict[str, int] = {}
    try:
        with cluster:
            found = Bed(cluster)
            pids |= found.pids()
            yield found
    finally:
        cluster.dir.with_name(f"{cluster.name}.lock").unlink(missing_ok=True)
        assert remains(cluster, pids.values()) == []


def remains(cluster: Cluster, pids: Iterable[int]) -> list[str]:
    """What a cluster that was taken down has left on the machine."""
    left = [str(path) for path in Path("/run/netns").glob(f"{cluster.name}-*")]
    left += [line for line in Path("/proc/mounts").read_text().splitlines() if cluster.name in line]
    left += [f"process {pid}" for pid in pids if Path(f"/proc/{pid}").exists()]
    if cluster.dir.exists():
        left.append(str(cluster.dir))
    return left


def wait_for(condition: Callable[[], Any], timeout: float = 5.0, pause: float = 0.02) -> Any:
    """Wait until a condition holds; its last value, true or not."""
    deadline = time.monotonic() + timeout
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(pause)
    return value


def together(calls: list[Callable[[], Any]]) -> list[Any]:
    """Run calls at the same time; their results in order. Raises what the first of them raised."""
    with ThreadPoolExecutor(max_workers=len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]
