"""p4runtime-shell, as people use it, against the soft switch's service.

It has an environment of its own, which ``scripts/setup`` makes: it needs an older protobuf.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest
from p4_served import INSERT, Served, rule, serving
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from prism.flow import Endpoint
from prism.switch.ebpf import Settings

pytestmark = pytest.mark.net

SHELL = Path(sys.prefix) / "p4runtime-shell/bin/python"
PROMPT = "P4Runtime sh >>> "

SCRIPT = """
import sys
import p4runtime_sh.shell as sh
sh.setup(device_id=1, grpc_addr=sys.argv[1], election_id=(0, 99))
try:
    table = "PrismIngress.to_owner_" + sys.argv[2]
    entry = sh.TableEntry(table)(action="PrismIngress.send_to_owner_" + sys.argv[2])
    client, service, owner, second = sys.argv[3:]
    entry.match["client_addr"] = client
    entry.match["client_port"] = "1234"
    entry.match["service_addr"] = service
    entry.match["service_port"] = "80"
    entry.action["owner_addr"] = owner
    entry.action["owner_port"] = "4700"
    entry.insert()
    try:
        entry.insert()
    except Exception as error:
        print("TWICE", error)
    entry.action["owner_addr"] = second
    entry.modify()
    for found in sh.TableEntry(table).read():
        print("FOUND", found.match["client_port"], found.action.action_name)
        print(found.action["owner_addr"])
    entry.delete()
    print("LEFT", len(list(sh.TableEntry(table).read())))
finally:
    sh.teardown()
"""


@pytest.fixture
def served() -> Iterator[Served]:
    if not SHELL.exists():
        pytest.fail(f"{SHELL} is not there: run scripts/setup")
    with serving() as found:
        found.store.configure(Settings(bytes(16), (Endpoint("10.0.0.1", 4760),)))
        yield found


@pytest.mark.parametrize(
    ("family", "ends", "second"),
    [
        ("v4", ("198.51.100.9", "192.0.2.80", "10.50.3.2", "10.50.4.2"), r"\n2\004\002"),
        (
            "v6",
            ("2001:db8::9", "2001:db8::80", "fd50::2", "fd50::3"),
            r"\375P" + r"\000" * 13 + r"\003",
        ),
    ],
)
def test_a_script_inserts_modifies_reads_and_deletes(
    served: Served, family: str, ends: tuple[str, ...], second: str
) -> None:
    done = subprocess.run(
        [SHELL, "-c", SCRIPT, served.address, family, *ends],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "TWICE" in done.stdout and "ALREADY_EXISTS" in done.stdout, done.stdout
    found = done.stdout.partition("FOUND")[2]
    assert f"send_to_owner_{family}" in found and second in found, done.stdout
    assert "LEFT 0" in done.stdout


MESSAGES = """
import sys
sys.path.insert(0, sys.argv[1])
from prism.switch.p4runtime_messages import p4, p4_config
request = p4.WriteRequest(device_id=7, atomicity=p4.WriteRequest.ROLLBACK_ON_ERROR)
entry = request.updates.add(type=p4.Update.MODIFY).entity.table_entry
entry.match.add(field_id=2).lpm.prefix_len = 9
info = p4_config.P4Info(actions=[p4_config.Action(preamble=p4_config.Preamble(id=4, name="four"))])
print(request.SerializeToString().hex(), info.SerializeToString().hex())
"""


def test_messages_are_the_same_on_the_old_protobuf_and_on_ours() -> None:
    told = [
        subprocess.run(
            [python, "-c", MESSAGES, Path(__file__).parents[2]],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
        for python in (SHELL, sys.executable)
    ]
    assert told[0] == told[1] != ""


class Terminal:
    """The shell at a terminal."""

    def __init__(self, address: str, election: str, home: Path) -> None:
        self.child = pexpect.spawn(
            str(SHELL),
            ["-m", "p4runtime_sh", "--grpc-addr", address, "--election-id", election],
            timeout=40, encoding="utf-8", dimensions=(60, 240),
            env={"TERM": "dumb", "PATH": os.environ["PATH"], "HOME": str(home)},
        )  # fmt: skip
        self.child.expect_exact(PROMPT)

    def type(self, line: str) -> str:
        """What it answers."""
        self.child.sendline(line)
        self.child.expect_exact(PROMPT)
        return str(self.child.before)

    def leave(self) -> int | None:
        self.child.sendline("exit")
        self.child.expect_exact(pexpect.EOF)
        self.child.close()
        code: int | None = self.child.exitstatus
        return code


RULE = [
    'own = table_entry["to_client_v4"](action="speak_as_service_v4")',
    'own.match["owner_addr"] = "10.50.3.2"; own.match["owner_port"] = "4700"',
    'own.match["client_addr"] = "198.51.100.7"; own.match["client_port"] = "1000"',
    'own.action["service_addr"] = "192.0.2.80"; own.action["service_port"] = "80"',
    "own.insert()",
    'te = table_entry["to_owner_v4"](action="send_to_owner_v4")',
    'te.match["client_addr"] = "198.51.100.7"; te.match["client_port"] = "1000"',
    'te.match["service_addr"] = "192.0.2.80"; te.match["service_port"] = "80"',
    'te.action["owner_addr"] = "10.50.3.2"; te.action["owner_port"] = "4700"',
    "te.insert()",
]


def test_somebody_at_a_terminal_makes_a_rule_that_packets_follow(
    served: Served, tmp_path: Path
) -> None:
    packet = Ether() / IP(src="198.51.100.7", dst="192.0.2.80") / TCP(sport=1000, flags="A")
    program = served.store._object.program_fd("prism_switch")
    at = Terminal(served.address, "0,99", tmp_path)
    try:
        assert "to_owner_v4" in at.type("tables")
        assert "size: 1048576" in at.type('tables["to_owner_v4"].info()')
        for line in RULE:
            told = at.type(line)
            assert "rror" not in told, told
        (made,) = served.state()
        assert made == rule()._replace(
            owner=0, owner_mac=bytes(6), gen=made.gen, cookie=made.cookie
        )
        _, out = served.store._object.run(program, bytes(packet))
        assert Ether(out)[IP].dst == "10.50.3.2"
        told = at.type('te.counter_data; te.read(lambda e: print("PACKETS", e.counter_data))')
        assert "packet_count: 1" in told.partition("PACKETS")[2], told
        told = at.type('table_entry["to_client_v4"].read(lambda e: print(e))')
        assert "speak_as_service_v4" in told, told
        assert "INVALID_ARGUMENT" in at.type("te.priority = 3; te.modify()")
        at.type("te.priority = 0; te.delete(); own.delete()")
        assert served.state() == []
        assert at.leave() == 0
    finally:
        at.child.close(force=True)


def test_somebody_who_is_not_the_primary_may_look_and_change_nothing(
    served: Served, tmp_path: Path
) -> None:
    served.write(*served.updates(INSERT, rule()))
    at = Terminal(served.address, "0,1", tmp_path)
    try:
        told = at.type('te = table_entry["to_owner_v4"]; te.read(lambda e: print(e))')
        assert "send_to_owner_v4" in told, told
        at.type("found = list(te.read())[0]")
        assert "PERMISSION_DENIED" in at.type("found.delete()")
        assert served.state() == [rule()]
        assert at.leave() == 0
    finally:
        at.child.close(force=True)
