"""Loading the functions that an operator's configuration names."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prism.errors import ConfigError

__all__ = ["load_function"]


def load_function(key: str, reference: str, directory: Path | None = None) -> Callable[..., Any]:
    """The function that ``module:attribute`` names, found in ``directory``, too.

    Args:
        key: of the configuration, for errors.
        reference: to the function.
        directory: is imported from before all others.

    Raises:
        ConfigError: it cannot be imported, or called.
    """
    module, _, attribute = reference.partition(":")
    if directory is not None and str(directory) not in sys.path:
        sys.path.insert(0, str(directory))
    try:
        found: object = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:
        raise ConfigError(f"{key}: {reference} cannot be imported: {error}") from None
    if not callable(found):
        raise ConfigError(f"{key}: {reference} is not a function")
    return found
