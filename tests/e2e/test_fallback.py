"""When a connection cannot be handed over, the frontend relays, and a counter says why."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from e2e_bed import Bed, wait_for
from e2e_http import digest, payload

from prism.flow import Endpoint
from prism.handoff.channel import Channel
from prism.tls.identity import Identity

PLACE = 'name = "be1"\naddress = "10.77.101.2"'


def _store_and_fetch(bed: Bed, node: str, tag: str, **options: Any) -> str:
    """Both methods, bodies whole; who answered."""
    path = bed.key(node, f"fallback-{tag}")
    data = payload(path, 40_000)
    with bed.client.open(**options) as conn:
        assert conn.request("PUT", path, data).status in (200, 201, 204)
        answer = conn.request("GET", path)
        assert (answer.status, answer.sha256) == (200, digest(data))
        assert conn.request("DELETE", path).status == 204
    return answer.node


def test_rule_table_full(make_bed: Callable[..., Bed]) -> None:
    """More connections than rules: the rest is relayed; room that comes free is used."""
    bed = make_bed(backends=2, settings={"switch.max_rules": 8})
    path = bed.key("be1", "full")
    data = bed.store(path, 5000)
    assert wait_for(lambda: bed.rules() == 0)
    conns = [bed.client.connect() for _ in range(40)]
    for _ in range(2):
        for conn in conns:
            assert conn.request("GET", path).sha256 == digest(data)
    relays = bed.relays()
    assert relays.get("full", 0) >= 2 * (40 - 8) - 16, relays
    assert 0 < bed.rules() <= 16
    for conn in conns:
        conn.close()
    assert wait_for(lambda: bed.rules() == 0)
    before = bed.relays()
    _store_and_fetch(bed, "be1", "room")
    assert bed.relays() == before


def test_backend_that_is_full(make_bed: Callable[..., Bed]) -> None:
    """A backend with as many connections as it wants refuses; the frontend relays."""
    bed = make_bed(backends=2, settings={"backend.max_connections": 4})
    path = bed.key("be1", "busy")
    data = bed.store(path, 5000)
    assert wait_for(lambda: bed.rules() == 0)
    conns = [bed.client.connect() for _ in range(10)]
    for _ in range(2):
        for conn in conns:
            answer = conn.request("GET", path)
            assert (answer.status, answer.sha256) == (200, digest(data))
    assert bed.relays().get("refused-busy", 0) >= 6, bed.relays()
    for conn in conns:
        conn.close()
    assert wait_for(lambda: bed.rules() == 0)


def test_backend_that_cannot_import(make_bed: Callable[..., Bed]) -> None:
    """Its address for the flow is gone: it refuses, and the frontend relays over the other one."""
    bed = make_bed(backends=2)
    with bed.cluster.topology.namespace("be1").route() as route:
        (index,) = route.link_lookup(ifname="eth0")
        route.addr("del", index=index, address="fd77:101::2", prefixlen=64)
    path = bed.key("be1", "no-address")
    data = payload(path, 40_000)
    with bed.client6.open() as conn:
        assert conn.request("PUT", path, data).status in (200, 201, 204)
        answer = conn.request("GET", path)
        assert (answer.status, answer.sha256) == (200, digest(data))
    relays = bed.relays()
    if bed.slow_rules:  # the second request may come before the rule of the first is gone
        relays["refused-import-failed"] += relays.pop("handoff-pending", 0)
    assert relays == {"refused-import-failed": 2}
    assert wait_for(lambda: bed.rules() == 0)
    handoffs = bed.switch("handoffs")
    assert _store_and_fetch(bed, "be1", "v4") == "be1/0"
    assert bed.switch("handoffs") == handoffs + 1


def test_switch_that_does_not_answer(make_bed: Callable[..., Bed]) -> None:
    """Control datagrams get lost: relayed, at once when that is known; handed over again later."""
    bed = make_bed(backends=2)
    _store_and_fetch(bed, "be1", "warm")
    assert bed.relays() == {}
    with bed.cluster.topology.namespace("fe1").route() as route:
        # A device whose other end nobody listens at: what goes there is lost without a word.
        route.link("add", ifname="nowhere", kind="veth", peer={"ifname": "void"})
        for name in ("void", "nowhere"):
            (index,) = route.link_lookup(ifname=name)
            route.link("set", index=index, state="up")
        route.neigh("add", ifindex=index, dst="10.77.0.1", lladdr="02:00:00:00:00:01")
        route.route("add", dst="10.77.0.1/32", oif=index)
        began = time.monotonic()
        _store_and_fetch(bed, "be1", "first")
        assert time.monotonic() - began < 4.0
        assert wait_for(lambda: not bed.cluster.statuses("fe1")[0]["switch_reachable"], 5.0)
        began = time.monotonic()
        for _ in range(3):
            _store_and_fetch(bed, "be2", "known")
        assert time.monotonic() - began < 1.0
        relays = bed.relays()
        assert relays.get("switch-unreachable", 0) >= 9, relays
        route.route("del", dst="10.77.0.1/32", oif=index)
    assert wait_for(lambda: bed.cluster.statuses("fe1")[0]["switch_reachable"], 5.0)
    handoffs = bed.switch("handoffs")
    assert _store_and_fetch(bed, "be1", "again") == "be1/0"
    assert bed.switch("handoffs") > handoffs
    assert wait_for(lambda: bed.rules() == 0)


@contextlib.contextmanager
def _double(bed: Bed, serve: Callable[[], Any]) -> Iterator[None]:
    """Run an event loop in a thread inside be1's namespace; ``serve`` returns what to close."""
    started, stop = threading.Event(), threading.Event()

    async def main() -> None:
        closing = await serve()
        started.set()
        await asyncio.to_thread(stop.wait)
        result = closing()
        if asyncio.iscoroutine(result):
            await result

    def run() -> None:
        with bed.cluster.topology.namespace("be1").entered():
            asyncio.run(main())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert started.wait(5)
        yield
    finally:
        stop.set()
        thread.join(5)


