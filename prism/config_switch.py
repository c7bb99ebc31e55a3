"""The ``[switch]`` section of the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from prism.config_types import Seconds, Section

__all__ = ["SwitchConfig"]


class SwitchConfig(Section):
    """The switch: its data plane and the agent beside it."""

    kind: Literal["ebpf", "p4runtime", "userspace"] = Field(
        "ebpf",
        description="`ebpf`: in the kernel. `p4runtime`: any switch that runs `p4/prism.p4`, see "
        "`p4runtime_address`. `userspace`: the rule table alone, without a data plane, for trying "
        "nodes out.",
    )
    p4runtime_address: str = Field(
        "127.0.0.1:9559", description="`p4runtime`: HOST:PORT of the switch's gRPC service."
    )
    p4runtime_device: int = Field(1, ge=0, lt=2**63, description="`p4runtime`: its device id.")
    p4runtime_priority: int = Field(
        1,
        ge=0,
        lt=2**63,
        description="`p4runtime`: the agent with the highest one is the primary, others wait.",
    )
    p4runtime_timeout: Seconds = Field(
        2.0, description="`p4runtime`: seconds for a call of the switch."
    )
    p4runtime_ca: Path | None = Field(
        None,
        description="PEM file of a CA. `p4runtime`: that of the switch's certificate; without it "
        "the connection is in the clear. With `p4runtime_listen`: controllers have to show a "
        "certificate of it. Relative to this file, like the files below.",
    )
    p4runtime_certificate: Path | None = Field(
        None,
        description="PEM file of a certificate. `p4runtime`: to show the switch. With "
        "`p4runtime_listen`: the switch's own; without it connections are in the clear.",
    )
    p4runtime_key: Path | None = Field(
        None, description="PEM file: the private key of `p4runtime_certificate`, unencrypted."
    )
    p4info: Path | None = Field(
        None, description="`p4runtime`: another p4info than the one that comes with Prism."
    )
    p4_device_config: Path | None = Field(
        None, description="`p4runtime`: what the target runs; for bmv2 the JSON of p4c."
    )
    p4runtime_listen: str | None = Field(
        None,
        description="`ebpf`: HOST:PORT where the switch serves P4Runtime. It is programmed by that "
        "alone then, and answers no control datagrams.",
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

    @model_validator(mode="after")
    def _tls_is_complete(self) -> Self:
        shows = self.p4runtime_certificate is not None
        if shows != (self.p4runtime_key is not None):
            raise ValueError("p4runtime_certificate and p4runtime_key belong together: give both")
        if self.kind == "p4runtime" and shows and self.p4runtime_ca is None:
            raise ValueError(
                "p4runtime_certificate without p4runtime_ca: name the CA of the switch's "
                "certificate, or the connection is in the clear"
            )
        if self.p4runtime_listen and self.p4runtime_ca and not shows:
            raise ValueError(
                "p4runtime_ca without p4runtime_certificate: a switch needs a certificate for TLS"
            )
        return self
