"""Bodies of every size and shape, and clients that are slow, leave early or vanish."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import pytest
from e2e_bed import Bed, together, wait_for
from e2e_http import Conn, Cut, digest, payload
from e2e_leaks import temporary_files

CLUSTER = {
    "backends": 3,
    "settings": {"backend.body_timeout": 3.0, "backend.send_timeout": 3.0,
                 "frontend.head_timeout": 3.0, "backend.head_timeout": 3.0},
}  # fmt: skip
OK = (200, 201, 204)
SIZES = (1, 2, 100, 1447, 1448, 1449, 65_535, 65_536, 1 << 20, 7_000_001)


def test_what_stays_is_noticed(shared: Bed) -> None:
    """The check that the others rely on tells a connection that stays, and who holds it."""
    before = shared.snapshot()
    with shared.client.open() as conn:
        assert conn.request("GET", shared.key("be1", "nothing")).status == 404
        with pytest.raises(AssertionError, match=r"be1 socket ESTABLISHED: .* held by be1/0 \(fd"):
            shared.assert_clean(before, timeout=0.2)
    shared.assert_clean(before)


@pytest.mark.parametrize("chunk", [0, 1, 1000, 65_536], ids=["length", "1", "1000", "65536"])
def test_uploads(shared: Bed, chunk: int) -> None:
    """Every size comes back as it was, on one connection that moves with each object."""
    before = shared.snapshot()
    with shared.client.open() as conn:
        for number, size in enumerate(SIZES):
            if chunk == 1 and size > 65_536:
                continue
            path = shared.key(shared.backends[number % 3], f"up-{chunk}-{size}")
            data = payload(path, size)
            assert conn.request("PUT", path, data, chunked=chunk).status in OK
            answer = conn.request("GET", path)
            assert (answer.status, answer.length, answer.sha256) == (200, size, digest(data))
            conn.request("DELETE", path)
    shared.assert_clean(before)


def test_upload_of_256_mebibytes(shared: Bed) -> None:
    """The largest, once, with the handoff in the middle of it."""
    before, handoffs = shared.snapshot(), shared.switch("handoffs")
    path, size = shared.key("be2", "large"), 256 << 20
    block = payload("block", 1 << 20)
    with shared.client.open() as conn:
        conn.request("GET", shared.key("be1", "nothing"))
        conn.send(conn.head("PUT", path, [("Content-Length", str(size))]))
        for _ in range(size // len(block)):
            conn.send(block)
        assert conn.response("PUT").status in OK
        answer = conn.request("GET", path)
        assert (answer.status, answer.length) == (200, size)
        assert answer.sha256 == digest(block * (size // len(block)))
        assert conn.request("DELETE", path).status == 204
    assert shared.switch("handoffs") - handoffs >= 2
    shared.assert_clean(before)


@pytest.mark.parametrize("gap", [0.0, 0.0001, 0.0005, 0.002])
@pytest.mark.parametrize("chunk", [0, 3000])
def test_handoff_in_mid_body(shared: Bed, gap: float, chunk: int) -> None:
    """The head comes with a part of the body, the rest follows while the connection moves."""
    before = shared.snapshot()
    data = payload("mid", 120_000)
    with shared.client.open() as conn:
        for turn in range(12):
            path = shared.key(shared.backends[turn % 3], f"mid-{turn}")
            request = conn.start("PUT", path, data, chunked=chunk)
            for at in range(0, len(request), 10_000):
                conn.send(request[at : at + 10_000])
                if gap:
                    time.sleep(gap)
            assert conn.response("PUT").status in OK
            answer = conn.request("GET", path)
            assert (answer.status, answer.sha256) == (200, digest(data))
    shared.assert_clean(before)


def test_expect_continue(shared: Bed) -> None:
    """A client that waits before it sends its body is told to go on by the body's owner."""
    before, handoffs = shared.snapshot(), shared.switch("handoffs")
    with shared.client.open() as conn:
        for turn in range(6):
            path = shared.key(shared.backends[turn % 3], "expect")
            data = payload(turn, 30_000)
            fields = [("Content-Length", "30000"), ("Expect", "100-continue")]
            conn.send(conn.head("PUT", path, fields))
            assert conn.response_head().status == 100
            conn.send(data)
            assert conn.response("PUT").status in OK
            assert conn.request("GET", path).sha256 == digest(data)
    assert shared.switch("handoffs") - handoffs == 6
    shared.assert_clean(before)


