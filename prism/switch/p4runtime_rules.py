"""Rules as entries of the P4 program's tables, and back; sans-I/O.

A rule of flow (client C, service S) with owner O is up to three entries::

    to_client (O, C)   speak_as_service(S) | lock      only where O is not S
    to_client (S, C)   pass while S itself owns the flow and is unlocked, else lock
    to_owner  (C, S)   send_to_owner(O) | pass (O is S) | lock

Without the second, what a frozen frontend still acknowledges would reach the client. The last one
is written last, carries the rule's facts as metadata, and *is* the rule: an entry of ``to_client``
without it lets nobody receive anything, so a batch that is cut off is safe wherever it is cut.
A former owner's entry stays as ``lock`` for a moment (:data:`LINGER`): what its frozen socket
still sends must not leave un-rewritten.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from prism.flow import Endpoint, pack_address, unpack_address
from prism.switch.base import Rule
from prism.switch.p4runtime_messages import p4
from prism.switch.p4runtime_pipeline import Layout, Pipeline, RuleTable

__all__ = ["LINGER", "OURS", "Codec", "Facts", "Key", "Value", "canonical", "difference"]

LINGER: Final = 2.0
"""Seconds that a former owner's entry stays, locked."""

OURS: Final = b"\x01"
"""Metadata of an entry of ``to_client`` that the driver made."""

_MAPPED: Final = bytes(10) + b"\xff\xff"
_FACTS: Final = struct.Struct("!BB6s16sHQQQQ")
_VERSION: Final = 1
_LOCKED: Final = 1


class Key(NamedTuple):
    """An entry's table and its match fields, one after another."""

    table: int
    match: bytes


class Value(NamedTuple):
    """An entry's action, its parameters one after another, and metadata."""

    action: int
    params: bytes = b""
    metadata: bytes = b""


class Facts(NamedTuple):
    """What an entry of ``to_owner`` says of its rule in its metadata."""

    owner: int
    endpoint: Endpoint
    mac: bytes
    gen: int
    cookie: int
    locked: bool
    incarnation: int = 0

    def pack(self) -> bytes:
        """58 octets."""
        return _FACTS.pack(
            _VERSION,
            _LOCKED if self.locked else 0,
            self.mac,
            pack_address(self.endpoint.host),
            self.endpoint.port,
            self.owner,
            self.gen,
            self.cookie,
            self.incarnation,
        )

    @classmethod
    def unpack(cls, data: bytes) -> Facts | None:
        """The inverse; ``None``: somebody else's metadata."""
        if len(data) != _FACTS.size or data[0] != _VERSION:
            return None
        _, flags, mac, address, port, owner, gen, cookie, incarnation = _FACTS.unpack(data)
        endpoint = Endpoint(unpack_address(address), port)
        return cls(owner, endpoint, mac, gen, cookie, bool(flags & _LOCKED), incarnation)


def canonical(value: bytes) -> bytes:
    """The shortest form of a number (P4Runtime specification, section 8.4)."""
    return value.lstrip(b"\0") or b"\0"


