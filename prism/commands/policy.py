"""``prism-proxy route`` and ``prism-proxy reload``: what a policy says, and applying a new one."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from urllib.parse import urlsplit

import click

from prism.commands.options import config_file
from prism.errors import ConfigError, PrismError

__all__ = ["reload", "route"]

_PATIENCE = 10.0  # seconds


@click.command()
@config_file(required=True)
@click.argument("method")
@click.argument("url")
@click.option("-H", "--header", "fields", multiple=True, metavar="NAME: VALUE", help="Repeatable.")
@click.option("--client", default="192.0.2.1", show_default=True, help="Address of the client.")
@click.option("--sni", default="", help="Name asked for in the TLS handshake; default: the host.")
@click.option("--certificate", default="", help="Subject of the verified client certificate.")
def route(  # noqa: PLR0917
    path: Path,
    method: str,
    url: str,
    fields: tuple[str, ...],
    client: str,
    sni: str,
    certificate: str,
) -> None:
    """Explain which rule of the policy decides about a request, and where it would go."""
    from prism.config import load  # noqa: PLC0415
    from prism.http.head import HttpError, parse_head  # noqa: PLC0415
    from prism.policy.engine import Policy  # noqa: PLC0415
    from prism.pools import Pools  # noqa: PLC0415
    from prism.tls.peer import Peer, pack_peer  # noqa: PLC0415

    config = load(path)
    parts = urlsplit(url)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    lines = [f"{method} {target} HTTP/1.1", f"Host: {parts.netloc or 'localhost'}", *fields]
    try:
        head = parse_head("\r\n".join((*lines, "", "")).encode("utf-8", "surrogateescape"))
    except HttpError as error:
        raise PrismError(f"no node takes this request: {error}") from None
    if head is None:
        raise PrismError("this is no whole request head: check METHOD, URL and -H")
    peer = Peer()
    if parts.scheme == "https":
        name = sni or (parts.hostname or "")
        peer = Peer(name, certificate, (), "given" if certificate else "")
    steps, decision = Policy(config.policy).explain(head, client, pack_peer(peer))
    for step in steps:
        because = f": {step.holds}" if step.holds else ""
        verdict = f"no:   {step.fails}" if step.fails else f"decides{because}"
        click.echo(f"  {step.rule:24s} {verdict}")
    if not steps or steps[-1].fails:
        click.echo(f"  {'default':24s} decides: no rule does")
    click.echo(f"action: {decision.action.value}")
    if decision.answer is not None:
        click.echo(f"status: {decision.answer.status}")
        return
    if config.nodes:
        pool = Pools(config).get(decision.pool, decision.placement)
        chosen = pool.placement.choose(head.key.decode("utf-8", "surrogateescape"))
        sure = "" if pool.placement.keyed else " (or another of the pool)"
        click.echo(f"pool:   {decision.pool or 'all nodes'}; backend: {chosen.name}{sure}")


@click.command()
@config_file(required=True)
def reload(path: Path) -> None:
    """Have the running processes of a configuration file apply it; nothing is dropped."""
    from prism.config import load  # noqa: PLC0415
    from prism.policy.engine import Policy  # noqa: PLC0415
    from prism.telemetry.status import read_status  # noqa: PLC0415

    config = load(path)
    Policy(config.policy)
    if config.telemetry.status_socket is None:
        raise ConfigError(
            f"{path}: telemetry.status_socket is not set, so its processes cannot be found; "
            "send them SIGHUP"
        )
    failed = []
    for role in (config.frontend, config.backend):
        for worker in range(role.workers) if role else ():
            socket = config.telemetry.status_path(worker)
            if role is None or socket is None:
                continue
            before = read_status(socket)
            os.kill(before["pid"], signal.SIGHUP)
            if _wait(socket, before["reloads"]):
                click.echo(f"{role.worker_name(worker)}: reloaded")
            else:
                failed.append(role.worker_name(worker))
    if failed:
        raise PrismError(f"not reloaded: {', '.join(failed)}; their logs say why")


def _wait(socket: Path, before: dict[str, int]) -> bool:
    """Until a process has applied or refused its file; whether it has applied it."""
    from prism.telemetry.status import read_status  # noqa: PLC0415

    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        now = read_status(socket)["reloads"]
        if now != before:
            return bool(now["refused"] == before["refused"])
        time.sleep(0.02)
    return False
