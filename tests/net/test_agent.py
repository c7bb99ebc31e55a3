"""The agent beside the kernel's switch: real packets, real connections, real crashes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from switch_bed import bpffs

from prism._ext import tcp_repair
from prism.flow import Endpoint, Flow
from prism.lab.topology import Site, Topology
from prism.switch.base import Rule
from prism.switch.client import SwitchClient
from prism.switch.control import Message, Op, Status
from prism.switch.ebpf import EbpfSwitch
from prism.switch.provoke import Provoker, checksum

pytestmark = pytest.mark.net

KEY = bytes(range(16))
PORT = 80
PROGRAM = Path(__file__).with_name("agent_process.py")
ROOT = Path(__file__).parents[2]


class AgentProcess:
    """One agent process in the switch's namespace."""

    def __init__(self, topology: Topology, pins: Path, **settings: Any) -> None:
        values = {
            "control": [(topology.control.host, topology.control.port), ("fd77::1", 4760)],
            "key": KEY.hex(),
            "interfaces": topology.interfaces,
            "pin_dir": str(pins / "prism"),
            "max_rules": 4096,
            "grace": 0.5,
        }
        self.process = topology.switch.popen(
            [sys.executable, str(PROGRAM), json.dumps(values | settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert self._answer() == "ready"

    def _answer(self) -> str:
        return str(self.process.stdout.readline()).rstrip()  # type: ignore[union-attr]

    def tell(self, command: str) -> str:
        self.process.stdin.write(command + "\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        return self._answer()

    def status(self) -> dict[str, Any]:
        return dict(json.loads(self.tell("status")))

    def counter(self, *path: str) -> Any:
        value: Any = self.status()["counters"]
        for name in path:
            value = value[name]
        return value

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(5)
        self._close_pipes()

    def stop(self) -> int:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()  # type: ignore[union-attr]
        code = self.process.wait(10)
        self._close_pipes()
        return code

    def _close_pipes(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]


class Bed:
    """A lab's network, a bpffs, agents one after the other, and nodes."""

    def __init__(self, topology: Topology, pins: Path) -> None:
        self.topology = topology
        self.pins = pins
        self.agents: list[AgentProcess] = []
        self.clients: list[SwitchClient] = []
        self.sockets: list[socket.socket] = []

    def agent(self, **settings: Any) -> AgentProcess:
        self.agents.append(AgentProcess(self.topology, self.pins, **settings))
        return self.agents[-1]

    def store(self) -> contextlib.closing[EbpfSwitch]:
        """The table, without being the agent."""
        return contextlib.closing(EbpfSwitch(self.pins / "prism", max_rules=4096))

    async def join(self, site: Site, name: str, port: int = 8000, **options: Any) -> SwitchClient:
        client = SwitchClient(
            name, self.topology.control, KEY, Endpoint(site.address, port), **options
        )
        with site.namespace.entered():
            await client.start()
        self.clients.append(client)
        return client

    def connect(
        self, family: int = 4, client_port: int = 0
    ) -> tuple[socket.socket, socket.socket, Flow]:
        """A client's socket, the frontend's, and the flow."""
        service = self.topology.services(PORT)[0 if family == 4 else 1]
        listener = self.topology.frontends[0].namespace.socket(service.family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((service.host, service.port))
        listener.listen(8)
        client = self.client_socket(family)
        client.bind(("", client_port))
        client.connect((service.host, service.port))
        accepted, _ = listener.accept()
        listener.close()
        self.sockets += [client, accepted]
        for sock in (client, accepted):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return client, accepted, Flow.of_socket(accepted)

    def client_socket(self, family: int = 4) -> socket.socket:
        sock = self.topology.client.namespace.socket(
            socket.AF_INET if family == 4 else socket.AF_INET6
        )
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.settimeout(3)
        self.sockets.append(sock)
        return sock

    async def hand_over(
        self, accepted: socket.socket, flow: Flow, source: SwitchClient, target: SwitchClient
    ) -> tuple[socket.socket, Message]:
        """A whole handoff to the first backend, without the channel."""
        packed, site = flow.pack(), self.topology.backends[0]
        service = flow.service
        added = await source.request(Op.ADD, packed, locked=True, endpoint=service)
        assert added is not None
        assert added.status == Status.OK
        state = tcp_repair.export_state(accepted.fileno())
        address = site.address6 if ":" in service.host else site.address
        imported = site.namespace.run_inside(lambda: tcp_repair.import_state(state, address, 8000))
        owner = Endpoint(*imported.local)
        taken = await target.request(Op.CHOWN, packed, gen=added.gen, endpoint=owner)
        assert taken is not None
        assert taken.status == Status.OK
        served = socket.socket(fileno=imported.activate())
        served.setblocking(False)
        self.sockets.append(served)
        tcp_repair.close_quietly(accepted.detach())
        return served, taken

    async def close(self) -> None:
        for sock in self.sockets:
            if sock.fileno() >= 0:  # quietly: whatever it still has to say is of no use
                with contextlib.suppress(OSError):
                    tcp_repair.freeze(sock.fileno())
            sock.close()
        for client in self.clients:
            await client.close()
        for agent in self.agents:
            if agent.process.poll() is None:
                agent.stop()
        with contextlib.suppress(Exception), self.store() as store:
            store.unpin()


@pytest.fixture(scope="module")
def network() -> Iterator[Topology]:
    if os.geteuid() != 0:
        pytest.fail("this test makes network namespaces and needs root")
    topology = Topology(f"pt-{uuid.uuid4().hex[:6]}", backends=2)
    topology.build()
    yield topology
    topology.remove()


@pytest.fixture(scope="module")
def pins() -> Iterator[Path]:
    with bpffs() as directory:
        yield directory


@pytest.fixture
async def bed(network: Topology, pins: Path) -> AsyncIterator[Bed]:
    bed = Bed(network, pins)
    yield bed
    await bed.close()


async def until(condition: Callable[[], bool], seconds: float = 3.0) -> float:
    """Wait until something is so; how long it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "it did not happen in time"
        await asyncio.sleep(0.005)
    return time.monotonic() - start


async def received(sock: socket.socket, size: int, seconds: float = 3.0) -> tuple[bytes, float]:
    """Exactly ``size`` octets, and how long they took; the loop goes on meanwhile."""
    data = bytearray()

    def more() -> bool:
        with contextlib.suppress(BlockingIOError):
            data.extend(sock.recv(65536))
        return len(data) >= size

    took = await until(more, seconds)
    return bytes(data), took


async def rule_of(node: SwitchClient, flow: Flow) -> Message:
    reply = await node.request(Op.GET, flow.pack())
    assert reply is not None
    return reply


# Holding


@pytest.mark.parametrize("family", [4, 6])
async def test_what_a_client_sends_during_the_lock_arrives_at_the_unlock(
    bed: Bed, family: int
) -> None:
    agent = bed.agent()
    fe = await bed.join(bed.topology.frontends[0], "fe1/0", PORT)
    client, accepted, flow = bed.connect(family)
    added = await fe.request(Op.ADD, flow.pack(), locked=True, endpoint=flow.service)
    assert added is not None
    payload = os.urandom(30_000)
    client.sendall(payload[:10_000])
    await asyncio.sleep(0.02)
    client.sendall(payload[10_000:])
    await asyncio.sleep(0.05)
    with pytest.raises(BlockingIOError):
        accepted.recv(1)
    assert agent.counter("hold", "flows") == 1
    assert (await fe.request(Op.UNLOCK, flow.pack(), gen=added.gen)).status == Status.OK
    data, took = await received(accepted, len(payload))
    assert data == payload
    assert took < 0.1  # its retransmission timer takes 200 ms
    hold = agent.counter("hold")
    assert hold["held"] == hold["released"] >= 2
    assert (hold["octets"], hold["flows"]) == (0, 0)
    assert agent.counter("missed_events") == 0
    assert agent.counter("write_errors") == 0


async def test_held_packets_follow_the_connection_to_its_new_owner(bed: Bed) -> None:
    agent = bed.agent()
    fe = await bed.join(bed.topology.frontends[0], "fe1/0", PORT)
    be = await bed.join(bed.topology.backends[0], "be1/0")
    client, accepted, flow = bed.connect()
    client.sendall(b"head")
    await received_peek(accepted, 4)
    added = await fe.request(Op.ADD, flow.pack(), locked=True, endpoint=flow.service)
    assert added is not None
    state = tcp_repair.export_state(accepted.fileno())
    client.sendall(b"body" * 2000)
    await asyncio.sleep(0.02)
    site = bed.topology.backends[0]
    imported = site.namespace.run_inside(lambda: tcp_repair.import_state(state, site.address, 8000))
    taken = await be.request(
        Op.CHOWN, flow.pack(), gen=added.gen, endpoint=Endpoint(*imported.local)
    )
    assert taken is not None
    assert taken.status == Status.OK
    served = socket.socket(fileno=imported.activate())
    served.setblocking(False)
    bed.sockets.append(served)
    tcp_repair.close_quietly(accepted.detach())
    data, took = await received(served, 8004)
    assert data == b"head" + b"body" * 2000
    assert took < 0.1
    served.sendall(b"answer")
    assert (await received(client, 6))[0] == b"answer"
    assert agent.counter("handoffs") == 1


async def received_peek(sock: socket.socket, size: int) -> None:
    def there() -> bool:
        with contextlib.suppress(BlockingIOError):
            return len(sock.recv(size, socket.MSG_PEEK)) >= size
        return False

    await until(there)


async def test_deleting_the_rule_releases_too(bed: Bed) -> None:
    agent = bed.agent()
    fe = await bed.join(bed.topology.frontends[0], "fe1/0", PORT)
    client, accepted, flow = bed.connect()
    added = await fe.request(Op.ADD, flow.pack(), locked=True, endpoint=flow.service)
    assert added is not None
    client.sendall(b"held")
    await asyncio.sleep(0.02)
    assert (await fe.request(Op.DELETE, flow.pack(), gen=added.gen)).status == Status.OK
    data, took = await received(accepted, 4)
    assert (data, took < 0.1) == (b"held", True)
    assert agent.counter("missed_events") == 0


async def test_a_flow_that_stays_locked_loses_its_packets_in_the_end(bed: Bed) -> None:
    agent = bed.agent(hold_time=0.2)
    fe = await bed.join(bed.topology.frontends[0], "fe1/0", PORT)
    client, accepted, flow = bed.connect()
    added = await fe.request(Op.ADD, flow.pack(), locked=True, endpoint=flow.service)
    assert added is not None
    client.sendall(b"lost at first")
    await until(lambda: agent.counter("hold", "dropped_expired") >= 1)
    await fe.request(Op.UNLOCK, flow.pack(), gen=added.gen)
    assert (await received(accepted, 13))[0] == b"lost at first"  # sent again by the client


@pytest.mark.parametrize(
    ("settings", "counter"),
    [
        ({"hold_flow_bytes": 2000}, "dropped_flow_full"),
        ({"hold_total_bytes": 2000}, "dropped_total_full"),
    ],
)
async def test_what_goes_beyond_the_bounds_is_dropped_and_sent_again(
    bed: Bed, settings: dict[str, int], counter: str
) -> None:
    agent = bed.agent(**settings)
    fe = await bed.join(bed.topology.frontends[0], "fe1/0", PORT)
    client, accepted, flow = bed.connect()
    added = await fe.request(Op.ADD, flow.pack(), locked=True, endpoint=flow.service)
    assert added is not None
    payload = os.urandom(9000)
    client.sendall(payload)
    await until(lambda: agent.counter("hold", counter) >= 1)
    await fe.request(Op.UNLOCK, flow.pack(), gen=added.gen)
    assert (await received(accepted, len(payload)))[0] == payload
    assert agent.counter("dropped_packets") >= 1


async def test_without_holding_they_are_dropped(bed: Bed) -> None:
    agent = bed.agent(hold=False)
    fe = await bed.join(bed.topology.frontends[0], "fe1/0", PORT)
    client, accepted, flow = bed.connect()
    added = await fe.request(Op.ADD, flow.pack(), locked=True, endpoint=flow.service)
    assert added is not None
    client.sendall(b"dropped")
    await until(lambda: agent.counter("dropped_packets") >= 1)
    await fe.request(Op.UNLOCK, flow.pack(), gen=added.gen)
    data, took = await received(accepted, 7)
    assert data == b"dropped"
    assert took > 0.1  # the client's timer
    assert agent.counter("hold", "held") == 0


# SYNs


def reconnect(bed: Bed, flow: Flow) -> socket.socket:
    """Begin to connect once more from the flow's own port; does not wait."""
    sock = bed.client_socket()
    sock.bind((flow.client.host, flow.client.port))
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        sock.connect((flow.service.host, flow.service.port))
    return sock


def is_connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def listen(bed: Bed) -> socket.socket:
    listener = bed.topology.frontends[0].namespace.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    service = bed.topology.services(PORT)[0]
    listener.bind((service.host, service.port))
    listener.listen(8)
    bed.sockets.append(listener)
    return listener


async def test_a_port_used_again_reaches_the_frontend_once_the_owner_says_gone(bed: Bed) -> None:
    agent = bed.agent()
    fe = await bed.join(bed.topology.frontends[0], "fe1/0", PORT)
    be = await bed.join(bed.topology.backends[0], "be1/0")
    client, accepted, flow = bed.connect()
    served, taken = await bed.hand_over(accepted, flow, fe, be)
    tcp_repair.close_quietly(served.detach())
    tcp_repair.close_quietly(client.detach())
    asked: list[tuple[bytes, int]] = []

    def is_alive(packed: bytes, gen: int) -> bool:
        asked.append((packed, gen))
        return False

    be.on_query = is_alive
    listen(bed)
    sock = reconnect(bed, flow)
    assert await until(lambda: is_connected(sock)) < 0.5  # no SYN was lost: that takes 1 s
    assert asked == [(flow.pack(), taken.gen)]
    assert (await rule_of(be, flow)).status == Status.NOENT
    assert agent.counter("ask") | {} == {
        "asked": 1, "alive": 0, "gone": 1, "owner_dead": 0, "unanswered": 0, "overflows": 0,
    }  # fmt: skip


def forge_syn(bed: Bed, flow: Flow) -> None:
    source, target = (socket.inet_aton(end.host) for end in flow)

    def header(check: int) -> bytes:
        ports = (flow.client.port, flow.service.port)
        return struct.pack("!HHIIBBHHH", *ports, 12345, 0, 5 << 4, 0x02, 64240, check, 0)

    segment = header(checksum(source + target + struct.pack("!HH", 6, 20) + header(0)))
    packet = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 40, 0, 0, 64, 6, 0, source, target) + segment
    with bed.topology.client.namespace.run_inside(
        lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    ) as raw:
        raw.sendto(packet, (flow.service.host, 0))


async def test_a_forged_syn_does_nothing_to_a_live_connection(bed: Bed) -> None:
    agent = bed.agent()
    fe = await bed.join(bed.topology.frontends[0], "fe1/0", PORT)
    be = await bed.join(bed.topology.backends[0], "be1/0")
    be.on_query = lambda packed, gen: True
    client, accepted, flow = bed.connect()
    served, _ = await bed.hand_over(accepted, flow, fe, be)
    forge_syn(bed, flow)
    await until(lambda: agent.counter("ask", "alive") == 1)
    assert agent.counter("data_plane", "syn_passed") == 1
    client.sendall(b"still")
    assert (await received(served, 5))[0] == b"still"
    served.sendall(b"here")
    assert (await received(client, 4))[0] == b"here"
    assert (await rule_of(be, flow)).owner == be.id


async def test_a_client_that_restarted_gets_in_although_the_owner_is_alive(bed: Bed) -> None:
    """RFC 9293 and RFC 5961: challenge ACK, reset by the client, and then its next SYN."""
    bed.agent()
    fe = await bed.join(bed.topology.frontends[0], "fe1/0", PORT)
    be = await bed.join(bed.topology.backends[0], "be1/0")
    client, accepted, flow = bed.connect()
    served, _ = await bed.hand_over(accepted, flow, fe, be)

    def is_alive(packed: bytes, gen: int) -> bool:
        return served.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == 1  # ESTABLISHED

    be.on_query = is_alive
    tcp_repair.close_quietly(client.detach())
    listen(bed)
    sock = reconnect(bed, flow)
    await until(lambda: is_connected(sock), 4)
    with pytest.raises(ConnectionResetError):
        served.recv(1)


async def test_a_syn_is_dropped_when_the_owner_does_not_answer(bed: Bed) -> None:
    agent = bed.agent()
    fe = await bed.join(bed.topology.frontends[0], "fe1/0", PORT)
    be = await bed.join(bed.topology.backends[0], "be1/0", lease=10.0)
    client, accepted, flow = bed.connect()
    served, _ = await bed.hand_over(accepted, flow, fe, be)
    tcp_repair.close_quietly(client.detach())
    asyncio.get_running_loop().remove_reader(be._requests._fd)  # deaf, but its lease goes on
    listen(bed)
    sock = reconnect(bed, flow)
    await until(lambda: agent.counter("ask", "unanswered") == 1, 1)
    assert not is_connected(sock)
    assert served.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == 1


# Leases


async def test_clients_of_a_dead_node_are_told_at_once(bed: Bed) -> None:
    agent = bed.agent(grace=0.05)
    fe = await bed.join(bed.topology.frontends[0], "fe1/0", PORT)
    be = await bed.join(bed.topology.backends[0], "be1/0", lease=0.4)
    flows, clients = [], []
    for family in (4, 6):
        client, accepted, flow = bed.connect(family)
        await bed.hand_over(accepted, flow, fe, be)
        flows.append(flow)
        clients.append(client)
    kept_client, kept, kept_flow = bed.connect()
    assert (
        await fe.request(Op.ADD, kept_flow.pack(), endpoint=kept_flow.service)
    ).status == Status.OK
    silence(bed, be)
    for client in clients:
        await until(lambda sock=client: is_reset(sock), 2)
    for flow in flows:
        assert (await rule_of(fe, flow)).status == Status.NOENT
    assert (await rule_of(fe, kept_flow)).status == Status.OK
    assert agent.counter("leases", "expired_nodes") == 1
    assert agent.counter("leases", "expired_rules") == 2
    await until(lambda: agent.counter("provoked") == 4, 2)  # each a second time
    kept_client.sendall(b"ok")
    assert (await received(kept, 2))[0] == b"ok"


async def test_a_client_that_does_not_answer_at_first(bed: Bed) -> None:
    """Its kernel has just answered another stray segment, and answers one in half a second only."""
    bed.agent(grace=0.05)
    fe = await bed.join(bed.topology.frontends[0], "fe1/0", PORT)
    be = await bed.join(bed.topology.backends[0], "be1/0", lease=0.4)
    client, accepted, flow = bed.connect()
    await bed.hand_over(accepted, flow, fe, be)
    silence(bed, be)
    with contextlib.closing(bed.topology.switch.run_inside(Provoker)) as other:
        while (await rule_of(fe, flow)).status == Status.OK:
            other.provoke(flow.pack())  # the rule sends the answer to the owner, who is silent
            await asyncio.sleep(0.02)
    await until(lambda: is_reset(client), 2)


def silence(bed: Bed, node: SwitchClient) -> None:
    """As if the node's process had been killed."""
    node._hello_timer.cancel()  # type: ignore[union-attr]
    node._hello_timer = None
    node._requests.close()
    bed.clients.remove(node)


def is_reset(sock: socket.socket) -> bool:
    try:
        sock.recv(1)
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True
    return False


async def test_a_node_taken_for_dead_can_come_back(bed: Bed) -> None:
    agent = bed.agent(grace=0.05)
    be = await bed.join(bed.topology.backends[0], "be1/0", lease=0.3)
    flow = Flow(Endpoint("10.77.1.2", 1234), Endpoint("10.77.0.80", PORT))
    assert (await be.request(Op.ADD, flow.pack())).status == Status.OK
    be._hello_timer.cancel()  # type: ignore[union-attr]
    await until(lambda: agent.counter("leases", "expired_rules") == 1)
    reply = await be.request(Op.ADD, flow.pack())  # DENIED, HELLO, and again
    assert reply is not None
    assert reply.status == Status.OK
    assert be.counters.denied == 1


# Life


async def test_the_data_plane_outlives_a_killed_agent_and_is_adopted(bed: Bed) -> None:
    agent = bed.agent()
    fe = await bed.join(bed.topology.frontends[0], "fe1/0", PORT)
    be = await bed.join(bed.topology.backends[0], "be1/0")
    client, accepted, flow = bed.connect()
    served, taken = await bed.hand_over(accepted, flow, fe, be)
    incarnation = be.incarnation
    agent.kill()

    client.sendall(b"without")
    assert (await received(served, 7))[0] == b"without"
    served.sendall(b"agent")
    assert (await received(client, 5))[0] == b"agent"
    assert (await be.request(Op.LOCK, flow.pack(), gen=taken.gen)).status == Status.OK
    assert (await be.request(Op.UNLOCK, flow.pack(), gen=taken.gen)).status == Status.OK

    again = bed.agent(grace=0.2)
    assert again.status()["adopted"]
    assert again.status()["rules"] == 1
    await asyncio.sleep(0.5)  # beyond the grace: nodes with a lease keep their rules
    assert (await be.request(Op.LOCK, flow.pack(), gen=taken.gen)).status == Status.OK
    client.sendall(b"held")
    await asyncio.sleep(0.02)
    assert (await be.request(Op.UNLOCK, flow.pack(), gen=taken.gen)).status == Status.OK
    data, took = await received(served, 4)
    assert (data, took < 0.1) == (b"held", True)
    assert (be.incarnation, be.counters.incarnations) == (incarnation, 0)


async def test_rules_without_a_living_owner_go_after_the_grace(bed: Bed) -> None:
    first = bed.agent()
    be = await bed.join(bed.topology.backends[0], "be1/0", lease=0.3)
    fe = await bed.join(bed.topology.frontends[0], "fe1/0", PORT)
    orphan = Flow(Endpoint("10.77.1.2", 1), Endpoint("10.77.0.80", PORT))
    kept = Flow(Endpoint("10.77.1.2", 2), Endpoint("10.77.0.80", PORT))
    stranger = Flow(Endpoint("10.77.1.2", 3), Endpoint("10.77.0.80", PORT))
    assert (await be.request(Op.ADD, orphan.pack())).status == Status.OK
    assert (await fe.request(Op.ADD, kept.pack())).status == Status.OK
    with bed.store() as store:  # of a node that no table knows
        store.add(Rule(stranger.pack(), 77, Endpoint("10.77.101.2", 9), bytes(6), 0, False))
    first.kill()
    silence(bed, be)
    await asyncio.sleep(0.4)
    second = bed.agent(grace=0.6)
    assert second.status()["rules"] == 3
    await until(lambda: second.status()["rules"] == 1)
    assert (await rule_of(fe, kept)).status == Status.OK


async def test_two_agents_do_not_run_beside_each_other(bed: Bed) -> None:
    bed.agent()
    with pytest.raises(AssertionError):
        bed.agent()


async def test_a_clean_stop_leaves_the_data_plane_and_flush_takes_it_away(bed: Bed) -> None:
    agent = bed.agent()
    fe = await bed.join(bed.topology.frontends[0], "fe1/0", PORT)
    flow = Flow(Endpoint("10.77.1.2", 1), Endpoint("10.77.0.80", PORT))
    assert (await fe.request(Op.ADD, flow.pack())).status == Status.OK
    assert agent.stop() == 0
    assert (await rule_of(fe, flow)).status == Status.OK
    again = bed.agent()
    assert again.tell("flush") == "flushed"
    assert again.stop() == 0
    assert not (bed.pins / "prism").exists()
    client = SwitchClient(
        "fe1/1", bed.topology.control, KEY, fe.local_endpoint, delays=(0.02, 0.02)
    )
    with bed.topology.frontends[0].namespace.entered(), pytest.raises(Exception, match="answer"):
        await client.start(timeout=0.1)


async def test_a_port_that_appears_later_is_attached(bed: Bed) -> None:
    agent = bed.agent(interfaces=[*bed.topology.interfaces, "late0"])
    assert "late0" not in agent.status()["ports"]
    switch = bed.topology.switch
    add = ["ip", "link", "add", "late0", "type", "veth", "peer", "name", "late1"]
    assert switch.run(add).returncode == 0
    await until(lambda: "late0" in agent.status()["ports"])
    filters = switch.run(
        ["tc", "filter", "show", "dev", "late0", "ingress"], capture_output=True, text=True
    )
    assert "prism_switch" in filters.stdout
    assert switch.run(["ip", "link", "del", "late0"]).returncode == 0
    await until(lambda: "late0" not in agent.status()["ports"])


async def test_rules_are_listed_by_owner_in_pages(bed: Bed) -> None:
    bed.agent()
    fe = await bed.join(bed.topology.frontends[0], "fe1/0", PORT)
    be = await bed.join(bed.topology.backends[0], "be1/0")
    service = Endpoint("10.77.0.80", PORT)
    flows = {Flow(Endpoint("10.77.1.2", port), service).pack() for port in range(1, 41)}
    for flow in flows:
        await be.request(Op.ADD, flow)
    await fe.request(Op.ADD, Flow(Endpoint("10.77.1.2", 99), service).pack(), endpoint=service)
    listed = [rule async for rule in fe.list(be.id)]
    assert {rule.flow for rule in listed} == flows
    assert len(listed) == 40
    assert {rule.owner for rule in listed} == {be.id}
    assert len([rule async for rule in be.list()]) == 41
    assert [rule async for rule in fe.list(4711)] == []
