"""What the classifier makes of single packets, run on them in the kernel (BPF_PROG_TEST_RUN).

The expected packet is built by scapy with its own checksums. Every case runs twice: with the
checksums in the packet alone, and with the whole packet summed by the device (CHECKSUM_COMPLETE),
where the kernel compares its sum with the packet when the classifier is done (EBADMSG otherwise).
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from scapy.layers.inet import IP, TCP, UDP, IPOption_RR
from scapy.layers.inet6 import (
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether
from scapy.packet import Packet, Raw
from switch_bed import bpffs

from prism.flow import Endpoint, Flow
from prism.switch.base import Rule
from prism.switch.control import Flags, Message, Op, Status, decode, encode, node_id
from prism.switch.ebpf import EbpfSwitch, Settings

pytestmark = pytest.mark.net

UNTOUCHED, OK, SHOT, REDIRECT = -1, 0, 2, 7  # linux/pkt_cls.h
COMPLETE = 4  # BPF_F_TEST_SKB_CHECKSUM_COMPLETE
KEY = os.urandom(16)
CONTROL, CONTROL6 = Endpoint("10.0.0.1", 4760), Endpoint("fd00::1", 4760)
ETHER = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")
NODE = node_id("be1/0")
_ports = itertools.count(2000)


@pytest.fixture(scope="module")
def switch() -> Iterator[EbpfSwitch]:
    with bpffs() as pins:
        switch = EbpfSwitch(pins / "prism", max_rules=1024)
        switch.configure(Settings(KEY, (CONTROL, CONTROL6)))
        yield switch
        switch.close()


@pytest.fixture(params=[0, COMPLETE], ids=["filled-in", "complete"])
def run(switch: EbpfSwitch, request: pytest.FixtureRequest) -> Callable[[Packet], tuple]:
    def run(packet: Packet) -> tuple[int, bytes]:
        program = switch._object.program_fd("prism_switch")
        return switch._object.run(program, bytes(packet), request.param)

    return run


class Handed:
    """A flow that has been handed over to a backend, in one family."""

    def __init__(self, switch: EbpfSwitch, family: int, *, locked: bool = False) -> None:
        self.switch, self.ip = switch, IP if family == 4 else IPv6
        client, service, owner = (
            ("198.51.100.1", "192.0.2.80", "10.9.8.7")
            if family == 4
            else ("2001:db8::c", "2001:db8:80::80", "fd00:9::8:7")
        )
        self.client = Endpoint(client, next(_ports))
        self.service, self.owner = Endpoint(service, 80), Endpoint(owner, 8080)
        self.flow = Flow(self.client, self.service).pack()
        rule = Rule(self.flow, NODE, self.owner, bytes(6), 0, locked, 1)
        assert switch.add(rule) == Status.OK

    def packet(
        self,
        source: Endpoint,
        destination: Endpoint,
        between: tuple[Packet, ...] = (),
        flags: str = "A",
        ether: Packet = ETHER,
        **ip: object,
    ) -> Packet:
        packet = ether / self.ip(src=source.host, dst=destination.host, **ip)
        for header in between:
            packet /= header.copy()
        tcp = TCP(sport=source.port, dport=destination.port, flags=flags, seq=1, ack=2)
        return packet / tcp / Raw(b"some data, of odd size.")

    @property
    def stands(self) -> Rule:
        rule = self.switch.get(self.flow)
        assert rule is not None
        return rule


def both_ways(handed: Handed, run: Callable, **options: object) -> None:
    """The client's packet goes to the owner, and the owner's to the client, rewritten."""
    verdict, out = run(handed.packet(handed.client, handed.service, **options))
    assert verdict == OK
    assert out == bytes(handed.packet(handed.client, handed.owner, **options))
    verdict, out = run(handed.packet(handed.owner, handed.client, **options))
    assert verdict == OK
    assert out == bytes(handed.packet(handed.service, handed.client, **options))


def test_ipv4_is_rewritten_both_ways(switch: EbpfSwitch, run: Callable) -> None:
    both_ways(Handed(switch, 4), run)


def test_ipv6_is_rewritten_both_ways(switch: EbpfSwitch, run: Callable) -> None:
    both_ways(Handed(switch, 6), run)


def test_ipv4_options_are_passed_on(switch: EbpfSwitch, run: Callable) -> None:
    both_ways(Handed(switch, 4), run, options=[IPOption_RR(length=11, routers=["0.0.0.0"] * 2)])


@pytest.mark.parametrize(
    "between",
    [
        (IPv6ExtHdrHopByHop(),),
        (IPv6ExtHdrHopByHop(), IPv6ExtHdrDestOpt()),
        (IPv6ExtHdrDestOpt(options=[]), IPv6ExtHdrFragment(offset=0, m=0, id=7)),
    ],
    ids=["hop-by-hop", "two", "atomic-fragment"],
)
def test_ipv6_extension_headers_are_passed_on(
    switch: EbpfSwitch, run: Callable, between: tuple[Packet, ...]
) -> None:
    both_ways(Handed(switch, 6), run, between=between)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize(
    "tags", [Dot1Q(vlan=5), Dot1AD(vlan=6) / Dot1Q(vlan=5)], ids=["vlan", "stacked"]
)
def test_vlan_tags_are_passed_on(
    switch: EbpfSwitch, run: Callable, family: int, tags: Packet
) -> None:
    both_ways(Handed(switch, family), run, ether=ETHER / tags)


def test_fragments_are_not_touched(switch: EbpfSwitch, run: Callable) -> None:
    four, six = Handed(switch, 4), Handed(switch, 6)
    packets = [
        four.packet(four.client, four.service, flags="A", frag=3),
        six.packet(six.client, six.service, (IPv6ExtHdrFragment(offset=0, m=1),)),
        six.packet(six.client, six.service, (IPv6ExtHdrFragment(offset=5, m=0),)),
    ]
    first = four.packet(four.client, four.service)
    first[IP].flags = "MF"
    for packet in [*packets, first]:
        assert run(packet) == (UNTOUCHED, bytes(packet))


def test_what_is_not_ours_is_not_touched(switch: EbpfSwitch, run: Callable) -> None:
    handed = Handed(switch, 4)
    six = Handed(switch, 6)
    other = handed.client._replace(port=1)
    packets = [
        handed.packet(other, handed.service),
        handed.packet(handed.owner, other),
        handed.packet(handed.client, handed.service._replace(port=81)),
        ETHER / IP(src=handed.client.host, dst=handed.service.host) / UDP(sport=1, dport=80),
        ETHER / ARP(),
        ETHER / IP(src=handed.client.host, dst=handed.service.host, proto=6) / Raw(b"short"),
        ETHER / IP(src=handed.client.host, dst=handed.service.host, proto=47) / Raw(b"x" * 40),
        ETHER / Dot1Q() / Dot1Q() / Dot1Q() / handed.packet(handed.client, handed.service)[IP],
        six.packet(six.client, six.service, (IPv6ExtHdrRouting(addresses=["::1"]),)),
    ]
    for packet in packets:
        assert run(packet) == (UNTOUCHED, bytes(packet))


def test_nothing_of_a_locked_flow_passes(switch: EbpfSwitch, run: Callable) -> None:
    handed = Handed(switch, 4, locked=True)
    before = switch.counters()
    assert run(handed.packet(handed.client, handed.service))[0] == SHOT
    assert run(handed.packet(handed.owner, handed.client))[0] == SHOT
    after = switch.counters()
    assert after["dropped_locked"] - before["dropped_locked"] == 1
    assert after["dropped_owner"] - before["dropped_owner"] == 1
    seen = switch.get_counters(handed.flow)
    assert seen is not None
    assert (seen.dropped, seen.held_total, seen.to_owner_packets) == (2, 0, 0)
    assert switch.unlock(handed.flow, handed.stands.gen)
    both_ways(handed, run)


def test_only_the_owner_speaks_for_a_flow(switch: EbpfSwitch, run: Callable) -> None:
    """The frontend, with the service's own address, does not any more."""
    handed = Handed(switch, 6)
    before = switch.counters()["dropped_stale"]
    assert run(handed.packet(handed.service, handed.client, flags="R"))[0] == SHOT
    assert switch.counters()["dropped_stale"] == before + 1
    elsewhere = handed.owner._replace(port=9)
    packet = handed.packet(elsewhere, handed.client)
    assert run(packet) == (UNTOUCHED, bytes(packet))


