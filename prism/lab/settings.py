"""The configuration that the lab writes for each of its processes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism.errors import ConfigError
from prism.lab.certificates import tls_settings
from prism.lab.servers import URL

if TYPE_CHECKING:
    from prism.lab.cluster import Cluster, Node

__all__ = ["settings_of"]

P4RUNTIME = "127.0.0.1:9559"  # the soft switch's service, in the switch's namespace
_ROLES = ("frontend", "backend", "switch")
_COMMON = ("cluster", "placement", "health", "telemetry")
_TLS = ("frontend", "backend")  # roles that serve clients; only frontends have the keys


def settings_of(cluster: Cluster, node: Node) -> dict[str, Any]:
    """The configuration of one process, as sections; the lab's ``settings`` override it.

    Raises:
        ConfigError: a setting that is not of the form ``section.key``, or of no use here.
    """
    options, topology = cluster.options, cluster.topology
    given = dict(options.settings)
    # A lab is there to show handoffs. What is said of the frontends is meant for all nodes.
    given.setdefault("frontend.handoff", "always")
    for key in ("handoff", "handoff_threshold"):
        if f"frontend.{key}" in given:
            given.setdefault(f"backend.{key}", given[f"frontend.{key}"])
    settings: dict[str, Any] = {
        "cluster": {
            "key_file": str(cluster.dir / "cluster.key"),
            "pki_dir": str(cluster.dir / "pki"),
            "control": str(topology.control),
            "serves": "application" if options.app or options.upstream else "objects",
            "services": [str(service) for service in topology.services(80)],
        },
        "placement": {"name": options.placement}
        | ({"replicas": options.replicas} if options.placement == "replicated" else {}),
        "health": {},
        "telemetry": {
            "status_socket": str(cluster.dir / f"run/{node.name}.sock"),
            "log_format": "json",
            "trace": options.trace,
        },
        "nodes": [
            {
                "name": site.role,
                "address": site.address,
                "address6": site.address6,
                "workers": options.workers,
            }
            for site in topology.backends
        ],
        node.role: _role(cluster, node),
    }
    if options.tls and node.role in _TLS:
        secure = node.role == "frontend"
        settings["tls"] = tls_settings(cluster.dir, topology.services(443)) if secure else {}
    for key, value in given.items():
        section, _, name = key.partition(".")
        if not name or section not in (*_COMMON, *_ROLES, "tls"):
            raise ConfigError(f"setting {key!r}: write SECTION.KEY=VALUE")
        if section == "tls" and not options.tls:
            raise ConfigError(f"setting {key!r} is for a lab with --tls")
        if section in settings:
            settings[section][name] = value
    return settings


def _app(cluster: Cluster) -> dict[str, Any]:
    """What a backend serves instead of its store."""
    if cluster.options.app is not None:
        return {"app": cluster.options.app, "app_dir": str(Path.cwd())}
    return {"upstream": URL} if cluster.options.upstream is not None else {}


def _role(cluster: Cluster, node: Node) -> dict[str, Any]:
    options = cluster.options
    if node.role == "switch" and node.name != "plane" and options.switch == "p4runtime":
        return {
            "kind": "p4runtime",
            "p4runtime_address": options.p4runtime_address or P4RUNTIME,
            "p4runtime_device": 1 if options.p4runtime_address is None else 0,
        }
    if node.role == "switch":
        served = {"p4runtime_listen": P4RUNTIME} if node.name == "plane" else {}
        return {
            "kind": "ebpf",
            **served,
            "interfaces": list(cluster.topology.interfaces),
            "lock": options.lock,
            "pin_dir": str(cluster.dir / "bpf/prism"),
        }
    if node.role == "backend":
        store = (options.store or cluster.dir / "store").absolute() / node.name
        store.mkdir(parents=True, exist_ok=True)
        return {"name": node.name, "store": str(store), **_app(cluster)}
    site = next(site for site in cluster.topology.frontends if site.role == node.name)
    return {
        "name": node.name,
        "address": site.address,
        "address6": site.address6,
        "workers": options.workers,
    }
