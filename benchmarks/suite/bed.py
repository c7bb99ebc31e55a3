"""The bed: one lab with Prism in it, and the rivals beside it on the same links."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from naming import lab_name

from prism.lab.cluster import Cluster
from prism.lab.netns import Namespace
from prism.placement import placement_from

from . import rivals
from .account import Account, Usage
from .load import Load, Sample, drive

__all__ = ["RATE", "Bed", "Measured"]

RATE = "200mbit"
_PATTERN = os.urandom(1 << 20)
# HTTP and HTTPS ports of the rivals, on the service's address.
_PORTS = {"nginx": (8080, 8440), "haproxy": (8081, 8441), "nginx-store": (8082, 8442)}


_WARM = 1.5  # seconds at either end of a run of uploads that are not measured
_MOST_KEYS, _FEWEST_KEYS = 64, 16  # of one size
_HELD = 256 << 20  # octets of one size's objects, if that is not fewer than the fewest


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of one system.

    Attributes:
        sample: what the client saw.
        usage: what the machine spent meanwhile.
        frontend: seconds of the system's frontend processes, of ``usage``.
        backends: seconds of all its backend processes.
        counters: how Prism's own counters moved; empty for a rival.
        seconds: how long it was measured.
        octets: delivered in a second: of a GET what the client has read; of a PUT what has come to
            the backends and stayed there, by their links, since bodies that are not complete at
            the end count, too, but neither what was lost on the way nor what is only passed on.
    """

    sample: Sample
    usage: Usage
    frontend: float
    backends: float
    counters: dict[str, int]
    seconds: float
    octets: float


