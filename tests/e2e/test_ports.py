"""A client that uses its port again while the switch still has the rule of its last connection."""

from __future__ import annotations

import socket
import time

import pytest
from e2e_bed import Bed, wait_for
from e2e_capture import SYN, capturing
from e2e_http import Conn, digest
from scapy.all import IP, TCP

CLUSTER = {"backends": 2}
PORT = 41_000


def _fetch(conn: Conn, path: str, wanted: str, *headers: tuple[str, str]) -> None:
    answer = conn.request("GET", path, headers=headers)
    assert (answer.status, answer.sha256) == (200, wanted)


@pytest.mark.parametrize("end", ["reset", "vanish"])
def test_port_used_again_at_once(shared: Bed, end: str) -> None:
    """Each connection ends on the client's side only; the next one has the same port."""
    paths = [shared.key(node, "again") for node in shared.backends]
    hashes = [digest(shared.store(path, 20_000)) for path in paths]
    before = shared.snapshot()
    slowest = 0.0
    for turn in range(20):
        began = time.perf_counter()
        conn = shared.client.connect(source_port=PORT + (end == "vanish"))
        _fetch(conn, paths[turn % 2], hashes[turn % 2])
        slowest = max(slowest, time.perf_counter() - began)
        getattr(conn, end)()
    # A vanished connection lives on at the backend, which learns of its end by a challenge ACK
    # (RFC 5961, section 4): the client's SYN comes again after a second.
    assert slowest < (0.5 if end == "reset" else 3.0)
    conn = shared.client.connect(source_port=PORT + (end == "vanish"))
    _fetch(conn, paths[0], hashes[0])
    conn.close()
    shared.assert_clean(before)


def _server_closes(shared: Bed, port: int, path: str, wanted: str) -> None:
    with shared.client.open(source_port=port) as conn:
        _fetch(conn, path, wanted, ("Connection", "close"))
        assert conn.at_end()


def test_port_used_again_after_the_server_closed(shared: Bed) -> None:
    """The rule outlives the connection by TIME_WAIT; the SYN's ask takes it away at once."""
    path = shared.key("be1", "closed")
    wanted = digest(shared.store(path, 20_000))
    asked = shared.switch("syn_asked")
    times = []
    with capturing(shared.client.namespace) as capture:
        for _ in range(10):
            began = time.perf_counter()
            _server_closes(shared, PORT + 2, path, wanted)
            times.append(time.perf_counter() - began)
    assert max(times) < 0.5, times
    assert shared.switch("syn_asked") - asked >= 9
    talk = next(talk for (_, port), talk in capture.talks().items() if port == PORT + 2)
    assert talk.back.rsts == 0
    # Ten connections in ten milliseconds: the frontend may still keep the frozen socket of one when
    # the next one's SYN comes, and answers with a challenge ACK. Then the client says it again.
    syns = [packet for packet in talk.packets if packet.outgoing and packet.flags & SYN]
    assert 10 <= len(syns) <= 20


def test_forged_syn(shared: Bed) -> None:
    """A SYN on a live flow disturbs nothing."""
    path = shared.key("be1", "live")
    wanted = digest(shared.store(path, 20_000))
    namespace = shared.client.namespace
    with shared.client.open() as conn:
        _fetch(conn, path, wanted)
        with namespace.run_inside(
            lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 255)
        ) as raw:
            service = shared.client.service
            for seq in (0, 1 << 31, 12345):
                syn = IP(src=conn.local[0], dst=service.host) / TCP(
                    sport=conn.local[1], dport=service.port, flags="S", seq=seq
                )
                raw.sendto(bytes(syn), (service.host, 0))
                time.sleep(0.05)
        for _ in range(3):
            _fetch(conn, path, wanted)


@pytest.mark.slow
@pytest.mark.timeout(180, method="signal")
def test_rule_goes_after_time_wait(shared: Bed) -> None:
    """A rule of a connection that its backend closed first stays for TIME_WAIT, and then goes."""
    path = shared.key("be2", "wait")
    wanted = digest(shared.store(path, 100))
    # What earlier tests closed stands for its own TIME_WAIT, and goes before these five do.
    assert wait_for(lambda: shared.rules() < 5, 65.0)
    before, began = shared.rules(), time.monotonic()
    for port in range(5):
        _server_closes(shared, PORT + 10 + port, path, wanted)
    assert 5 <= shared.rules() <= before + 5
    assert wait_for(lambda: shared.rules() < 5, 75.0, pause=0.5)
    assert time.monotonic() - began > 55.0
    assert wait_for(lambda: shared.rules() == 0, 20.0, pause=0.5)
