"""The eBPF switch by itself: control round trips, the classifier's cost per packet, and memory.

Needs root. Everything runs in network namespaces of its own and takes about half a minute:

    python benchmarks/bench_switch.py [--rules 1000000] [--json]
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import platform
import random
import resource
import socket
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from naming import lab_name

from prism._ext import control as _control
from prism.flow import Endpoint, Flow, pack_address
from prism.lab.netns import Namespace, join
from prism.switch.base import Rule
from prism.switch.control import Message, Op, Status, encode, node_id
from prism.switch.ebpf import EbpfSwitch, Settings

CONTROL = Endpoint("10.50.0.1", 4760)
SERVICE = Endpoint("10.50.0.80", 80)
NODE = node_id("bench/0")
KEY = os.urandom(16)
ROUND_TRIPS = 20_000
RUNS = 200_000


@contextlib.contextmanager
def bed(rules: int) -> Iterator[tuple[EbpfSwitch, Namespace]]:
    """A switch with one node beside it."""
    tag = lab_name()
    with contextlib.ExitStack() as stack:
        pins = stack.enter_context(tempfile.TemporaryDirectory())
        subprocess.run(["mount", "-t", "bpf", "bpf", pins], check=True)
        stack.callback(subprocess.run, ["umount", "--lazy", pins], check=True)
        router, node = (Namespace.create(f"{tag}-{role}") for role in ("switch", "node"))
        stack.callback(router.remove)
        stack.callback(node.remove)
        join(node, "eth0", router, "node")
        node.add_address("eth0", "10.50.1.2/24")
        router.add_address("node", "10.50.1.1/24")
        node.add_route("default", "10.50.1.1")
        switch = EbpfSwitch(Path(pins) / "prism", max_rules=max(rules, 1024))
        stack.callback(switch.close)
        switch.configure(Settings(KEY, (CONTROL,)))
        switch.attach(["node"], namespace=router.name)
        yield switch, node


class Client:
    """Signs requests and times their round trips."""

    def __init__(self, node: Namespace) -> None:
        self.socket = node.socket(kind=socket.SOCK_DGRAM)
        self.socket.connect((CONTROL.host, CONTROL.port))
        self.socket.settimeout(2)
        self.seq = time.time_ns()

    def build(self, op: Op, flow: bytes, **fields: int) -> bytes:
        """One signed request."""
        self.seq += 1
        endpoint = Endpoint("10.50.1.2", 8080)
        message = Message(
            op, NODE, self.seq, flow=flow, owner=NODE, owner_endpoint=endpoint, **fields
        )
        return encode(message, KEY)

    def ask(self, data: bytes) -> bytes:
        """One round trip in C."""
        reply, _ = _control.exchange(self.socket.fileno(), data, 1000)
        if reply is None:
            raise SystemExit("the switch did not answer")
        return reply

    def ask_plainly(self, data: bytes) -> bytes:
        """One round trip with Python's sockets."""
        self.socket.send(data)
        return self.socket.recv(256)


def flow_of(number: int) -> bytes:
    return (
        pack_address(f"198.{18 + (number >> 22)}.{number >> 14 & 255}.{number >> 6 & 255}")
        + pack_address(SERVICE.host)
        + struct.pack("!HH", 1024 + (number & 63), SERVICE.port)
    )


