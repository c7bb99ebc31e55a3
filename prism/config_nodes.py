"""The sections that name nodes: ``[frontend]``, ``[backend]`` and ``[[nodes]]``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from prism.config_app import AppKeys
from prism.config_types import Address, HostPort, Name, Port, Seconds, Section
from prism.flow import Endpoint

__all__ = ["BackendConfig", "FrontendConfig", "NodeConfig"]


class _Identity(Section):
    """What names and places a node."""

    name: Name = Field(description="Name of the node, unique in the cluster.")
    address: Address = Field(
        description="The node's own address: for control, channel and flows.",
        examples=["10.77.101.2"],
    )
    address6: Address | None = Field(
        None, description="Its IPv6 address, for IPv6 flows, where `address` is an IPv4 one."
    )
    handoff_port: Port = Field(
        4800, description="First port of the handoff channel: worker i listens on this port plus i."
    )
    relay_port: Port = Field(
        8080, description="Port for ordinary, relayed connections; its workers share it."
    )
    workers: int = Field(1, ge=1, le=256, description="Worker processes.")

    def address_for(self, client: str) -> str | None:
        """The own address of the same family as the client's, if the node has one."""
        wanted = ":" in client
        if (":" in self.address) == wanted:
            return self.address
        return self.address6 if wanted else None

    def worker_name(self, worker: int) -> str:
        """The name under which the switch knows a worker (``be1/0``)."""
        return f"{self.name}/{worker}"

    def handoff_endpoint(self, worker: int) -> Endpoint:
        """Where a worker's handoff channel listens."""
        return Endpoint(self.address, self.handoff_port + worker)

    @model_validator(mode="after")
    def _plausible(self) -> Self:
        if self.address6 is not None and ":" not in self.address6:
            raise ValueError("address6 must be an IPv6 address")
        if self.handoff_port + self.workers > 65536:
            raise ValueError("handoff_port plus workers goes beyond port 65535")
        return self


class _Replica(_Identity):
    """What a backend's place is in addition."""

    replication_port: Port = Field(
        4600,
        description="Port on which backends replicate, with the placement `replicated` (TCP, "
        "mutual TLS; frontends connect to it, too).",
    )


class NodeConfig(_Replica):
    """One `[[nodes]]` entry for each backend."""

    weight: float = Field(1.0, gt=0, le=1000, description="Its share of the keys, relatively.")


class _Serving(_Identity):
    """Bounds and time-outs of whoever talks to clients."""

    node_certificate: Path | None = Field(
        None,
        description="The node's certificate, for the handoff channel; default: `NAME.pem` in "
        "`cluster.pki_dir`.",
    )
    node_key: Path | None = Field(
        None,
        description="Its private key, which others must not be able to read; default: `NAME.key` "
        "in `cluster.pki_dir`.",
    )
    backlog: int = Field(4096, ge=1, le=65535, description="Length of the listen queues.")
    max_connections: int = Field(
        65536,
        ge=1,
        le=10_000_000,
        description="Connections of one worker; more are refused. Relayed ones count apart.",
    )
    max_head_size: int = Field(
        16384,
        ge=512,
        le=262144,
        description="Octets a request's head may have; more is answered 431.",
    )
    max_header_fields: int = Field(
        100, ge=1, le=1000, description="Fields a request's head may have; more is answered 431."
    )
    head_timeout: Seconds = Field(
        10.0, description="Seconds for a request's head, from its first octet; then 408."
    )
    keepalive_timeout: Seconds = Field(
        75.0, description="Seconds a connection may wait for its next request."
    )
    body_timeout: Seconds = Field(
        30.0, description="Seconds between two pieces of a request's body; then 408."
    )
    send_timeout: Seconds = Field(
        60.0, description="Seconds a client may take nothing of a response."
    )
    handoff_deadline_ms: float = Field(
        250.0,
        gt=0,
        le=10_000,
        description="Milliseconds after which an unanswered handoff is taken back.",
    )
    drain_timeout: float = Field(
        5.0, ge=0, le=3600, description="Seconds for open requests when told to stop."
    )
    handoff: Literal["always", "never", "adaptive"] = Field(
        "adaptive",
        description="Which requests of other nodes are handed over with their connection: "
        "`adaptive`, those that pay, the others are relayed; `always`; `never`: relay all, like a "
        "plain proxy. A rule's action goes before it.",
    )
    handoff_threshold: int | None = Field(
        None,
        ge=0,
        le=1024**4,
        description="With `adaptive`: octets of request and response from which a handoff pays; "
        "measured by default.",
    )


class FrontendConfig(_Serving):
    """A node that accepts clients' connections."""

    listen: tuple[HostPort, ...] = Field(
        (),
        max_length=64,
        description="Service addresses to listen on; default: `cluster.services`.",
    )
    relay: bool = Field(
        True, description="Relay what cannot be handed over; without it, such requests get a 503."
    )
    connect_timeout: Seconds = Field(
        3.0, description="Seconds to connect to a backend when relaying; then 502 or another one."
    )
    handoff_after: int = Field(
        16,
        ge=0,
        le=1_000_000,
        description="With `adaptive`: relayed requests after which a connection is handed over, "
        "however small the next one is; 0: never.",
    )


class BackendConfig(AppKeys, _Serving, _Replica):
    """A node that takes connections over. Its place is read from its `[[nodes]]` entry."""

    takeover_port: Port = Field(
        4700, description="First port tried for a connection that is taken over; nothing listens."
    )
    store: Path = Field(
        Path("/var/lib/prism"), description="Directory of the object store. Relative to this file."
    )
    max_object_size: int = Field(
        5 * 1024**3, ge=0, description="Octets an object may have; more is answered 413."
    )
    monitor: Literal["auto", "kmod", "sockdiag"] = Field(
        "auto",
        description="What tells that the kernel has forgotten a connection: `kmod`, the monitor "
        "module, or `sockdiag`, the kernel's own notices. `auto`: the module where it is loaded.",
    )
