"""What every switch must answer to control datagrams (docs/protocol.md), as a suite to inherit.

A test module for one kind of switch makes a fixture ``bed`` (a :class:`ControlBed`) and writes
``class TestControl(ControlConformance): pass``. The suite speaks datagrams over a real network.
"""

from __future__ import annotations

import itertools
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import pytest

from prism.flow import Endpoint, Flow
from prism.lab.netns import Namespace
from prism.switch.base import Rule
from prism.switch.control import (
    MESSAGE_SIZE,
    NO_ENDPOINT,
    Flags,
    Message,
    Op,
    Status,
    decode,
    encode,
    node_id,
)

MAC = bytes.fromhex("020000000001")
_numbers = itertools.count(1)


def fresh_flow(service: str = "192.0.2.80") -> Flow:
    """A flow that no other test has."""
    number = next(_numbers)
    client = f"198.51.{100 + number // 60000}.7" if ":" not in service else "2001:db8::7"
    return Flow(Endpoint(client, 1024 + number % 60000), Endpoint(service, 80))


def fresh_name() -> str:
    return f"t{next(_numbers)}/0"


class ControlNode:
    """A node that talks to the switch with plain sockets."""

    def __init__(
        self, space: Namespace, control: Endpoint, key: bytes, name: str, endpoint: Endpoint
    ) -> None:
        self.key = key
        self.id = node_id(name)
        self.endpoint = endpoint
        self.seq = time.time_ns()
        self.socket = space.socket(control.family, socket.SOCK_DGRAM)
        self.socket.connect((control.host, control.port))
        self.socket.settimeout(2)

    def close(self) -> None:
        self.socket.close()

    def request(self, op: int, flow: Flow | None = None, **fields: Any) -> Message:
        """The next request; ``fields`` as of ``Message``."""
        self.seq += 1
        if flow is not None:
            fields["flow"] = flow.pack()
        if op in (Op.ADD, Op.CHOWN):
            fields.setdefault("owner", self.id)
            fields.setdefault("owner_endpoint", self.endpoint)
            fields.setdefault("owner_mac", MAC)
        locked = fields.pop("locked", False)
        fields.setdefault("flags", Flags.LOCKED if locked else 0)
        return Message(op, fields.pop("node", self.id), fields.pop("seq", self.seq), **fields)

    def send(self, request: Message) -> None:
        self.socket.send(encode(request, self.key))

    def answer(self) -> Message:
        return decode(self.socket.recv(2048), self.key)

    def ask(self, op: int, flow: Flow | None = None, **fields: Any) -> Message:
        """Send one request and return its answer."""
        request = self.request(op, flow, **fields)
        self.send(request)
        reply = self.answer()
        assert (reply.op, reply.node, reply.seq) == (op, request.node, request.seq)
        assert reply.is_reply
        assert reply.flow == request.flow
        return reply

    def hello(self, lease_ms: int = 10_000) -> ControlNode:
        assert self.ask(Op.HELLO, cookie=lease_ms).status == Status.OK
        return self

    def silent(self) -> bool:
        """Whether nothing has come and nothing comes soon."""
        return not select.select([self.socket], [], [], 0.1)[0]


class ControlBed(Protocol):
    """A switch under test."""

    key: bytes
    control: Endpoint

    def node(self, name: str) -> ControlNode:
        """A node that reaches the switch; it has not said HELLO."""

    def rule(self, flow: bytes) -> Rule | None:
        """The rule as the switch's own process sees it."""

    def drops(self) -> dict[str, int]:
        """How many datagrams were dropped: ``bad`` (size, magic, version, MAC) and ``replay``."""


Join = Callable[[], ControlNode]


