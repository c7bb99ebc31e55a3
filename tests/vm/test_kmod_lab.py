"""A whole cluster with kernel TLS and the monitor module: a rule goes when its connection has gone.

That is when nothing of it is left in the backend's kernel: at once where the client closed first,
and at the end of TIME_WAIT, of itself or cut short, where the backend did.
"""

from __future__ import annotations

import hashlib
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_bed import Bed, wait_for
from e2e_tls import tls_bed
from kmod_device import release, time_waits
from tcp_bed import Sniffer

from prism.monitor.base import TIME_WAIT

PORT = 42_000
SIZE = 300_000  # worth the kernel's while
SLOW = {  # the emulated machine is some twenty times slower than a real one
    "switch.max_rules": 1024,
    "cluster.lease": 30.0,
    "frontend.handoff_deadline_ms": 5000.0,
    "backend.handoff_deadline_ms": 5000.0,
}
SEES_TIME_WAIT = release() < (6, 18)
pytestmark = pytest.mark.usefixtures("module")


@pytest.fixture(scope="module")
def lab(module: str) -> Iterator[Bed]:
    settings = {"backend.monitor": "kmod", "tls.offload": "kernel", **SLOW}
    with tls_bed(backends=2, frontends=1, settings=settings) as found:
        yield found
        assert found.no_unexpected_errors() == []


def handed_over(lab: Bed, path: str, wanted: str, port: int, *headers: tuple[str, str]):
    """A connection that got this object from the backend that has it; still open here."""
    before = lab.counters("be1")["handoffs_in"]
    conn = lab.client.connect(source_port=port)
    answer = conn.request("GET", path, headers=headers)
    assert (answer.status, answer.sha256) == (200, wanted)
    assert lab.counters("be1")["handoffs_in"] == before + 1, lab.relays()
    return conn


def backend_time_waits(lab: Bed, port: int) -> int:
    with lab.cluster.topology.namespace("be1").entered():
        return time_waits(port)


@pytest.fixture(scope="module")
def stored(lab: Bed) -> tuple[str, str]:
    path = lab.key("be1", "kmod")
    return path, hashlib.sha256(lab.store(path, SIZE)).hexdigest()


def test_the_backends_use_the_module(lab: Bed) -> None:
    for node in lab.backends:
        assert [status["monitor"] for status in lab.cluster.statuses(node)] == ["kmod"]
    assert Path("/dev/prism_monitor").exists()


def kernel_sessions(lab: Bed) -> int:
    """Connections that the kernel has begun to seal for, at all backends."""
    total = 0
    for node in lab.backends:
        text = lab.cluster.exec(node, ["cat", "/proc/net/tls_stat"], capture_output=True, text=True)
        total += int(dict(line.split() for line in text.stdout.splitlines())["TlsTxSw"])
    return total


