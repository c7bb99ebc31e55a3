"""``prism-proxy switch rules`` over each data plane: what is listed is what was put there."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from p4_bed import make_world
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether
from switch_bed import bpffs

from prism._ext.bpf import BpfError, PinnedMap
from prism.cli import main
from prism.config import load
from prism.flow import Endpoint, Flow
from prism.switch.base import Change, Rule
from prism.switch.client import SwitchClient
from prism.switch.control import Op, Status, node_id
from prism.switch.ebpf import EbpfSwitch
from prism.switch.server import SwitchServer

pytestmark = pytest.mark.net
CLIENT, CLIENT6 = Endpoint("198.51.100.1", 4242), Endpoint("2001:db8::c", 4242)
SERVICE, SERVICE6 = Endpoint("192.0.2.80", 80), Endpoint("2001:db8:80::80", 80)
OWNER = Endpoint("10.50.3.2", 4700)
KEY = "00112233445566778899aabbccddeeff"
ROWS = [
    {
        "flow": str(Flow(CLIENT, SERVICE)),
        "owner": "be1/1",
        "owner_endpoint": str(OWNER),
        "state": "active",
        "generation": 7,
        "packets_to_owner": 2,
        "packets_to_client": 1,
    },
    {
        "flow": str(Flow(CLIENT6, SERVICE6)),
        "owner": "0000000000000005",
        "owner_endpoint": str(SERVICE6),
        "state": "locked",
        "generation": 9,
        "packets_to_owner": 0,
        "packets_to_client": 0,
    },
]
RULES = [
    Rule(Flow(CLIENT, SERVICE).pack(), node_id("be1/1"), OWNER, bytes(6), 7, False, 3),
    Rule(Flow(CLIENT6, SERVICE6).pack(), 5, SERVICE6, bytes(6), 9, True, 4),
]


@pytest.fixture(autouse=True)
def _root() -> None:
    if os.geteuid() != 0:
        pytest.fail("this test loads eBPF programs and needs root")


def write(directory: Path, switch: str, control: str = "10.50.0.1:4760") -> Path:
    path = directory / "prism.toml"
    path.write_text(
        f"""
[cluster]
key = "{KEY}"
pki_dir = "{directory}"
control = "{control}"
[[nodes]]
name = "be1"
address = "10.50.3.2"
workers = 2
[switch]
{switch}
"""
    )
    return path


def prism(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


def listed(path: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    code = prism("switch", "rules", "-c", str(path), "--json")
    told = capsys.readouterr()
    assert code == 0, told.err
    found = json.loads(told.out)
    return sorted(found, key=lambda rule: rule["generation"])


def count_packets(store: EbpfSwitch) -> None:
    """Two packets of the IPv4 flow to the owner, one from it."""
    program = store._object.program_fd("prism_switch")
    there, back = (
        bytes(Ether() / IP(src=a.host, dst=b.host) / TCP(sport=a.port, dport=b.port, flags="A"))
        for a, b in ((CLIENT, SERVICE), (OWNER, CLIENT))
    )
    for packet in (there, there, back):
        assert store._object.run(program, packet)[0] == 0


@pytest.fixture
def pins() -> Iterator[Path]:
    with bpffs() as found:
        yield found / "prism"


def test_the_kernels_table(pins: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, f'pin_dir = "{pins}"\ninterfaces = ["eth0"]')
    assert prism("switch", "rules", "-c", str(path)) == 1
    said = capsys.readouterr().err
    assert f"cannot open {pins}/rules: No such file or directory" in said
    assert said.count("\n") == 1
    assert not pins.exists()
    with contextlib.closing(EbpfSwitch(pins, max_rules=64)) as store:
        assert listed(path, capsys) == []
        for rule in RULES:
            assert store.add(rule) == Status.OK
        count_packets(store)
        before = {pin.name: pin.stat().st_ino for pin in pins.iterdir()}
        assert listed(path, capsys) == ROWS
        assert {pin.name: pin.stat().st_ino for pin in pins.iterdir()} == before
        assert prism("switch", "rules", "-c", str(path)) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split() == (
            ["flow", "owner", "endpoint", "state", "generation", "to", "owner", "to", "client"]
        )
        assert lines[-1] == "2 rules"
        values = {tuple(line.split()) for line in lines[1:-1]}
        assert values == {tuple(str(value) for value in row.values()) for row in ROWS}


def test_a_pinned_map_is_read_only_and_leaves_nothing_open(pins: Path) -> None:
    with contextlib.closing(EbpfSwitch(pins, max_rules=64)) as store:
        assert store.add(RULES[0]) == Status.OK
        before = len(list(Path("/proc/self/fd").iterdir()))
        for number in range(200):
            table = PinnedMap(pins / "rules", locked=True)
            if number % 2:
                table.close()
                with pytest.raises(ValueError, match="closed"):
                    table.get(RULES[0].flow)
        with pytest.raises(BpfError):
            table_of_programs = PinnedMap(pins / "nothing")
            del table_of_programs
        del table
        assert len(list(Path("/proc/self/fd").iterdir())) == before
        table = PinnedMap(pins / "rules", locked=True)
        value = table.get(RULES[0].flow)
        assert value is not None
        with pytest.raises(BpfError, match="Operation not permitted"):
            table.put(RULES[0].flow, value)
        with pytest.raises(BpfError, match="Operation not permitted"):
            table.remove(RULES[0].flow)
        assert store.get(RULES[0].flow) == RULES[0]


async def test_a_p4runtime_switch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with make_world() as world:
        address = world.address
        path = write(tmp_path, f'kind = "p4runtime"\np4runtime_address = "{address}"')
        controller = await world.join()
        await controller.ready()
        await controller.change(*(Change(rule.flow, None, rule) for rule in RULES))
        count_packets(world.served)
        assert await asyncio.to_thread(listed, path, capsys) == ROWS
        assert controller.driver.ready, "the list has disturbed the primary"
    await asyncio.to_thread(prism, "switch", "rules", "-c", str(path))
    assert (
        f"the P4Runtime switch at {address} cannot be reached: Connection refused"
        in capsys.readouterr().err
    )


async def test_the_userspace_switch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = load(write(tmp_path, 'kind = "userspace"')).cluster.control_key()
    here = Endpoint("127.0.0.1", 0)
    server = SwitchServer(here, key)
    await server.start()
    client = SwitchClient("be1/1", server.endpoint, key, here, mac=bytes(6), lease=60.0)
    try:
        await client.start()
        for rule in RULES:
            answer = await client.request(
                Op.ADD, rule.flow, locked=rule.locked, endpoint=rule.owner_endpoint
            )
            assert answer is not None
            assert answer.status == Status.OK
        path = write(tmp_path, 'kind = "userspace"', str(server.endpoint))
        found = await asyncio.to_thread(listed, path, capsys)
        assert [rule["packets_to_owner"] for rule in found] == [None, None]
        for rule, row in zip(found, ROWS, strict=True):
            assert {key: rule[key] for key in ("flow", "owner_endpoint", "state")} == {
                key: row[key] for key in ("flow", "owner_endpoint", "state")
            }
            assert rule["owner"] == "be1/1"
    finally:
        await client.close()
        await server.close()
