"""What a node's last life has left in the switch: clients learn that their connections are gone.

A socket in repair mode, on its way to another node, dies without a word, and its client may have
nothing left to say: only the node's next life can tell it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from switch_bed import bpffs
from test_agent import PORT, Bed, bed, is_reset, received, silence, until  # noqa: F401

from prism._ext import tcp_repair
from prism.flow import Flow
from prism.lab.topology import Topology, limit
from prism.reconcile import PAUSE, Reconciler
from prism.switch.client import SwitchClient
from prism.switch.control import Op, Status
from prism.switch.provoke import Provoker

pytestmark = pytest.mark.net

RATE = 1_000_000  # bits a second of the first backend's link: a datagram takes 1.3 ms
QUEUE = 8192  # octets that wait for the link where it is busy: some 60 ms


@pytest.fixture(scope="module")
def network() -> Iterator[Topology]:
    if os.geteuid() != 0:
        pytest.fail("this test makes network namespaces and needs root")
    topology = Topology(f"pt-{uuid.uuid4().hex[:6]}", backends=1)
    topology.build()
    limit(topology.backends[0].namespace, "eth0", RATE)
    yield topology
    topology.remove()


@pytest.fixture(scope="module")
def pins() -> Iterator[Path]:
    with bpffs() as directory:
        yield directory


@contextlib.contextmanager
def busy(topology: Topology) -> Iterator[None]:
    """Keep a queue before the backend's link."""
    sink = topology.client.namespace.socket(kind=socket.SOCK_DGRAM)
    sink.bind((topology.client.address, 0))
    source = topology.backends[0].namespace.socket(kind=socket.SOCK_DGRAM)
    source.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, QUEUE)
    ended = threading.Event()

    def fill() -> None:
        while not ended.is_set():
            source.sendto(bytes(1000), sink.getsockname())

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        source.close()
        sink.close()


async def die_in_mid_handoff(bed: Bed, family: int = 4) -> tuple[socket.socket, Flow]:  # noqa: F811
    """A client whose connection was frozen when its owner died, and the flow."""
    fe = await bed.join(bed.topology.frontends[0], "fe1/0", PORT)
    be = await bed.join(bed.topology.backends[0], "be1/0", lease=30.0)
    client, accepted, flow = bed.connect(family)
    served, taken = await bed.hand_over(accepted, flow, fe, be)
    client.sendall(b"request")
    await received(served, 7)  # and acknowledged, so that the client has nothing to repeat
    await asyncio.sleep(0.1)  # the acknowledgement may be delayed
    locked = await be.request(Op.LOCK, flow.pack(), gen=taken.gen)
    assert locked is not None
    assert locked.status == Status.OK
    tcp_repair.close_quietly(served.detach())
    silence(bed, be)
    return client, flow


async def restart(bed: Bed) -> tuple[SwitchClient, Reconciler]:  # noqa: F811
    """The backend's next life, without the rest of a node; it has no connections."""
    be = await bed.join(bed.topology.backends[0], "be1/0", lease=30.0)
    node: Any = SimpleNamespace(
        switch=be,
        connections={},
        keeps_rules=True,
        alive=lambda *_: False,
        in_transit=lambda _: False,
    )
    return be, Reconciler(node)


async def gone(node: SwitchClient, flow: Flow) -> None:
    """Wait until the flow has no rule."""
    async with asyncio.timeout(5):
        while True:
            reply = await node.request(Op.GET, flow.pack())
            if reply is not None and reply.status == Status.NOENT:
                return
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("family", [4, 6])
async def test_the_client_is_told_although_the_link_is_busy(bed: Bed, family: int) -> None:  # noqa: F811
    """The backend's reset waits in the queue, behind whatever was said right after the segment."""
    bed.agent()
    client, flow = await die_in_mid_handoff(bed, family)
    with busy(bed.topology), bed.topology.backends[0].namespace.entered():
        await asyncio.sleep(0.5)  # what the link lets through at once is used up
        be, reconciler = await restart(bed)
        reconciler.start()
        await until(lambda: is_reset(client))
        await gone(be, flow)
        await reconciler.close()


async def test_the_client_is_told_although_it_does_not_answer_at_first(bed: Bed) -> None:  # noqa: F811
    """A client that has just answered another stray segment says nothing to the next."""
    bed.agent(hold=False)
    client, flow = await die_in_mid_handoff(bed)
    with bed.topology.switch.entered():
        other = Provoker()
    with bed.topology.backends[0].namespace.entered():
        be, reconciler = await restart(bed)
        with contextlib.closing(other):
            assert other.provoke(flow.pack())  # the rule is locked: the answer is dropped
        reconciler.start()
        await until(lambda: is_reset(client))
        await gone(be, flow)
        await reconciler.close()


async def test_the_client_of_a_rule_that_nobody_has_a_connection_for_is_told(bed: Bed) -> None:  # noqa: F811
    """A node that gave up unsure has discarded its socket, and finds that the rule is its own."""
    bed.agent()
    client, flow = await die_in_mid_handoff(bed)
    with bed.topology.backends[0].namespace.entered():
        be, reconciler = await restart(bed)
        reconciler.check(flow.pack())
        await until(lambda: is_reset(client), PAUSE + 3)
        await gone(be, flow)
        await reconciler.close()
