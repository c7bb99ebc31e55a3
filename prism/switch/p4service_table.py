"""The P4 program's tables over the kernel's: what a P4Runtime server may change, and its checks.

The eBPF table has rules, not entries. A rule stands in it as long as its ``to_owner`` entry does;
it is locked unless the ``to_client`` entry of its owner lets that owner speak as the service, so
half a rule lets nothing through. Entries of ``to_client`` that belong to no rule are kept and
told, and change nothing. What the driver says of a rule in its metadata (owner, generation,
cookie, MAC) is stored in the rule; other metadata lasts as long as the process.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

from google.rpc import code_pb2 as codes

from prism.flow import Endpoint, unpack_address
from prism.switch.base import Rule
from prism.switch.control import Status
from prism.switch.ebpf import EbpfSwitch
from prism.switch.p4runtime_messages import p4
from prism.switch.p4runtime_pipeline import Field, Pipeline, RuleTable, Table
from prism.switch.p4runtime_rules import Codec, Facts, Key, Value, canonical

__all__ = ["EntryTable", "UpdateError"]

_SPEAKERS: Final = 4
_MAX_METADATA: Final = 1024  # octets of one entry
_MAPPED: Final = bytes(10) + b"\xff\xff"
_REFUSALS: Final = {
    Status.FULL: (codes.RESOURCE_EXHAUSTED, "the table is full"),
    Status.EXISTS: (
        codes.FAILED_PRECONDITION,
        "the owner's address and port serve another flow of this client",
    ),
    Status.INVALID: (codes.INVALID_ARGUMENT, "a port is zero, or the addresses make no sense"),
}


class UpdateError(Exception):
    """One update that is refused: a google.rpc code and a text."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


class _Undo(NamedTuple):
    key: Key
    value: Value | None