def test_curl(lab: Bed, stored: tuple[str, str], tmp_path: Path) -> None:
    """One connection to one backend, the other, and back; then its rule goes. No reset."""
    other = lab.key("be2", "kmod")
    wanted = [stored[1], hashlib.sha256(lab.store(other, SIZE)).hexdigest(), stored[1]]
    sniffer = Sniffer(lab.cluster.topology.namespace("client"))
    sessions, handoffs = kernel_sessions(lab), lab.total("handoffs_in")
    command = ["curl", "--silent", "--show-error", "--fail", "--cacert", str(lab.cluster.ca_file)]
    for number, path in enumerate((stored[0], other, stored[0])):
        command += ["-o", str(tmp_path / str(number)), f"{lab.cluster.url}{path}"]
    done = lab.cluster.exec("client", command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    got = [hashlib.sha256((tmp_path / str(n)).read_bytes()).hexdigest() for n in range(3)]
    assert got == wanted
    assert lab.total("handoffs_in") == handoffs + 3, lab.relays()
    assert kernel_sessions(lab) == sessions + 3
    assert wait_for(lambda: lab.rules() == 0, 3.0)
    segments = sniffer.segments()
    sniffer.close()
    assert segments
    assert not [flags for flags, _, _ in segments if flags & Sniffer.RST]


def test_the_client_closes_first(lab: Bed, stored: tuple[str, str]) -> None:
    conn = handed_over(lab, *stored, PORT)
    assert lab.rules() == 1
    time.sleep(0.3)
    assert lab.rules() == 1
    conn.close()
    assert wait_for(lambda: lab.rules() == 0, 3.0)
    assert backend_time_waits(lab, PORT) == 0


def test_the_backend_closes_first_and_the_port_is_used_again(
    lab: Bed, stored: tuple[str, str]
) -> None:
    """The SYN's question ends the old rule; the module does not mistake the old for the new."""
    conn = handed_over(lab, *stored, PORT + 1, ("Connection", "close"))
    assert conn.at_end()
    conn.close()
    assert wait_for(lambda: backend_time_waits(lab, PORT + 1) == 1, 3.0)
    assert lab.rules() == 1
    again = handed_over(lab, *stored, PORT + 1)
    assert lab.rules() == 1
    time.sleep(0.5)
    assert lab.rules() == 1  # the new connection's, and it stays
    answer = again.request("GET", stored[0])
    assert (answer.status, answer.sha256) == (200, stored[1])
    again.close()
    assert wait_for(lambda: lab.rules() == 0, 3.0)


def test_time_wait_cut_short(lab: Bed, stored: tuple[str, str]) -> None:
    """Nothing but the module can tell; the rule goes with TIME_WAIT, a minute earlier than else."""
    conn = handed_over(lab, *stored, PORT + 2, ("Connection", "close"))
    assert conn.at_end()
    client, seq = conn.local, next_sequence(conn.sock.raw)
    conn.close()
    assert wait_for(lambda: backend_time_waits(lab, PORT + 2) == 1, 3.0)
    time.sleep(0.5)
    assert lab.rules() == 1
    send_reset(lab, client, seq + 1)  # behind the FIN (RFC 1337 would rather it were ignored)
    assert wait_for(lambda: backend_time_waits(lab, PORT + 2) == 0, 3.0)
    if not SEES_TIME_WAIT:  # waited out, as without the module
        time.sleep(1.0)
        assert lab.rules() == 1
        assert wait_for(lambda: lab.rules() == 0, TIME_WAIT + 5)
        return
    assert wait_for(lambda: lab.rules() == 0, 3.0)


def next_sequence(sock: socket.socket) -> int:
    """The sequence number that a socket's next octet will have (TCP_REPAIR, TCP_QUEUE_SEQ)."""
    repair, queue, sequence, send_queue, off_without_probe = 19, 20, 21, 2, -1
    sock.setsockopt(socket.IPPROTO_TCP, repair, 1)
    sock.setsockopt(socket.IPPROTO_TCP, queue, send_queue)
    number = sock.getsockopt(socket.IPPROTO_TCP, sequence)
    sock.setsockopt(socket.IPPROTO_TCP, repair, off_without_probe)
    return number


def send_reset(lab: Bed, client: tuple[str, int], seq: int) -> None:
    """Send an RST from a port of the client that has no socket any more (RFC 9293, 3.1)."""
    service = lab.client.service
    header = struct.pack(
        "!HHIIBBHHH", client[1], service.port, seq & 0xFFFF_FFFF, 0, 5 << 4, 4, 0, 0, 0
    )
    pseudo = socket.inet_aton(client[0]) + socket.inet_aton(service.host)
    pseudo += struct.pack("!HH", socket.IPPROTO_TCP, len(header))
    total = sum(struct.unpack(f"!{(len(pseudo) + len(header)) // 2}H", pseudo + header))
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    with lab.client.namespace.run_inside(
        lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
    ) as raw:
        packet = header[:16] + struct.pack("!H", ~total & 0xFFFF) + header[18:]
        raw.sendto(packet, (service.host, 0))


@pytest.mark.slow
def test_the_rule_stays_exactly_as_long_as_time_wait(lab: Bed, stored: tuple[str, str]) -> None:
    assert lab.rules() == 0
    conn = handed_over(lab, *stored, PORT + 3, ("Connection", "close"))
    assert conn.at_end()
    conn.close()
    assert wait_for(lambda: backend_time_waits(lab, PORT + 3) == 1, 3.0)
    began = time.monotonic()
    ended = None  # when its TIME_WAIT did
    while lab.rules() == 1:
        now = time.monotonic()
        assert now - began < TIME_WAIT + 10
        if ended is None and not backend_time_waits(lab, PORT + 3):
            ended = now
        assert ended is None or now - ended < 3.0
        time.sleep(0.25)
    assert backend_time_waits(lab, PORT + 3) == 0
    assert time.monotonic() - began > TIME_WAIT - 10


def test_s_client(lab: Bed, stored: tuple[str, str]) -> None:
    sessions = kernel_sessions(lab)
    service = lab.cluster.topology.services(443)[0]
    command = ["openssl", "s_client", "-connect", str(service), "-quiet"]
    command += ["-CAfile", str(lab.cluster.ca_file), "-verify_return_error"]
    request = f"GET {stored[0]} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode()
    done = lab.cluster.exec("client", command, input=request, capture_output=True)
    head, _, body = done.stdout.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), (head, done.stderr)
    assert hashlib.sha256(body).hexdigest() == stored[1]
    assert kernel_sessions(lab) == sessions + 1