def test_large_head(shared: Bed) -> None:
    """Just below the bound; it all travels in the receive queue."""
    before = shared.snapshot()
    fields = [(f"X-{n}", "v" * 1500) for n in range(10)]
    with shared.client.open() as conn:
        for turn in range(6):
            path = shared.key(shared.backends[turn % 3], "head")
            assert conn.request("PUT", path, b"x" * turn, headers=fields).status in OK
            assert conn.request("GET", path, headers=fields).body == b"x" * turn
    shared.assert_clean(before)


def test_one_octet_at_a_time(shared: Bed) -> None:
    """Head and body in segments of one octet, ten clients at once."""
    before = shared.snapshot()

    def trickle(number: int) -> bool:
        path = shared.key(shared.backends[number % 3], f"trickle-{number}")
        data = payload(path, 200)
        with shared.client.open() as conn:
            conn.send_slowly(conn.start("PUT", path, data, chunked=7 * (number % 2)))
            stored = conn.response("PUT").status in OK
            conn.send_slowly(conn.start("GET", path))
            answer = conn.response()
            return stored and answer.sha256 == digest(data)

    assert all(together([lambda n=n: trickle(n) for n in range(10)]))  # type: ignore[misc]
    shared.assert_clean(before)


def test_pipelined_requests_for_different_owners(shared: Bed) -> None:
    """Several requests in one segment, each for another node: answered whole and in order."""
    paths = [shared.key(node, "pipe") for node in shared.backends] * 4
    bodies = {path: shared.store(path, 5000) for path in set(paths)}
    before = shared.snapshot()
    with shared.client.open() as conn:
        conn.send(b"".join(conn.start("GET", path) for path in paths))
        for path in paths:
            answer = conn.response()
            assert (answer.status, answer.sha256) == (200, digest(bodies[path]))
            assert answer.node.partition("/")[0] == shared.owner(path)
    shared.assert_clean(before)


@pytest.mark.parametrize("delay", [0.0, 0.00005, 0.0002, 0.001, 0.02])
def test_half_close(shared: Bed, delay: float) -> None:
    """A client that has said all it will say still gets its answer, then a clean end."""
    path = shared.key("be1", "half")
    data = shared.store(path, 300_000)
    upload = payload("half-up", 100_000)
    before = shared.snapshot()
    for turn in range(8):
        with shared.client.open() as conn:
            conn.send(conn.start("GET", path))
            if delay:
                time.sleep(delay)
            conn.half_close()
            answer = conn.response()
            assert (answer.status, answer.sha256) == (200, digest(data))
            assert conn.at_end()
        with shared.client.open() as conn:
            conn.send(conn.start("PUT", shared.key("be3", f"half-{turn}"), upload))
            if delay:
                time.sleep(delay)
            conn.half_close()
            assert conn.response("PUT").status in OK
            assert conn.at_end()
    shared.assert_clean(before)


def test_half_close_in_mid_request(shared: Bed) -> None:
    """A request that can never become whole is ended cleanly, and nothing is stored."""
    before = shared.snapshot()
    for cut in (5, 30, 60, 5_000):
        with shared.client.open() as conn:
            path = shared.key("be2", f"cut-{cut}")
            conn.send(conn.start("PUT", path, payload(cut, 10_000))[:cut])
            conn.half_close()
            with contextlib.suppress(Cut, ConnectionResetError):
                assert conn.response("PUT").status in (400, 408)
        assert shared.client.once("GET", shared.key("be2", f"cut-{cut}")).status == 404
    shared.assert_clean(before)


WAYS: dict[str, Callable[[Conn], None]] = {
    "fin": Conn.close,
    "reset": Conn.reset,
    "vanish": Conn.vanish,
}