def test_a_frontend_that_owns_is_guarded_and_not_rewritten(
    switch: EbpfSwitch, run: Callable
) -> None:
    client, service = Endpoint("198.51.100.9", next(_ports)), Endpoint("192.0.2.80", 80)
    handed = Handed(switch, 4)
    flow = Flow(client, service).pack()
    assert switch.add(Rule(flow, NODE, service, bytes(6), 0, False)) == Status.OK
    packets = handed.packet(client, service), handed.packet(service, client)
    for packet in packets:
        assert run(packet) == (UNTOUCHED, bytes(packet))
    rule = switch.get(flow)
    assert rule is not None
    assert switch.lock(flow, rule.gen)
    for packet in packets:
        assert run(packet)[0] == SHOT


def test_a_deleted_rule_leaves_plain_forwarding(switch: EbpfSwitch, run: Callable) -> None:
    handed = Handed(switch, 4)
    assert not switch.delete(handed.flow, handed.stands.gen + 1)
    assert switch.delete(handed.flow, handed.stands.gen)
    for source, destination in (
        (handed.client, handed.service),
        (handed.service, handed.client),
    ):
        packet = handed.packet(source, destination)
        assert run(packet) == (UNTOUCHED, bytes(packet))


@pytest.mark.parametrize("end", ["chown", "delete"])
def test_strays_of_a_former_owner_are_dropped_for_a_while(
    switch: EbpfSwitch, run: Callable, end: str
) -> None:
    """A frozen socket's delayed ACK would make the client reset what is there next."""
    handed = Handed(switch, 4)
    if end == "delete":
        assert switch.delete(handed.flow, handed.stands.gen)
    else:
        elsewhere = Endpoint("10.9.9.9", 4700)
        gen = handed.stands.gen
        status = switch._operate(Op.CHOWN, handed.flow, gen=gen, owner=NODE, endpoint=elsewhere)
        assert status == Status.OK
    stray = handed.packet(handed.owner, handed.client)
    before = switch.counters()["dropped_stale"]
    assert run(stray)[0] == SHOT
    assert switch.counters()["dropped_stale"] == before + 1
    former = switch._map("former")
    key = Flow(handed.owner, handed.client).pack()  # struct prism_owner_key
    remaining = int.from_bytes(former.get(key) or b"", sys.byteorder) - time.monotonic_ns()
    assert 0 < remaining <= 2_000_000_000
    former.put(key, time.monotonic_ns().to_bytes(8, sys.byteorder))
    assert run(stray) == (UNTOUCHED, bytes(stray))


