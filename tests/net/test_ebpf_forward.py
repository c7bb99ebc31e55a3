"""The classifier between real kernels: streams, offloads, holding, asking, restarts."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import itertools
import os
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Raw
from switch_bed import CONTROL, ROLES, SERVICE, SERVICE6, SwitchBed, bpffs, host

from prism.errors import ProtocolError, SwitchError
from prism.flow import Endpoint
from prism.lab.netns import Namespace
from prism.switch.base import EventKind, Rule
from prism.switch.control import Message, Op, Status, decode, encode, node_id
from prism.switch.ebpf import EbpfSwitch, Settings

pytestmark = pytest.mark.net

MEGABYTE = 1 << 20
OWNER_PORT = 8080
NODE = node_id("be1/0")
PORTS = itertools.count(4001)
PATTERN = random.Random(1).randbytes(MEGABYTE)


@pytest.fixture(scope="module")
def bed() -> Iterator[SwitchBed]:
    with bpffs() as pins:
        bed = SwitchBed(pins)
        yield bed
        bed.close()


def offload(space: Namespace, device: str, enabled: bool) -> None:
    """Checksum offload (and with it segmentation offload) of a device (linux/ethtool.h)."""
    value = ctypes.create_string_buffer(struct.pack("=II", 0x17, enabled), 8)  # ETHTOOL_STXCSUM
    request = struct.pack("=16sQ16x", device.encode(), ctypes.addressof(value))
    with space.socket(kind=socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, 0x8946, request)  # SIOCETHTOOL


class Connection:
    """A client's connection to the service that the switch gives to be1."""

    def __init__(self, bed: SwitchBed, family: int = 4) -> None:
        kind = socket.AF_INET if family == 4 else socket.AF_INET6
        service = SERVICE if family == 4 else SERVICE6
        self.port = port = next(PORTS)
        self.bed, self.owner = bed, Endpoint(host("be1", family), OWNER_PORT)
        self.client = bed.spaces["client"].socket(kind)
        self.client.settimeout(10)
        self.client.bind(("", port))
        listener = bed.spaces["be1"].socket(kind)
        listener.settimeout(5)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("", OWNER_PORT))
        listener.listen()
        self.flow = bed.flow(port, family).pack()
        assert bed.switch.add(Rule(self.flow, NODE, self.owner, bytes(6), 0, False)) == Status.OK
        bed.switch.pass_syn(self.flow)
        self.client.connect((service, 80))
        self.served, peer = listener.accept()
        assert Endpoint.from_sockaddr(peer) == Endpoint(host("client", family), port)
        self.served.settimeout(10)
        listener.close()

    @property
    def gen(self) -> int:
        rule = self.bed.switch.get(self.flow)
        assert rule is not None
        return rule.gen

    def close(self) -> None:
        # A reset, so that nothing of this connection is sent again after its rule is gone.
        if self.served.fileno() >= 0:
            self.served.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.served.close()
        self.client.close()
        rule = self.bed.switch.get(self.flow)
        if rule is not None:
            assert self.bed.switch.delete(self.flow, rule.gen)


def stream(source: socket.socket, sink: socket.socket, megabytes: int) -> None:
    """Send that much one way and compare the digests."""
    sent, received = hashlib.sha256(), hashlib.sha256()

    def send() -> None:
        for index in range(megabytes):
            block = PATTERN[index:] + PATTERN[:index]
            sent.update(block)
            source.sendall(block)

    thread = threading.Thread(target=send)
    thread.start()
    left = megabytes * MEGABYTE
    while left:
        data = sink.recv(min(left, MEGABYTE))
        assert data
        received.update(data)
        left -= len(data)
    thread.join()
    assert received.digest() == sent.digest()


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("offloads", ["all", "none", "hosts"])
def test_streams_arrive_whole(bed: SwitchBed, family: int, offloads: str) -> None:
    """``hosts``: the switch's ports segment and sum what the classifier rewrote, and the receiver
    verifies it; ``none``: it arrives in single segments with their sums."""
    for role in ("client", "be1"):
        offload(bed.router, role, offloads == "all")
        offload(bed.spaces[role], "eth0", offloads != "none")
    connection = Connection(bed, family)
    stream(connection.client, connection.served, 32)
    stream(connection.served, connection.client, 32)
    seen = bed.switch.get_counters(connection.flow)
    assert seen is not None
    assert min(seen.to_owner_bytes, seen.to_client_bytes) > 32 * MEGABYTE
    assert seen.dropped == 0
    connection.close()


