"""Rules made over P4Runtime do to packets what rules made directly do.

Random changes go to one eBPF table through driver, gRPC and service, and straight to another. The
same random packets then run through the classifier over each (BPF_PROG_TEST_RUN): verdict and
octets have to be the same, and every checksum right.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter

import pytest
from p4_bed import CLIENTS, OWNERS, SERVICES, directly, make_world, operation
from scapy.layers.inet import IP, TCP, IPOption_RR
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop
from scapy.layers.l2 import Dot1AD, Dot1Q, Ether
from scapy.packet import Packet, Raw

from prism.flow import Endpoint, Flow
from prism.switch.base import Change, Rule
from prism.switch.ebpf import EbpfSwitch, Settings

pytestmark = pytest.mark.net

UNTOUCHED, OK, SHOT = -1, 0, 2  # linux/pkt_cls.h
COMPLETE = 4  # BPF_F_TEST_SKB_CHECKSUM_COMPLETE: the kernel compares its own sum afterwards
ROUNDS, PACKETS = 25, 40


def ends(port: int, family: int) -> tuple[Endpoint, Endpoint]:
    """Where a random packet of a client's port comes from and goes to."""
    client, service = Endpoint(CLIENTS[family], port), Endpoint(SERVICES[family], 80)
    other = random.choice([service, *(Endpoint(host, 4700 + port) for host in OWNERS[family])])
    if random.random() < 0.45:
        return client, service
    if random.random() < 0.05:  # a client that talks to an owner by itself
        return client, other
    return other, client


def random_packet() -> Packet:
    """Of a flow that may have a rule, in one of the forms that there are."""
    family = random.randrange(2)
    source, destination = ends(1000 + random.randrange(20), family)
    packet: Packet = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")
    packet = random.choice([packet, packet, packet / Dot1Q(vlan=5), packet / Dot1AD() / Dot1Q()])
    if family == 0:
        packet /= IP(src=source.host, dst=destination.host, ttl=random.randrange(1, 255))
        form = random.random()
        if form < 0.15:
            packet[IP].options = [IPOption_RR(length=11, routers=["0.0.0.0"] * 2)]
        elif form < 0.25:
            packet[IP].frag = random.choice([0, 3])
            packet[IP].flags = "MF"
    else:
        packet /= IPv6(src=source.host, dst=destination.host, hlim=random.randrange(1, 255))
        for header in random.choice(
            [
                (),
                (),
                (IPv6ExtHdrHopByHop(),),
                (IPv6ExtHdrHopByHop(), IPv6ExtHdrDestOpt()),
                (IPv6ExtHdrFragment(offset=0, m=0, id=7),),
                (IPv6ExtHdrFragment(offset=random.choice([0, 5]), m=1, id=7),),
            ]
        ):
            packet /= header
    flags = random.choice(["A", "A", "PA", "S", "SA", "R", "RA", "F", "FA"])
    options = random.choice([[], [("Timestamp", (1, 2))], [("NOP", None), ("NOP", None)]])
    numbers = {"seq": random.getrandbits(32), "ack": random.getrandbits(32)}
    tcp = TCP(sport=source.port, dport=destination.port, flags=flags, options=options, **numbers)
    return packet / tcp / Raw(random.randbytes(random.choice([0, 1, 23, 512])))


def outcome(store: EbpfSwitch, data: bytes, checksums: int) -> tuple[int, bytes]:
    program = store._object.program_fd("prism_switch")
    verdict, out = store._object.run(program, data, checksums)
    return verdict, b"" if verdict == SHOT else out


def summed(data: bytes) -> bytes:
    """The packet with scapy's own checksums."""
    packet = Ether(data)
    if IP in packet:
        del packet[IP].chksum
    del packet[TCP].chksum
    return bytes(packet)


def model(rules: dict[bytes, Rule], packet: Packet) -> tuple[int, Endpoint] | None:
    """Verdict and destination of a client's plain ACK on a flow with a rule; ``None``: no such."""
    ip = packet[IP] if IP in packet else packet[IPv6]
    tcp = packet.getlayer(TCP)
    if tcp is None or tcp.flags != "A" or IPv6ExtHdrFragment in packet:
        return None
    if IP in packet and (packet[IP].frag or packet[IP].flags == "MF"):
        return None
    client, service = Endpoint(ip.src, tcp.sport), Endpoint(ip.dst, tcp.dport)
    rule = rules.get(Flow(client, service).pack())
    if rule is None:
        return None
    if rule.locked:
        return SHOT, service
    return (UNTOUCHED if rule.owner_endpoint == service else OK), rule.owner_endpoint


def check(rules: dict[bytes, Rule], packet: Packet, verdict: int, out: bytes) -> None:
    """What must hold of a single outcome, whatever made the rules."""
    data = bytes(packet)
    if verdict == UNTOUCHED:
        assert out == data
    elif verdict == OK:
        assert out == summed(out)
        assert len(out) == len(data)
        assert out != data
    expected = model(rules, packet)
    if expected is not None:
        assert verdict == expected[0]
        if verdict == OK:
            found = Ether(out)
            ip = found[IP] if IP in found else found[IPv6]
            assert Endpoint(ip.dst, found[TCP].dport) == expected[1]


async def test_packets_fare_the_same() -> None:
    if os.geteuid() != 0:
        pytest.fail("this test loads eBPF programs and needs root")
    random.seed(20)
    seen: Counter[int] = Counter()
    async with make_world() as world:
        for store in (world.served, world.direct):
            store.configure(Settings(bytes(16), (Endpoint("10.0.0.1", 4760),)))
        controller = await world.join()
        await controller.ready()
        for number in range(1, ROUNDS + 1):
            batch: dict[bytes, Change] = {}
            for step in range(12):
                change = operation(controller.rules, 1000 * number + step)
                batch.setdefault(change.flow, change)
            await controller.change(*batch.values())
            for change in batch.values():
                directly(world.direct, change)
            for _ in range(PACKETS):
                packet = random_packet()
                data, checksums = bytes(packet), random.choice([0, COMPLETE])
                # Strays are dropped for a while only, which does not end at the same instant in
                # both tables: what differs has to agree in the end.
                deadline = time.monotonic() + 4.0
                while True:
                    served = outcome(world.served, data, checksums)
                    direct = outcome(world.direct, data, checksums)
                    if served == direct or time.monotonic() > deadline:
                        break
                    await asyncio.sleep(0.01)
                assert served == direct, packet.summary()
                check(controller.rules, packet, *served)
                seen[served[0]] += 1
    assert min(seen[OK], seen[SHOT], seen[UNTOUCHED]) > ROUNDS
