"""The ``[placement]`` section of the configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from prism.config_types import Section

__all__ = ["PlacementConfig"]


class PlacementConfig(Section):
    """Which backend a request belongs to."""

    name: Literal["partitioned", "round-robin", "least-connections", "replicated"] = Field(
        "partitioned",
        description="`partitioned`: by the request's path (rendezvous hashing, weighted). "
        "`replicated`: the same, with each object on `replicas` backends (docs/replication.md).",
    )
    replicas: int = Field(
        2,
        ge=2,
        le=16,
        description="With `replicated`: backends that have a copy of each object. A store keeps "
        "the number it began with.",
    )

    @property
    def replicated(self) -> bool:
        """Whether objects are replicated."""
        return self.name == "replicated"