def test_a_tagged_port_gets_tagged_answers(bed: SwitchBed) -> None:
    """The kernel takes the tag out of the packet before the classifier sees it."""
    frames = bed.spaces["client"].run_inside(
        lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003))
    )
    frames.setsockopt(263, 8, 1)  # SOL_PACKET, PACKET_AUXDATA: the tag of what is received
    frames.bind(("eth0", 0))
    frames.settimeout(2)
    ether = Ether(src=frames.getsockname()[4], dst="02:00:00:00:00:02")
    data = encode(Message(Op.HELLO, NODE, time.time_ns(), cookie=1000), bed.key)
    ip = IP(src="10.60.1.2", dst=CONTROL.host)
    frames.send(bytes(ether / Dot1Q(vlan=7) / ip / UDP(sport=9, dport=CONTROL.port) / Raw(data)))
    while True:
        frame, auxiliary, _, address = frames.recvmsg(2048, 256)
        if address[2] == socket.PACKET_HOST and decoded(frame[-120:], bed.key):
            break
    ((_, _, tag),) = auxiliary
    assert struct.unpack_from("=HH", tag, 16) == (7, 0x8100)  # struct tpacket_auxdata
    assert Ether(frame)[IP].dst == "10.60.1.2"
    frames.close()


def decoded(data: bytes, key: bytes) -> bool:
    with contextlib.suppress(ProtocolError):
        return decode(data, key).status == Status.OK
    return False


# Holding: a TUN device takes what the client sends while the flow is locked


class Tun:
    """The switch's TUN device and what has come out of it."""

    def __init__(self, bed: SwitchBed) -> None:
        self.fd = bed.router.run_inside(self._open)
        bed.router.sysctl("ipv4/conf/hold/rp_filter", 0)
        bed.router.sysctl("ipv4/conf/all/rp_filter", 0)
        bed.router.sysctl("ipv6/conf/hold/router_solicitations", 0)
        with bed.router.route() as route:
            (self.index,) = route.link_lookup(ifname="hold")
            route.link("set", index=self.index, state="up")
        bed.configure(self.index)
        bed.switch.attach(["hold"], namespace=bed.router.name)
        bed.switch.heartbeat()

    @staticmethod
    def _open() -> int:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        request = struct.pack("16sH22x", b"hold", 0x1001)  # IFF_TUN | IFF_NO_PI
        fcntl.ioctl(fd, 0x400454CA, request)  # TUNSETIFF
        return fd

    def packets(self, port: int, patience: float = 2) -> list[bytes]:
        """What comes out from a client's port: waits for the first, and until it is quiet."""
        found: list[bytes] = []
        while select.select([self.fd], [], [], 0.03 if found else patience)[0]:
            packet = os.read(self.fd, 65536)
            header = 40 if packet[0] >> 4 == 6 else (packet[0] & 15) * 4
            if packet[header : header + 2] == port.to_bytes(2, "big"):
                found.append(packet)
        return found

    def put_back(self, packets: list[bytes]) -> None:
        for packet in packets:
            os.write(self.fd, packet)

    def close(self) -> None:
        os.close(self.fd)


@pytest.fixture
def tun(bed: SwitchBed) -> Iterator[Tun]:
    tun = Tun(bed)
    yield tun
    tun.close()
    bed.configure()


@pytest.mark.parametrize("family", [4, 6])
def test_what_a_client_sends_under_the_lock_is_held(bed: SwitchBed, tun: Tun, family: int) -> None:
    connection = Connection(bed, family)
    gen = connection.gen
    bed.switch.heartbeat()
    assert bed.switch.lock(connection.flow, gen)
    data = PATTERN[:9000]
    connection.client.sendall(data)
    held = tun.packets(connection.port)
    assert held
    assert not select.select([connection.served], [], [], 0.02)[0]
    seen = bed.switch.get_counters(connection.flow)
    assert seen is not None
    assert seen.held == seen.held_total >= len(held)
    assert seen.dropped == 0
    assert bed.switch.unlock(connection.flow, gen)
    assert select.select([bed.switch.events_fd], [], [], 1)[0]
    (event,) = bed.switch.read_events()
    assert event == (EventKind.UNLOCKED, connection.flow, False, gen, NODE, seen.held)
    started = time.monotonic()
    tun.put_back(held)
    assert connection.served.recv(len(data), socket.MSG_WAITALL) == data
    assert time.monotonic() - started < 0.15  # less than the client's retransmission timer
    stream(connection.served, connection.client, 1)
    connection.close()


