"""``prism-proxy lab``: a whole cluster on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from prism.errors import ConfigError

if TYPE_CHECKING:
    from prism.lab.cluster import Cluster

__all__ = ["lab"]

_name_option = click.option(
    "--name", default="prism", show_default=True, help="Prefix of the namespaces' names."
)


@click.group()
def lab() -> None:
    """A whole cluster on this machine, in network namespaces (needs root)."""


@lab.command()
@_name_option
@click.option("--backends", default=2, show_default=True, type=click.IntRange(1, 120))
@click.option("--frontends", default=1, show_default=True, type=click.IntRange(1, 80))
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1, 64))
@click.option("--rate", help="Rate of each node's link, each way, such as 200mbit.")
@click.option("--tls", is_flag=True, help="Serve HTTPS on port 443, too.")
@click.option(
    "--switch",
    "kind",
    default="ebpf",
    show_default=True,
    type=click.Choice(["ebpf", "p4runtime"]),
)
@click.option(
    "--p4runtime-address",
    metavar="HOST:PORT",
    help="With --switch p4runtime: drive this switch instead of the soft switch.",
)
@click.option("--lock", default="hold", show_default=True, type=click.Choice(["hold", "drop"]))
@click.option(
    "--store", type=click.Path(path_type=Path, file_okay=False), help="Keep objects here."
)
@click.option("--app", metavar="MODULE:ATTR", help="Backends serve this ASGI application.")
@click.option(
    "--upstream",
    metavar="CMD",
    help="Run this server beside each backend, at port $PRISM_PORT, and serve what it answers.",
)
@click.option(
    "--placement",
    default="partitioned",
    show_default=True,
    type=click.Choice(["partitioned", "round-robin", "least-connections", "replicated"]),
)
@click.option(
    "--replicas",
    default=2,
    show_default=True,
    type=click.IntRange(2, 16),
    help="With --placement replicated: backends that have a copy of each object.",
)
@click.option("--set", "settings", multiple=True, metavar="SECTION.KEY=VALUE", help="Any setting.")
@click.option("--detach", is_flag=True, help="Leave it running; end it with: lab down.")
def up(
    name: str,
    kind: str,
    settings: tuple[str, ...],
    detach: bool,
    **options: Any,
) -> None:
    """Bring a cluster up; without --detach, until Ctrl-C."""
    from prism.lab.cluster import Cluster, Options  # noqa: PLC0415

    if options["p4runtime_address"] and kind != "p4runtime":
        raise ConfigError("lab up --p4runtime-address goes with --switch p4runtime")
    chosen = Options(switch=kind, settings=_settings(settings), **options)
    cluster = Cluster(name, chosen)
    cluster.keeper = not detach
    with _interruptible() as interrupts:
        ready = False
        try:
            cluster.up()
            interrupts.check()
            ready = True
            _announce(cluster, detach)
            if not detach:
                _watch(cluster, interrupts)
        except KeyboardInterrupt:
            if not ready:
                raise click.Abort from None
            click.echo(f"taking lab {name} down", err=True)
        finally:
            interrupts.enough = True  # an impatient second Ctrl-C must not leave half of it
            if cluster.nodes and not (detach and ready):  # none: it was refused, or cleaned up
                cluster.down()


class _Interrupts:
    """What has become of interrupts.

    Attributes:
        enough: whether further ones are of no interest.
    """

    def __init__(self) -> None:
        self.enough = False
        self._came = False

    def arrive(self) -> None:
        """One has come: raise :class:`KeyboardInterrupt`, unless there were enough."""
        if not self.enough:
            self._came = True
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raise it again where it was lost: Python ignores what is raised in a destructor."""
        if self._came:
            raise KeyboardInterrupt


@contextlib.contextmanager
def _interruptible() -> Iterator[_Interrupts]:
    """Make SIGTERM and SIGHUP interrupt as Ctrl-C does, until there were enough."""
    interrupts = _Interrupts()
    owner = os.getpid()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            # The netlink library forks helpers and ends them by SIGTERM: one that unwound this
            # process's stack would take the lab down while it is being built.
            os._exit(128 + number)
        interrupts.arrive()

    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    previous = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield interrupts
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _watch(cluster: Cluster, interrupts: _Interrupts) -> NoReturn:
    """Until interrupted; says so when a process ends by itself."""
    dead: set[str] = set()
    while True:
        time.sleep(0.2)
        interrupts.check()
        for name, node in cluster.nodes.items():
            if node.alive:
                dead.discard(name)
            elif name not in dead:
                dead.add(name)
                click.echo(f"{name} has ended; its log: {node.log}", err=True)


def _announce(cluster: Cluster, detached: bool) -> None:
    suffix = "" if cluster.name == "prism" else f" --name {cluster.name}"
    click.echo(f"lab {cluster.name} is up: {', '.join(cluster.nodes)}; service: {cluster.url}")
    trust = f"--cacert {cluster.ca_file} " if cluster.ca_file else ""
    click.echo(f"  try:  prism-proxy lab exec{suffix} client -- curl -s {trust}{cluster.url}/")
    end = f"prism-proxy lab down{suffix}" if detached else "Ctrl-C"
    click.echo(f"  logs: {cluster.dir}/log/; end it with: {end}")


def _settings(given: tuple[str, ...]) -> dict[str, Any]:
    """``section.key=value`` with a TOML value; what is none is taken as text."""
    settings: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or "." not in key:
            raise ConfigError(f"--set {text!r}: write SECTION.KEY=VALUE")
        try:
            settings[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            settings[key.strip()] = value
    return settings


@lab.command("exec", context_settings={"ignore_unknown_options": True})
@_name_option
@click.argument("role")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def exec_(name: str, role: str, command: tuple[str, ...]) -> None:
    """Run COMMAND in the namespace of ROLE: client, switch, fe1, be2..."""
    from prism.lab.cluster import Cluster  # noqa: PLC0415

    arguments = Cluster.attach(name).topology.namespace(role).command(command)
    os.execvp(arguments[0], arguments)


@lab.command()
@_name_option
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def status(name: str, as_json: bool) -> None:
    """Show nodes, rules and counters of a running lab."""
    from prism.lab.cluster import Cluster  # noqa: PLC0415

    document = Cluster.attach(name).status()
    if as_json:
        click.echo(json.dumps(document, indent=2))
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table(title=f"lab {name}: {document['url']}", title_justify="left")
    for heading in ("node", "role", "address", "namespace", "pids", "health"):
        table.add_column(heading)
    for node, entry in document["nodes"].items():
        pids = " ".join(map(str, entry["pids"])) if entry["alive"] else "[red]ended[/red]"
        table.add_row(
            node, entry["role"], entry["address"], entry["namespace"], pids, entry["health"]
        )
    console = Console()
    console.print(table)
    counters = "  ".join(f"{key} {value}" for key, value in document["counters"].items())
    console.print(f"rules {document['rules']}  {counters}")


@lab.command()
@_name_option
def down(name: str) -> None:
    """Take a lab down; removes what a crashed one left too."""
    from prism.lab.cluster import Cluster  # noqa: PLC0415

    found = Cluster.remove(name)
    click.echo(f"lab {name} is down" if found else f"there is no lab {name}")
