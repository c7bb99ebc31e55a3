"""The configuration file: one TOML file that may serve every role of a cluster.

The models say which keys there are, what they mean and which values they take;
``docs/configuration.md`` is made from them. :func:`load` reads a file; whatever is wrong with it
becomes one :class:`~prism.errors.ConfigError` that names file, line and key, and says what to do.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PrivateAttr, SecretStr, ValidationError, model_validator

from prism.config_errors import explain, report, syntax_line
from prism.config_files import certificate_problems, with_absolute_paths
from prism.config_tls import TlsConfig
from prism.config_types import Address, HostPort, Name, Port, Seconds, Section
from prism.errors import ConfigError
from prism.flow import Endpoint
from prism.tls.identity import IdentityFiles
from prism.tomlpos import positions

__all__ = [
    "Address",
    "BackendConfig",
    "ClusterConfig",
    "Config",
    "FrontendConfig",
    "HostPort",
    "NodeConfig",
    "PlacementConfig",
    "SwitchConfig",
    "TelemetryConfig",
    "TlsConfig",
    "load",
    "parse",
]

_MIN_KEY = 16


class ClusterConfig(Section):
    """What all members of the cluster have in common. Required."""

    key: SecretStr | None = Field(
        None, description="Cluster key: at least 16 octets in hexadecimal or Base64. Or `key_file`."
    )
    key_file: Path | None = Field(
        None,
        description="File that holds the cluster key; must not be readable by others. "
        "Relative to this file.",
    )
    control: HostPort = Field(
        description="Where the switch answers control datagrams (UDP).",
        examples=["10.77.0.1:4760"],
    )
    services: tuple[HostPort, ...] = Field(
        (),
        max_length=64,
        description="Service addresses the clients connect to; the default of `frontend.listen`.",
    )
    lease: float = Field(
        2.0, ge=0.1, le=60, description="Seconds without renewal after which a node counts as dead."
    )

    pki_dir: Path = Field(
        Path("/etc/prism/pki"),
        description="Directory with `ca.pem` and each node's `NAME.pem` and `NAME.key`, as "
        "`prism-proxy pki` makes them. Relative to this file.",
    )
    ca: Path | None = Field(
        None,
        description="Certificate of the CA that nodes trust each other by; default: `ca.pem` in "
        "`pki_dir`.",
    )

    _secret: bytes = PrivateAttr(b"")

    def control_key(self) -> bytes:
        """The 16-octet key of the control datagrams' SipHash (docs/protocol.md)."""
        return self._derive(b"prism control", 16)

    def channel_key(self) -> bytes:
        """The 32-octet key that authenticates handoff channels."""
        return self._derive(b"prism channel", 32)

    def _derive(self, purpose: bytes, size: int) -> bytes:
        # One secret, one key for each use: what one protocol leaks is no use in the other.
        return hashlib.blake2b(self._secret, digest_size=size, person=purpose).digest()

    def _read_key(self, base: Path) -> None:
        """Take the key from where the file says it is.

        Raises:
            ValueError: there is none, or it cannot be used; the message is safe to show.
        """
        if (self.key is None) == (self.key_file is None):
            raise ValueError("give exactly one of key_file and key")
        if self.key is not None:
            text = self.key.get_secret_value()
        else:
            path = base / Path(str(self.key_file)).expanduser()
            try:
                mode = path.stat().st_mode & 0o777
                text = path.read_text("ascii", errors="replace")
            except OSError as error:
                raise ValueError(f"cannot read {path}: {error.strerror}") from None
            if mode & 0o077:
                raise ValueError(f"{path} is open to others (mode {mode:o}): chmod 600 {path}")
        self._secret = _decode_key(text.strip())


def _decode_key(text: str) -> bytes:
    try:
        secret = bytes.fromhex(text)
    except ValueError:
        try:
            secret = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            secret = b""
    if not _MIN_KEY <= len(secret) <= 1024:
        raise ValueError(
            f"a key of at least {_MIN_KEY} octets in hexadecimal or Base64 is wanted; "
            "make one with: openssl rand -hex 32"
        )
    return secret


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


class NodeConfig(_Identity):
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


class FrontendConfig(_Serving):
    """A node that accepts clients' connections."""

    listen: tuple[HostPort, ...] = Field(
        (),
        max_length=64,
        description="Service addresses to listen on; default: `cluster.services`.",
    )
    handoff: Literal["always", "never"] = Field(
        "always", description="Whether requests are handed over; `never` makes it a plain proxy."
    )
    relay: bool = Field(
        True, description="Relay what cannot be handed over; without it, such requests get a 503."
    )
    connect_timeout: Seconds = Field(
        3.0, description="Seconds to connect to a backend when relaying; then 502 or another one."
    )


class BackendConfig(_Serving):
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


class PlacementConfig(Section):
    """Which backend a request belongs to."""

    name: Literal["partitioned", "round-robin", "least-connections"] = Field(
        "partitioned",
        description="`partitioned`: by the request's path (rendezvous hashing, weighted).",
    )