def test_every_end_of_a_hold_is_an_event(bed: SwitchBed, tun: Tun) -> None:
    connection = Connection(bed)
    a, b = bed.node("a/0").hello(), bed.node("b/0").hello()
    handoffs = bed.switch.counters()["handoffs"]

    def hold(gen: int) -> None:
        bed.switch.heartbeat()
        assert bed.switch.lock(connection.flow, gen)
        connection.client.send(b"x")
        assert tun.packets(connection.port)

    gen = connection.gen
    hold(gen)
    flow = bed.flow(connection.port)
    elsewhere = a.endpoint._replace(port=9)
    kept = a.ask(Op.CHOWN, flow, gen=gen, owner_endpoint=elsewhere, locked=True)
    assert kept.status == Status.OK
    assert list(bed.switch.read_events()) == []
    assert b.ask(Op.CHOWN, flow, gen=gen + 1).status == Status.OK
    (event,) = bed.switch.read_events()
    assert event[:5] == (EventKind.CHOWNED, connection.flow, False, gen + 2, b.id)
    hold(gen + 2)
    assert b.ask(Op.DELETE, flow, gen=gen + 2).status == Status.OK
    (event,) = bed.switch.read_events()
    assert event[:5] == (EventKind.DELETED, connection.flow, False, gen + 2, b.id)
    assert bed.switch.counters()["handoffs"] == handoffs + 2
    for node in (a, b):
        node.close()
    connection.close()


def test_without_an_agent_nothing_is_held(bed: SwitchBed, tun: Tun) -> None:
    connection = Connection(bed)
    gen = connection.gen
    time.sleep(1.05)  # no heartbeat
    assert bed.switch.lock(connection.flow, gen)
    connection.client.send(b"x")
    assert tun.packets(connection.port, 0.05) == []
    seen = bed.switch.get_counters(connection.flow)
    assert seen is not None
    assert (seen.held_total, seen.dropped) == (0, 1)
    bed.switch.heartbeat()
    assert tun.packets(connection.port)  # the client's retransmission
    bed.switch.stop_holding()
    before = bed.switch.counters()["dropped_locked"]
    time.sleep(0.5)
    assert bed.switch.counters()["dropped_locked"] > before
    connection.close()


def test_a_syn_is_asked_about_and_passed_on(bed: SwitchBed, tun: Tun) -> None:
    """First as for a connection that is gone, then as for one that is alive."""
    listeners = []
    for role, port in (("be1", OWNER_PORT), ("fe", 80)):
        listener = bed.spaces[role].socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("", port))
        listener.listen()
        listener.settimeout(2)
        listeners.append(listener)
    owner = Rule(b"", NODE, Endpoint(host("be1"), OWNER_PORT), bytes(6), 0, False)
    before = bed.switch.counters()
    bed.switch.heartbeat()
    for port, gone, served_by in (
        (next(PORTS), True, listeners[1]),
        (next(PORTS), False, listeners[0]),
    ):
        flow = bed.flow(port).pack()
        assert bed.switch.add(owner._replace(flow=flow)) == Status.OK
        client = bed.spaces["client"].socket()
        client.bind(("", port))
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            client.connect((SERVICE, 80))
        syns = tun.packets(port)
        assert len(syns) == 1
        assert syns[0][33] == 0x02 or syns[0][33] & 0x12 == 0x02  # a bare SYN
        rule = bed.switch.get(flow)
        assert rule is not None
        if gone:
            assert bed.switch.delete(flow, rule.gen)
        else:
            bed.switch.pass_syn(flow)
        tun.put_back(syns)
        served, _ = served_by.accept()
        client.settimeout(2)
        stream(client, served, 1)
        served.close()
        client.close()
        if not gone:
            assert bed.switch.delete(flow, rule.gen)
    after = bed.switch.counters()
    assert after["syn_asked"] - before["syn_asked"] == 2
    assert after["syn_passed"] - before["syn_passed"] == 1
    for listener in listeners:
        listener.close()


# The tables outlive the process that made them


def test_the_data_plane_works_without_the_process_and_is_adopted(bed: SwitchBed) -> None:
    connection = Connection(bed)
    incarnation, pins = bed.switch.incarnation, bed.pins
    rules = list(bed.switch.rules())
    bed.switch.close()
    stream(connection.client, connection.served, 2)
    with pytest.raises(ValueError, match="closed"):
        bed.switch.counters()
    bed.switch = EbpfSwitch(pins, max_rules=77)  # the tables there keep their size
    assert bed.switch.adopted
    assert bed.switch.max_rules == 4096
    assert bed.switch.incarnation == incarnation
    assert list(bed.switch.rules()) == rules
    assert bed.switch.rule_count == 1
    connection.close()