class Codec:
    """Translates for one program.

    Args:
        pipeline: the program.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self._v4, self._v6 = pipeline.layouts
        self.rule_tables: dict[int, tuple[RuleTable, Layout]] = {
            table.table.id: (table, layout)
            for layout in pipeline.layouts
            for table in (layout.to_owner, layout.to_client)
        }

    # Rules

    def entries(self, rule: Rule, incarnation: int = 0) -> dict[Key, Value]:
        """The entries of a rule, in the order to write them."""
        flow = rule.flow
        layout, cut = (self._v4, 12) if flow.startswith(_MAPPED) else (self._v6, 0)
        client = flow[cut:16] + flow[32:34]
        service = flow[16 + cut : 32] + flow[34:36]
        packed = pack_address(rule.owner_endpoint.host)
        owner = packed[cut:] + rule.owner_endpoint.port.to_bytes(2, "big")
        to_owner, to_client = layout.to_owner, layout.to_client
        here = owner == service
        found: dict[Key, Value] = {}
        lock = Value(to_client.lock, b"", OURS)
        if not here:
            speak = Value(to_client.rewrite, service, OURS)
            found[Key(to_client.table.id, owner + client)] = lock if rule.locked else speak
        may_pass = here and not rule.locked
        guard = Value(to_client.let_pass, b"", OURS) if may_pass else lock
        found[Key(to_client.table.id, service + client)] = guard
        facts = Facts(
            rule.owner,
            rule.owner_endpoint,
            rule.owner_mac,
            rule.gen,
            rule.cookie,
            rule.locked,
            incarnation,
        ).pack()
        if rule.locked:
            value = Value(to_owner.lock, b"", facts)
        elif here:
            value = Value(to_owner.let_pass, b"", facts)
        else:
            value = Value(to_owner.rewrite, owner, facts)
        found[Key(to_owner.table.id, client + service)] = value
        return found

    def speaker(self, rule: Rule) -> Key:
        """The entry of ``to_client`` that a rule's owner speaks by: the first of its entries."""
        flow = rule.flow
        layout, cut = (self._v4, 12) if flow.startswith(_MAPPED) else (self._v6, 0)
        port = rule.owner_endpoint.port.to_bytes(2, "big")
        owner = pack_address(rule.owner_endpoint.host)[cut:] + port
        return Key(layout.to_client.table.id, owner + flow[cut:16] + flow[32:34])

    def is_rule(self, key: Key) -> bool:
        """Whether an entry is of ``to_owner``."""
        known = self.rule_tables.get(key.table)
        return known is not None and known[1].to_owner is known[0]

    def flow_of(self, key: Key) -> bytes:
        """The packed flow of an entry of ``to_owner``."""
        size = self.rule_tables[key.table][1].size
        match = key.match
        prefix = _MAPPED if size == 4 else b""
        client, service = match[: size + 2], match[size + 2 :]
        return prefix + client[:-2] + prefix + service[:-2] + client[-2:] + service[-2:]

    def rule_of(self, key: Key, value: Value) -> tuple[Rule, int] | None:
        """The rule that an entry of ``to_owner`` is, and its incarnation; ``None``: not ours."""
        facts = Facts.unpack(value.metadata)
        if facts is None:
            return None
        rule = Rule(
            self.flow_of(key),
            facts.owner,
            facts.endpoint,
            facts.mac,
            facts.gen,
            facts.locked,
            facts.cookie,
        )
        return rule, facts.incarnation

    # Messages

    def entry(self, key: Key, value: Value | None) -> Any:
        """A ``TableEntry``; without a value only what names it."""
        return self._fill(p4.TableEntry(), key, value)

    def _fill(self, entry: Any, key: Key, value: Value | None) -> Any:
        table = self.pipeline.tables[key.table]
        entry.table_id = key.table
        at = 0
        for field in table.fields:
            match = entry.match.add(field_id=field.id)
            match.exact.value = canonical(key.match[at : at + field.size])
            at += field.size
        if value is not None:
            action = entry.action.action
            action.action_id = value.action
            at = 0
            for param in table.actions[value.action].params:
                octets = canonical(value.params[at : at + param.size])
                action.params.add(param_id=param.id, value=octets)
                at += param.size
            entry.metadata = value.metadata
        return entry

    def update(self, kind: int, key: Key, value: Value | None) -> Any:
        """An ``Update`` of a write."""
        update = p4.Update()
        self.fill(kind, key, value, update)
        return update

    def fill(self, kind: int, key: Key, value: Value | None, update: Any) -> None:
        """The same, in a message that is there."""
        update.type = kind
        self._fill(update.entity.table_entry, key, value)

    def parse(self, entry: Any) -> tuple[Key, Value]:
        """A ``TableEntry`` that a switch told, of one of the rule tables."""
        table = self.pipeline.tables[entry.table_id]
        matches = {match.field_id: match.exact.value for match in entry.match}
        match = b"".join(matches[field.id].rjust(field.size, b"\0") for field in table.fields)
        told = entry.action.action
        values = {param.param_id: param.value for param in told.params}
        params = b"".join(
            values[param.id].rjust(param.size, b"\0")
            for param in table.actions[told.action_id].params
        )
        return Key(entry.table_id, match), Value(told.action_id, params, entry.metadata)


def difference(
    known: Mapping[Key, Value], wanted: Mapping[Key, Value]
) -> list[tuple[int, Key, Value]]:
    """The inserts and modifications that bring ``known`` to ``wanted``, in its order."""
    changes: list[tuple[int, Key, Value]] = []
    for key, value in wanted.items():
        there = known.get(key)
        if there is None:
            changes.append((p4.Update.INSERT, key, value))
        elif there != value:
            changes.append((p4.Update.MODIFY, key, value))
    return changes
