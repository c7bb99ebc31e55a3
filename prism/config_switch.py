"""The ``[switch]`` section of the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from prism.config_types import Seconds, Section

__all__ = ["SwitchConfig"]


class SwitchConfig(Section):
    """The switch: its data plane and the agent beside it."""

    kind: Literal["ebpf", "userspace"] = Field(
        "ebpf",
        description="`ebpf`: in the kernel. `userspace`: the rule table alone, without a data "
        "plane, for trying nodes out.",
    )
    interfaces: tuple[Annotated[str, Field(min_length=1, max_length=15)], ...] = Field(
        (), max_length=256, description="Network devices whose packets it sees."
    )
    pin_dir: Path = Field(
        Path("/sys/fs/bpf/prism"),
        description="Directory below a bpffs, where its maps outlive the agent.",
    )
    lock: Literal["hold", "drop"] = Field(
        "hold", description="What becomes of a client's packets while a connection changes hands."
    )
    hold_flow_bytes: int = Field(
        262_144, ge=2048, le=2**30, description="Octets held of one flow; more is dropped, counted."
    )
    hold_total_bytes: int = Field(
        64 * 1024**2, ge=65536, le=2**32, description="Octets held of all flows together."
    )
    hold_time: Seconds = Field(1.0, description="Seconds a packet is held at most.")
    max_rules: int = Field(
        1_000_000, ge=1, le=16_000_000, description="Rules the table has room for."
    )