def microseconds(samples: list[int]) -> dict[str, float]:
    ordered = sorted(samples)
    return {
        "median_us": round(ordered[len(ordered) // 2] / 1e3, 2),
        "p99_us": round(ordered[len(ordered) * 99 // 100] / 1e3, 2),
    }


def round_trips(client: Client, ask: Callable[[bytes], bytes]) -> dict[str, float]:
    """GET, built and signed beforehand."""
    flow, samples = flow_of(5_000_000), []
    for _ in range(ROUND_TRIPS):
        data = client.build(Op.GET, flow)
        started = time.perf_counter_ns()
        ask(data)
        samples.append(time.perf_counter_ns() - started)
    return microseconds(samples)


def handoffs(client: Client) -> dict[str, float]:
    """ADD(locked), CHOWN(unlock), DELETE: what one handoff asks of the switch, and its end."""
    samples = []
    for number in range(ROUND_TRIPS // 10):
        flow = flow_of(6_000_000 + number)
        started = time.perf_counter_ns()
        added = client.ask(client.build(Op.ADD, flow, flags=1))
        (gen,) = struct.unpack_from("!Q", added, 96)
        client.ask(client.build(Op.CHOWN, flow, gen=gen))
        last = client.ask(client.build(Op.DELETE, flow, gen=gen + 1))
        samples.append(time.perf_counter_ns() - started)
        if last[6] != Status.OK:
            raise SystemExit(f"DELETE was answered with {last[6]}")
    return microseconds(samples)


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


def packet(source: Endpoint, destination: Endpoint) -> bytes:
    """An Ethernet frame with an empty TCP segment (its TCP checksum is not right)."""
    addresses = socket.inet_aton(source.host) + socket.inet_aton(destination.host)
    head = struct.pack("!BBHHHBBH", 0x45, 0, 40, 1, 0, 64, 6, 0) + addresses
    head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
    tcp = struct.pack("!HHIIBBHHH", source.port, destination.port, 1, 1, 0x50, 0x10, 512, 0, 0)
    return struct.pack("!6s6sH", bytes(6), bytes(6), 0x0800) + head + tcp


def classifier(switch: EbpfSwitch, frames: list[bytes]) -> float:
    """Nanoseconds for one packet, the kernel's own measure, averaged over the frames."""
    library = ctypes.CDLL("libbpf.so.1", use_errno=True)
    program = switch._object.program_fd("prism_switch")
    repeat = max(1, RUNS // len(frames))
    took = []
    for frame in frames:
        options = TestRun(size=ctypes.sizeof(TestRun), repeat=repeat)
        options.data_in = ctypes.cast(ctypes.c_char_p(frame), ctypes.c_void_p)
        options.data_size_in = len(frame)
        if library.bpf_prog_test_run_opts(program, ctypes.byref(options)):
            raise OSError(ctypes.get_errno(), "BPF_PROG_TEST_RUN")
        took.append(options.duration)
    return round(statistics.mean(took), 1)


class TestRun(ctypes.Structure):
    """``struct bpf_test_run_opts`` (bpf/bpf.h)."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("data_in", ctypes.c_void_p),
        ("data_out", ctypes.c_void_p),
        ("data_size_in", ctypes.c_uint32),
        ("data_size_out", ctypes.c_uint32),
        ("ctx_in", ctypes.c_void_p),
        ("ctx_out", ctypes.c_void_p),
        ("ctx_size_in", ctypes.c_uint32),
        ("ctx_size_out", ctypes.c_uint32),
        ("retval", ctypes.c_uint32),
        ("repeat", ctypes.c_int),
        ("duration", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("cpu", ctypes.c_uint32),
        ("batch_size", ctypes.c_uint32),
    )


def packets(switch: EbpfSwitch) -> dict[str, float]:
    """The classifier on packets of three kinds; the test run itself is part of the figure."""
    client, owner = Endpoint("198.51.100.1", 7777), Endpoint("10.50.1.2", 8080)
    flow = Flow(client, SERVICE).pack()
    switch.add(Rule(flow, NODE, owner, bytes(6), 0, False))
    rule = switch.get(flow)
    if rule is None:
        raise SystemExit("no rule")
    # Repeated test runs see the rewritten packet from the second on, so a rewritten packet is
    # run once at a time; what does not change is repeated.
    stranger = packet(Endpoint("198.51.100.2", 1), SERVICE)
    result = {"unknown_flow_ns": classifier(switch, [stranger])}
    program = switch._object.program_fd("prism_switch")
    for name, frame in (
        ("to_owner_us_with_syscall", packet(client, SERVICE)),
        ("to_client_us_with_syscall", packet(owner, client)),
        ("unknown_us_with_syscall", stranger),
    ):
        samples = []
        for _ in range(ROUND_TRIPS):
            started = time.perf_counter_ns()
            switch._object.run(program, frame)
            samples.append(time.perf_counter_ns() - started)
        result[name] = microseconds(samples)["median_us"]
    switch.delete(flow, rule.gen)
    return result


def scattered(switch: EbpfSwitch, rules: int) -> dict[str, float]:
    """A packet of another flow each time, so that no rule is in the CPU's caches."""
    program = switch._object.program_fd("prism_switch")
    chance, samples = random.Random(1), []
    for _ in range(ROUND_TRIPS):
        flow = Flow.unpack(flow_of(chance.randrange(rules)))
        frame = packet(flow.client, flow.service)
        started = time.perf_counter_ns()
        verdict, _ = switch._object.run(program, frame)
        samples.append(time.perf_counter_ns() - started)
        if verdict != 0:
            raise SystemExit("a packet was not rewritten")
    return microseconds(samples)


def memory() -> int:
    """Octets of kernel memory that maps are made of: slabs and vmalloc."""
    total = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, value = line.split(":")
        if name in ("SUnreclaim", "VmallocUsed"):
            total += int(value.split()[0]) * 1024
    return total


def fill(switch: EbpfSwitch, count: int) -> dict[str, float]:
    """Make that many rules with owners elsewhere, and read them all."""
    used, started = memory(), time.perf_counter()
    for number in range(count):
        owner = Endpoint("10.50.1.2", 1024 + (number & 0x3FFF))
        status = switch.add(Rule(flow_of(number), NODE, owner, bytes(6), 0, False))
        if status != Status.OK:
            raise SystemExit(f"rule {number}: {status!r}")
    filled = time.perf_counter()
    used = memory() - used
    seen = sum(1 for _ in switch.rules())
    listed = time.perf_counter()
    return {
        "rules": seen,
        "add_us": round((filled - started) / max(count, 1) * 1e6, 2),
        "list_us": round((listed - filled) / max(seen, 1) * 1e6, 2),
        "octets_per_rule": round(used / max(count, 1)),
        "process_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rules", type=int, default=1_000_000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results: dict[str, object] = {"kernel": platform.release()}
    with bed(arguments.rules + 16) as (switch, node):
        client = Client(node)
        client.ask(client.build(Op.HELLO, bytes(36), cookie=60_000))
        results["round trip"] = round_trips(client, client.ask)
        results["round trip, plain sockets"] = round_trips(client, client.ask_plainly)
        results["ADD + CHOWN + DELETE"] = handoffs(client)
        results["packets, no rules"] = packets(switch)
        results["fill"] = fill(switch, arguments.rules)
        results["packets, full table"] = packets(switch)
        results["to_owner, scattered flows"] = scattered(switch, arguments.rules)
        client.ask(client.build(Op.HELLO, bytes(36), cookie=60_000))
        results["round trip, full table"] = round_trips(client, client.ask)
    if arguments.json:
        print(json.dumps(results, indent=2))
        return
    for name, value in results.items():
        print(f"{name:28} {value}")


if __name__ == "__main__":
    main()
