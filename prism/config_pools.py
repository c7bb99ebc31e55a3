"""The ``[[pools]]`` section of the configuration: named sets of nodes."""

from __future__ import annotations

from pydantic import Field

from prism.config_health import CheckConfig
from prism.config_placement import PlacementConfig
from prism.config_types import Name, Section

__all__ = ["PoolConfig"]


class PoolConfig(Section):
    """One `[[pools]]` entry for each set of nodes that the policy's rules send requests to."""

    name: Name = Field(description="Name of the pool, unique in the cluster.")
    nodes: tuple[Name, ...] = Field(
        min_length=1, max_length=1024, description="Names of `[[nodes]]` entries."
    )
    placement: PlacementConfig | None = Field(
        None, description="As the `[placement]` section, which is the default."
    )
    health: CheckConfig | None = Field(
        None,
        description="How its nodes are checked, as the first keys of the `[health]` section, which "
        "is the default.",
    )
