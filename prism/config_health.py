"""The ``[health]`` section of the configuration: which backends are fit to get requests."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from prism.config_types import Seconds, Section

__all__ = ["CheckConfig", "HealthConfig"]


class CheckConfig(Section):
    """How the nodes of a pool are checked; the default is the `[health]` section."""

    interval: Seconds = Field(1.0, description="Seconds between two checks of a node.")
    timeout: Seconds = Field(1.0, description="Seconds a check may take; then it has failed.")
    rise: int = Field(
        2, ge=1, le=1000, description="Good checks in a row after which a node is up again."
    )
    fall: int = Field(
        3, ge=1, le=1000, description="Failed checks in a row after which a node is down."
    )
    path: str | None = Field(
        None,
        pattern=r"^/[\x21-\x7e]*$",
        max_length=1024,
        description="What to GET at the node's `relay_port`, from the application or server that "
        "it serves; a status from 200 to 399 is good. By default only the handoff link is "
        "checked, which every check does.",
        examples=["/healthz"],
    )


class HealthConfig(CheckConfig):
    """Which nodes are left out when requests are placed. Every node finds out for itself."""

    failover: bool | None = Field(
        None,
        description="Whether a key whose node is unfit is placed at the next node. Default: yes, "
        "but not for a `partitioned` object store, where another node would say that an object is "
        "not there; its requests fail meanwhile.",
    )
    eject_after: int = Field(
        5,
        ge=0,
        le=1000,
        description="Failures in a row of handoffs and relayed requests (refusals, time-outs, lost "
        "connections, 502, 503, 504) after which a node is ejected; 0: never.",
    )
    eject_time: Seconds = Field(
        10.0, description="Seconds of the first ejection; doubled by each that follows soon."
    )
    eject_longest: Seconds = Field(300.0, description="Seconds of the longest ejection.")
    eject_share: float = Field(
        0.5, ge=0, le=1, description="Share of all nodes that may be ejected at a time."
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.eject_longest < self.eject_time:
            raise ValueError("eject_longest is shorter than eject_time")
        return self
