"""``prism-proxy drain``: empty a node without a failed request, and end it."""

from __future__ import annotations

import time
from pathlib import Path

import click

from prism.commands.options import config_file
from prism.errors import ConfigError, PrismError

__all__ = ["drain"]

_POLL = 0.1  # seconds
_SPARE = 10.0  # seconds that a process has to end when it is empty


@click.command()
@click.argument("node")
@config_file(required=False)
@click.option("--lab", default="prism", show_default=True, help="Without -c: the lab of this name.")
@click.option(
    "--timeout",
    "seconds",
    default=30.0,
    show_default=True,
    type=click.FloatRange(0, 86400),
    help="Seconds after which the node ends with what it still has.",
)
@click.option("--wait/--no-wait", default=True, help="Return when the node has ended.")
@click.option("--undo", is_flag=True, help="Have a node that is being drained stay after all.")
def drain(
    node: str, path: Path | None, lab: str, *, seconds: float, wait: bool, undo: bool
) -> None:
    """Empty NODE, which runs on this machine: no new connections, others take those it has.

    The node ends when it has none left. NODE is a frontend's or a backend's name.
    """
    from prism.telemetry.status import act  # noqa: PLC0415

    sockets = _sockets(path, lab, node)
    for name, socket in sockets.items():
        status = act(socket, "undrain" if undo else "drain", seconds)
        state = "is being drained" if status["draining"] else "is not drained"
        click.echo(f"{name}: {state}; connections: {status['counters']['connections']}")
    if undo or not wait:
        return
    deadline = time.monotonic() + seconds + _SPARE
    left = dict(sockets)
    while left and time.monotonic() < deadline:
        time.sleep(_POLL)
        for name, socket in list(left.items()):
            if not _answers(name, socket):
                click.echo(f"{name}: has ended")
                del left[name]
    if left:
        raise PrismError(f"not ended in time: {', '.join(left)}; the logs say why")


def _answers(name: str, socket: Path) -> bool:
    """Whether a worker still runs.

    Raises:
        PrismError: it is not being drained any more.
    """
    from prism.telemetry.status import read_status  # noqa: PLC0415

    try:
        status = read_status(socket)
    except PrismError:
        return socket.exists()
    if not status["draining"]:
        raise PrismError(f"{name}: the draining was undone")
    return True


def _sockets(path: Path | None, lab: str, node: str) -> dict[str, Path]:
    """The status sockets of a node's workers.

    Raises:
        ConfigError: there is no such node here.
    """
    from prism.config import load  # noqa: PLC0415
    from prism.lab.cluster import Cluster  # noqa: PLC0415

    config = load(path) if path is not None else Cluster.attach(lab).config(node)
    where = path or f"lab {lab}"
    for role in (config.frontend, config.backend):
        if role is None or role.name != node:
            continue
        found = {}
        for worker in range(role.workers):
            socket = config.telemetry.status_path(worker)
            if socket is None:
                raise ConfigError(f"{where}: telemetry.status_socket is not set")
            found[role.worker_name(worker)] = socket
        return found
    here = ", ".join(role.name for role in (config.frontend, config.backend) if role)
    raise ConfigError(f"{where}: has no frontend or backend {node!r}; it has: {here or 'none'}")