class ControlConformance:
    """The suite. Flows and nodes are new in each test, so one bed may serve them all."""

    @pytest.fixture
    def join(self, bed: ControlBed, request: pytest.FixtureRequest) -> Join:
        """Makes nodes that have said HELLO."""

        def make() -> ControlNode:
            node = bed.node(fresh_name())
            request.addfinalizer(node.close)
            return node.hello()

        return make

    # HELLO

    def test_hello_grants_the_lease_and_names_the_table(self, bed: ControlBed, join: Join) -> None:
        first, second = join(), join()
        reply = first.ask(Op.HELLO, cookie=1500)
        assert (reply.status, reply.gen) == (Status.OK, 1500)
        assert reply.cookie != 0
        assert second.ask(Op.HELLO, cookie=1).cookie == reply.cookie

    def test_a_lease_is_bounded(self, join: Join) -> None:
        assert join().ask(Op.HELLO, cookie=2**63).gen == 60_000

    def test_nothing_is_allowed_without_a_hello(self, bed: ControlBed) -> None:
        node = bed.node(fresh_name())
        for op in (Op.ADD, Op.LOCK, Op.CHOWN, Op.UNLOCK, Op.DELETE, Op.GET):
            flow = fresh_flow()
            assert node.ask(op, flow).status == Status.DENIED
            assert bed.rule(flow.pack()) is None
        node.close()

    def test_lease_zero_ends_it(self, join: Join) -> None:
        node = join()
        assert node.ask(Op.HELLO, cookie=0).status == Status.OK
        assert node.ask(Op.ADD, fresh_flow()).status == Status.DENIED
        node.hello()
        assert node.ask(Op.ADD, fresh_flow()).status == Status.OK

    def test_nobody_speaks_for_the_agent(self, join: Join) -> None:
        node, flow = join(), fresh_flow()
        gen = node.ask(Op.ADD, flow).gen
        assert node.ask(Op.HELLO, node=0, cookie=1000).status == Status.DENIED
        assert node.ask(Op.DELETE, flow, node=0, gen=gen).status == Status.DENIED

    # ADD

    @pytest.mark.parametrize("locked", [False, True])
    def test_add_makes_the_rule_asked_for(self, bed: ControlBed, join: Join, locked: bool) -> None:
        node, flow = join(), fresh_flow()
        reply = node.ask(Op.ADD, flow, cookie=5, locked=locked)
        assert reply.status == Status.OK
        assert (reply.owner, reply.owner_endpoint) == (node.id, node.endpoint)
        assert (reply.owner_mac, reply.locked) == (MAC, locked)
        assert reply.gen > 0
        rule = Rule(flow.pack(), node.id, node.endpoint, MAC, reply.gen, locked, 5)
        assert bed.rule(flow.pack()) == rule

    def test_a_repeated_add_is_answered_as_the_first(self, join: Join) -> None:
        node, flow = join(), fresh_flow()
        first = node.ask(Op.ADD, flow, cookie=7, locked=True)
        again = node.ask(Op.ADD, flow, cookie=7, locked=True)
        assert again._replace(seq=first.seq) == first

    def test_add_does_not_replace_a_rule(self, bed: ControlBed, join: Join) -> None:
        node, other, flow = join(), join(), fresh_flow()
        first = node.ask(Op.ADD, flow, cookie=7)
        for asker, cookie in ((node, 8), (other, 7)):
            reply = asker.ask(Op.ADD, flow, cookie=cookie)
            assert (reply.status, reply.owner, reply.gen) == (Status.EXISTS, node.id, first.gen)
        rule = bed.rule(flow.pack())
        assert rule is not None
        assert rule.owner == node.id

    def test_a_generation_is_never_given_twice(self, join: Join) -> None:
        node, flow = join(), fresh_flow()
        generations = []
        for _ in range(5):
            generations.append(node.ask(Op.ADD, flow).gen)
            locked = node.ask(Op.CHOWN, flow, gen=generations[-1])
            generations.append(locked.gen)
            assert node.ask(Op.DELETE, flow, gen=locked.gen).status == Status.OK
        assert generations == sorted(set(generations))

    def test_a_node_acts_for_itself_only(self, bed: ControlBed, join: Join) -> None:
        node, other, flow = join(), join(), fresh_flow()
        assert node.ask(Op.ADD, flow, owner=other.id).status == Status.DENIED
        assert bed.rule(flow.pack()) is None
        gen = node.ask(Op.ADD, flow).gen
        assert node.ask(Op.CHOWN, flow, gen=gen, owner=other.id).status == Status.DENIED
        rule = bed.rule(flow.pack())
        assert rule is not None
        assert (rule.owner, rule.gen) == (node.id, gen)

    @pytest.mark.parametrize(
        ("client", "service", "owner"),
        [
            (("198.51.100.1", 5), ("2001:db8::1", 80), ("2001:db8::2", 80)),
            (("2001:db8::1", 5), ("2001:db8::2", 80), ("192.0.2.1", 80)),
            (("198.51.100.1", 0), ("192.0.2.80", 80), ("192.0.2.1", 80)),
            (("198.51.100.1", 5), ("192.0.2.80", 0), ("192.0.2.1", 80)),
            (("198.51.100.1", 5), ("192.0.2.80", 80), ("192.0.2.1", 0)),
        ],
    )
    def test_nonsense_is_invalid(
        self,
        bed: ControlBed,
        join: Join,
        client: tuple[str, int],
        service: tuple[str, int],
        owner: tuple[str, int],
    ) -> None:
        node, flow = join(), Flow(Endpoint(*client), Endpoint(*service))
        for op in (Op.ADD, Op.CHOWN):
            assert node.ask(op, flow, owner_endpoint=Endpoint(*owner)).status == Status.INVALID
        assert bed.rule(flow.pack()) is None

    def test_an_unknown_operation_is_invalid(self, join: Join) -> None:
        assert join().ask(9, fresh_flow()).status == Status.INVALID

    # LOCK, UNLOCK, DELETE, GET

    def test_lock_and_unlock_keep_the_generation(self, bed: ControlBed, join: Join) -> None:
        node, flow = join(), fresh_flow()
        gen = node.ask(Op.ADD, flow).gen
        for op, locked in (
            (Op.LOCK, True),
            (Op.LOCK, True),
            (Op.UNLOCK, False),
            (Op.UNLOCK, False),
        ):
            reply = node.ask(op, flow, gen=gen)
            assert (reply.status, reply.gen, reply.locked) == (Status.OK, gen, locked)
            rule = bed.rule(flow.pack())
            assert rule is not None
            assert rule.locked is locked

    @pytest.mark.parametrize("op", [Op.LOCK, Op.UNLOCK, Op.DELETE])
    def test_only_the_owner_of_this_generation_may(
        self, bed: ControlBed, join: Join, op: Op
    ) -> None:
        node, other, flow = join(), join(), fresh_flow()
        assert node.ask(op, flow, gen=1).status == Status.NOENT
        gen = node.ask(Op.ADD, flow).gen
        before = bed.rule(flow.pack())
        for asker, asked, status in (
            (node, gen - 1, Status.STALE),
            (node, gen + 1, Status.STALE),
            (other, gen, Status.DENIED),
        ):
            reply = asker.ask(op, flow, gen=asked)
            assert (reply.status, reply.gen, reply.owner) == (status, gen, node.id)
        assert bed.rule(flow.pack()) == before

    def test_delete_removes_the_rule(self, bed: ControlBed, join: Join) -> None:
        node, flow = join(), fresh_flow()
        gen = node.ask(Op.ADD, flow).gen
        assert node.ask(Op.DELETE, flow, gen=gen).status == Status.OK
        assert bed.rule(flow.pack()) is None
        repeated = node.ask(Op.DELETE, flow, gen=gen)
        assert repeated.status == Status.NOENT
        assert (repeated.owner, repeated.gen, repeated.owner_endpoint) == (0, 0, NO_ENDPOINT)
        assert node.ask(Op.GET, flow).status == Status.NOENT

    def test_get_tells_the_rule_to_anybody(self, join: Join) -> None:
        node, other, flow = join(), join(), fresh_flow()
        added = node.ask(Op.ADD, flow, locked=True)
        told = other.ask(Op.GET, flow)
        assert told.status == Status.OK
        assert told[4:] == added[4:]

    # CHOWN

    def test_chown_of_a_locked_rule(self, bed: ControlBed, join: Join) -> None:
        a, b, flow = join(), join(), fresh_flow()
        gen = a.ask(Op.ADD, flow, locked=True).gen
        reply = b.ask(Op.CHOWN, flow, gen=gen)
        assert (reply.status, reply.owner, reply.gen) == (Status.OK, b.id, gen + 1)
        assert not reply.locked
        rule = bed.rule(flow.pack())
        assert rule is not None
        assert (rule.owner, rule.owner_endpoint, rule.gen) == (b.id, b.endpoint, gen + 1)

    def test_a_repeated_chown_is_answered_as_the_first(self, join: Join) -> None:
        a, b, flow = join(), join(), fresh_flow()
        gen = a.ask(Op.ADD, flow, locked=True).gen
        first = b.ask(Op.CHOWN, flow, gen=gen)
        again = b.ask(Op.CHOWN, flow, gen=gen)
        assert again._replace(seq=first.seq) == first

    def test_chown_may_keep_the_lock(self, join: Join) -> None:
        a, b, flow = join(), join(), fresh_flow()
        gen = a.ask(Op.ADD, flow, locked=True).gen
        assert b.ask(Op.CHOWN, flow, gen=gen, locked=True).locked
        assert a.ask(Op.CHOWN, flow, gen=gen + 1).status == Status.OK

    def test_an_unlocked_flow_is_not_taken(self, join: Join) -> None:
        a, b, flow = join(), join(), fresh_flow()
        gen = a.ask(Op.ADD, flow).gen
        assert b.ask(Op.CHOWN, flow, gen=gen).status == Status.DENIED
        assert a.ask(Op.CHOWN, flow, gen=gen).status == Status.OK
        assert b.ask(Op.CHOWN, fresh_flow(), gen=gen).status == Status.NOENT

    @pytest.mark.parametrize("winner", ["source", "target"])
    def test_of_take_over_and_take_back_one_wins(self, join: Join, winner: str) -> None:
        a, b, flow = join(), join(), fresh_flow()
        gen = a.ask(Op.ADD, flow, locked=True).gen
        first, second = (a, b) if winner == "source" else (b, a)
        assert first.ask(Op.CHOWN, flow, gen=gen).status == Status.OK
        lost = second.ask(Op.CHOWN, flow, gen=gen)
        assert (lost.status, lost.owner, lost.gen) == (Status.STALE, first.id, gen + 1)
        for op in (Op.LOCK, Op.UNLOCK, Op.DELETE):
            assert second.ask(op, flow, gen=gen).status == Status.STALE

    def test_racing_chowns_have_one_winner(self, join: Join) -> None:
        """Two nodes ask at the same moment, many times over."""
        a, rivals, rounds = join(), (join(), join()), 200
        flows = [fresh_flow() for _ in range(rounds)]
        generations = [a.ask(Op.ADD, flow, locked=True).gen for flow in flows]
        barrier = threading.Barrier(2)
        statuses: list[list[int]] = [[], []]

        def race(index: int) -> None:
            for flow, gen in zip(flows, generations, strict=True):
                barrier.wait(10)
                statuses[index].append(rivals[index].ask(Op.CHOWN, flow, gen=gen).status)

        threads = [threading.Thread(target=race, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for flow, gen, one, other in zip(flows, generations, *statuses, strict=True):
            assert sorted((one, other)) == [Status.OK, Status.STALE]
            told = a.ask(Op.GET, flow)
            winner = rivals[0] if one == Status.OK else rivals[1]
            assert (told.owner, told.gen) == (winner.id, gen + 1)

    # An owner's address and port serve one flow of a client

    def test_a_port_in_use_for_this_client_is_refused(self, join: Join) -> None:
        a, b = join(), join()
        first = fresh_flow()
        second = first._replace(service=Endpoint("192.0.2.81", 80))
        assert a.ask(Op.ADD, first).status == Status.OK
        assert b.ask(Op.ADD, second, owner_endpoint=a.endpoint).status == Status.EXISTS
        there = a.endpoint._replace(port=9999)
        gen = b.ask(Op.ADD, second, owner_endpoint=there, locked=True).gen
        assert a.ask(Op.CHOWN, second, gen=gen).status == Status.EXISTS
        another = a.endpoint._replace(port=8888)
        assert a.ask(Op.CHOWN, second, gen=gen, owner_endpoint=another).status == Status.OK

    def test_a_port_is_free_again_when_its_flow_has_left(self, join: Join) -> None:
        a, b = join(), join()
        first = fresh_flow()
        second = first._replace(service=Endpoint("192.0.2.81", 80))
        gen = a.ask(Op.ADD, first, locked=True).gen
        elsewhere = a.endpoint._replace(port=9999)
        assert b.ask(Op.CHOWN, first, gen=gen, owner_endpoint=elsewhere).status == Status.OK
        gen2 = a.ask(Op.ADD, second)
        assert gen2.status == Status.OK
        assert a.ask(Op.DELETE, second, gen=gen2.gen).status == Status.OK
        third = first._replace(service=Endpoint("192.0.2.82", 80))
        assert a.ask(Op.ADD, third).status == Status.OK

    def test_a_refused_chown_leaves_the_port_free(self, join: Join) -> None:
        a, b = join(), join()
        first = fresh_flow()
        second = first._replace(service=Endpoint("192.0.2.81", 80))
        elsewhere = a.endpoint._replace(port=9999)
        gen = a.ask(Op.ADD, first, locked=True).gen
        stale = b.ask(Op.CHOWN, first, gen=gen - 1, owner_endpoint=elsewhere)
        assert stale.status == Status.STALE
        assert a.ask(Op.ADD, second, owner_endpoint=elsewhere).status == Status.OK

    def test_many_flows_share_a_service_address_as_owner(self, join: Join) -> None:
        """A frontend owns with the service's own address: no port is taken."""
        node = join()
        for _ in range(3):
            flow = fresh_flow()
            assert node.ask(Op.ADD, flow, owner_endpoint=flow.service).status == Status.OK

    # What is not answered

    def test_every_octet_is_covered_by_the_mac(self, bed: ControlBed, join: Join) -> None:
        node, flow = join(), fresh_flow()
        good = encode(node.request(Op.ADD, flow), bed.key)
        before = bed.drops()["bad"]
        for index in range(MESSAGE_SIZE):
            bad = bytearray(good)
            bad[index] ^= 1 << random.randrange(8)
            node.socket.send(bad)
        assert node.ask(Op.GET, flow).status == Status.NOENT  # the first answer that comes
        assert bed.drops()["bad"] == before + MESSAGE_SIZE

    def test_other_sizes_are_dropped(self, bed: ControlBed, join: Join) -> None:
        node, flow = join(), fresh_flow()
        before = bed.drops()["bad"]
        sizes = (0, 1, 119, 121, 240, 1400)
        for size in sizes:
            data = encode(node.request(Op.ADD, flow), bed.key) * 12
            node.socket.send(data[:size])
        assert node.ask(Op.GET, flow).status == Status.NOENT
        assert bed.drops()["bad"] == before + len(sizes)

    def test_another_key_is_dropped(self, bed: ControlBed, join: Join) -> None:
        node, flow = join(), fresh_flow()
        node.socket.send(encode(node.request(Op.ADD, flow), bytes(16)))
        assert node.ask(Op.GET, flow).status == Status.NOENT

    def test_a_reply_is_not_taken_for_a_request(self, bed: ControlBed, join: Join) -> None:
        node, flow = join(), fresh_flow()
        node.send(node.request(Op.ADD, flow, flags=Flags.REPLY))
        assert node.ask(Op.GET, flow).status == Status.NOENT

    def test_a_replay_is_dropped(self, bed: ControlBed, join: Join) -> None:
        node, flow = join(), fresh_flow()
        gen = node.ask(Op.ADD, flow).gen
        lock = node.request(Op.LOCK, flow, gen=gen)
        node.send(lock)
        assert node.answer().locked
        assert not node.ask(Op.UNLOCK, flow, gen=gen).locked
        before = bed.drops()["replay"]
        node.send(lock)
        assert node.silent()
        assert bed.drops()["replay"] == before + 1
        assert not node.ask(Op.GET, flow).locked

    def test_sequence_numbers_may_come_out_of_order_within_a_window(
        self, bed: ControlBed, join: Join
    ) -> None:
        node, flow = join(), fresh_flow()
        top = node.seq + 200
        assert node.ask(Op.GET, flow, seq=top).status == Status.NOENT
        before = bed.drops()["replay"]
        for behind in random.sample(range(1, 64), 63):
            node.ask(Op.GET, flow, seq=top - behind)
        for used in (top, top - 1, top - 63, top - 64, top - 65, top - 1000):
            node.send(node.request(Op.GET, flow, seq=used))
        assert node.silent()
        assert bed.drops()["replay"] == before + 6
        node.ask(Op.GET, flow, seq=top + 64)
        node.seq = top + 64
        node.ask(Op.GET, flow, seq=top + 1)  # just inside again
        node.send(node.request(Op.GET, flow, seq=top))
        assert node.silent()

    def test_a_replayed_hello_does_not_renew(self, bed: ControlBed, join: Join) -> None:
        node = join()
        hello = node.request(Op.HELLO, cookie=10_000)
        node.send(hello)
        node.answer()
        assert node.ask(Op.HELLO, cookie=0).status == Status.OK
        node.send(hello)
        assert node.silent()
        assert node.ask(Op.GET, fresh_flow()).status == Status.DENIED

    def test_replies_look_as_the_protocol_says(self, bed: ControlBed, join: Join) -> None:
        node, flow = join(), fresh_flow()
        request = node.request(Op.ADD, flow)
        node.send(request)
        data, address = node.socket.recvfrom(2048)
        assert address[:2] == (bed.control.host, bed.control.port)
        assert len(data) == MESSAGE_SIZE
        magic, version, op, status, flags = struct.unpack_from("!IBBBB", data)
        assert (magic, version, op, status, flags) == (0x5052534D, 1, Op.ADD, 0, 0x80)