class TelemetryConfig(Section):
    """What the process tells about itself."""

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least important level that is logged."
    )
    log_format: Literal["auto", "human", "json"] = Field(
        "auto", description="`auto`: for people on a terminal, JSON lines elsewhere."
    )
    log_file: Path | None = Field(None, description="File to append to, instead of stderr.")
    trace: bool = Field(False, description="Log each handoff with the time of each step.")
    status_socket: Path | None = Field(
        None, description="Unix socket that answers `prism-proxy status`; worker i: `NAME-i.sock`."
    )
    metrics_listen: HostPort | None = Field(
        None, description="Where Prometheus metrics are served; worker i: the port plus i."
    )

    def status_path(self, worker: int | None) -> Path | None:
        """The status socket of a worker, or of a role without workers (``None``)."""
        path = self.status_socket
        if path is None or worker is None:
            return path
        return path.with_name(f"{path.stem}-{worker}{path.suffix or '.sock'}")

    def metrics_endpoint(self, worker: int | None) -> Endpoint | None:
        """The metrics endpoint of a worker, or of a role without workers (``None``)."""
        listen = self.metrics_listen
        return listen and Endpoint(listen.host, listen.port + (worker or 0))


class Config(Section):
    """A whole file. Sections of other roles may stand in it too."""

    cluster: ClusterConfig
    frontend: FrontendConfig | None = None
    backend: BackendConfig | None = None
    switch: SwitchConfig | None = None
    tls: TlsConfig | None = None
    nodes: tuple[NodeConfig, ...] = Field((), max_length=1024)
    placement: PlacementConfig = PlacementConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    @property
    def listen(self) -> tuple[Endpoint, ...]:
        """Where the frontend listens, with and without TLS."""
        plain = (self.frontend.listen if self.frontend else ()) or self.cluster.services
        return tuple(dict.fromkeys((*plain, *self.tls_listen)))

    @property
    def tls_listen(self) -> tuple[Endpoint, ...]:
        """Those of :attr:`listen` that speak TLS."""
        return self.tls.listen if self.tls else ()

    def identity_files(self, serving: FrontendConfig | BackendConfig) -> IdentityFiles:
        """The files by which a node and its peers know each other."""
        pki_dir = self.cluster.pki_dir
        return IdentityFiles(
            self.cluster.ca or pki_dir / "ca.pem",
            serving.node_certificate or pki_dir / f"{serving.name}.pem",
            serving.node_key or pki_dir / f"{serving.name}.key",
        )


def load(path: str | Path) -> Config:
    """Read and check a configuration file.

    Raises:
        ConfigError: it cannot be read or used; the message has a line for each problem, with
            file, line number, key and remedy.
    """
    path = Path(path)
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text, as TOML must be") from None
    return parse(text, source=str(path), base=path.absolute().parent, certificates=True)


def parse(
    text: str, *, source: str = "<text>", base: Path | None = None, certificates: bool = False
) -> Config:
    """Check a configuration given as text; relative paths are relative to ``base``.

    With ``certificates``, those of the nodes in it have to be there and good, as for :func:`load`.

    Raises:
        ConfigError: as for :func:`load`.
    """
    base = base or Path()
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}:{syntax_line(error, text)}: not valid TOML: {error}") from None
    where = positions(text)
    _place_backend(data)
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error, Config, where, source)) from None
    problems = list(_inconsistencies(config))
    try:
        config.cluster._read_key(base)
    except ValueError as error:
        problems.append((("cluster", "key_file" if config.cluster.key_file else "key"), str(error)))
    config = with_absolute_paths(config, base)
    if certificates:
        problems += certificate_problems(config)
    if problems:
        raise ConfigError("\n".join(report(source, where, *problem) for problem in problems))
    return config


_PLACE = ("address", "address6", "handoff_port", "relay_port", "workers")


def _place_backend(data: dict[str, Any]) -> None:
    """Fill in what [backend] leaves to its [[nodes]] entry."""
    backend, nodes = data.get("backend"), data.get("nodes")
    if not isinstance(backend, dict) or not isinstance(nodes, list):
        return
    for node in nodes:
        if isinstance(node, dict) and node.get("name") == backend.get("name"):
            data["backend"] = {key: node[key] for key in _PLACE if key in node} | backend
            return


def _inconsistencies(config: Config) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """What no single section can see: (key, what is wrong and what to do)."""
    names: set[str] = set()
    for index, node in enumerate(config.nodes):
        if node.name in names:
            yield ("nodes", index, "name"), f"{node.name!r} is taken; give each node its own name"
        names.add(node.name)
    if config.frontend is not None:
        if not config.listen:
            yield ("frontend", "listen"), "no address to listen on; give some, or cluster.services"
        if not config.nodes:
            yield ("nodes",), "a frontend needs a [[nodes]] entry for each backend"
        if config.frontend.name in names:
            yield ("frontend", "name"), "a backend in [[nodes]] has this name; choose another"
    if config.backend is not None:
        entry = next((node for node in config.nodes if node.name == config.backend.name), None)
        if entry is None:
            yield ("backend", "name"), f"add a [[nodes]] entry named {config.backend.name!r}"
            return
        for key in _PLACE:
            if getattr(config.backend, key) != getattr(entry, key):
                yield ("backend", key), "differs from its [[nodes]] entry; leave it out here"
    if config.switch is not None and config.switch.kind == "ebpf" and not config.switch.interfaces:
        yield ("switch", "interfaces"), "name the network devices the switch shall see"
