"""What a configuration has to be like for objects to be replicated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prism.config import Config

__all__ = ["replication_changed", "replication_problems"]

_Problem = tuple[tuple[str | int, ...], str]


def replication_problems(config: Config) -> Iterator[_Problem]:
    """What does not go together with replication: (key, what is wrong and what to do)."""
    for index, pool in enumerate(config.pools):
        if pool.placement is not None and pool.placement.replicated:
            text = "a pool cannot be replicated; all nodes together can: [placement]"
            yield ("pools", index, "placement"), text
    if not config.placement.replicated:
        return
    if config.cluster.serves != "objects":
        yield ("placement", "name"), "only the object store is replicated, not an application"
    if config.placement.replicas > len(config.nodes):
        text = f"there are {len(config.nodes)} [[nodes]] only; add some, or want fewer copies"
        yield ("placement", "replicas"), text
    for index, node in enumerate(config.nodes):
        if node.workers != 1:
            text = "a backend that replicates has one worker; leave it out"
            yield ("nodes", index, "workers"), text
    if config.pools:
        yield ("pools",), "replicated objects are placed among all nodes: leave pools out"
    for index, rule in enumerate(config.policy.rules):
        if rule.placement is not None:
            text = "replicated objects are where they are: leave the rule's placement out"
            yield ("policy", "rules", index, "placement"), text


def replication_changed(old: Config, new: Config) -> str:
    """Why a cluster cannot change to another configuration while it runs; empty: it can."""
    if not (old.placement.replicated or new.placement.replicated):
        return ""
    if old.placement != new.placement:
        return "placement: replication cannot be begun, ended or changed in a cluster that runs"
    if old.nodes != new.nodes:
        return "nodes: replicated objects stay where they are; the nodes cannot be changed"
    return ""
