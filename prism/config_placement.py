"""The ``[placement]`` section of the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from prism.config_types import Section

__all__ = ["PlacementConfig"]


class PlacementConfig(Section):
    """Which backend a request belongs to."""

    name: Literal["partitioned", "round-robin", "least-connections", "replicated", "callable"] = (
        Field(
            "partitioned",
            description="`partitioned`: by the request's path (rendezvous hashing, weighted). "
            "`replicated`: the same, with each object on `replicas` backends "
            "(docs/replication.md). `callable`: as `function` says.",
        )
    )
    replicas: int = Field(
        2,
        ge=2,
        le=16,
        description="With `replicated`: backends that have a copy of each object. A store keeps "
        "the number it began with.",
    )
    function: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$",
        description="`module:attribute` of a function from a key and the nodes that are fit to one "
        "of them, or its name. The same one on all nodes.",
        examples=["shards:place"],
    )
    function_dir: Path | None = Field(
        None, description="Directory to import `function` from. Relative to this file."
    )

    @property
    def replicated(self) -> bool:
        """Whether objects are replicated."""
        return self.name == "replicated"

    @model_validator(mode="after")
    def _has_function(self) -> Self:
        if (self.name == "callable") != (self.function is not None):
            raise ValueError('function goes with name = "callable", and is needed there')
        return self
