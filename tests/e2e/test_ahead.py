"""Uploads on one connection that belong to backends in turn: what travels with each handoff."""

from __future__ import annotations

from pathlib import Path

from e2e_bed import Bed
from e2e_http import digest, payload

# Links that the client's window fills; on faster ones a handoff is over before much has come.
CLUSTER = {"backends": 2, "rate": "100mbit"}
OK = (200, 201, 204)
MIB = 1 << 20


def sent_by(bed: Bed, *nodes: str) -> int:
    """Octets that these nodes have sent."""
    switch = bed.cluster.topology.switch
    text = switch.run_inside(lambda: Path("/proc/thread-self/net/dev").read_text())
    lines = (line.partition(":") for line in text.splitlines()[2:])
    received = {name.strip(): int(numbers.split()[0]) for name, _, numbers in lines}
    return sum(received[node] for node in nodes)


def test_little_of_the_next_request_travels(shared: Bed) -> None:
    """After a large upload the client may send only the beginning of its next one ahead."""
    before = shared.snapshot()
    paths = {node: shared.key(node, "ahead") for node in shared.backends}
    turns = [paths[shared.backends[turn % 2]] for turn in range(10)]
    with shared.client.open() as conn:
        for path in turns[:2]:
            assert conn.request("PUT", path, payload(path, MIB)).status in OK
        octets, handoffs = sent_by(shared, "be1", "be2"), shared.switch("handoffs")
        for path in turns[2:]:
            assert conn.request("PUT", path, payload(path, MIB)).status in OK
        octets = sent_by(shared, "be1", "be2") - octets
        handoffs = shared.switch("handoffs") - handoffs
        for path in paths.values():
            assert conn.request("GET", path).sha256 == digest(payload(path, MIB))
    assert handoffs == 8
    assert octets / handoffs < 96 * 1024  # acknowledgements of 1 MiB among them
    shared.assert_clean(before)
