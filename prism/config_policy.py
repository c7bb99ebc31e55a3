"""The ``[policy]`` section of the configuration: the rules of the L7 firewall and router."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator

from prism.config_types import Name, Section

__all__ = ["PolicyConfig", "RuleConfig"]


def _network(value: object) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    if isinstance(value, ipaddress.IPv4Network | ipaddress.IPv6Network):
        return value
    try:
        return ipaddress.ip_network(str(value), strict=True)
    except ValueError as error:
        raise ValueError(f"{value!r} is not a network such as 192.0.2.0/24: {error}") from None


Network = Annotated[
    ipaddress.IPv4Network | ipaddress.IPv6Network,
    PlainValidator(_network),
    WithJsonSchema({"type": "network"}),
]
Patterns = tuple[Annotated[str, Field(min_length=1, max_length=1024)], ...]
Paths = tuple[Annotated[str, Field(min_length=1, max_length=1024, pattern="^/")], ...]


class RuleConfig(Section):
    """One `[[policy.rules]]` entry a rule; the first whose conditions all hold decides."""

    name: Name = Field(description="Name of the rule, in logs, counters and explanations.")
    host: Patterns = Field((), max_length=256, description="Globs; the host asked for.")
    path: Paths = Field((), max_length=256, description="Whole paths, decoded.")
    path_prefix: Paths = Field((), max_length=256, description="Paths and all below them.")
    path_glob: Patterns = Field((), max_length=256, description="Globs; `*` matches slashes, too.")
    path_regex: Patterns = Field(
        (), max_length=64, description="RE2 expressions, searched for in the path."
    )
    method: Patterns = Field((), max_length=32, description="Methods.")
    header: dict[str, Patterns] = Field(
        {}, max_length=32, description="Globs by field name; the field has to be there."
    )
    query: dict[str, Patterns] = Field(
        {}, max_length=32, description="Globs by parameter name; one has to be there."
    )
    client: tuple[Network, ...] = Field((), max_length=1024, description="Networks of clients.")
    tls_server_name: Patterns = Field((), max_length=256, description="Globs; the name by SNI.")
    client_certificate: Patterns = Field(
        (),
        max_length=256,
        description="Globs; the verified client certificate's subject, an alternative name such "
        "as `DNS:a.example`, or its SHA-256 fingerprint.",
    )
    action: Literal["auto", "handoff", "relay", "respond", "deny"] = Field(
        "auto",
        description="`auto`: hand over or relay, as `frontend.handoff` says; `respond` and `deny` "
        "answer where the connection is.",
    )
    pool: Name | None = Field(None, description="The `[[pools]]` entry to place it in.")
    placement: Literal["partitioned", "round-robin", "least-connections"] | None = Field(
        None, description="Another placement than the pool's own."
    )
    max_body: int | None = Field(
        None, ge=0, description="Octets a request's body may have; more is answered 413."
    )
    rate: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="Requests a second from each client network, on each node's workers; more are "
        "answered 429.",
    )
    burst: int | None = Field(
        None, ge=1, le=1_000_000, description="Requests at once; default: one second's."
    )
    rate_prefix4: int = Field(32, ge=0, le=32, description="Bits that make an IPv4 network.")
    rate_prefix6: int = Field(64, ge=0, le=128, description="Bits that make an IPv6 network.")
    status: int | None = Field(
        None, ge=200, le=599, description="Of `respond` (200) and `deny` (403)."
    )
    body: str = Field("", max_length=65536, description="Of `respond`; UTF-8 text.")
    content_type: str = Field(
        "text/plain; charset=utf-8", pattern=r"^[\x21-\x7e ]+$", description="Of `body`."
    )
    location: str | None = Field(
        None, pattern=r"^[\x21-\x7e]+$", max_length=4096, description="Where `respond` redirects."
    )
    set_headers: dict[str, Annotated[str, Field(pattern=r"^[\x20-\x7e\t]*$")]] = Field(
        {},
        max_length=32,
        description="Fields to set in the request; they replace what the client has sent.",
    )
    remove_headers: Patterns = Field(
        (), max_length=32, description="Names of fields to take out of the request."
    )

    @model_validator(mode="after")
    def _fits(self) -> RuleConfig:
        answers = self.action in ("respond", "deny")
        for key in ("status", "location"):
            if getattr(self, key) is not None and not answers:
                raise ValueError(f"{key} is for the actions respond and deny")
        if self.body and self.action != "respond":
            raise ValueError("body is for the action respond")
        if answers and (self.pool or self.placement):
            raise ValueError("pool and placement are for requests that are passed on")
        if self.location and not 300 <= (self.status or 302) < 400:
            raise ValueError("location needs a status from 300 to 399")
        if self.burst is not None and self.rate is None:
            raise ValueError("burst is of no use without rate")
        names = (*self.set_headers, *self.remove_headers, *self.header)
        for name in names:
            if not _is_token(name):
                raise ValueError(f"{name!r} is not the name of a header field")
            if name.lower() in _OURS and name not in self.header:
                raise ValueError(f"{name} says how the message is framed; leave it to Prism")
        return self


class PolicyConfig(Section):
    """What becomes of each request. The same file on every node gives the same verdicts."""

    route: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$",
        description="`module:attribute` of a function from a request to a decision or `None`; it "
        "is asked before the rules.",
    )
    route_dir: Path | None = Field(
        None, description="Directory to import `route` from. Relative to this file."
    )
    default: Literal["auto", "handoff", "relay", "deny"] = Field(
        "auto", description="For requests that no rule decides about."
    )
    rules: tuple[RuleConfig, ...] = Field((), max_length=1024, description="In order.")


_OURS = frozenset(("host", "content-length", "transfer-encoding", "connection", "upgrade", "te"))
_TOKEN = frozenset("!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz")


def _is_token(name: str) -> bool:
    return bool(name) and set(name.lower()) <= _TOKEN
