"""The userspace rule table against the simplest thing that could be right, and its leases."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism.flow import Endpoint, Flow
from prism.switch.base import Change, Rule
from prism.switch.control import LIST_LIMIT, Message, Op, Status
from prism.switch.listing import Lister
from prism.switch.table import RuleTable

NODES = (11, 12, 13)
SERVICE = Endpoint("192.0.2.80", 80)
SOURCE = Endpoint("10.0.0.1", 5000)
FLOWS = [
    Flow(Endpoint("198.51.100.1", port), service).pack()
    for port in (1, 2)
    for service in (SERVICE, Endpoint("192.0.2.81", 80))
]
OWNERS = (Endpoint("10.0.1.1", 8080), Endpoint("10.0.1.1", 8081), SERVICE)


class Clock:
    """Nanoseconds, moved by hand."""

    def __init__(self, now: int = 10**9) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now


class Harness:
    """A table and nodes with running sequence numbers."""

    def __init__(self, **options: int) -> None:
        self.clock = Clock()
        self.table = RuleTable(clock=self.clock, **options)
        self.sequences = itertools.count(100)

    def ask(self, op: int, node: int, flow: bytes = bytes(36), **fields: object) -> Message:
        fields = {"owner": node, "owner_endpoint": OWNERS[0]} | fields
        request = Message(op, node, next(self.sequences), flow=flow, **fields)  # type: ignore[arg-type]
        outcome = self.table.handle(request, SOURCE)
        assert outcome is not None
        reply = outcome.reply
        assert reply.is_reply
        assert reply[:3] == request[:3]
        assert reply.flow == flow
        return reply

    def hello(self, node: int, lease_ms: int = 1000) -> Message:
        return self.ask(Op.HELLO, node, cookie=lease_ms)


@dataclass
class Simple:
    """One rule of the model, without generations: it counts versions instead."""

    owner: int
    endpoint: Endpoint
    locked: bool
    cookie: int
    version: int


class Model:
    """docs/protocol.md as literally as possible."""

    def __init__(self) -> None:
        self.rules: dict[bytes, Simple] = {}

    def collides(self, flow: bytes, endpoint: Endpoint) -> bool:
        if Flow.unpack(flow).service == endpoint:
            return False
        client = Flow.unpack(flow).client
        return any(
            rule.endpoint == endpoint
            and Flow.unpack(other).client == client
            and Flow.unpack(other).service != endpoint
            for other, rule in self.rules.items()
            if other != flow
        )

    def apply(
        self, op: Op, node: int, flow: bytes, endpoint: Endpoint, locked: bool, cookie: int,
        ahead: int,
    ) -> Status:  # fmt: skip
        rule = self.rules.get(flow)
        if op == Op.ADD:
            if rule is not None:
                same = (rule.owner, rule.cookie) == (node, cookie)
                return Status.OK if same else Status.EXISTS
            if self.collides(flow, endpoint):
                return Status.EXISTS
            self.rules[flow] = Simple(node, endpoint, locked, cookie, 0)
            return Status.OK
        if rule is None:
            return Status.NOENT
        if op == Op.GET:
            return Status.OK
        if op == Op.CHOWN and ahead == -1 and rule.owner == node:
            return Status.OK
        if ahead:
            return Status.STALE
        if rule.owner != node and (op != Op.CHOWN or not rule.locked):
            return Status.DENIED
        if op == Op.CHOWN:
            if self.collides(flow, endpoint):
                return Status.EXISTS
            self.rules[flow] = Simple(node, endpoint, locked, rule.cookie, rule.version + 1)
        elif op == Op.DELETE:
            del self.rules[flow]
        else:
            rule.locked = op == Op.LOCK
        return Status.OK


STEP = st.tuples(
    st.sampled_from([Op.ADD, Op.ADD, Op.LOCK, Op.CHOWN, Op.CHOWN, Op.UNLOCK, Op.DELETE, Op.GET]),
    st.sampled_from(NODES),
    st.sampled_from(FLOWS),
    st.sampled_from(OWNERS),
    st.booleans(),
    st.integers(0, 1),
    st.sampled_from([0, 0, 0, -1, 1]),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(STEP, max_size=60))
def test_the_table_agrees_with_the_protocols_text(
    steps: list[tuple[Op, int, bytes, Endpoint, bool, int, int]],
) -> None:
    harness, model = Harness(), Model()
    for node in NODES:
        harness.hello(node)
    seen: dict[bytes, int] = {}
    for op, node, flow, endpoint, locked, cookie, ahead in steps:
        before = harness.table.get(flow)
        gen = before.gen + ahead if before else 1
        reply = harness.ask(
            op, node, flow, owner_endpoint=endpoint, flags=int(locked), cookie=cookie, gen=gen
        )
        expected = model.apply(op, node, flow, endpoint, locked, cookie, ahead)
        assert reply.status == expected, (op, before)
        simple = {
            rule.flow: (rule.owner, rule.owner_endpoint, rule.locked, rule.cookie)
            for rule in harness.table.rules()
        }
        assert simple == {
            flow: (rule.owner, rule.endpoint, rule.locked, rule.cookie)
            for flow, rule in model.rules.items()
        }
        after = harness.table.get(flow)
        if after is not None:
            assert (reply.owner, reply.gen, reply.locked) == (after.owner, after.gen, after.locked)
            assert after.gen >= seen.get(flow, 0)  # never again a generation it has had
            if before is None or before.owner != after.owner:
                assert after.gen > seen.get(flow, 0)
            seen[flow] = after.gen
    owners = {
        (rule.endpoint, Flow.unpack(flow).client)
        for flow, rule in model.rules.items()
        if rule.endpoint != Flow.unpack(flow).service
    }
    assert len(harness.table._owners) == len(owners)


def test_generations_grow_even_when_the_clock_stands_still() -> None:
    harness = Harness()
    harness.hello(11)
    generations = []
    for _ in range(5):
        gen = harness.ask(Op.ADD, 11, FLOWS[0]).gen
        gen = harness.ask(Op.CHOWN, 11, FLOWS[0], gen=gen).gen
        generations.append(gen)
        harness.ask(Op.DELETE, 11, FLOWS[0], gen=gen)
        harness.clock.now += 1
    assert generations == sorted(set(generations))


def test_a_full_table_says_so_and_a_deletion_makes_room() -> None:
    harness = Harness(max_rules=2)
    harness.hello(11)
    statuses = [harness.ask(Op.ADD, 11, flow, owner_endpoint=SERVICE).status for flow in FLOWS[::2]]
    assert statuses == [Status.OK, Status.OK]
    full = harness.ask(Op.ADD, 11, FLOWS[1])
    assert (full.status, full.gen) == (Status.FULL, 0)
    assert harness.table.get(FLOWS[1]) is None
    rule = harness.table.get(FLOWS[0])
    assert rule is not None
    assert not harness.table.delete(FLOWS[0], rule.gen + 1)
    assert harness.table.delete(FLOWS[0], rule.gen)
    assert harness.ask(Op.ADD, 11, FLOWS[1]).status == Status.OK


def test_only_so_many_nodes_and_one_that_left_makes_room() -> None:
    harness = Harness(max_nodes=2)
    assert [harness.hello(node).status for node in NODES] == [Status.OK, Status.OK, Status.FULL]
    harness.hello(12, 0)
    assert harness.hello(13).status == Status.OK


def test_leases_are_granted_up_to_a_bound_and_run_out() -> None:
    harness = Harness()
    reply = harness.hello(11, 10**9)
    assert (reply.gen, reply.cookie) == (60_000, harness.table.incarnation)
    harness.hello(12, 500)
    harness.clock.now += 600_000_000
    nodes = {node.id: node for node in harness.table.nodes()}
    assert (nodes[11].alive, nodes[12].alive) == (True, False)
    assert nodes[12].endpoint == SOURCE
    assert not harness.table.end_lease(11)
    assert harness.table.end_lease(12)
    assert harness.ask(Op.GET, 12, FLOWS[0]).status == Status.DENIED
    assert harness.ask(Op.GET, 11, FLOWS[0]).status == Status.NOENT


def test_replays_are_dropped_and_counted() -> None:
    harness = Harness()
    harness.hello(11)
    request = Message(Op.GET, 11, 5000, flow=FLOWS[0])
    assert harness.table.handle(request, SOURCE) is not None
    assert harness.table.handle(request, SOURCE) is None
    assert harness.table.handle(request._replace(seq=5000 - 64), SOURCE) is None
    assert harness.table.replays == 2
    assert harness.table.handle(request._replace(seq=6000, flags=0x80), SOURCE) is None


def test_a_change_tells_before_and_after_and_can_be_taken_back() -> None:
    harness = Harness()
    harness.hello(11)
    request = Message(Op.ADD, 11, 5000, flow=FLOWS[0], owner=11, owner_endpoint=OWNERS[0], cookie=3)
    outcome = harness.table.handle(request, SOURCE)
    assert outcome is not None
    assert outcome.change is not None
    rule = outcome.change.after
    assert isinstance(rule, Rule)
    assert outcome.change == Change(FLOWS[0], None, rule)
    again = harness.table.handle(request._replace(seq=5001), SOURCE)
    assert again is not None
    assert again.change is None
    harness.table.restore(outcome.change)
    assert harness.table.get(FLOWS[0]) is None
    assert harness.table._owners == {}


@pytest.mark.parametrize("count", [0, 1, LIST_LIMIT, LIST_LIMIT + 1, 3 * LIST_LIMIT])
def test_pages_of_a_list_tell_every_rule_once(count: int) -> None:
    harness, lister = listed(count)
    flows, cursor, pages = [], 0, 0
    while True:
        page = lister.answer(Message(Op.LIST, 11, 1, owner=11, cookie=cursor))
        pages += 1
        if page[0].status == Status.NOENT:
            break
        assert len(page) <= LIST_LIMIT
        assert not any(message.more for message in page[:-1])
        flows += [message.flow for message in page]
        if not page[-1].more:
            break
        cursor = page[-1].cookie
    assert sorted(flows) == sorted(rule.flow for rule in harness.table.rules())
    assert pages == max(1, -(-count // LIST_LIMIT))


def listed(count: int) -> tuple[Harness, Lister]:
    harness = Harness()
    harness.hello(11)
    for port in range(1, count + 1):
        flow = Flow(Endpoint("198.51.100.9", port), SERVICE).pack()
        assert harness.ask(Op.ADD, 11, flow, cookie=port).status == Status.OK
    return harness, Lister(harness.table, max_snapshots=2, clock=lambda: harness.clock.now / 1e9)


def test_a_page_can_be_asked_for_again() -> None:
    _, lister = listed(2 * LIST_LIMIT)
    first = lister.answer(Message(Op.LIST, 11, 1, owner=11))
    second = Message(Op.LIST, 11, 2, owner=11, cookie=first[-1].cookie)
    assert lister.answer(second) == lister.answer(second)


def test_rules_that_go_while_listed_are_left_out() -> None:
    harness, lister = listed(2 * LIST_LIMIT)
    cursor = lister.answer(Message(Op.LIST, 11, 1, owner=11))[-1].cookie
    for rule in list(harness.table.rules()):
        harness.table.delete(rule.flow, rule.gen)
    (reply,) = lister.answer(Message(Op.LIST, 11, 2, owner=11, cookie=cursor))
    assert reply.status == Status.NOENT


def test_a_cursor_that_nobody_gave_is_invalid_and_old_ones_are_forgotten() -> None:
    harness, lister = listed(2 * LIST_LIMIT)
    (reply,) = lister.answer(Message(Op.LIST, 11, 1, owner=11, cookie=(99 << 32) | 3))
    assert reply.status == Status.INVALID
    cursors = [lister.answer(Message(Op.LIST, 11, 1, owner=11))[-1].cookie for _ in range(3)]
    statuses = [
        lister.answer(Message(Op.LIST, 11, 1, owner=11, cookie=cursor))[0].status
        for cursor in cursors
    ]
    assert statuses == [Status.INVALID, Status.OK, Status.OK]
    other = lister.answer(Message(Op.LIST, 11, 1, owner=12, cookie=cursors[2]))
    assert other[0].status == Status.INVALID
    harness.clock.now += 10**10
    late = lister.answer(Message(Op.LIST, 11, 1, owner=11, cookie=cursors[2]))
    assert late[0].status == Status.INVALID
