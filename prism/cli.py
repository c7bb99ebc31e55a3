"""``prism-proxy``: thin shells over the library.

Exit codes: 0 all is well; 1 it is not, and a line on stderr says why; 2 the command line or the
configuration cannot be used.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from prism._version import __version__
from prism.commands.drain import drain
from prism.commands.kmod import kmod
from prism.commands.lab import lab
from prism.commands.options import config_file
from prism.commands.pki import pki
from prism.commands.policy import reload, route
from prism.errors import ConfigError, PrismError

__all__ = ["cli", "main"]

_config_option = config_file(required=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="prism-proxy", message="%(prog)s %(version)s")
def cli() -> None:
    """An HTTP proxy that hands live connections over to the backends."""


@cli.command()
@_config_option
def frontend(path: Path) -> None:
    """Accept clients' connections and hand them to the backends."""
    from prism.config import load  # noqa: PLC0415
    from prism.frontend import run  # noqa: PLC0415

    config = load(path)
    if config.frontend is None:
        raise ConfigError(f"{path}: has no [frontend] section")
    sys.exit(run(config))


@cli.command()
@_config_option
@click.option("--app", metavar="MODULE:ATTR", help="Serve this ASGI application (backend.app).")
@click.option(
    "--upstream", metavar="URL", help="Serve what this server answers (backend.upstream)."
)
def backend(path: Path, app: str | None, upstream: str | None) -> None:
    """Take connections over and answer their requests."""
    from prism.backend import run  # noqa: PLC0415
    from prism.config import load, serving  # noqa: PLC0415

    config = load(path)
    if config.backend is None:
        raise ConfigError(f"{path}: has no [backend] section")
    sys.exit(run(serving(config, app, upstream)))


@cli.group(invoke_without_command=True, subcommand_metavar="[rules]")
@config_file(required=False)
@click.option("--remove", is_flag=True, help="Take it away instead, with all its rules.")
@click.pass_context
def switch(context: click.Context, path: Path | None, remove: bool) -> None:
    """Load the switch's data plane and look after it; it stays when this process ends."""
    if context.invoked_subcommand is not None:
        if path is not None or remove:
            raise click.UsageError(f"options go behind {context.invoked_subcommand!r}", context)
        return
    if path is None:
        raise click.UsageError("Missing option '-c' / '--config'.", context)
    from prism.config import load  # noqa: PLC0415
    from prism.switch.run import remove as remove_switch  # noqa: PLC0415
    from prism.switch.run import run  # noqa: PLC0415

    config = load(path)
    if config.switch is None:
        raise ConfigError(f"{path}: has no [switch] section")
    if remove:
        remove_switch(config)
        return
    sys.exit(run(config))


@switch.command()
@_config_option
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def rules(path: Path, as_json: bool) -> None:
    """List the rules that the data plane has: flow, owner, state, generation and packets."""
    from prism.commands.rules import show  # noqa: PLC0415
    from prism.config import load  # noqa: PLC0415

    config = load(path)
    if config.switch is None:
        raise ConfigError(f"{path}: has no [switch] section")
    show(config, config.switch, as_json)


@cli.command()
@_config_option
def check(path: Path) -> None:
    """Validate a configuration file and say which roles it serves."""
    from prism.config import load  # noqa: PLC0415
    from prism.policy.engine import Policy  # noqa: PLC0415
    from prism.pools import Pools  # noqa: PLC0415

    config = load(path)
    Policy(config.policy)  # loads the routing function, too
    if config.nodes:
        Pools(config)  # and functions that place
    roles = [role for role in ("frontend", "backend", "switch") if getattr(config, role)]
    click.echo(f"{path}: good; roles: {', '.join(roles) or 'none'}; nodes: {len(config.nodes)}")


@cli.command()
@_config_option
def status(path: Path) -> None:
    """Show, as JSON, what the running processes of a configuration file tell."""
    from prism.config import load  # noqa: PLC0415
    from prism.telemetry.status import read_status  # noqa: PLC0415

    config = load(path)
    if config.telemetry.status_socket is None:
        raise ConfigError(f"{path}: telemetry.status_socket is not set")
    documents: dict[str, Any] = {}
    for role in (config.frontend, config.backend):
        for worker in range(role.workers) if role else ():
            socket = config.telemetry.status_path(worker)
            if role and socket:
                documents[role.worker_name(worker)] = read_status(socket)
    if config.switch is not None:
        documents["switch"] = read_status(config.telemetry.status_socket)
    click.echo(json.dumps(documents, indent=2))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def doctor(as_json: bool) -> None:
    """Try everything Prism needs of this machine; say what is missing and how to mend it."""
    from prism.commands.doctor import show  # noqa: PLC0415

    sys.exit(show(as_json))


cli.add_command(drain)
cli.add_command(kmod)
cli.add_command(lab)
cli.add_command(pki)
cli.add_command(reload)
cli.add_command(route)


def main(arguments: list[str] | None = None) -> None:
    """Run ``prism-proxy`` and exit."""
    try:
        code = cli.main(arguments, prog_name="prism-proxy", standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except ConfigError as error:
        click.echo(f"prism-proxy: {error}", err=True)
        sys.exit(2)
    except PrismError as error:
        click.echo(f"prism-proxy: {error}", err=True)
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)
