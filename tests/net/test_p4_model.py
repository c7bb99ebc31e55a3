"""The reference model of the P4 program and the eBPF switch treat the same packets alike.

The classifier runs in the kernel (BPF_PROG_TEST_RUN); rules become entries of the P4 tables as the
driver makes them.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from p4_model import CPU_PORT, REASON_BARE_SYN, REASON_HOPS, REASON_LOCAL, Call, Model, Out
from scapy.layers.inet import IP, TCP, UDP, IPOption_RR
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Packet, Raw
from switch_bed import bpffs

from prism.flow import Endpoint, Flow
from prism.switch.base import Rule
from prism.switch.control import Status, node_id
from prism.switch.ebpf import EbpfSwitch, Settings
from prism.switch.p4runtime_pipeline import load
from prism.switch.p4runtime_rules import Codec

pytestmark = pytest.mark.net

UNTOUCHED, OK, SHOT = -1, 0, 2  # linux/pkt_cls.h
NODE = node_id("be1/0")
HERE, THERE, ROUTER = "02:00:00:00:00:01", "02:00:00:00:00:02", "02:00:00:00:00:fe"
_ports = itertools.count(2000)
_codec = Codec(load())


@pytest.fixture(scope="module")
def switch() -> Iterator[EbpfSwitch]:
    with bpffs() as pins:
        switch = EbpfSwitch(pins / "prism", max_rules=4096)
        control = Endpoint("10.0.0.1", 4760), Endpoint("fd00::1", 4760)
        switch.configure(Settings(os.urandom(16), control))
        yield switch
        switch.close()


def number(mac: str) -> int:
    return int(mac.replace(":", ""), 16)


def entries(rules: list[Rule]) -> dict[tuple[str, tuple[int, ...]], Call]:
    """What the driver would write, in the model's terms."""

    def cut(fields: Any, octets: bytes) -> tuple[int, ...]:
        found = []
        for one in fields:
            found.append(int.from_bytes(octets[: one.size], "big"))
            octets = octets[one.size :]
        return tuple(found)

    found = {}
    for rule in rules:
        for key, value in _codec.entries(rule).items():
            table = _codec.pipeline.tables[key.table]
            action = table.actions[value.action]
            name = table.name.rpartition(".")[2], cut(table.fields, key.match)
            found[name] = Call(action.name.rpartition(".")[2], cut(action.params, value.params))
    return found


def bridging(rules: list[Rule]) -> Model:
    """A switch that only bridges, as the classifier alone leaves MAC addresses and TTL alone."""
    model = Model({"bridge": {(number(THERE),): Call("out_by", (2,))}})
    model.rules(entries(rules))
    return model


CLIENT = {4: "198.51.100.1", 6: "2001:db8::c"}
SERVICE = {4: "192.0.2.80", 6: "2001:db8:80::80"}
OWNER = {4: "10.9.8.7", 6: "fd00:9::8:7"}


class Case:
    """A flow, with a rule or without; its three ends."""

    def __init__(self, family: int, state: str, service_port: int, owner_port: int) -> None:
        self.family, self.state = family, state
        self.client = Endpoint(CLIENT[family], 1024 + next(_ports) % 60000)
        self.service = Endpoint(SERVICE[family], service_port)
        at_service = state.startswith("frontend")
        self.owner = self.service if at_service else Endpoint(OWNER[family], owner_port)
        self.flow = Flow(self.client, self.service).pack()
        self.rules = [] if state == "none" else [self._rule(state.endswith("locked"))]

    def _rule(self, locked: bool) -> Rule:
        return Rule(self.flow, NODE, self.owner, bytes(6), 0, locked, 1)


def tcp_packet(case: Case, direction: str, draw: dict[str, Any]) -> Packet:
    ends = {
        "client": (case.client, case.service),
        "owner": (case.owner, case.client),
        "service": (case.service, case.client),
        "stranger": (case.client._replace(port=7), case.service),
    }
    source, to = ends[direction]
    packet = Ether(src=HERE, dst=THERE)
    if draw["vlan"]:
        packet /= Dot1Q(vlan=draw["vlan"])
    kind = draw["kind"]
    if case.family == 4:
        ip = IP(src=source.host, dst=to.host, ttl=draw["ttl"], tos=draw["tos"], id=draw["id"])
        if draw["options"]:
            ip.options = [IPOption_RR(length=11, routers=["0.0.0.0"] * 2)]
        if kind == "fragment":
            ip.flags, ip.frag = draw["fragment"]
        if kind == "bad header":
            ip.chksum = draw["check"]
        packet /= ip
    else:
        packet /= IPv6(src=source.host, dst=to.host, hlim=draw["ttl"], tc=draw["tos"])
        if kind == "fragment":
            packet /= IPv6ExtHdrFragment(offset=draw["fragment"][1], m=1, id=draw["id"])
        if kind == "extension":
            packet /= IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt()
    tcp = TCP(sport=source.port, dport=to.port, flags=draw["flags"], seq=draw["seq"], ack=2)
    if draw["mss"]:
        tcp.options = [("MSS", 1460), ("Timestamp", (draw["seq"], 0))]
    if kind == "bad checksum":
        tcp.chksum = draw["check"]
    return packet / tcp / Raw(draw["payload"])


