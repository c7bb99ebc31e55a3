"""The Python side's idea of the kernel's structures is that of ``prism_abi.h``."""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path

import pytest

from prism._ext import bpf
from prism.switch import ebpf, records

HEADER = Path(records.__file__).parents[1] / "_ext/bpf/prism_abi.h"

# field of the structure -> index in the tuple that struct.unpack gives
FIELDS = {
    "prism_rule": (
        records.RULE,
        "lock state flow owner_port owner_mac owner_addr held owner gen cookie to_owner_packets "
        "to_owner_bytes to_client_packets to_client_bytes seen_ns created_ns locked_ns held_total "
        "dropped",
    ),
    "prism_node": (
        records.NODE,
        "lock lease_ms highest window hello_ns addr port reserved ifindex",
    ),
    "prism_event": (records.EVENT, "kind held flow state gen owner"),
    "prism_config": (
        ebpf._CONFIG,
        "table_version hold_ifindex incarnation key[0] key[1] control_v4 control_v6 control_port "
        "reserved lease_max_ms",
    ),
    "prism_msg": (
        ebpf._MESSAGE,
        "magic version op status flags node seq flow owner_port owner_mac reserved owner_addr "
        "owner gen cookie mac",
    ),
}


def offsets(form: str) -> list[int]:
    """Where each field of a padding-free ``struct`` format begins, and the end."""
    prefix, codes = form[0], re.findall(r"\d+s|[A-Z]", form[1:])
    return [struct.calcsize(prefix + "".join(codes[:count])) for count in range(len(codes) + 1)]


@pytest.mark.parametrize("name", FIELDS)
def test_fields_are_where_the_header_puts_them(name: str, tmp_path: Path) -> None:
    layout, names = FIELDS[name]
    lines = [f'printf("%zu ", offsetof(struct {name}, {field}));' for field in names.split()]
    source = tmp_path / "offsets.c"
    source.write_text(
        f'#include <stddef.h>\n#include <stdio.h>\n#include "{HEADER}"\n'
        f'int main(void) {{ {"".join(lines)} printf("%zu", sizeof(struct {name})); }}\n'
    )
    program = tmp_path / "offsets"
    subprocess.run(["gcc", "-std=gnu11", "-o", program, source], check=True)
    output = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    assert offsets(layout.format) == [int(number) for number in output.split()]


def test_counters_are_named_in_the_headers_order() -> None:
    names = re.findall(r"^\tPRISM_STAT_(\w+),", HEADER.read_text(), re.MULTILINE)
    assert [name.lower() for name in names] == [*records.COUNTERS, "count"]
    assert len(records.COUNTERS) == bpf.STAT_COUNT
    assert records.EVENT.size == bpf.EVENT_SIZE
