"""``prism-proxy kmod``: the monitor module."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

__all__ = ["kmod"]

_kernel = click.option("--kernel", metavar="RELEASE", help="Kernel; the running one by default.")


@click.group()
def kmod() -> None:
    """Build, install and inspect the monitor module (docs/kernel.md)."""


@kmod.command()
@_kernel
@click.option(
    "--headers",
    type=click.Path(path_type=Path, file_okay=False),
    help="Its headers; /lib/modules/RELEASE/build by default.",
)
@click.option(
    "-o",
    "--output",
    default=Path(),
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory for prism_monitor.ko; the present one by default.",
)
def build(kernel: str | None, headers: Path | None, output: Path) -> None:
    """Build prism_monitor.ko; installs nothing."""
    from prism.monitor import module  # noqa: PLC0415

    click.echo(f"built {module.build(output, kernel, headers)}")


@kmod.command()
@_kernel
def install(kernel: str | None) -> None:
    """Build, install and load the module, with DKMS where it is installed (needs root)."""
    from prism.monitor import module  # noqa: PLC0415

    click.echo(module.install(kernel))


@kmod.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def status(as_json: bool) -> None:
    """Say whether the module is installed, loaded and usable."""
    from prism.monitor import module  # noqa: PLC0415

    found = module.status()
    if as_json:
        click.echo(json.dumps(asdict(found), default=str, indent=2))
        return
    click.echo(f"kernel      {found.kernel}")
    click.echo(f"headers     {found.headers or 'missing'}")
    click.echo(f"installed   {found.installed or 'no'}")
    click.echo(f"loaded      {'yes' if found.loaded else 'no'}")
    if found.info is None:
        click.echo(f"usable      no: {found.problem}")
    else:
        sees = "seen" if found.info.sees_time_wait else "not seen on this kernel"
        click.echo(f"usable      yes; the end of TIME_WAIT is {sees}; {found.info.limit} sockets")
    if found.secure_boot:
        click.echo("secure boot on: the module has to be signed")