class EntryTable:
    """All entries, and the eBPF rules made of them. May be used from several threads.

    Args:
        store: the kernel's table; its rules are taken over.
        pipeline: the program.
    """

    def __init__(self, store: EbpfSwitch, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self._store = store
        self._codec = Codec(pipeline)
        self._lock = threading.RLock()
        self._entries: dict[int, dict[bytes, Value]] = {id: {} for id in self._codec.rule_tables}
        self._speakers: dict[Key, Key] = {}  # entry of to_client -> the rule that hangs on it
        for rule in store.rules():
            for key, value in self._codec.entries(rule).items():
                self._entries[key.table][key.match] = value
                if self._codec.is_rule(key):
                    self._speakers[self._codec.speaker(rule)] = key

    def __len__(self) -> int:
        return sum(map(len, self._entries.values()))

    # Changes

    def write(self, updates: Sequence[Any], *, rollback: bool = False) -> list[UpdateError | None]:
        """Carry out updates one after another; what is wrong with each.

        Args:
            updates: ``p4.v1.Update`` messages.
            rollback: undo all after the first error; those behind it are ABORTED.
        """
        results: list[UpdateError | None] = []
        undo: list[_Undo] = []
        with self._lock:
            for update in updates:
                try:
                    undo.append(self._update(update))
                    results.append(None)
                except UpdateError as error:
                    results.append(error)
                    if rollback:
                        break
            if rollback and any(results):
                for key, value in reversed(undo):
                    self._put(key, value)
                aborted = UpdateError(codes.ABORTED, "not carried out: another update failed")
                results = [aborted if result is None else result for result in results]
                results += [aborted] * (len(updates) - len(results))
        return results

    def clear(self) -> None:
        """Delete every entry and every rule."""
        with self._lock:
            for id, entries in self._entries.items():
                for match in list(entries):
                    self._put(Key(id, match), None)

    def _update(self, update: Any) -> _Undo:
        if not update.entity.HasField("table_entry"):
            kind = update.entity.WhichOneof("entity")
            raise UpdateError(
                codes.INVALID_ARGUMENT if kind is None else codes.UNIMPLEMENTED,
                f"only table entries can be written, not {kind or 'nothing'}",
            )
        entry = update.entity.table_entry
        key = self.key(entry)
        there = self._entries[key.table].get(key.match)
        if update.type == p4.Update.INSERT:
            if there is not None:
                raise UpdateError(codes.ALREADY_EXISTS, "there is an entry with this match")
            if len(self._entries[key.table]) >= self._room(key):
                raise UpdateError(codes.RESOURCE_EXHAUSTED, "the table is full")
            value: Value | None = self._value(entry)
        elif update.type in (p4.Update.MODIFY, p4.Update.DELETE):
            if there is None:
                raise UpdateError(codes.NOT_FOUND, "there is no entry with this match")
            value = self._value(entry) if update.type == p4.Update.MODIFY else None
        else:
            raise UpdateError(codes.INVALID_ARGUMENT, "an update is INSERT, MODIFY or DELETE")
        self._put(key, value)
        return _Undo(key, there)

    def _room(self, key: Key) -> int:
        """Entries that a table may have: of ``to_client`` a rule has two, a moved one more."""
        most = self._store.max_rules * (1 if self._codec.is_rule(key) else _SPEAKERS)
        return min(most, self.pipeline.tables[key.table].size)

    def _put(self, key: Key, value: Value | None) -> None:
        """Change one entry and the rule that it is part of; all or nothing."""
        entries = self._entries[key.table]
        before = entries.get(key.match)
        _set(entries, key.match, value)
        rule_key = key if self._codec.is_rule(key) else self._speakers.get(key)
        if rule_key is None:
            return
        try:
            self._project(rule_key)
        except UpdateError:
            _set(entries, key.match, before)
            raise

    # The rules

    def _project(self, key: Key) -> None:
        flow = self._codec.flow_of(key)
        there = self._store.get(flow)
        value = self._entries[key.table].get(key.match)
        if value is None:
            if there is not None:
                self._store.delete(flow, there.gen)
                self._speakers.pop(self._codec.speaker(there), None)
            return
        wanted = self._rule(key, value, flow, there)
        if there is not None and there.cookie != wanted.cookie:
            self._store.delete(flow, there.gen)
            self._speakers.pop(self._codec.speaker(there), None)
            there = None
        if there is None:
            status = self._store.add(wanted)
        elif there == wanted:
            status = Status.OK
        else:
            status = self._store.chown(there.gen, wanted)
        if status != Status.OK:
            raise UpdateError(*_REFUSALS.get(status, (codes.INTERNAL, f"{status.name}")))
        if there is not None:
            self._speakers.pop(self._codec.speaker(there), None)
        self._speakers[self._codec.speaker(wanted)] = key

    def _rule(self, key: Key, value: Value, flow: bytes, there: Rule | None) -> Rule:
        """The rule that an entry of ``to_owner`` asks for, with what its owner may say."""
        table, layout = self._codec.rule_tables[key.table]
        service = Endpoint(unpack_address(flow[16:32]), int.from_bytes(flow[34:36], "big"))
        facts = Facts.unpack(value.metadata)
        if value.action == table.rewrite:
            prefix = _MAPPED if layout.size == 4 else b""
            host = unpack_address(prefix + value.params[:-2])
            owner = Endpoint(host, int.from_bytes(value.params[-2:], "big"))
        elif value.action == table.let_pass:
            owner = service
        elif facts is not None:
            owner = facts.endpoint
        else:
            owner = there.owner_endpoint if there is not None else service
        rule = Rule(flow, 0, owner, bytes(6), there.gen if there else 0, False)
        if facts is not None:
            rule = rule._replace(
                owner=facts.owner, owner_mac=facts.mac, gen=facts.gen, cookie=facts.cookie
            )
        elif there is not None:
            rule = rule._replace(cookie=there.cookie)
        locked = value.action == table.lock or not self._may_speak(key, rule, layout.to_client)
        return rule._replace(locked=locked)

    def _may_speak(self, key: Key, rule: Rule, to_client: RuleTable) -> bool:
        speaker = self._codec.speaker(rule)
        value = self._entries[speaker.table].get(speaker.match)
        service = key.match[len(key.match) // 2 :]
        if value is None:
            return False
        if speaker.match[: len(service)] == service:
            return value.action == to_client.let_pass
        return value.action == to_client.rewrite and value.params == service

    # Reading

    def read(self, table: int, entry: Any | None = None) -> Iterator[tuple[Key, Value]]:
        """The entries of one table (0: of all), or the one that an entry names."""
        with self._lock:
            if entry is not None and entry.match:
                key = self.key(entry)
                value = self._entries[key.table].get(key.match)
                found = [] if value is None else [(key, value)]
            else:
                found = [
                    (Key(id, match), value)
                    for id, entries in self._entries.items()
                    if table in (0, id)
                    for match, value in entries.items()
                ]
        return iter(found)

    def counters(self, key: Key) -> tuple[int, int]:
        """Packets and octets that hit an entry, those that were locked out in neither."""
        rule_key = key if self._codec.is_rule(key) else self._speakers.get(key)
        counters = rule_key and self._store.get_counters(self._codec.flow_of(rule_key))
        if not counters:
            return 0, 0
        if self._codec.is_rule(key):
            return counters.to_owner_packets, counters.to_owner_bytes
        return counters.to_client_packets, counters.to_client_bytes

    def message(self, key: Key, value: Value) -> Any:
        """An entry as P4Runtime tells it."""
        return self._codec.entry(key, value)

    # Checks

    def table(self, id: int) -> Table:
        """One of the tables that entries may be of.

        Raises:
            UpdateError: there is no such table, or the soft switch does not have it.
        """
        table = self.pipeline.tables.get(id)
        if table is None:
            raise UpdateError(codes.NOT_FOUND, f"there is no table {id:#x}")
        if id not in self._entries:
            raise UpdateError(
                codes.UNIMPLEMENTED, f"{table.name}: the soft switch routes as its kernel does"
            )
        return table

    def key(self, entry: Any) -> Key:
        """Check what an entry matches.

        Raises:
            UpdateError: it is not a match of the table.
        """
        table = self.table(entry.table_id)
        if entry.is_default_action:
            raise UpdateError(codes.INVALID_ARGUMENT, f"{table.name}: its default is constant")
        if entry.priority:
            raise UpdateError(codes.INVALID_ARGUMENT, f"{table.name}: exact matches, no priority")
        given: dict[int, bytes] = {}
        for match in entry.match:
            if match.field_id in given:
                raise UpdateError(
                    codes.INVALID_ARGUMENT, f"{table.name}: field {match.field_id} is given twice"
                )
            if match.WhichOneof("field_match_type") != "exact":
                raise UpdateError(
                    codes.INVALID_ARGUMENT, f"{table.name}: field {match.field_id} wants exact"
                )
            given[match.field_id] = match.exact.value
        return Key(entry.table_id, _packed(table.name, "field", table.fields, given))

    def _value(self, entry: Any) -> Value:
        table = self.pipeline.tables[entry.table_id]
        for unwanted in ("meter_config", "time_since_last_hit", "meter_counter_data"):
            if entry.HasField(unwanted):
                raise UpdateError(codes.INVALID_ARGUMENT, f"{table.name}: has no {unwanted}")
        if entry.HasField("counter_data") and entry.counter_data != p4.CounterData():
            raise UpdateError(codes.UNIMPLEMENTED, "counters can only be read")
        if entry.idle_timeout_ns or entry.is_const:
            raise UpdateError(
                codes.INVALID_ARGUMENT, f"{table.name}: no idle time-outs, no constant entries"
            )
        if len(entry.metadata) > _MAX_METADATA:
            raise UpdateError(
                codes.RESOURCE_EXHAUSTED,
                f"{table.name}: at most {_MAX_METADATA} octets of metadata",
            )
        if entry.action.WhichOneof("type") != "action":
            raise UpdateError(codes.INVALID_ARGUMENT, f"{table.name}: an entry needs an action")
        told = entry.action.action
        action = table.actions.get(told.action_id)
        if action is None or action.id not in table.keyed:
            raise UpdateError(
                codes.INVALID_ARGUMENT, f"{table.name}: action {told.action_id:#x} is not for it"
            )
        given: dict[int, bytes] = {}
        for param in told.params:
            if param.param_id in given:
                raise UpdateError(
                    codes.INVALID_ARGUMENT, f"{action.name}: {param.param_id} is given twice"
                )
            given[param.param_id] = param.value
        params = _packed(action.name, "parameter", action.params, given)
        return Value(action.id, params, entry.metadata)


def _set(entries: dict[bytes, Value], match: bytes, value: Value | None) -> None:
    if value is None:
        entries.pop(match, None)
    else:
        entries[match] = value


def _packed(name: str, what: str, fields: Sequence[Field], given: dict[int, bytes]) -> bytes:
    """Values in the order of their fields, each as wide as its field.

    Raises:
        UpdateError: one is missing, unknown, empty or too wide.
    """
    packed = []
    for field in fields:
        value = given.get(field.id)
        if value is None:
            raise UpdateError(codes.INVALID_ARGUMENT, f"{name}: {what} {field.name} is missing")
        if not value:
            raise UpdateError(codes.INVALID_ARGUMENT, f"{name}: {what} {field.name} is empty")
        bits = field.bits
        if len(value) * 8 != bits:
            if int.from_bytes(value, "big") >> bits:
                raise UpdateError(
                    codes.OUT_OF_RANGE, f"{name}: {what} {field.name} has {bits} bits"
                )
            value = canonical(value).rjust(field.size, b"\0")
        packed.append(value)
    if len(given) != len(packed):
        unknown = min(given.keys() - {field.id for field in fields})
        raise UpdateError(codes.INVALID_ARGUMENT, f"{name}: no {what} {unknown}")
    return b"".join(packed)