def test_a_bare_syn_needs_the_agents_word(switch: EbpfSwitch, run: Callable) -> None:
    handed = Handed(switch, 4)
    syn = handed.packet(handed.client, handed.service, flags="S")
    before = switch.counters()
    assert run(syn)[0] == SHOT
    assert switch.counters()["syn_dropped"] == before["syn_dropped"] + 1
    switch.pass_syn(handed.flow)
    verdict, out = run(syn)
    assert verdict == OK
    assert out == bytes(handed.packet(handed.client, handed.owner, flags="S"))
    assert run(syn)[0] == SHOT  # the word is for one SYN
    assert run(handed.packet(handed.client, handed.service, flags="SA"))[0] == OK


def test_the_agents_word_is_good_for_a_second(switch: EbpfSwitch, run: Callable) -> None:
    handed = Handed(switch, 4)
    switch.pass_syn(handed.flow)
    time.sleep(1.05)
    assert run(handed.packet(handed.client, handed.service, flags="S"))[0] == SHOT


def test_packets_are_counted(switch: EbpfSwitch, run: Callable) -> None:
    handed = Handed(switch, 4)
    packet = handed.packet(handed.client, handed.service)
    for _ in range(3):
        run(packet)
    run(handed.packet(handed.owner, handed.client))
    seen = switch.get_counters(handed.flow)
    assert seen is not None
    assert (seen.to_owner_packets, seen.to_owner_bytes) == (3, 3 * len(packet))
    assert (seen.to_client_packets, seen.to_client_bytes) == (1, len(packet))
    now = time.monotonic()
    assert now - 5 < seen.created <= now
    assert now - 5 < seen.seen <= now