def _channel_double(bed: Bed, offers: list[Any]) -> contextlib.AbstractContextManager[None]:
    """Somebody with be1's keys who greets and answers pings, but no offer."""
    config = bed.cluster.config("be1")
    assert config.backend is not None
    key = config.cluster.channel_key()
    identity = Identity("be1", config.identity_files(config.backend))

    async def serve() -> Callable[[], Any]:
        channel = Channel("be1/0", key, lambda offer, reply: offers.append(offer), identity)
        await channel.listen(Endpoint("10.77.101.2", 4900))
        return channel.close

    return _double(bed, serve)


def _usable(bed: Bed) -> bool:
    """Whether the frontend would offer be1 a connection."""
    return bool(bed.cluster.statuses("fe1")[0]["peers"]["be1/0"])


def test_backend_that_never_greets(make_bed: Callable[..., Bed]) -> None:
    """Somebody accepts at the handoff port and says nothing: no link, so relayed at once."""

    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)

    async def serve() -> Callable[[], None]:
        server = await asyncio.start_server(mute, "10.77.101.2", 4900)
        return server.close

    bed = make_bed(backends=2)
    with _channel_double(bed, []):
        bed.reconfigure("fe1", (PLACE, PLACE + "\nhandoff_port = 4900"))
        assert _usable(bed)
    with _double(bed, serve):
        assert wait_for(lambda: not _usable(bed))
        began = time.monotonic()
        assert _store_and_fetch(bed, "be1", "mute") == "be1/0"
        assert time.monotonic() - began < 1.0
        assert bed.relays() == {"link-down": 3}
    assert bed.rules() == 0


def test_backend_that_never_answers(make_bed: Callable[..., Bed]) -> None:
    """It greets and answers pings, but no offer: taken back after the deadline, then relayed."""
    bed = make_bed(backends=2)
    offers: list[Any] = []
    with _channel_double(bed, offers):
        bed.reconfigure("fe1", (PLACE, PLACE + "\nhandoff_port = 4900"))
        assert _usable(bed)
        began = time.monotonic()
        assert _store_and_fetch(bed, "be1", "silent") == "be1/0"
        # One deadline of 250 ms, and two more at most: then others are not kept waiting.
        assert 0.2 < time.monotonic() - began < 2.0
        relays = bed.relays()
        assert 1 <= relays["timed-out"] <= 3
        assert sum(relays.values()) == 3
        assert set(relays) <= {"timed-out", "link-down"}
        assert len(offers) == bed.counters("fe1")["take_backs"] == relays["timed-out"]
        for turn in range(20):
            _store_and_fetch(bed, "be1", f"silent-{turn}")
        assert bed.counters("fe1")["take_backs"] <= 8, "its pauses grow"
    assert wait_for(lambda: bed.rules() == 0)


@pytest.mark.parametrize("relay", [True, False])
def test_handoffs_forbidden(make_bed: Callable[..., Bed], relay: bool) -> None:
    """``handoff = "never"`` makes a plain proxy; without relaying too, requests get a 503."""
    bed = make_bed(backends=2, settings={"frontend.handoff": "never", "frontend.relay": relay})
    if relay:
        before = bed.snapshot()
        assert _store_and_fetch(bed, "be1", "never") == "be1/0"
        assert bed.relays() == {"configured": 3}
        bed.assert_clean(before)  # but for the connection that the frontend keeps
        assert bed.cluster.statuses("fe1")[0]["relaying"] == {"busy": 0, "idle": 1}
        with bed.cluster.topology.namespace("fe1").socket() as stray:
            stray.connect(bed.placement.nodes[0].relay_endpoint)
            stray.sendall(b"GET")
            with pytest.raises(AssertionError, match="no pool keeps"):
                bed.assert_clean(before, timeout=0.2)
    else:
        assert bed.client.once("GET", bed.key("be1")).status == 503
    assert bed.switch("handoffs") == 0
