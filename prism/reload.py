"""Applying a changed configuration to a node that runs, without dropping anything.

Applied: the policy, nodes and their weights, pools, placement, time-outs and limits, whether to
hand over and to relay, and certificates. Everything else is the process's identity or what it has
opened already; it takes a restart, and the log says so.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from prism.config import load
from prism.config_replication import replication_changed
from prism.errors import ConfigError
from prism.http.head import Limits
from prism.policy.engine import Policy
from prism.pools import Pools

if TYPE_CHECKING:
    from prism.node import Node

__all__ = ["reload_node"]

log = logging.getLogger(__name__)

_APPLIED = ("policy", "nodes", "pools", "placement", "health")
_RESTART = ("cluster", "tls", "telemetry")
# Of [frontend] and [backend]: what is looked at when it is needed, not only at the start.
_SERVING = frozenset(
    (
        "max_connections",
        "max_head_size",
        "max_header_fields",
        "head_timeout",
        "keepalive_timeout",
        "body_timeout",
        "handoff_deadline_ms",
        "drain_timeout",
        "handoff",
        "handoff_threshold",
        "handoff_after",
        "relay",
    )
)


def reload_node(node: Node) -> list[str]:
    """Read the node's file and apply it; returns the names of what has changed.

    Raises:
        ConfigError: the file is no good, or has another role or no file is known; nothing has
            changed then.
    """
    if node.config.source is None:
        raise ConfigError("this node was not started from a file")
    new = load(node.config.source)
    serving = getattr(new, node.role, None)
    if serving is None:
        raise ConfigError(f"{node.config.source}: has no [{node.role}] section any more")
    if problem := replication_changed(node.config, new):
        raise ConfigError(f"{node.config.source}: {problem}")
    policy = Policy(new.policy, node.route)  # whatever may fail comes first
    pools = Pools(new, node.peers.loads)
    changed = [name for name in _APPLIED if getattr(new, name) != getattr(node.config, name)]
    if "policy" in changed:
        node.policy = policy
    if {"nodes", "pools", "placement", "health"} & set(changed):
        node.peers.change(pools, new.health)
        node.listing.nodes = pools.nodes
    changed += _apply_serving(node, serving)
    if node.reload_certificates():
        changed.append("certificates")
    later = [name for name in _RESTART if getattr(new, name) != getattr(node.config, name)]
    if later:
        log.warning("a restart is needed to apply what has changed in: %s", ", ".join(later))
    node.config = new.model_copy(
        update={name: getattr(node.config, name) for name in _RESTART} | {node.role: node.serving}
    )
    node.config._source = new.source
    return changed


def _apply_serving(node: Node, new: Any) -> list[str]:
    """The settings of the node's own section that can change; warns of the others."""
    old = node.serving
    names = [name for name in type(old).model_fields if getattr(old, name) != getattr(new, name)]
    good = [name for name in names if name in _SERVING]
    if later := [name for name in names if name not in _SERVING]:
        log.warning("a restart is needed to apply: %s.%s", node.role, ", ".join(later))
    if good:
        node.use(old.model_copy(update={name: getattr(new, name) for name in good}))
        node.limits = Limits(new.max_head_size, new.max_header_fields)
        node.body_timeout = new.body_timeout
        node.deadline = new.handoff_deadline_ms / 1000
    return good
