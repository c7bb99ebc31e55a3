"""The elements of the kernel's tables, unpacked (``prism/_ext/bpf/prism_abi.h``)."""

from __future__ import annotations

import struct
import sys
from functools import lru_cache
from typing import Final, NamedTuple

from prism.flow import Endpoint, unpack_address
from prism.switch.base import Event, Node, Rule

__all__ = [
    "COUNTERS",
    "EVENT",
    "NODE",
    "RULE",
    "RuleCounters",
    "event_from",
    "node_from",
    "rule_counters_from",
    "rule_from",
]

# Native byte order without padding: the structures have no holes. Ports and addresses are as on
# the wire.
RULE: Final = struct.Struct("=II36s2s6s16sIQQQQQQQQQQII")
NODE: Final = struct.Struct("=IIQQQ16s2sHI")
EVENT: Final = struct.Struct("=II36sIQQ")

_LOCKED: Final = 2
_NS: Final = 1e-9

COUNTERS: Final = (
    "hello",
    "add",
    "lock",
    "chown",
    "unlock",
    "delete",
    "get",
    "to_agent",
    "refused",
    "full",
    "bad_format",
    "bad_mac",
    "replay",
    "busy",
    "added",
    "deleted",
    "handoffs",
    "to_owner_packets",
    "to_owner_bytes",
    "to_client_packets",
    "to_client_bytes",
    "held",
    "dropped_locked",
    "dropped_owner",
    "dropped_stale",
    "syn_asked",
    "syn_dropped",
    "syn_passed",
    "rewrite_failed",
    "events_lost",
)
"""Names of the data plane's counters, in the order of ``enum prism_stat``."""

_address = lru_cache(4096)(unpack_address)


class RuleCounters(NamedTuple):
    """What a rule has seen: packets and octets (as on the switch's port, GSO packets whole).

    ``seen``, ``created`` and ``locked`` are seconds of CLOCK_MONOTONIC; ``locked`` is when the
    rule was last locked, 0 when never.
    """

    to_owner_packets: int
    to_owner_bytes: int
    to_client_packets: int
    to_client_bytes: int
    held: int
    held_total: int
    dropped: int
    seen: float
    created: float
    locked: float


def rule_from(value: bytes) -> Rule:
    """A rule from ``struct prism_rule``."""
    _, state, flow, port, mac, addr, _, owner, gen, cookie, *_ = RULE.unpack(value)
    endpoint = Endpoint(_address(addr), int.from_bytes(port, "big"))
    return Rule(flow, owner, endpoint, mac, gen, state == _LOCKED, cookie)


def rule_counters_from(value: bytes) -> RuleCounters:
    """The counters of ``struct prism_rule``."""
    fields = RULE.unpack(value)
    held = fields[6]
    packets_out, bytes_out, packets_in, bytes_in, seen, created, locked, total, drop = fields[10:]
    return RuleCounters(
        packets_out,
        bytes_out,
        packets_in,
        bytes_in,
        held,
        total,
        drop,
        seen * _NS,
        created * _NS,
        locked * _NS,
    )


def node_from(key: bytes, value: bytes, now_ns: int) -> Node:
    """A node from its id and ``struct prism_node``; ``now_ns`` is CLOCK_MONOTONIC."""
    _, lease_ms, _, _, hello_ns, addr, port, _, _ = NODE.unpack(value)
    return Node(
        int.from_bytes(key, sys.byteorder),
        Endpoint(_address(addr), int.from_bytes(port, "big")),
        lease_ms / 1000,
        max(0, now_ns - hello_ns) * _NS,
    )


def event_from(data: bytes) -> Event:
    """An event from ``struct prism_event``."""
    kind, held, flow, state, gen, owner = EVENT.unpack(data)
    return Event(kind, flow, state == _LOCKED, gen, owner, held)