u16 = st.integers(0, 0xFFFF)
ports = st.integers(1, 0xFFFF)
draws = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(
            ["plain", "plain", "plain", "bad checksum", "fragment", "bad header", "extension"]
        ),
        "flags": st.sampled_from(["A", "PA", "S", "SA", "SEC", "R", "RA", "FA", "", "FPU"]),
        "vlan": st.sampled_from([0, 0, 1, 4094]),
        "ttl": st.integers(1, 255),
        "tos": st.integers(0, 255),
        "id": u16,
        "options": st.booleans(),
        "fragment": st.sampled_from([("MF", 0), ("MF", 3), ("", 9)]),
        "check": u16,
        "seq": st.integers(0, 0xFFFFFFFF),
        "mss": st.booleans(),
        "payload": st.binary(max_size=40),
    }
)
states = st.sampled_from(["none", "owner", "owner", "owner locked", "frontend", "frontend locked"])
directions = st.sampled_from(["client", "client", "owner", "service", "stranger"])


def known_difference(case: Case, direction: str, draw: dict[str, Any]) -> str:
    """Which of the differences in the model's table is to be expected, if any."""
    guarded = bool(case.rules)
    if draw["kind"] == "bad header" and case.family == 4:
        return "damaged"
    if draw["kind"] == "fragment":
        return ""
    if draw["kind"] == "extension" and case.family == 6:
        return "extension" if guarded and direction != "stranger" else ""
    if guarded and direction == "client" and "S" in draw["flags"] and "A" not in draw["flags"]:
        return "bare SYN"
    return ""


PLAIN = {
    "kind": "plain",
    "flags": "A",
    "vlan": 0,
    "ttl": 64,
    "tos": 0,
    "id": 1,
    "options": False,
    "fragment": ("MF", 0),
    "check": 0,
    "seq": 1,
    "mss": False,
    "payload": b"some data",
}


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    family=st.sampled_from([4, 6]),
    state=states,
    direction=directions,
    service_port=ports,
    owner_port=ports,
    draw=draws,
)
@example(4, "owner", "client", 80, 8080, PLAIN | {"kind": "bad checksum", "check": 0xFFFF})
@example(4, "owner", "client", 80, 8080, PLAIN | {"kind": "bad checksum", "check": 0})
@example(6, "owner", "owner", 80, 8080, PLAIN | {"options": True})
@example(4, "owner", "owner", 80, 8080, PLAIN | {"options": True, "vlan": 9})
@example(6, "owner", "service", 80, 8080, PLAIN | {"flags": "R"})
@example(4, "owner", "client", 80, 8080, PLAIN | {"flags": "S"})
@example(4, "owner locked", "client", 80, 8080, PLAIN | {"flags": "S"})
@example(6, "owner", "client", 80, 8080, PLAIN | {"kind": "extension"})
def test_the_model_and_the_classifier_agree(
    switch: EbpfSwitch,
    family: int,
    state: str,
    direction: str,
    service_port: int,
    owner_port: int,
    draw: dict[str, Any],
) -> None:
    case = Case(family, state, service_port, owner_port)
    data = bytes(tcp_packet(case, direction, draw))
    for rule in case.rules:
        assert switch.add(rule) == Status.OK
    try:
        verdict, bpf = switch._object.run(switch._object.program_fd("prism_switch"), data)
    finally:
        for rule in case.rules:
            stands = switch.get(rule.flow)
            assert stands is not None
            assert switch.delete(rule.flow, stands.gen)
    assert verdict in (UNTOUCHED, OK, SHOT)
    out = bridging(case.rules).process(data, 1)
    assert len(out) <= 1
    p4 = out[0].data if out else None
    known = known_difference(case, direction, draw)
    if known == "bare SYN":
        assert verdict == SHOT  # nobody asks here
        assert p4 == (None if state.endswith("locked") else data)
    elif known == "extension":
        assert p4 == data
        assert verdict != OK or bpf != data or state.startswith("frontend")
    elif known == "damaged" and p4 is None:
        assert IP(data[18 if draw["vlan"] else 14 :]).chksum != _right_check(data, draw)
    else:
        assert (bpf if verdict != SHOT else None) == p4


