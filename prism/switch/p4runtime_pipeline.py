"""The P4 program as a controller knows it: its p4info, and the names the driver goes by.

The driver and the service look everything up by name, so the numbers are the program's alone.
Needs the extra ``prism-proxy[p4]``.
"""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path
from typing import Any, Final, NamedTuple

from google.protobuf import text_format

from prism.errors import ConfigError
from prism.switch.p4runtime_messages import p4_config

__all__ = [
    "Action",
    "Field",
    "Layout",
    "Pipeline",
    "RuleTable",
    "Table",
    "load",
]

_NAME: Final = "prism.p4info.txtpb"
_FAMILIES: Final = ((4, "v4"), (16, "v6"))


class Field(NamedTuple):
    """A match field or an action parameter: its id, name, width in bits and kind of match."""

    id: int
    name: str
    bits: int
    match: str = ""

    @property
    def size(self) -> int:
        """Octets that hold any value."""
        return (self.bits + 7) // 8


class Action(NamedTuple):
    """One action: its id, name and parameters."""

    id: int
    name: str
    params: tuple[Field, ...]


class Table(NamedTuple):
    """One table.

    ``actions`` are by id; ``counter`` is the id of its direct counter, 0: none; ``keyed`` those
    actions that an entry may have (the others are for the default entry only).
    """

    id: int
    name: str
    fields: tuple[Field, ...]
    actions: dict[int, Action]
    keyed: frozenset[int]
    counter: int
    size: int


class RuleTable(NamedTuple):
    """One of the four tables that rules are made of.

    Attributes:
        table: the table: (address, port, address, port), matched exactly.
        rewrite: id of the action with an address and a port.
        let_pass: id of the action ``pass``: forward as it is.
        lock: id of the action ``lock``: drop, and count.
    """

    table: Table
    rewrite: int
    let_pass: int
    lock: int


class Layout(NamedTuple):
    """The two tables of one address family, ``size`` octets an address."""

    size: int
    to_owner: RuleTable
    to_client: RuleTable


class Pipeline:
    """A program: its p4info, its device configuration and the cookie that names both.

    Args:
        p4info: the parsed p4info.
        device_config: what the target runs (bmv2: the JSON); empty for the soft switch.

    Attributes:
        tables: by id.
        layouts: (IPv4, IPv6).
        bare_syn: table and action whose default has the controller asked about bare SYNs on flows
            with a rule; ``None``: the program has no such table.

    Raises:
        ConfigError: it is not a program that the driver can use; the message says why.
    """

    def __init__(self, p4info: Any, device_config: bytes = b"") -> None:
        self.p4info = p4info
        self.device_config = device_config
        self.serialized: bytes = p4info.SerializeToString(deterministic=True)
        digest = hashlib.blake2b(self.serialized + device_config, digest_size=8)
        self.cookie = int.from_bytes(digest.digest(), "big") or 1
        actions = {action.preamble.id: _action(action) for action in p4info.actions}
        counters = {
            counter.direct_table_id: counter.preamble.id for counter in p4info.direct_counters
        }
        self.tables = {
            table.preamble.id: _table(table, actions, counters.get(table.preamble.id, 0))
            for table in p4info.tables
        }
        self.layouts = tuple(
            Layout(
                size,
                self._rule_table(f"to_owner_{family}", size),
                self._rule_table(f"to_client_{family}", size),
            )
            for size, family in _FAMILIES
        )
        self.bare_syn = self._asking()
        self.packet_in = self._header("packet_in")
        self.packet_out = self._header("packet_out")

    def table(self, name: str) -> Table:
        """A table by name, with or without the block's name before it.

        Raises:
            ConfigError: there is none.
        """
        for table in self.tables.values():
            if table.name == name or table.name.endswith(f".{name}"):
                return table
        known = ", ".join(table.name for table in self.tables.values())
        raise ConfigError(f"p4info: no table {name!r}, only {known}")

    def _rule_table(self, name: str, size: int) -> RuleTable:
        table = self.table(name)
        widths = [field.bits for field in table.fields]
        if widths != [8 * size, 16] * 2 or any(field.match != "EXACT" for field in table.fields):
            raise ConfigError(
                f"p4info: {table.name} has to match an address, a port, an address and a port "
                f"exactly; its fields have {widths} bits"
            )
        rewrite = [
            action.id
            for action in table.actions.values()
            if action.id in table.keyed
            and [param.bits for param in action.params] == [8 * size, 16]
        ]
        if len(rewrite) != 1:
            raise ConfigError(
                f"p4info: {table.name} needs one action whose parameters are an address and a port"
            )
        return RuleTable(table, rewrite[0], _plain(table, "pass"), _plain(table, "lock"))

    def _asking(self) -> tuple[int, int] | None:
        for table in self.tables.values():
            if table.name.rpartition(".")[2] == "bare_syn":
                return table.id, _plain(table, "syn_to_cpu")
        return None

    def _header(self, name: str) -> tuple[Field, ...] | None:
        for header in self.p4info.controller_packet_metadata:
            if header.preamble.name == name:
                return tuple(Field(m.id, m.name, m.bitwidth) for m in header.metadata)
        return None


def _plain(table: Table, name: str) -> int:
    """The id of an action without parameters, by the last part of its name."""
    for action in table.actions.values():
        if action.name.rpartition(".")[2] == name and not action.params:
            return action.id
    known = ", ".join(action.name for action in table.actions.values())
    raise ConfigError(f"p4info: {table.name} has no action {name} without parameters, only {known}")


def _action(info: Any) -> Action:
    params = tuple(Field(p.id, p.name, p.bitwidth) for p in info.params)
    return Action(info.preamble.id, info.preamble.name, params)


def _table(info: Any, actions: dict[int, Action], counter: int) -> Table:
    kinds = p4_config.MatchField.MatchType
    return Table(
        info.preamble.id,
        info.preamble.name,
        tuple(Field(f.id, f.name, f.bitwidth, kinds.Name(f.match_type)) for f in info.match_fields),
        {ref.id: actions[ref.id] for ref in info.action_refs},
        frozenset(
            ref.id for ref in info.action_refs if ref.scope != p4_config.ActionRef.DEFAULT_ONLY
        ),
        counter,
        info.size,
    )


def load(p4info: Path | None = None, device_config: Path | None = None) -> Pipeline:
    """Read a program; by default the packaged p4info, without a device configuration.

    Raises:
        ConfigError: a file cannot be read, or is no p4info that the driver can use.
    """
    message = p4_config.P4Info()
    try:
        text = packaged().read_text("utf-8") if p4info is None else p4info.read_text("utf-8")
        config = device_config.read_bytes() if device_config else b""
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be read: {error.strerror}") from None
    try:
        text_format.Parse(text, message)
    except text_format.ParseError as error:
        raise ConfigError(f"{p4info or 'packaged p4info'}: is not a p4info: {error}") from None
    return Pipeline(message, config)


def packaged() -> Any:
    """The p4info that comes with Prism: in the wheel, or in the checkout."""
    shipped = resources.files("prism") / "_p4" / _NAME
    return shipped if shipped.is_file() else Path(__file__).parents[2] / "p4" / _NAME
