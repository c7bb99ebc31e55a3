"""The configuration file: one TOML file that may serve every role of a cluster.

The models say which keys there are, what they mean and which values they take;
``docs/configuration.md`` is made from them. :func:`load` reads a file; whatever is wrong with it
becomes one :class:`~prism.errors.ConfigError` that names file, line and key, and says what to do.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field, PrivateAttr, ValidationError

from prism.config_cluster import ClusterConfig
from prism.config_errors import explain, report, syntax_line
from prism.config_files import certificate_problems, with_absolute_paths
from prism.config_health import HealthConfig
from prism.config_nodes import BackendConfig, FrontendConfig, NodeConfig
from prism.config_placement import PlacementConfig
from prism.config_policy import PolicyConfig
from prism.config_pools import PoolConfig
from prism.config_replication import replication_problems
from prism.config_switch import SwitchConfig
from prism.config_telemetry import TelemetryConfig
from prism.config_tls import TlsConfig
from prism.config_types import Address, HostPort, Section
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
    "PolicyConfig",
    "PoolConfig",
    "SwitchConfig",
    "TelemetryConfig",
    "TlsConfig",
    "load",
    "parse",
    "serving",
]


class Config(Section):
    """A whole file. Sections of other roles may stand in it too."""

    cluster: ClusterConfig
    frontend: FrontendConfig | None = None
    backend: BackendConfig | None = None
    switch: SwitchConfig | None = None
    tls: TlsConfig | None = None
    nodes: tuple[NodeConfig, ...] = Field((), max_length=1024)
    placement: PlacementConfig = PlacementConfig()
    pools: tuple[PoolConfig, ...] = Field((), max_length=256)
    health: HealthConfig = HealthConfig()
    policy: PolicyConfig = PolicyConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    _source: Path | None = PrivateAttr(None)

    @property
    def source(self) -> Path | None:
        """The file it was read from."""
        return self._source

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
    config = parse(text, source=str(path), base=path.absolute().parent, certificates=True)
    config._source = path.absolute()
    return config


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
        config.cluster.read_key(base)
    except ValueError as error:
        problems.append((("cluster", "key_file" if config.cluster.key_file else "key"), str(error)))
    config = with_absolute_paths(config, base)
    if certificates:
        problems += certificate_problems(config)
    if problems:
        raise ConfigError("\n".join(report(source, where, *problem) for problem in problems))
    return config


def serving(config: Config, app: str | None, upstream: str | None) -> Config:
    """The same, but for what the backend serves; ``None``: as it says itself.

    Args:
        config: with a ``[backend]`` section.
        app: ASGI application, ``module:attribute``, also found in the working directory.
        upstream: a server's URL.

    Raises:
        ConfigError: one of them cannot be, or both are given.
    """
    if config.backend is None or (app is None and upstream is None):
        return config
    keys = {"app": app, "upstream": upstream} | ({"app_dir": Path.cwd()} if app else {})
    try:
        backend = type(config.backend).model_validate(config.backend.model_dump() | keys)
    except ValidationError as error:
        raise ConfigError("; ".join(problem["msg"] for problem in error.errors())) from None
    cluster = config.cluster.model_copy(update={"serves": "application"})
    return config.model_copy(update={"backend": backend, "cluster": cluster})


_PLACE = ("address", "address6", "handoff_port", "relay_port", "workers", "replication_port")


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
    yield from _pool_problems(config, names)
    yield from _policy_problems(config)
    yield from replication_problems(config)
    if config.frontend is not None:
        if not config.listen:
            yield ("frontend", "listen"), "no address to listen on; give some, or cluster.services"
        if not config.nodes:
            yield ("nodes",), "a frontend needs a [[nodes]] entry for each backend"
        if config.frontend.name in names:
            yield ("frontend", "name"), "a backend in [[nodes]] has this name; choose another"
    if config.backend is not None:
        if not config.backend.serves_objects and config.cluster.serves == "objects":
            key = "app" if config.backend.app is not None else "upstream"
            text = 'needs cluster.serves = "application", in the frontends\' files too'
            yield ("backend", key), text
        entry = next((node for node in config.nodes if node.name == config.backend.name), None)
        if entry is None:
            yield ("backend", "name"), f"add a [[nodes]] entry named {config.backend.name!r}"
            return
        for key in _PLACE:
            if getattr(config.backend, key) != getattr(entry, key):
                yield ("backend", key), "differs from its [[nodes]] entry; leave it out here"
    if config.switch is not None and config.switch.kind == "ebpf" and not config.switch.interfaces:
        yield ("switch", "interfaces"), "name the network devices the switch shall see"


def _pool_problems(config: Config, nodes: set[str]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    pools: set[str] = set()
    for index, pool in enumerate(config.pools):
        if pool.name in pools:
            yield ("pools", index, "name"), f"{pool.name!r} is taken; give each pool its own name"
        pools.add(pool.name)
        for name in pool.nodes:
            if name not in nodes:
                yield ("pools", index, "nodes"), f"there is no [[nodes]] entry named {name!r}"
        if len(set(pool.nodes)) < len(pool.nodes):
            yield ("pools", index, "nodes"), "has a node twice"


def _policy_problems(config: Config) -> Iterator[tuple[tuple[str | int, ...], str]]:
    from prism.policy.engine import Rule  # noqa: PLC0415 - it reads configurations itself

    names: set[str] = set()
    pools = {pool.name for pool in config.pools}
    for index, rule in enumerate(config.policy.rules):
        if rule.name in names:
            yield ("policy", "rules", index, "name"), f"{rule.name!r} is taken"
        names.add(rule.name)
        if rule.pool is not None and rule.pool not in pools:
            yield (
                ("policy", "rules", index, "pool"),
                f"there is no [[pools]] entry named {rule.pool!r}; add one",
            )
        try:
            Rule(rule)
        except ValueError as error:
            yield ("policy", "rules", index), str(error)