@pytest.mark.parametrize("way", WAYS)
def test_clients_that_disappear_in_mid_handoff(shared: Bed, way: str) -> None:
    """At many moments around the handoff; nothing stays behind, others are served."""
    path, upload = shared.key("be1", "gone"), payload("gone", 2_000_000)
    body = shared.store(path, 100_000)
    before = shared.snapshot()
    for turn in range(60):
        conn = shared.client.connect()
        if turn % 3 == 0:
            # The store keeps a small body in memory, and gives a large one a file.
            part = 1_000_000 if turn % 2 else 30_000
            conn.send(conn.start("PUT", shared.key("be2", f"gone-{turn}"), upload)[:part])
        else:
            conn.send(conn.start("GET", path))
        deadline = time.perf_counter() + (turn % 20) * 30e-6
        while time.perf_counter() < deadline:
            pass
        WAYS[way](conn)
    # An upload that was cut waits for its body no longer than body_timeout.
    shared.assert_clean(before, timeout=8.0)
    answer = shared.client.once("GET", path)
    assert (answer.status, answer.sha256) == (200, digest(body))


def test_clients_behind_a_broken_link(shared: Bed) -> None:
    """The client's link goes in mid-download; its server gives up, nothing stays behind."""
    path = shared.key("be3", "link")
    shared.store(path, 8 << 20)
    before = shared.snapshot()
    conns = [shared.client.connect(rcvbuf=8192) for _ in range(5)]
    for conn in conns:
        conn.send(conn.start("GET", path))
        conn.sock.recv(1000)
    with no_way_to_the_service(shared):
        for conn in conns:
            conn.vanish()
        time.sleep(3.5)  # send_timeout is 3 s
        assert wait_for(lambda: shared.counters("be3")["connections"] == 0, 4.0)
    shared.assert_clean(before, timeout=8.0)


@contextlib.contextmanager
def no_way_to_the_service(bed: Bed) -> Iterator[None]:
    """Nothing that the client sends to the service arrives."""
    with bed.client.namespace.route() as route:
        target = {"dst": f"{bed.client.service.host}/32", "type": "blackhole"}
        route.route("add", **target)
        try:
            yield
        finally:
            route.route("del", **target)


def test_slow_heads_time_out(shared: Bed) -> None:
    """A head that does not come in time is answered 408 and the connection closed."""
    before = shared.snapshot()
    with shared.client.open() as conn:
        conn.send(b"GET /slow HTT")
        began = time.monotonic()
        answer = conn.response()
        assert answer.status == 408
        assert 2.0 < time.monotonic() - began < 6.0
        assert conn.at_end()
    shared.assert_clean(before)


def test_body_that_stalls(shared: Bed) -> None:
    """A body that stops is answered 408 or the connection is closed; no file is left."""
    before = shared.snapshot()
    with shared.client.open() as conn:
        path = shared.key("be1", "stall")
        conn.send(conn.start("PUT", path, bytes(1_000_000))[:500_000])
        assert wait_for(lambda: temporary_files(shared.stores())), "no file to be left behind"
        with contextlib.suppress(Cut, ConnectionResetError):
            assert conn.response("PUT").status == 408
    assert shared.client.once("GET", path).status == 404
    shared.assert_clean(before, closed_by_backend=1)


def test_slow_readers(shared: Bed) -> None:
    """Twelve clients that read slowly do not hold others up, and get everything."""
    path = shared.key("be2", "slow")
    data = shared.store(path, 1 << 20)
    quick = shared.key("be2", "quick")
    shared.store(quick, 1000)
    before = shared.snapshot()

    def slow() -> bool:
        with shared.client.open(rcvbuf=16_384) as conn:
            conn.send(conn.start("GET", path))
            return conn.response(pace=1e6).sha256 == digest(data)

    def fast() -> bool:
        time.sleep(0.2)
        began = time.monotonic()
        with shared.client.open() as conn:
            for _ in range(20):
                assert conn.request("GET", quick).status == 200
        return time.monotonic() - began < 0.6

    assert all(together([*[slow] * 12, fast]))
    shared.assert_clean(before)
