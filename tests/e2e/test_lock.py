"""What a client feels of the lock: held packets come at once, dropped ones after a time-out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from e2e_bed import Bed
from e2e_http import payload

SEGMENTS, SEGMENT = 40, 50
PAUSE = 25e-6


def _upload(bed: Bed, path: str, data: bytes) -> float:
    """Send the head, then the body in many small segments; seconds from the last to the answer."""
    with bed.client.open() as conn:
        conn.send(conn.head("PUT", path, [("Content-Length", str(len(data)))]))
        due = time.perf_counter()
        for at in range(0, len(data), SEGMENT):
            due += PAUSE
            while time.perf_counter() < due:
                pass
            conn.send(data[at : at + SEGMENT])
        sent = time.perf_counter()
        assert conn.response("PUT").status in (200, 201, 204)
        return time.perf_counter() - sent


def _stalls(bed: Bed, counter: str, wanted: int, tries: int) -> list[float]:
    """Times of the uploads during whose lock the switch held (or dropped) a packet."""
    data = payload("lock", SEGMENTS * SEGMENT)
    hit = []
    for number in range(tries):
        before = bed.switch(counter)
        took = _upload(bed, bed.key(bed.backends[number % 2], f"lock-{number}"), data)
        if bed.switch(counter) > before:
            hit.append(took)
        if len(hit) == wanted:
            break
    return hit


def test_hold_against_drop(make_bed: Callable[..., Bed]) -> None:
    """Held: no stall worth the name at the median. Dropped: the client's time-out, about 200 ms."""
    bed = make_bed(backends=2, lock="drop")
    dropped = _stalls(bed, "dropped_packets", 15, 150)
    bed = make_bed(backends=2, lock="hold")
    held = _stalls(bed, "held_packets", 60, 600)
    for name, times in (("held", held), ("dropped", dropped)):
        figures = [f"{1e3 * t:.2f}" for t in (statistics.median(times), max(times))]
        print(f"{name}: {len(times)} uploads hit, median {figures[0]} ms, longest {figures[1]} ms")
    assert len(held) >= 20, "too few uploads met the lock to say anything"
    assert len(dropped) >= 5, "too few uploads met the lock to say anything"
    assert statistics.median(held) < 0.005
    assert statistics.median(dropped) > 0.1
