"""``prism-proxy pki``: the cluster's certificates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from prism.tls.pki import Issued

__all__ = ["pki"]

_directory = click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
_force = click.option("--force", is_flag=True, help="Replace what is there.")


@click.group()
def pki() -> None:
    """Make and show the certificates that nodes know each other by."""


@pki.command()
@_directory
@click.option("--days", default=3650, show_default=True, type=click.IntRange(1, 36500))
@_force
def init(directory: Path, days: int, force: bool) -> None:
    """Make a cluster CA in DIRECTORY: ca.pem for every node, ca.key for nobody but this host."""
    from prism.tls import pki as made  # noqa: PLC0415

    _tell(made.init(directory, days=days, force=force))


@pki.command()
@_directory
@click.argument("name")
@click.option("--address", "addresses", multiple=True, metavar="IP", help="IP address; repeatable.")
@click.option("--dns", multiple=True, metavar="NAME", help="DNS name; repeatable.")
@click.option("--server", is_flag=True, help="For a service (HTTPS), not for a node.")
@click.option("--days", default=365, show_default=True, type=click.IntRange(1, 36500))
@_force
def issue(  # noqa: PLR0917
    directory: Path,
    name: str,
    addresses: tuple[str, ...],
    dns: tuple[str, ...],
    server: bool,
    days: int,
    force: bool,
) -> None:
    """Issue a certificate to the node NAME (such as be1), signed by the CA in DIRECTORY."""
    from prism.tls import pki as made  # noqa: PLC0415

    request = made.Request(name, server, dns, addresses, days)
    _tell(made.issue(directory, request, force=force))


@pki.command()
@click.argument("path", type=click.Path(path_type=Path))
def show(path: Path) -> None:
    """Print what a certificate, or each one in a directory, says."""
    from prism.tls import pki as made  # noqa: PLC0415

    for line in made.describe(path):
        click.echo(line)


def _tell(issued: Issued) -> None:
    verb = "made" if issued.fresh else "left as they are:"
    until = f"{issued.not_after:%Y-%m-%d}"
    click.echo(f"{verb} {issued.certificate} and {issued.key}, good until {until}")