# Control datagrams: what comes back is well-formed down to its checksums

_seqs = itertools.count(time.time_ns())


@pytest.mark.parametrize(
    ("between", "ether"),
    [((), ETHER), ((), ETHER / Dot1Q(vlan=7))],
    ids=["plain", "vlan"],
)
@pytest.mark.parametrize("checksum", [None, 0], ids=["checksum", "none"])
def test_an_answer_over_ipv4(
    run: Callable, between: tuple[Packet, ...], ether: Packet, checksum: int | None
) -> None:
    data = encode(Message(Op.HELLO, NODE, next(_seqs), cookie=1000), KEY)
    ip = IP(src="10.0.0.9", dst=CONTROL.host, ttl=3, tos=4, id=5)
    verdict, out = run(ether / ip / UDP(sport=999, dport=4760, chksum=checksum) / Raw(data))
    assert verdict == REDIRECT
    reply = Ether(out)
    assert decode(bytes(reply[UDP].payload), KEY).status == Status.OK
    back = ether.copy()
    back.src, back.dst = ether.dst, ether.src
    back /= IP(src=CONTROL.host, dst="10.0.0.9", ttl=64, tos=4, id=5)
    back /= UDP(sport=4760, dport=999, chksum=checksum) / Raw(bytes(reply[UDP].payload))
    assert out == bytes(back)


@pytest.mark.parametrize("between", [(), (IPv6ExtHdrDestOpt(),)], ids=["plain", "extension"])
def test_an_answer_over_ipv6(run: Callable, between: tuple[Packet, ...]) -> None:
    def packet(source: Endpoint, to: Endpoint, hops: int, ether: Packet, data: bytes) -> Packet:
        made = ether / IPv6(src=source.host, dst=to.host, hlim=hops)
        for header in between:
            made /= header.copy()
        return made / UDP(sport=source.port, dport=to.port) / Raw(data)

    me = Endpoint("fd00::9", 999)
    data = encode(Message(Op.HELLO, NODE, next(_seqs), cookie=1000), KEY)
    verdict, out = run(packet(me, CONTROL6, 3, ETHER, data))
    assert verdict == REDIRECT
    answer = out[-120:]
    assert decode(answer, KEY).status == Status.OK
    ether = Ether(src=ETHER.dst, dst=ETHER.src)
    assert out == bytes(packet(CONTROL6, me, 64, ether, answer))


def test_list_and_answers_to_queries_go_to_the_agent(switch: EbpfSwitch, run: Callable) -> None:
    def packet(message: Message, key: bytes = KEY) -> Packet:
        header = ETHER / IP(src="10.0.0.9", dst=CONTROL.host) / UDP(sport=999, dport=4760)
        return header / Raw(encode(message, key))

    run(packet(Message(Op.HELLO, NODE, next(_seqs), cookie=1000)))
    listing = packet(Message(Op.LIST, NODE, next(_seqs)))
    assert run(listing) == (UNTOUCHED, bytes(listing))
    assert run(listing)[0] == SHOT  # a replay
    answer = packet(Message(Op.QUERY, 0, 1, flags=Flags.REPLY))
    assert run(answer) == (UNTOUCHED, bytes(answer))
    forged = packet(Message(Op.QUERY, 0, 1, flags=Flags.REPLY), bytes(16))
    assert run(forged)[0] == SHOT
    unknown = packet(Message(Op.LIST, node_id("nobody/0"), next(_seqs)))
    assert run(unknown)[0] == REDIRECT  # DENIED
