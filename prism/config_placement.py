"""The ``[placement]`` section of the configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from prism.config_types import Section

__all__ = ["PlacementConfig"]


class PlacementConfig(Section):
    """Which backend a request belongs to."""

    name: Literal["partitioned", "round-robin", "least-connections"] = Field(
        "partitioned",
        description="`partitioned`: by the request's path (rendezvous hashing, weighted).",
    )