def tcp_counters(space: Namespace) -> dict[str, int]:
    """The namespace's TCP counters (``Tcp:`` of /proc/net/snmp)."""
    output = space.run(["cat", "/proc/net/snmp"], capture_output=True, text=True).stdout
    names, values = (line.split()[1:] for line in output.splitlines() if line.startswith("Tcp:"))
    return dict(zip(names, map(int, values), strict=True))


def test_a_new_program_takes_over_without_a_gap(bed: SwitchBed) -> None:
    """A packet that met no classifier would reach the frontend, or the client from a stranger."""
    connection = Connection(bed)
    frontend, client = tcp_counters(bed.spaces["fe"]), tcp_counters(bed.spaces["client"])
    done, replaced = threading.Event(), []

    def replace() -> None:
        while not done.is_set():
            with contextlib.closing(EbpfSwitch(bed.pins)) as switch:
                switch.attach(["client", "be1"], namespace=bed.router.name)
                replaced.append(switch.adopted)

    thread = threading.Thread(target=replace)
    thread.start()
    stream(connection.client, connection.served, 200)
    done.set()
    thread.join()
    assert all(replaced)
    assert tcp_counters(bed.spaces["fe"])["InSegs"] == frontend["InSegs"]
    assert tcp_counters(bed.spaces["client"])["OutRsts"] == client["OutRsts"]
    connection.close()


def test_detaching_leaves_plain_forwarding(bed: SwitchBed) -> None:
    bed.switch.detach([*ROLES, "no-such-port"], namespace=bed.router.name)
    bed.switch.detach(["client"], namespace=bed.router.name)
    listener = bed.spaces["fe"].socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("", 80))
    listener.listen()
    port = next(PORTS)
    flow = bed.flow(port).pack()
    owner = Endpoint(host("be1"), OWNER_PORT)
    assert bed.switch.add(Rule(flow, NODE, owner, bytes(6), 0, True)) == Status.OK
    with bed.spaces["client"].socket() as client:
        client.bind(("", port))
        client.settimeout(2)
        client.connect((SERVICE, 80))
    listener.close()
    rule = bed.switch.get(flow)
    assert rule is not None
    assert bed.switch.delete(flow, rule.gen)
    bed.switch.attach(ROLES, namespace=bed.router.name)


def load(pins: Path, **options: bool) -> EbpfSwitch:
    return EbpfSwitch(pins, max_rules=16, **options)


def test_tables_of_another_version_are_refused() -> None:
    with bpffs() as root:
        first = load(root / "prism")
        config = first._object.map("config")
        value = config.get(bytes(4))
        assert value is not None
        config.put(bytes(4), struct.pack("=I", 99) + value[4:])
        incarnation = first.incarnation
        first.close()
        with pytest.raises(SwitchError, match=r"another version.*fresh"):
            load(root / "prism")
        fresh = load(root / "prism", fresh=True)
        assert not fresh.adopted
        assert fresh.incarnation != incarnation
        fresh.close()


def test_unfinished_tables_are_made_anew() -> None:
    with bpffs() as root:
        load(root / "prism").close()
        (root / "prism" / "config").unlink()
        second = load(root / "prism")
        assert not second.adopted
        second.close()
        third = load(root / "prism")
        assert third.adopted
        third.unpin()
        assert not (root / "prism").exists()
        third.close()


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SwitchError, match="mount -t bpf"):
        EbpfSwitch(tmp_path / "deep" / "prism")
    assert not (tmp_path / "deep").exists()
    with bpffs() as root:
        broken = tmp_path / "broken.o"
        broken.write_bytes(b"not an object")
        with pytest.raises(SwitchError, match="cannot load the classifier"):
            EbpfSwitch(root / "prism", object_path=broken)
        with contextlib.closing(load(root / "prism")) as switch:
            with pytest.raises(SwitchError, match="no-such-port"):
                switch.attach(["no-such-port"])
            four = Endpoint("10.0.0.1", 1)
            for settings in (
                Settings(b"short", (four,)),
                Settings(bytes(16), (four, Endpoint("10.0.0.2", 1))),
                Settings(bytes(16), (four, Endpoint("fd00::1", 2))),
            ):
                with pytest.raises(SwitchError):
                    switch.configure(settings)


def test_changing_a_setting_keeps_the_tables(bed: SwitchBed) -> None:
    before = bed.switch.incarnation
    bed.configure(7)
    assert bed.switch.incarnation == before
