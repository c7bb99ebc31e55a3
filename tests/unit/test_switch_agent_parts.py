"""What the agent decides about packets, SYNs and dead nodes, over a table in this process."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator

import pytest

from prism.flow import Endpoint, Flow
from prism.switch.asking import ASK_DELAYS, Asker
from prism.switch.base import Event, EventKind, Node, Rule
from prism.switch.control import AGENT, Message, Op, Status
from prism.switch.hold import HoldBuffer, parse_segment
from prism.switch.holding import Holder
from prism.switch.provoke import stray_segment
from prism.switch.reaping import Reaper
from prism.switch.table import RuleTable

OWNER = 11
OWNER_ENDPOINT = Endpoint("10.0.0.5", 5000)
SERVICE = Endpoint("192.0.2.80", 80)


def flow(port: int) -> Flow:
    return Flow(Endpoint("198.51.100.1", port), SERVICE)


def packet(of: Flow, number: int = 0, *, syn: bool = False) -> bytes:
    """A segment from the client, told apart by its number."""
    data = bytearray(stray_segment(Flow(of.service, of.client).pack()))
    data[33] = 0x02 if syn else 0x10
    data[24:28] = number.to_bytes(4, "big")
    data[28:32], data[36:38] = bytes(4), bytes(2)  # random otherwise: acknowledgement, checksum
    segment = parse_segment(bytes(data))
    assert segment == (of.pack(), syn)
    return bytes(data)


class Store(RuleTable):
    """The table, with a pipe for events."""

    def __init__(self) -> None:
        super().__init__()
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self.pending: list[Event] = []
        self.passed: list[bytes] = []
        self.sequence = 0

    def close(self) -> None:
        self._read.close()
        self._write.close()

    @property
    def events_fd(self) -> int:
        return self._read.fileno()

    def read_events(self) -> Iterator[Event]:
        self._read.recv(4096)
        events, self.pending = self.pending, []
        return iter(events)

    def heartbeat(self) -> None:
        """Nobody looks."""

    def pass_syn(self, flow: bytes) -> None:
        self.passed.append(flow)

    def ask(
        self, op: Op, of: Flow | None = None, *, tell: bool = True, **fields: object
    ) -> Message:
        self.sequence += 1
        fields = {"owner": OWNER, "owner_endpoint": Endpoint("10.0.0.5", 80)} | fields
        packed = of.pack() if of else bytes(36)
        request = Message(op, OWNER, self.sequence, flow=packed, **fields)  # type: ignore[arg-type]
        outcome = self.handle(request, OWNER_ENDPOINT)
        assert outcome is not None
        if op == Op.UNLOCK and tell:
            self.pending.append(Event(EventKind.UNLOCKED, packed, False, 1, OWNER, 1))
            self._write.send(b"x")
        return outcome.reply


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store()
    store.ask(Op.HELLO, cookie=60_000)
    yield store
    store.close()


class Device:
    """Two ends of a packet queue, in the place of the TUN device."""

    def __init__(self) -> None:
        self.mine, self.switch = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.mine.setblocking(False)
        self.switch.setblocking(False)
        self.fd = self.mine.fileno()

    def read(self) -> bytes | None:
        try:
            return self.mine.recv(65535)
        except BlockingIOError:
            return None

    def write(self, data: bytes) -> bool:
        self.mine.send(data)
        return True

    def out(self) -> list[bytes]:
        """What was put back into the switch."""
        packets = []
        try:
            while True:
                packets.append(self.switch.recv(65535))
        except BlockingIOError:
            return packets

    def close(self) -> None:
        self.mine.close()
        self.switch.close()


class TestHolder:
    @pytest.fixture
    def device(self) -> Iterator[Device]:
        device = Device()
        yield device
        device.close()

    def make(self, store: Store, device: Device, **options: float) -> Holder:
        self.buffer = HoldBuffer()
        self.syns: list[tuple[Rule, bytes]] = []
        holder = Holder(
            store,
            device,  # type: ignore[arg-type]
            self.buffer,
            lambda rule, data: self.syns.append((rule, data)),
            **options,  # type: ignore[arg-type]
        )
        holder.start()
        return holder

    async def test_order_is_kept_when_the_unlock_overtakes_packets(
        self, store: Store, device: Device
    ) -> None:
        holder = self.make(store, device)
        gen = store.ask(Op.ADD, flow(1), flags=1).gen
        packets = [packet(flow(1), number) for number in range(5)]
        for each in packets[:3]:
            device.switch.send(each)
        await asyncio.sleep(0.005)
        assert len(self.buffer) == 1
        store.ask(Op.UNLOCK, flow(1), gen=gen, tell=False)  # the event comes later
        for each in packets[3:]:
            device.switch.send(each)
        await asyncio.sleep(0.005)
        assert device.out() == packets
        holder.close()

    async def test_a_lost_event_is_made_up_for(self, store: Store, device: Device) -> None:
        holder = self.make(store, device)
        gen = store.ask(Op.ADD, flow(1), flags=1).gen
        device.switch.send(packet(flow(1)))
        await asyncio.sleep(0.005)
        store.ask(Op.UNLOCK, flow(1), gen=gen, tell=False)
        await asyncio.sleep(0.06)
        assert device.out() == [packet(flow(1))]
        assert holder.missed == 1
        holder.close()

    async def test_flows_do_not_wait_for_each_other(self, store: Store, device: Device) -> None:
        holder = self.make(store, device)
        gens = [store.ask(Op.ADD, flow(n), flags=1, owner_endpoint=SERVICE).gen for n in (1, 2)]
        for number in (1, 2):
            device.switch.send(packet(flow(number)))
        await asyncio.sleep(0.005)
        store.ask(Op.UNLOCK, flow(2), gen=gens[1])
        await asyncio.sleep(0.005)
        assert device.out() == [packet(flow(2))]
        holder.close()
        assert device.out() == [packet(flow(1))]  # at the end everything goes back

    async def test_a_syn_waits_while_locked_and_is_asked_about_afterwards(
        self, store: Store, device: Device
    ) -> None:
        holder = self.make(store, device)
        gen = store.ask(Op.ADD, flow(1), flags=1).gen
        syn = packet(flow(1), syn=True)
        device.switch.send(syn)
        await asyncio.sleep(0.005)
        assert (len(self.buffer), self.syns) == (1, [])
        store.ask(Op.UNLOCK, flow(1), gen=gen)
        await asyncio.sleep(0.005)
        assert device.out() == [syn]  # the classifier sends it here once more
        device.switch.send(syn)
        await asyncio.sleep(0.005)
        assert [data for _, data in self.syns] == [syn]
        holder.close()

    async def test_what_is_no_segment_is_dropped_and_counted(
        self, store: Store, device: Device
    ) -> None:
        holder = self.make(store, device)
        for data in (b"\x60", bytes(40), b"E" * 19):
            device.switch.send(data)
        device.switch.send(packet(flow(9)))  # no rule any more: back
        await asyncio.sleep(0.005)
        assert device.out() == [packet(flow(9))]
        assert holder.strangers == 3
        holder.close()


class TestAsker:
    def make(self, store: Store, *, limit: int = 4096) -> Asker:
        self.sent: list[tuple[Message, Endpoint]] = []
        self.injected: list[bytes] = []
        return Asker(
            store,
            self.find(store),
            lambda message, endpoint: self.sent.append((message, endpoint)),
            self.injected.append,
            limit=limit,
        )

    @staticmethod
    def find(store: Store) -> Callable[[int], Node | None]:
        def by_id(node: int) -> Node | None:
            return {found.id: found for found in store.nodes()}.get(node)

        return by_id

    def rule(self, store: Store, number: int = 1) -> Rule:
        store.ask(Op.ADD, flow(number), owner_endpoint=SERVICE)
        rule = store.get(flow(number).pack())
        assert rule is not None
        return rule

    async def test_the_query_names_the_rule_and_goes_to_its_owner(self, store: Store) -> None:
        asker, rule = self.make(store), self.rule(store)
        asker.ask(rule, b"syn", trust_leases=True)
        ((query, endpoint),) = self.sent
        assert endpoint == OWNER_ENDPOINT
        assert (query.op, query.node, query.flow) == (Op.QUERY, AGENT, rule.flow)
        assert (query.owner, query.gen) == (OWNER, rule.gen)
        asker.ask(rule, b"again", trust_leases=True)
        assert len(self.sent) == 1
        asker.close()

    @pytest.mark.parametrize("tries", [1, 2, 3])
    async def test_the_answer_to_any_try_counts(self, store: Store, tries: int) -> None:
        asker, rule = self.make(store), self.rule(store)
        asker.ask(rule, b"syn", trust_leases=True)
        while len(self.sent) < tries:
            await asyncio.sleep(0.005)
        first = self.sent[0][0]
        asker.on_reply(first.reply(Status.OK)._replace(owner=OWNER))
        assert (self.injected, store.passed) == ([b"syn"], [rule.flow])
        asker.on_reply(first.reply(Status.OK)._replace(owner=OWNER))
        assert self.injected == [b"syn"]

    async def test_gone_deletes_the_rule_before_the_syn_goes_on(self, store: Store) -> None:
        asker, rule = self.make(store), self.rule(store)
        asker.ask(rule, b"syn", trust_leases=True)
        asker.on_reply(self.sent[0][0].reply(Status.NOENT)._replace(owner=OWNER))
        assert store.get(rule.flow) is None
        assert (self.injected, store.passed) == ([b"syn"], [])

    async def test_only_the_owner_answers_and_only_what_was_asked(self, store: Store) -> None:
        asker, rule = self.make(store), self.rule(store)
        asker.ask(rule, b"syn", trust_leases=True)
        good = self.sent[0][0].reply(Status.NOENT)._replace(owner=OWNER)
        for wrong in (
            good._replace(owner=12),
            good._replace(seq=good.seq + 1),
            good._replace(flow=flow(2).pack()),
            good._replace(status=Status.DENIED),
            good._replace(node=OWNER),
        ):
            asker.on_reply(wrong)
        assert self.injected == []
        assert store.get(rule.flow) == rule
        asker.close()

    async def test_no_answer_drops_the_syn_after_all_tries(self, store: Store) -> None:
        asker, rule = self.make(store), self.rule(store)
        asker.ask(rule, b"syn", trust_leases=True)
        await asyncio.sleep(sum(ASK_DELAYS) + 0.05)
        assert len(self.sent) == len(ASK_DELAYS)
        assert len({query.seq for query, _ in self.sent}) == len(ASK_DELAYS)
        assert self.injected == []
        assert store.get(rule.flow) == rule
        assert asker.counters.unanswered == 1
        asker.ask(rule, b"syn", trust_leases=True)
        assert asker.counters.asked == 2
        asker.close()

    async def test_a_dead_owner_is_not_asked_once_leases_are_trusted(self, store: Store) -> None:
        asker = self.make(store)
        rules = [self.rule(store, number) for number in (1, 2)]
        store.ask(Op.HELLO, cookie=0)
        asker.ask(rules[0], b"early", trust_leases=False)
        assert (self.injected, len(self.sent)) == ([], 1)
        asker.ask(rules[1], b"late", trust_leases=True)
        assert (self.injected, len(self.sent)) == ([b"late"], 1)
        assert store.get(rules[1].flow) is None
        asker.close()

    async def test_questions_are_bounded(self, store: Store) -> None:
        asker = self.make(store, limit=2)
        for number in (1, 2, 3):
            asker.ask(self.rule(store, number), b"syn", trust_leases=True)
        assert (len(self.sent), asker.counters.overflows) == (2, 1)
        asker.close()


class TestReaper:
    async def test_a_node_that_comes_back_during_the_scan_keeps_its_rules(
        self, store: Store
    ) -> None:
        """Its lease ran out; it renews between the scan of the table and the deletion."""
        told: list[bytes] = []
        reaper = Reaper(store, told.append, interval=0.01, grace=0.0)
        store.ask(Op.ADD, flow(1))
        store.ask(Op.HELLO, cookie=1)
        await asyncio.sleep(0.01)
        scan = reaper._scan

        def slow_scan(dead: set[int] | None) -> list[tuple[bytes, int, int]]:
            found = scan(dead)
            store.ask(Op.HELLO, cookie=60_000)
            return found

        reaper._scan = slow_scan  # type: ignore[method-assign]
        task = asyncio.create_task(reaper.run())
        while reaper.counters.scans == 0:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.03)
        task.cancel()
        assert store.get(flow(1).pack()) is not None
        assert told == []

    async def test_rules_that_changed_hands_during_the_scan_stay(self, store: Store) -> None:
        told: list[bytes] = []
        reaper = Reaper(store, told.append, interval=0.01, grace=0.0)
        gen = store.ask(Op.ADD, flow(1)).gen
        store.ask(Op.ADD, flow(2))
        store.ask(Op.HELLO, cookie=1)
        await asyncio.sleep(0.01)
        scan = reaper._scan

        def slow_scan(dead: set[int] | None) -> list[tuple[bytes, int, int]]:
            found = scan(dead)
            rule = store.get(flow(1).pack())
            if rule is not None and rule.gen == gen:
                store._put(rule.flow, rule._replace(owner=12, gen=gen + 1))
            return found

        reaper._scan = slow_scan  # type: ignore[method-assign]
        task = asyncio.create_task(reaper.run())
        while not told:
            await asyncio.sleep(0.005)
        task.cancel()
        assert told == [flow(2).pack()]
        rule = store.get(flow(1).pack())
        assert rule is not None
        assert rule.owner == 12


def test_a_lease_is_alive_until_it_is_older_than_granted() -> None:
    node = Node(1, OWNER_ENDPOINT, 1.0, 1.0)
    assert node.alive
    assert not node._replace(age=1.001).alive
    assert not node._replace(lease=0.0, age=0.0).alive
