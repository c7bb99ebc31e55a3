"""What p4c made of the P4 program belongs to the program that is in the repository."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
from google.protobuf import text_format

from prism.switch.p4runtime_messages import p4_config

P4 = Path(__file__).parents[2] / "p4"
SOURCE = re.sub(r"/\*.*?\*/|//[^\n]*", "", (P4 / "prism.p4").read_text(), flags=re.DOTALL)
KINDS = {"exact": 2, "lpm": 3}  # MatchField.MatchType


@pytest.fixture(scope="module")
def p4info() -> p4_config.P4Info:
    return text_format.Parse((P4 / "prism.p4info.txtpb").read_text(), p4_config.P4Info())


@pytest.fixture(scope="module")
def bmv2() -> dict:
    return json.loads((P4 / "prism.json").read_text())


def declared(kind: str) -> dict[str, int]:
    """Name -> id of what the program declares with an ``@id``."""
    pattern = rf"@id\((0x[0-9a-f]{{8}})\)\s*{kind}\b[^;{{=]*?(\w+)\s*(?:\(\)|\(@id[^)]*|;|\{{)"
    return {name: int(id, 16) for id, name in re.findall(pattern, SOURCE)}


def tables() -> dict[str, str]:
    """Name -> body of the program's tables."""
    return dict(re.findall(r"table (\w+) \{(.*?)\n    \}\n", SOURCE, re.DOTALL))


def test_the_stamp_names_the_committed_files() -> None:
    lines = (P4 / "prism.stamp").read_text().splitlines()
    assert re.fullmatch(r"# p4c \d+(\.\d+)+.*", lines[0])
    stamped = dict(reversed(line.split("  ")) for line in lines[1:])
    assert sorted(stamped) == ["prism.json", "prism.p4", "prism.p4info.txtpb"]
    for name, digest in stamped.items():
        assert hashlib.sha256((P4 / name).read_bytes()).hexdigest() == digest, (
            f"p4/{name} is not what p4c was given, or made: run make in p4/"
        )


def test_every_table_action_and_counter_has_its_id(p4info: p4_config.P4Info) -> None:
    found = {t.preamble.alias: t.preamble.id for t in p4info.tables}
    assert len(found) == 12 == len(tables())
    assert found == declared("table")
    wanted = declared("action")
    for action in p4info.actions:
        if action.preamble.name != "NoAction":
            assert action.preamble.id == wanted[action.preamble.alias], action.preamble.alias
    found = {c.preamble.alias: c.preamble.id for c in (*p4info.direct_counters, *p4info.counters)}
    assert found == declared("direct_counter") | declared("counter")
    assert len(found) == 5


def test_match_fields_and_parameters_are_the_programs(p4info: p4_config.P4Info) -> None:
    bodies = tables()
    for table in p4info.tables:
        fields = re.findall(
            r": (exact|lpm) @id\((\d+)\) @name\(\"(\w+)\"\)", bodies[table.preamble.alias]
        )
        assert [(f.name, f.id, f.match_type) for f in table.match_fields] == [
            (name, int(id), KINDS[kind]) for kind, id, name in fields
        ]
    for action in p4info.actions:
        if action.preamble.name == "NoAction":
            continue
        text = re.search(rf"action {action.preamble.alias}\(([^{{]*)\) \{{", SOURCE)
        assert text is not None
        wanted = re.findall(r"@id\((\d+)\) (?:bit<(\d+)>|mac_t|port_t) (\w+)", text[1])
        assert [(p.name, p.id) for p in action.params] == [(n, int(i)) for i, _, n in wanted]
        for param, (_, bits, _) in zip(action.params, wanted, strict=True):
            assert not bits or param.bitwidth == int(bits)


def test_the_bmv2_json_has_the_p4infos_tables(p4info: p4_config.P4Info, bmv2: dict) -> None:
    made = {t["name"]: t for pipeline in bmv2["pipelines"] for t in pipeline["tables"]}
    names = {a.preamble.id: a.preamble.name for a in p4info.actions}
    for table in p4info.tables:
        twin = made[table.preamble.name]
        assert twin["id"] == made[table.preamble.name]["id"]
        assert twin["max_size"] == table.size
        assert [k["name"] for k in twin["key"]] == [f.name for f in table.match_fields]
        assert set(twin["actions"]) == {names[ref.id] for ref in table.action_refs}
        assert twin["with_counters"] is bool(table.direct_resource_ids)


def test_rules_find_room_for_a_million_flows(p4info: p4_config.P4Info) -> None:
    sizes = {t.preamble.alias: t.size for t in p4info.tables}
    assert sizes["to_owner_v4"] == sizes["to_owner_v6"] == 1 << 20
    assert sizes["to_client_v4"] == sizes["to_client_v6"] == 2 << 20  # the owner's and the guard
