"""The lab's status: one document from what all its processes tell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prism.lab.cluster import Cluster

__all__ = ["status"]


def status(cluster: Cluster) -> dict[str, Any]:
    """The document of ``lab status --json``.

    ``counters`` are sums over all nodes; ``handoffs`` are counted by whoever handed over.
    """
    told = {name: cluster.statuses(name) for name in cluster.nodes}
    counters = [
        document.get("counters", {})
        for name, documents in told.items()
        if name not in ("switch", "plane")
        for document in documents
    ]
    # A switch that is driven over P4Runtime has two processes: what holds packets, and the agent.
    switch: dict[str, Any] = {}
    for name in ("plane", "switch"):
        for document in told.get(name, []):
            switch |= document.get("counters", {})
    return {
        "name": cluster.name,
        "url": cluster.url,
        "url6": cluster.url6,
        "ca_file": cluster.ca_file and str(cluster.ca_file),
        "nodes": {
            name: {
                "role": node.role,
                "namespace": node.namespace,
                "address": node.address,
                "alive": node.alive,
                "pids": sorted(
                    {node.pid, *(document.get("pid", node.pid) for document in told[name])}
                    if node.alive
                    else ()
                ),
                "log": str(node.log),
                "health": _health(told, name),
            }
            for name, node in cluster.nodes.items()
        },
        "rules": int(switch.get("rules", 0)),
        "counters": {
            "handoffs": _sum(counters, "handoffs_out"),
            "take_backs": _sum(counters, "take_backs"),
            "refusals": _sum(counters, "refusals"),
            "relays": _sum(counters, "relays"),
            "held_packets": _sum([switch], "held_packets"),
            "dropped_packets": _sum([switch], "dropped_packets"),
        },
    }


def _health(told: dict[str, list[dict[str, Any]]], name: str) -> str:
    """How the others find a backend: ``fit``, or what is wrong with it; empty: not asked for."""
    found = {
        document["health"][name]["state"]
        for documents in told.values()
        for document in documents
        if name in document.get("health", {})
    }
    return ", ".join(sorted(found))


def _sum(documents: list[dict[str, Any]], key: str) -> int:
    """The sum of a counter over documents, and over its labels where it has some."""
    total = 0
    for document in documents:
        value = document.get(key, 0)
        total += sum(value.values()) if isinstance(value, dict) else int(value)
    return total
