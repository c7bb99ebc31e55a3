"""The switch client: over the classifier (answers at once) and the userspace server (later)."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import uvloop
from control_conformance import fresh_flow, fresh_name
from switch_bed import SwitchBed, bpffs
from test_userspace_control import UserspaceBed

from prism.errors import ProtocolError, SwitchError
from prism.flow import Endpoint
from prism.switch.client import SwitchClient
from prism.switch.control import AGENT, NO_MAC, Message, Op, Status, encode
from prism.switch.server import SwitchServer

pytestmark = [
    pytest.mark.net,
    pytest.mark.filterwarnings("ignore:Overriding the:pytest.PytestDeprecationWarning"),
]
QUICK = (0.02, 0.02, 0.04)


@pytest.fixture(
    params=[asyncio.DefaultEventLoopPolicy(), uvloop.EventLoopPolicy()], ids=["asyncio", "uvloop"]
)
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    policy: asyncio.AbstractEventLoopPolicy = request.param
    return policy


@pytest.fixture(scope="module")
def kernel() -> Iterator[SwitchBed]:
    with bpffs() as pins:
        bed = SwitchBed(pins)
        yield bed
        bed.close()


@pytest.fixture(scope="module")
def userspace() -> Iterator[UserspaceBed]:
    bed = UserspaceBed()
    yield bed
    bed.close()


Bed = SwitchBed | UserspaceBed


@pytest.fixture(params=["kernel", "userspace"])
def bed(request: pytest.FixtureRequest, kernel: SwitchBed, userspace: UserspaceBed) -> Bed:
    return kernel if request.param == "kernel" else userspace


Join = Callable[..., Any]


@pytest.fixture
async def join() -> AsyncIterator[Join]:
    """Makes and starts clients of a bed."""
    made: list[SwitchClient] = []

    async def start(bed: Bed, **options: Any) -> SwitchClient:
        if isinstance(bed, SwitchBed):
            space, local = bed.spaces["be1"], Endpoint("10.50.3.2", 8080)
        else:
            space, local = bed.space, Endpoint("127.0.0.1", 8080)
        options = {"address": bed.control} | options
        client = SwitchClient(
            fresh_name(), key=bed.key, local_endpoint=options.pop("local", local), **options
        )
        with space.entered():
            await client.start()
        made.append(client)
        return client

    yield start
    for client in made:
        await client.close()


async def until(condition: Callable[[], bool], seconds: float = 3.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.005)


async def test_the_classifiers_answer_runs_inside_submit(kernel: SwitchBed, join: Join) -> None:
    node, flow = await join(kernel), fresh_flow().pack()
    inside = 0
    for _ in range(20):
        replies: list[Message | None] = []
        node.submit(Op.GET, flow, replies.append)
        inside += len(replies)
        await until(lambda got=replies: len(got) == 1)
    assert inside >= 15  # on a busy machine another softirq may have taken it
    assert node.counters.answered_inline >= inside


async def test_a_callback_may_submit_the_next_step(bed: Bed, join: Join) -> None:
    a, b = await join(bed), await join(bed)
    flow, done = fresh_flow().pack(), asyncio.get_running_loop().create_future()

    def on_added(reply: Message | None) -> None:
        assert reply is not None
        b.submit(Op.CHOWN, flow, done.set_result, gen=reply.gen)

    a.submit(Op.ADD, flow, on_added, locked=True)
    reply = await asyncio.wait_for(done, 2)
    assert (reply.status, reply.owner) == (Status.OK, b.id)
    rule = bed.rule(flow)
    assert rule is not None
    assert (rule.owner, rule.locked) == (b.id, False)


async def test_the_fields_arrive_as_given(bed: Bed, join: Join) -> None:
    node, flow = await join(bed), fresh_flow().pack()
    owner, mac = Endpoint("10.50.9.9", 1234), b"\x02abcde"
    reply = await node.request(Op.ADD, flow, locked=True, cookie=42, endpoint=owner, mac=mac)
    rule = bed.rule(flow)
    assert rule is not None
    assert rule == (flow, node.id, owner, mac, reply.gen, True, 42)
    assert (await node.request(Op.UNLOCK, flow, gen=reply.gen)).locked is False
    assert (await node.request(Op.DELETE, flow, gen=reply.gen)).status == Status.OK
    default = await node.request(Op.ADD, flow)
    assert default.owner_endpoint == node.local_endpoint
    if isinstance(bed, SwitchBed):
        assert default.owner_mac not in (NO_MAC, mac)  # its device's own


async def test_the_lease_is_kept_and_close_ends_it(bed: Bed, join: Join) -> None:
    node, flow = await join(bed, lease=0.2), fresh_flow().pack()
    assert (await node.request(Op.ADD, flow)).status == Status.OK
    await asyncio.sleep(0.7)
    assert lease_of(bed, node) == 0.2
    assert (await node.request(Op.GET, flow)).status == Status.OK
    assert node.counters.denied == 0
    assert node.reachable
    await node.close()
    await node.close()
    assert lease_of(bed, node) == 0
    replies: list[Message | None] = []
    node.submit(Op.GET, flow, replies.append)
    assert replies == [None]


def lease_of(bed: Bed, node: SwitchClient) -> float:
    store = bed.switch if isinstance(bed, SwitchBed) else bed.server.table
    (found,) = [each for each in store.nodes() if each.id == node.id]
    return found.lease if found.alive else 0.0


async def test_who_is_denied_for_want_of_a_lease_greets_and_repeats(bed: Bed, join: Join) -> None:
    node, flow = await join(bed), fresh_flow().pack()
    await node._hello(0)
    replies: list[Message | None] = []
    node.submit(Op.ADD, flow, replies.append, cookie=1)
    await until(lambda: bool(replies))
    assert [reply.status for reply in replies if reply] == [Status.OK]
    assert node.counters.denied == 1


async def test_who_is_denied_for_another_reason_is_told_so(bed: Bed, join: Join) -> None:
    node, other, flow = await join(bed), await join(bed), fresh_flow().pack()
    gen = (await other.request(Op.ADD, flow)).gen
    reply = await node.request(Op.LOCK, flow, gen=gen)
    assert (reply.status, reply.owner) == (Status.DENIED, other.id)


class Relay(asyncio.DatagramProtocol):
    """A network that loses what it is told to lose."""

    def __init__(self, target: Endpoint) -> None:
        self.target = target
        self.lose_requests = 0
        self.lose_replies = 0
        self.requests = 0
        self.upstream: dict[Any, asyncio.DatagramTransport] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.requests += 1
        if self.lose_requests > 0:
            self.lose_requests -= 1
            return
        task = asyncio.ensure_future(self._pass_on(data, addr))
        task.add_done_callback(lambda done: done.result())

    async def _pass_on(self, data: bytes, addr: Any) -> None:
        if addr not in self.upstream:
            relay = self

            class Back(asyncio.DatagramProtocol):
                def datagram_received(self, data: bytes, _: Any) -> None:
                    if relay.lose_replies > 0:
                        relay.lose_replies -= 1
                    else:
                        relay.transport.sendto(data, addr)

            transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
                Back, remote_addr=self.target
            )
            self.upstream[addr] = transport
        self.upstream[addr].sendto(data)

    def close(self) -> None:
        self.transport.close()
        for transport in self.upstream.values():
            transport.close()


@contextlib.asynccontextmanager
async def relayed() -> AsyncIterator[tuple[Relay, SwitchServer, SwitchClient]]:
    """A server, a relay in front of it and a client, all on this loop."""
    key = bytes(range(16))
    server = SwitchServer(Endpoint("127.0.0.1", 0), key)
    await server.start()
    transport, relay = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: Relay(server.endpoint), local_addr=("127.0.0.1", 0)
    )
    address = Endpoint(*transport.get_extra_info("sockname"))
    client = SwitchClient(
        fresh_name(), address, key, Endpoint("127.0.0.1", 8080), lease=30, delays=QUICK
    )
    await client.start()
    try:
        yield relay, server, client
    finally:
        await client.close()
        relay.close()
        await server.close()


@pytest.mark.parametrize("direction", ["requests", "replies"])
async def test_what_is_lost_is_sent_again(direction: str) -> None:
    async with relayed() as (relay, server, client):
        setattr(relay, f"lose_{direction}", 2)
        replies: list[Message | None] = []
        flow = fresh_flow().pack()
        client.submit(Op.ADD, flow, replies.append, cookie=3, locked=True)
        await until(lambda: bool(replies))
        await asyncio.sleep(0.05)
        (reply,) = replies
        assert reply is not None
        assert (reply.status, reply.cookie, reply.locked) == (Status.OK, 3, True)
        assert client.counters.retransmissions == 2
        assert server.counters.replay == 0
        assert client.reachable


async def test_an_answer_to_an_earlier_try_counts_and_only_once() -> None:
    async with relayed() as (_, server, client):
        delayed: list[tuple[bytes, Any]] = []
        answer = server._transport.sendto  # type: ignore[union-attr]

        class Slow:
            def sendto(self, data: bytes, addr: Any) -> None:
                delayed.append((data, addr))

            def __getattr__(self, name: str) -> Any:
                return getattr(transport, name)

        transport, server._transport = server._transport, Slow()  # type: ignore[assignment]
        replies: list[Message | None] = []
        client.submit(Op.ADD, fresh_flow().pack(), replies.append)
        await until(lambda: len(delayed) == 2)
        server._transport = transport
        for data, addr in delayed:
            answer(data, addr)
        await asyncio.sleep(0.05)
        assert [reply.status for reply in replies if reply] == [Status.OK]
        assert client.counters.unexpected == 1


async def test_without_a_switch_the_answer_is_none_in_the_end() -> None:
    async with relayed() as (relay, _, client):
        relay.lose_requests = 10**6
        start, requests = time.monotonic(), relay.requests
        assert await client.request(Op.GET, fresh_flow().pack()) is None
        assert 0.07 < time.monotonic() - start < 0.4
        assert relay.requests - requests == len(QUICK)
        assert not client.reachable
        assert client.counters.timeouts == 1
        relay.lose_requests = 0
        assert await client.request(Op.GET, fresh_flow().pack()) is not None
        assert client.reachable


async def test_close_ends_what_is_pending() -> None:
    async with relayed() as (relay, _, client):
        relay.lose_requests = 10**6
        replies: list[Message | None] = []
        for _ in range(3):
            client.submit(Op.GET, fresh_flow().pack(), replies.append)
        await client.close()
        assert replies == [None] * 3


async def test_a_port_that_nobody_listens_on_is_a_switch_out_of_reach() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        address = Endpoint(*free.getsockname())
    client = SwitchClient("fe1/0", address, bytes(16), Endpoint("127.0.0.1", 1), delays=QUICK)
    with pytest.raises(SwitchError, match="does not answer fe1/0"):
        await client.start(timeout=0.1)
    assert client._requests._sock is None


async def test_another_key_is_no_answer(userspace: UserspaceBed) -> None:
    client = SwitchClient(
        "fe1/0", userspace.control, bytes(16), Endpoint("127.0.0.1", 1), delays=QUICK
    )
    with userspace.space.entered(), pytest.raises(SwitchError, match="cluster key"):
        await client.start(timeout=0.1)


async def test_more_than_may_be_pending_is_given_up_at_once() -> None:
    async with relayed() as (relay, _, client):
        relay.lose_requests = 10**6
        client._requests._max_pending = 2
        replies: list[tuple[int, Message | None]] = []
        for number in range(3):
            client.submit(
                Op.GET, fresh_flow().pack(), lambda reply, n=number: replies.append((n, reply))
            )
        assert replies == [(2, None)]


async def test_a_table_that_was_lost_is_noticed() -> None:
    key = bytes(range(16))
    server = SwitchServer(Endpoint("127.0.0.1", 0), key)
    await server.start()
    local = Endpoint("127.0.0.1", 80)
    client = SwitchClient("fe1/0", server.endpoint, key, local, lease=0.1, delays=QUICK)
    lost: list[int | None] = []
    client.on_incarnation = lambda: lost.append(client.incarnation)
    await client.start()
    await asyncio.sleep(0.1)
    assert lost == []
    await server.close()
    await until(lambda: not client.reachable)
    server = SwitchServer(server.endpoint, key)
    await server.start()
    await until(lambda: bool(lost))
    assert lost == [server.table.incarnation]
    assert client.reachable
    await client.close()
    await server.close()


class TestQuery:
    """The agent's question, sent from the server's own socket."""

    @pytest.mark.parametrize("alive", [True, False])
    async def test_the_owner_answers_and_what_is_gone_is_deleted_first(self, alive: bool) -> None:
        async with relayed() as (relay, server, client):
            flow = fresh_flow().pack()
            added = await client.request(Op.ADD, flow)
            assert added is not None
            asked: list[tuple[bytes, int]] = []

            def is_alive(packed: bytes, gen: int) -> bool:
                asked.append((packed, gen))
                return alive

            client.on_query = is_alive
            query = Message(Op.QUERY, AGENT, 77, flow=flow, owner=client.id, gen=added.gen)
            await self.send(relay, query)
            await until(lambda: client.counters.queries == 1)
            await until(lambda: server.counters.bad_format == 1)  # it asked nothing itself
            assert asked == [(flow, added.gen)]
            assert (server.table.get(flow) is not None) is alive
            await self.send(relay, query)  # a replay
            await asyncio.sleep(0.03)
            assert len(asked) == 1

    async def test_without_a_listener_every_connection_is_alive(self) -> None:
        async with relayed() as (relay, server, client):
            flow = fresh_flow().pack()
            added = await client.request(Op.ADD, flow)
            assert added is not None
            await self.send(relay, Message(Op.QUERY, AGENT, 1, flow=flow, gen=added.gen))
            await until(lambda: server.counters.bad_format == 1)
            assert server.table.get(flow) is not None

    async def test_a_question_read_together_with_an_answer_is_not_lost(self) -> None:
        async with relayed() as (relay, _, client):
            flow = fresh_flow().pack()
            await self.send(relay, Message(Op.QUERY, AGENT, 1, flow=flow))
            client.submit(Op.GET, flow, lambda reply: None)  # finds it before the loop does
            assert client.counters.queries == 0  # no callback within another
            await until(lambda: client.counters.queries == 1)

    async def test_nobody_but_the_agent_may_ask(self) -> None:
        async with relayed() as (relay, _, client):
            client.on_query = lambda flow, gen: pytest.fail("asked")
            await self.send(relay, Message(Op.QUERY, 5, 1))
            await self.send(relay, Message(Op.DELETE, AGENT, 2))
            await until(lambda: client.counters.unexpected == 2)

    async def send(self, relay: Relay, message: Message) -> None:
        (address,) = relay.upstream
        relay.transport.sendto(encode(message, bytes(range(16))), address)


def test_arguments_that_make_no_sense_are_refused() -> None:
    address, local = Endpoint("127.0.0.1", 1), Endpoint("127.0.0.1", 2)
    for changes in ({"key": bytes(15)}, {"lease": 0.0}, {"delays": ()}, {"delays": (0.0,)}):
        arguments: dict[str, Any] = {"key": bytes(16)} | changes
        with pytest.raises(ValueError, match=r"16 octets|lease"):
            SwitchClient("a", address, local_endpoint=local, **arguments)
    with pytest.raises(ProtocolError):
        SwitchClient("", address, bytes(16), local)
