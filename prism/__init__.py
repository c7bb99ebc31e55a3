"""Prism: an HTTP(S) proxy that hands live connections over to the backends.

What a program needs to be a part of a cluster (``docs/library.md``)::

    config = prism.load("prism.toml")
    async with prism.Frontend(config, route=my_function):
        await stop.wait()
"""

import importlib
from typing import TYPE_CHECKING

from prism._version import __version__

if TYPE_CHECKING:
    from prism.backend import Backend
    from prism.config import Config, load, parse
    from prism.errors import ConfigError, PrismError
    from prism.frontend import Frontend
    from prism.http.head import RequestHead
    from prism.policy.decision import Action, Decision
    from prism.switch.embedded import Switch

__all__ = [
    "Action",
    "Backend",
    "Config",
    "ConfigError",
    "Decision",
    "Frontend",
    "PrismError",
    "RequestHead",
    "Switch",
    "__version__",
    "load",
    "parse",
]

# Loaded when they are asked for: a program that wants one of them need not wait for all.
_HOMES = {
    "Action": "prism.policy.decision",
    "Backend": "prism.backend",
    "Config": "prism.config",
    "ConfigError": "prism.errors",
    "Decision": "prism.policy.decision",
    "Frontend": "prism.frontend",
    "PrismError": "prism.errors",
    "RequestHead": "prism.http.head",
    "Switch": "prism.switch.embedded",
    "load": "prism.config",
    "parse": "prism.config",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