class Bed:
    """A lab with rivals; a context manager.

    Systems, the names :meth:`run` takes: ``prism``; ``nginx`` and ``haproxy``, each before nginx
    file servers; ``nginx-store``, which is nginx before the Prism stores; ``direct``, the
    backends' file servers asked without anything in between (one of them: the first).

    Args:
        backends: how many.
        tls: whether the lab serves HTTPS too (on both ports all systems serve both).
        rivals_wanted: which rivals are started.
        rate: of each link but the client's.
        settings: of Prism's nodes, as for ``lab up --set``; what pays is handed over unless they
            say otherwise, as it is outside the lab.
        options: further options of the lab.
    """

    def __init__(
        self,
        backends: int = 4,
        *,
        rivals_wanted: Iterable[str] = ("nginx",),
        rate: str | None = RATE,
        settings: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.rivals = tuple(rivals_wanted)
        # In memory, so that no disk is measured; on both sides alike.
        name = lab_name()
        self.dir = Path(tempfile.mkdtemp(prefix=f"prism-{name}-", dir="/dev/shm"))
        options.setdefault("trace", False)
        self.cluster = Cluster(
            name,
            backends=backends,
            rate=rate,
            tls=True,
            store=self.dir / "store",
            settings={"frontend.handoff": "adaptive"} | dict(settings or {}),
            **options,
        )
        self._stack = contextlib.ExitStack()
        self._sessions: dict[str, int] = {}
        self._places: dict[str, str] = {}

    def __enter__(self) -> Self:
        try:
            self._stack.callback(shutil.rmtree, self.dir, ignore_errors=True)
            lock = self.cluster.dir.with_name(f"{self.cluster.name}.lock")
            self._stack.callback(lock.unlink, missing_ok=True)
            self._stack.enter_context(self.cluster)
            self._sessions = {name: node.pid for name, node in self.cluster.nodes.items()}
            self._start_origins()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    # -- preparing ------------------------------------------------------------------------------

    @property
    def client(self) -> Namespace:
        """Where the load comes from."""
        return self.cluster.topology.client.namespace

    @property
    def service(self) -> str:
        """The service's IPv4 address."""
        return self.cluster.topology.services(80)[0].host

    def _start_origins(self) -> None:
        root = self.dir / "origin"
        (root / ".body").mkdir(parents=True)
        for site in self.cluster.topology.backends:
            process = rivals.origin(
                site.namespace, site.address, root, self.dir / f"nginx-{site.role}"
            )
            running = self._stack.enter_context(process)
            self._sessions[f"origin-{site.role}"] = running.session

    def _start_rival(self, name: str) -> None:
        site = self.cluster.topology.frontends[0]
        start = rivals.haproxy if name == "haproxy" else rivals.nginx
        to_store = name.endswith("-store")
        nodes = self.cluster.config("fe1").nodes
        servers = {
            node.name: f"{node.address}:{node.relay_port if to_store else rivals.ORIGIN_PORT}"
            for node in nodes
        }
        tls = self.cluster.dir / "tls"
        process = start(
            site.namespace,
            self.service,
            _PORTS[name],
            servers,
            self._places if to_store and self.cluster.options.placement == "partitioned" else {},
            (tls / "service.pem", tls / "service.key"),
            self.dir / name,
        )
        self._sessions[name] = self._stack.enter_context(process).session

    def keys(self, size: int) -> list[str]:
        """Request targets of the objects of this size, the same number at each backend.

        A few dozen keys by their hashes are spread unevenly, and the fullest backend's link would
        be measured; what an uneven spread costs is an experiment of its own. 64 of them up to
        1 MiB, at most 256 MiB in all above, and a few more where the backends do not divide that.
        """
        count = max(_FEWEST_KEYS, min(_MOST_KEYS, _HELD // max(size, 1)))
        names = [site.role for site in self.cluster.topology.backends]
        room = dict.fromkeys(names, -(-count // len(names)))
        placement = placement_from(self.cluster.config("fe1"))
        found = []
        for number in itertools.count():
            path = f"/bench/{size}/{number}"
            home = placement.choose(path[1:]).name
            if room[home]:
                room[home] -= 1
                found.append(path)
            if not any(room.values()):
                break
        return found

    def fill(self, sizes: Iterable[int]) -> None:
        """Store objects of these sizes at all systems, then start the rivals.

        Straight into the stores over the backends' own ports: filling is not what is measured.
        """
        placement = placement_from(self.cluster.config("fe1"))
        store = self.dir / "origin"
        for size in sizes:
            for path in self.keys(size):
                target = store / path[1:]
                target.parent.mkdir(parents=True, exist_ok=True)
                body = (_PATTERN * (size // len(_PATTERN) + 1))[:size]
                target.write_bytes(body)
                self._places[path] = placement.choose(path[1:]).name
        self._put_all(sizes)
        for name in self.rivals:
            self._start_rival(name)

    def _put_all(self, sizes: Iterable[int]) -> None:
        """Upload by curl through the service, all files of a size in one process."""
        root = self.dir / "origin"
        for size in sizes:
            config = self.dir / "fill.curl"
            lines = []
            for path in self.keys(size):
                lines += [
                    f'upload-file = "{root / path[1:]}"',
                    f'url = "http://{self.service}{path}"',
                ]
            config.write_text("\n".join(lines) + "\n")
            command = ["curl", "-sS", "-f", "--max-time", "120", "-K", str(config)]
            self.client.run(command, capture_output=True, timeout=130).check_returncode()

    # -- measuring ------------------------------------------------------------------------------

    def url(self, system: str, *, tls: bool = False) -> str:
        """Where a system answers.

        Raises:
            KeyError: it is not on this bed.
        """
        if system == "direct":
            first = self.cluster.topology.backends[0].address
            return f"http://{first}:{rivals.ORIGIN_PORT}"
        scheme = "https" if tls else "http"
        if system == "prism":
            return f"{scheme}://{self.service}"
        return f"{scheme}://{self.service}:{_PORTS[system][tls]}"

    def run(
        self, system: str, load: Load, seconds: float, *, tls: bool = False, seed: int = 1
    ) -> Measured:
        """Let the load run against one system.

        Raises:
            PrismError: the load could not be driven.
        """
        counters = self._counters(system)
        watch = self._watch_uploads if load.method == "PUT" else self._watch
        sample, usage, octets = watch(self.url(system, tls=tls), load, seconds, seed)
        moved = {
            name: value - counters.get(name, 0) for name, value in self._counters(system).items()
        }
        return Measured(
            sample,
            usage,
            self._frontend(system, usage),
            self._backends(system, usage),
            moved,
            seconds,
            octets,
        )

    def _watch(
        self, url: str, load: Load, seconds: float, seed: int
    ) -> tuple[Sample, Usage, float]:
        """Drive the load; what the client saw, what was spent, octets a second."""
        account = Account(self.cluster.topology.switch, self._sessions)
        before = account.look()
        sample = drive(self.client, url, load, seconds, self.dir, seed=seed)
        return sample, account.look().since(before), sample.octets

    def _watch_uploads(
        self, url: str, load: Load, seconds: float, seed: int
    ) -> tuple[Sample, Usage, float]:
        """The same, by the links in the middle of a longer run: there is no end but the client's.

        wrk takes a while to prepare large bodies, and counts only uploads that are over.
        """
        account = Account(self.cluster.topology.switch, self._sessions)
        with ThreadPoolExecutor(1) as pool:
            driving = pool.submit(
                drive, self.client, url, load, seconds + 2 * _WARM, self.dir, seed=seed
            )
            time.sleep(_WARM)
            before, began = account.look(), time.monotonic()
            time.sleep(seconds)
            usage, took = account.look().since(before), time.monotonic() - began
            return driving.result(), usage, _stayed(usage) / took

    def place(self, path: str) -> str:
        """The backend that a path's object is at (the first, of several)."""
        return self._places[path]

    def _counters(self, system: str) -> dict[str, int]:
        return dict(self.cluster.status()["counters"]) if system == "prism" else {}

    def _frontend(self, system: str, usage: Usage) -> float:
        if system == "direct":
            return 0.0
        if system != "prism":
            return usage.cpu.get(system, 0.0)
        return sum(used for role, used in usage.cpu.items() if role.startswith("fe"))

    def _backends(self, system: str, usage: Usage) -> float:
        prefix = "be" if system in ("prism", "nginx-store") else "origin-"
        return sum(used for role, used in usage.cpu.items() if role.startswith(prefix))


def _stayed(usage: Usage) -> int:
    """Octets that backends have received and not sent on; of their answers little is to be seen."""
    links = [link for device, link in usage.links.items() if device.startswith("be")]
    return sum(received - sent for received, sent in links)
