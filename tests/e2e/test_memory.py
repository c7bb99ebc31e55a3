"""What an idle connection costs."""

from __future__ import annotations

import time
from collections.abc import Callable

from e2e_bed import Bed, wait_for
from e2e_http import Conn

COUNT, BATCH = 2000, 100
WARM = 300
TRIES = 10


def _idle(bed: Bed, path: str, count: int) -> list[Conn]:
    """Kept-alive connections that were handed over and have had one answer each."""
    conns: list[Conn] = []
    tries = 0
    while len(conns) < count:
        relays = bed.counters("fe1")["relays"]
        batch = [bed.client.connect() for _ in range(BATCH)]
        for conn in batch:
            assert conn.request("GET", path).status == 200
        if bed.counters("fe1")["relays"] == relays:
            conns += batch
            continue
        # On a busy machine one answer came too late, and what followed was relayed for a second.
        tries += 1
        assert tries < TRIES, f"not handed over: {bed.relays()}"
        for conn in batch:
            conn.close()
        time.sleep(1.1)
    return conns


def relayed(bed: Bed) -> int:
    """How many connections the frontend may keep for what it relays: none, if it did not."""
    return bed.total("relays")


def test_idle_connections(make_bed: Callable[..., Bed]) -> None:
    """Under 20 kB of user memory each on the backend, nothing on the frontend."""
    bed = make_bed(backends=2, trace=False)
    count, warm = (min(COUNT, 400), min(WARM, 100)) if bed.slow_rules else (COUNT, WARM)
    path = bed.key("be1", "idle")
    bed.store(path, 100)
    # What is allocated once is not what a connection costs; three rounds fill the pools.
    for _ in range(3):
        for conn in _idle(bed, path, warm):
            conn.close()
        assert wait_for(lambda: bed.counters("be1")["connections"] <= relayed(bed), 20.0)
    backend, frontend = bed.memory("be1"), bed.memory("fe1")
    conns = _idle(bed, path, count)
    try:
        assert count <= bed.counters("be1")["connections"] <= count + relayed(bed)
        assert bed.rules() == count
        each = (bed.memory("be1") - backend) / count
        grown = bed.memory("fe1") - frontend
    finally:
        for conn in conns:
            conn.close()
    print(f"{each:.0f} octets for each idle connection on the backend; frontend {grown:+d}")
    assert each < 20_000
    assert grown < 256 * 1024
    assert wait_for(lambda: bed.rules() == 0, 20.0)
    assert bed.counters("be1")["connections"] <= relayed(bed)
