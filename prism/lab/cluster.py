"""A cluster in the lab: real processes in the namespaces of :mod:`prism.lab.topology`.

Everything a lab has outside its namespaces is below ``/run/prism-lab/NAME/``: the state file,
cluster key, configuration and log of each process, status sockets, a bpffs and the stores.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from prism.config import Config, load
from prism.errors import ConfigError, PrismError
from prism.lab import files, report
from prism.lab.certificates import ca_file, make_node_certificates, make_service_certificate
from prism.lab.netns import Namespace
from prism.lab.servers import start_servers
from prism.lab.settings import settings_of
from prism.lab.topology import Topology, check_name, namespaces_of, parse_rate, remove_all
from prism.process import start_time
from prism.telemetry.status import read_status

__all__ = ["Cluster", "Node", "Options"]

_READY_PATIENCE = 20.0
_STOP_PATIENCE = 8.0
_LINK_PATIENCE = 2.0
_POLL = 0.02


@dataclass(frozen=True, slots=True)
class Options:
    """What a lab is made of; the options of ``prism-proxy lab up``.

    Attributes:
        backends, frontends: how many of each.
        workers: worker processes of each node.
        rate: of each node's link, each way, such as ``200mbit``; ``None``: unlimited.
        switch: ``ebpf``, or ``p4runtime``: an agent that drives a switch over P4Runtime.
        p4runtime_address: of that switch, as the lab's switch namespace reaches it; ``None``:
            the soft switch, a process of its own (node ``plane``).
        lock: ``hold`` or ``drop``.
        store: directory with one object store for each backend; ``None``: a temporary one.
        placement: name of the placement.
        replicas: copies of each object, with the placement ``replicated``.
        settings: further settings, ``{"frontend.handoff": "never"}``.
        trace: whether the nodes log each handoff step by step.
        app: ASGI application that the backends serve, found in the working directory.
        upstream: shell command of a server to run beside each backend, which it serves; see
            :mod:`prism.lab.servers`.
        tls: whether HTTPS is served on port 443, beside plain HTTP on port 80.
    """

    backends: int = 2
    frontends: int = 1
    workers: int = 1
    rate: str | None = None
    switch: str = "ebpf"
    lock: str = "hold"
    store: Path | None = None
    placement: str = "partitioned"
    replicas: int = 2
    settings: Mapping[str, Any] = field(default_factory=dict)
    trace: bool = True
    tls: bool = False
    app: str | None = None
    upstream: str | None = None
    p4runtime_address: str | None = None


@dataclass(slots=True)
class Node:
    """One process of the cluster.

    Attributes:
        name: ``switch``, ``fe1``, ``be2``...
        role: ``switch``, ``frontend`` or ``backend``.
        pid: of the process that ``lab up`` started, the supervisor where there are workers.
        started: its start time, which with the pid names it for good.
    """

    name: str
    role: str
    namespace: str
    address: str
    config: Path
    log: Path
    pid: int = 0
    started: int | None = None
    process: subprocess.Popen[bytes] | None = None

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        if self.process is not None and self.process.poll() is not None:
            return False
        return self.pid != 0 and start_time(self.pid) == self.started


class Cluster:
    """A running lab; a context manager that brings it up and takes it down.

    Args:
        name: prefix of its namespaces; two labs at a time need two names.
        options: what it is made of; or give the options as keywords.

    Raises:
        ConfigError: options that cannot be.
    """

    def __init__(
        self, name: str = "prism", options: Options | None = None, **keywords: Any
    ) -> None:
        check_name(name)
        self.name = name
        self.options = options or Options(**keywords)
        if self.options.app and self.options.upstream:
            raise ConfigError("--app and --upstream exclude each other: the backends serve one")
        self.dir = files.directory(name)
        rate = parse_rate(self.options.rate) if self.options.rate else None
        self.topology = Topology(
            name, backends=self.options.backends, frontends=self.options.frontends, rate=rate
        )
        self.nodes: dict[str, Node] = {}
        self.servers: list[subprocess.Popen[bytes]] = []
        self.keeper = False  # whether "lab down" shall stop this very process first

    @classmethod
    def attach(cls, name: str = "prism") -> Cluster:
        """The lab that runs under this name, started by whomever.

        Raises:
            PrismError: there is none.
        """
        state = files.read_state(name)
        if state is None:
            raise PrismError(f"lab {name} is not up; start it with: prism-proxy lab up")
        options = state["options"]
        store = options.pop("store")
        cluster = cls(name, Options(**options, store=Path(store) if store else None))
        for entry in state["nodes"]:
            entry |= {key: Path(entry[key]) for key in ("config", "log")}
            cluster.nodes[entry["name"]] = Node(**entry)
        return cluster

    # -- life -----------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.down()

    def up(self) -> None:
        """Build the network and start the processes; on failure nothing is left.

        Raises:
            ConfigError: settings the processes' configuration does not know.
            PrismError: the lab is up already, or a process did not become ready in 20 s (the
                message ends with the last lines of its log).
        """
        with files.locked(self.name):
            if files.read_state(self.name) is not None or namespaces_of(self.name):
                if self._anything_alive():
                    raise PrismError(
                        f"lab {self.name} is up already; take it down with: "
                        f"prism-proxy lab down --name {self.name}"
                    )
                self._clean()  # what a crash left behind
            try:
                self._prepare()
                self.topology.build()
                self.servers = start_servers(self)
                self._start_all()
            except BaseException:
                self._clean()
                raise

    def down(self) -> None:
        """Stop and remove everything, also after a crash or half an ``up``. Idempotent."""
        for node in self.nodes.values():
            if node.alive:
                os.kill(node.pid, signal.SIGTERM)
        deadline = time.monotonic() + _STOP_PATIENCE
        while any(node.alive for node in self.nodes.values()) and time.monotonic() < deadline:
            time.sleep(_POLL)
        self._clean()

    @classmethod
    def remove(cls, name: str = "prism") -> bool:
        """Take down whatever there is of a lab of this name; whether there was anything.

        A ``lab up`` in the foreground of another terminal is told to stop first.
        """
        check_name(name)
        found = files.directory(name).exists() or bool(namespaces_of(name))
        state = files.read_state(name)
        if state is not None:
            _stop_keeper(state.get("keeper", 0), state.get("keeper_started"))
            with contextlib.suppress(PrismError, TypeError, KeyError):
                cls.attach(name).down()
        remove_all(name)
        files.remove(name)
        return found

    def _anything_alive(self) -> bool:
        state = files.read_state(self.name)
        entries = state["nodes"] if state else []
        return any(
            entry["pid"] and start_time(entry["pid"]) == entry["started"] for entry in entries
        )

    def _clean(self) -> None:
        remove_all(self.name)
        for node in self.nodes.values():
            if node.process is not None:
                node.process.wait()
        for server in self.servers:
            server.wait()
        self.servers.clear()
        self.nodes.clear()
        files.remove(self.name)

    # -- starting -------------------------------------------------------------------------------

    def _prepare(self) -> None:
        files.create(self.name)
        (self.dir / "cluster.key").touch(mode=0o600)
        (self.dir / "cluster.key").write_text(secrets.token_hex(32) + "\n")
        place = (self.topology.switch.name, self.topology.control.host)
        if self.options.switch == "p4runtime" and self.options.p4runtime_address is None:
            self._add("plane", "switch", *place)
        self._add("switch", "switch", *place)
        for role, sites in (
            ("frontend", self.topology.frontends),
            ("backend", self.topology.backends),
        ):
            for site in sites:
                self._add(site.role, role, site.namespace.name, site.address)
        make_node_certificates(self.dir, [site.role for site in self.topology.nodes])
        if self.options.tls:
            make_service_certificate(self.dir, self.topology.services(443))
        for node in self.nodes.values():
            files.write_toml(node.config, settings_of(self, node))
            load(node.config)

    def _add(self, name: str, role: str, namespace: str, address: str) -> None:
        config, log = self.dir / f"conf/{name}.toml", self.dir / f"log/{name}.log"
        self.nodes[name] = Node(name, role, namespace, address, config, log)

    def _start_all(self) -> None:
        """The switch first, since nodes register with it; then all others at once."""
        for node in self.nodes.values():
            if node.role == "switch":
                self._start(node)
                self._write_state()
                self._wait_ready([node])
        others = [node for node in self.nodes.values() if node.role != "switch"]
        for node in others:
            self._start(node)
        self._write_state()
        self._wait_ready(others)

    def _start(self, node: Node) -> None:
        command = [sys.executable, "-m", "prism", node.role, "-c", str(node.config)]
        with node.log.open("ab") as log:
            node.process = Namespace(node.namespace).popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,
            )
        node.pid = node.process.pid
        node.started = start_time(node.pid)

    def _wait_ready(self, nodes: Sequence[Node], *, linked: bool = True) -> None:
        deadline = time.monotonic() + _READY_PATIENCE
        for node in nodes:
            while not self._ready(node, linked=linked):
                if not node.alive:
                    raise PrismError(f"{node.name} ended while starting:\n{files.tail(node.log)}")
                if time.monotonic() > deadline:
                    raise PrismError(f"{node.name} does not get ready:\n{files.tail(node.log)}")
                time.sleep(_POLL)

    def _ready(self, node: Node, *, linked: bool = True) -> bool:
        """Whether all workers answer and, with ``linked``, have links to all nodes that run."""
        for path in self.status_sockets(node.name):
            try:
                status = read_status(path, timeout=1.0)
            except PrismError:
                return False
            if linked and status.get("replication", {}).get("state", "serving") != "serving":
                return False
            for peer, usable in status.get("peers", {}).items() if linked else ():
                there = self.nodes.get(peer.partition("/")[0])
                if not usable and there is not None and there.alive:
                    return False
        return True

    def _wait_linked(self) -> None:
        """Give all a moment for the links to and from a node that has come back."""
        deadline = time.monotonic() + _LINK_PATIENCE
        others = [node for node in self.nodes.values() if node.alive]
        while time.monotonic() < deadline and not all(self._ready(node) for node in others):
            time.sleep(_POLL)

    def _write_state(self) -> None:
        files.write_state(self.name, self.options, list(self.nodes.values()), keeper=self.keeper)

    # -- use ------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """The service's base URL, IPv4; ``https://`` in a lab with TLS."""
        return self._url(0)

    @property
    def url6(self) -> str:
        """The service's base URL, IPv6."""
        return self._url(1)

    @property
    def ca_file(self) -> Path | None:
        """What a client has to trust (``curl --cacert``); ``None`` without TLS."""
        return ca_file(self.dir) if self.options.tls else None

    def _url(self, family: int) -> str:
        service = self.topology.services(80)[family]
        scheme = "https" if self.options.tls else "http"
        return f"{scheme}://{f'[{service.host}]' if family else service.host}"

    def node(self, name: str) -> Node:
        """One of the cluster's processes: ``switch``, ``fe1``, ``be1``...

        Raises:
            ConfigError: there is none of this name.
        """
        if name not in self.nodes:
            raise ConfigError(f"no node {name!r}; there are: {', '.join(self.nodes)}")
        return self.nodes[name]

    def config(self, name: str) -> Config:
        """The configuration a process runs with."""
        return load(self.node(name).config)

    def exec(
        self, role: str, arguments: Sequence[str], **options: Any
    ) -> subprocess.CompletedProcess[Any]:
        """Run a program in a role's namespace; ``options`` as for :func:`subprocess.run`."""
        return self.topology.namespace(role).run(arguments, **options)

    def popen(self, role: str, arguments: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a program in a role's namespace; ``options`` as for :class:`subprocess.Popen`."""
        return self.topology.namespace(role).popen(arguments, **options)

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to a process of the cluster and all its workers."""
        node = self.node(name)
        if not node.alive:
            raise PrismError(f"{name} does not run")
        # Each was started as the leader of a session of its own.
        os.killpg(node.pid, number)
        if number in (signal.SIGKILL, signal.SIGTERM):
            deadline = time.monotonic() + _STOP_PATIENCE
            while node.alive and time.monotonic() < deadline:
                time.sleep(_POLL)

    def restart(self, name: str) -> None:
        """Start a process again, stopping it first where it runs; waits until it is ready.

        Raises:
            PrismError: it does not get ready.
        """
        node = self.node(name)
        if node.alive:
            self.kill(name, signal.SIGTERM)
        if node.process is not None:
            node.process.wait()
        self._start(node)
        self._write_state()
        self._wait_ready([node], linked=False)
        self._wait_linked()

    def status_sockets(self, name: str) -> list[Path]:
        """The status sockets of a process's workers."""
        node = self.node(name)
        base = self.dir / f"run/{name}.sock"
        if node.role == "switch":
            return [base]
        return [base.with_name(f"{name}-{i}.sock") for i in range(self.options.workers)]

    def statuses(self, name: str) -> list[dict[str, Any]]:
        """What each worker of a process tells; nothing of those that do not answer."""
        found = []
        for path in self.status_sockets(name):
            with contextlib.suppress(PrismError):
                found.append(read_status(path))
        return found

    def status(self) -> dict[str, Any]:
        """The document of ``lab status --json``: url, nodes, rules, counters."""
        return report.status(self)


def _stop_keeper(pid: int, started: int | None) -> None:
    """Ask the ``lab up`` that stays in the foreground to end; not if it is this very process."""
    if not pid or pid == os.getpid() or started is None or start_time(pid) != started:
        return
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 2 * _STOP_PATIENCE
    while start_time(pid) == started and time.monotonic() < deadline:
        time.sleep(_POLL)