def _right_check(data: bytes, draw: dict[str, Any]) -> int:
    packet = IP(data[18 if draw["vlan"] else 14 :])
    del packet.chksum
    return int(IP(bytes(packet)).chksum)


def routing(rules: list[Rule], bare_syn: str = "syn_to_frontend") -> Model:
    """A router between a client (port 1), a frontend (2) and a backend (3)."""
    macs = {1: "02:00:00:00:01:01", 2: "02:00:00:00:02:01", 3: "02:00:00:00:03:01"}
    hosts = {1: HERE, 2: "02:00:00:00:02:02", 3: "02:00:00:00:03:02"}
    nets = {1: "198.51.100.0", 2: "192.0.2.80", 3: "10.9.0.0"}
    lengths = {1: 24, 2: 32, 3: 16}
    model = Model(
        {
            "my_mac": {(number(mac),): Call("route") for mac in macs.values()},
            "bridge": {(number(mac),): Call("out_by", (port,)) for port, mac in hosts.items()},
            "port_mac": {(port,): Call("from_mac", (number(mac),)) for port, mac in macs.items()},
            "next_hops": {(p,): Call("neighbour", (number(m),)) for p, m in hosts.items()},
            "ipv4_lpm": {
                (int.from_bytes(map(int, nets[p].split(".")), "big"), lengths[p]): Call("via", (p,))
                for p in nets
            }
            | {(0x0A090001, 32): Call("to_cpu")},
            "arp": {(0xC6336401,): Call("arp_answer", (number(macs[1]),))},
        },
        bare_syn,
        (1, 2, 3),
    )
    model.rules(entries(rules))
    return model


def test_a_routed_flow_gets_the_owners_mac_address_and_loses_a_hop() -> None:
    case = Case(4, "owner", 80, 8080)
    model = routing(case.rules)
    tail = TCP(sport=case.client.port, dport=80, flags="PA") / Raw(b"GET")
    packet = Ether(src=HERE, dst="02:00:00:00:01:01") / IP(src=CLIENT[4], dst=SERVICE[4], ttl=64)
    tail_out = TCP(sport=case.client.port, dport=8080, flags="PA") / Raw(b"GET")
    expected = Ether(src="02:00:00:00:03:01", dst="02:00:00:00:03:02") / IP(
        src=CLIENT[4], dst=OWNER[4], ttl=63
    )
    assert model.process(bytes(packet / tail), 1) == [Out(3, bytes(expected / tail_out))]
    back = Ether(src="02:00:00:00:03:02", dst="02:00:00:00:03:01") / IP(
        src=OWNER[4], dst=CLIENT[4], ttl=64
    )
    answer = TCP(sport=8080, dport=case.client.port, flags="A")
    seen = Ether(src="02:00:00:00:01:01", dst=HERE) / IP(src=SERVICE[4], dst=CLIENT[4], ttl=63)
    expected = seen / TCP(sport=80, dport=case.client.port, flags="A")
    assert model.process(bytes(back / answer), 3) == [Out(1, bytes(expected))]


def test_what_the_cpu_gets() -> None:
    case = Case(4, "owner", 80, 8080)
    model = routing(case.rules, "syn_to_cpu")
    head = Ether(src=HERE, dst="02:00:00:00:01:01")
    syn = bytes(head / IP(src=CLIENT[4], dst=SERVICE[4]) / TCP(sport=case.client.port, flags="S"))
    assert model.process(syn, 1) == [Out(CPU_PORT, syn, REASON_BARE_SYN)]
    local = bytes(head / IP(src=CLIENT[4], dst="10.9.0.1") / UDP(dport=4760))
    assert model.process(local, 1) == [Out(CPU_PORT, local, REASON_LOCAL)]
    last = bytes(head / IP(src=CLIENT[4], dst=SERVICE[4], ttl=1) / UDP(dport=4760))
    assert model.process(last, 1) == [Out(CPU_PORT, last, REASON_HOPS)]
    assert model.process(bytes(head / IP(dst="203.0.113.1") / UDP()), 1) == []


def test_the_router_answers_arp_and_others_hear_it() -> None:
    model = routing([])
    ask = Ether(src=HERE, dst="ff:ff:ff:ff:ff:ff") / ARP(
        hwsrc=HERE, psrc=CLIENT[4], pdst="198.51.100.1"
    )
    (answer,) = model.process(bytes(ask), 1)
    seen = Ether(answer.data)
    assert (answer.port, seen.dst, seen[ARP].op) == (1, HERE, 2)
    assert (seen[ARP].hwsrc, seen[ARP].psrc) == ("02:00:00:00:01:01", "198.51.100.1")
    ask[ARP].pdst = "198.51.100.77"
    assert [out.port for out in model.process(bytes(ask), 1)] == [2, 3]
