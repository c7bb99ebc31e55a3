"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

__all__ = ["config_file"]

_Command = TypeVar("_Command", bound=Callable[..., Any])


def config_file(*, required: bool) -> Callable[[_Command], _Command]:
    """``-c FILE``, as the argument ``path``."""
    return click.option(
        "-c",
        "--config",
        "path",
        required=required,
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="Configuration file (TOML); see docs/configuration.md.",
    )
