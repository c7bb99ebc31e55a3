"""The files that a configuration names: where they are, and whether nodes can use theirs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism.config_pools import PoolConfig
from prism.tls.identity import IdentityError

if TYPE_CHECKING:
    from prism.config import Config

__all__ = ["certificate_problems", "with_absolute_paths"]

_PATHS = {
    "cluster": ("pki_dir", "ca"),
    "frontend": ("node_certificate", "node_key"),
    "backend": ("node_certificate", "node_key", "store", "app_dir"),
    "placement": ("function_dir",),
    "policy": ("route_dir",),
    "switch": (
        "p4runtime_ca",
        "p4runtime_certificate",
        "p4runtime_key",
        "p4info",
        "p4_device_config",
    ),
    "telemetry": ("log_file", "status_socket"),
}


def with_absolute_paths(config: Config, base: Path) -> Config:
    """The same with its paths made absolute; relative ones are relative to ``base``."""
    update: dict[str, Any] = {}
    for section, keys in _PATHS.items():
        part = getattr(config, section)
        paths = {
            key: base / value.expanduser()
            for key in keys
            if (value := getattr(part, key, None)) is not None
        }
        if paths:
            update[section] = part.model_copy(update=paths)
    if config.tls is not None:
        update["tls"] = config.tls.with_absolute_paths(base)
    update["pools"] = tuple(_pool(pool, base) for pool in config.pools)
    return config.model_copy(update=update)


def _pool(pool: PoolConfig, base: Path) -> PoolConfig:
    placement = pool.placement
    if placement is None or placement.function_dir is None:
        return pool
    directory = base / placement.function_dir.expanduser()
    changed = placement.model_copy(update={"function_dir": directory})
    return pool.model_copy(update={"placement": changed})


def certificate_problems(config: Config) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """What keeps the nodes in it from showing themselves to their peers: (key, what to do)."""
    for section in ("frontend", "backend"):
        serving = getattr(config, section)
        if serving is None:
            continue
        try:
            config.identity_files(serving).check(serving.name)
        except IdentityError as error:
            own = f"node_{error.part}"
            if getattr(serving, own, None) is not None:
                yield (section, own), str(error)
            elif error.part == "ca" and config.cluster.ca is not None:
                yield ("cluster", "ca"), str(error)
            else:
                yield ("cluster", "pki_dir"), str(error)
