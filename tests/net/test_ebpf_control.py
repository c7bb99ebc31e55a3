"""The classifier's answers: the common suite, IPv6, and the userspace table as its model."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator

import pytest
from control_conformance import ControlConformance, ControlNode, fresh_flow, fresh_name
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from switch_bed import CONTROL, SERVICE, SwitchBed, bpffs

from prism.flow import Endpoint, Flow, pack_address
from prism.switch.control import Op, Status
from prism.switch.table import RuleTable

pytestmark = pytest.mark.net


@pytest.fixture(scope="module")
def bed() -> Iterator[SwitchBed]:
    with bpffs() as pins:
        bed = SwitchBed(pins)
        yield bed
        bed.close()


class TestControl(ControlConformance):
    pass


def test_the_same_over_ipv6(bed: SwitchBed) -> None:
    node = bed.node(fresh_name(), family=6)
    node.hello()
    flow = fresh_flow("2001:db8::80")
    reply = node.ask(Op.ADD, flow, locked=True)
    assert (reply.status, reply.owner_endpoint) == (Status.OK, node.endpoint)
    assert node.ask(Op.CHOWN, flow, gen=reply.gen).gen == reply.gen + 1
    rule = bed.rule(flow.pack())
    assert rule is not None
    assert rule.owner_endpoint == node.endpoint
    node.close()


def test_nodes_are_seen_with_their_leases(bed: SwitchBed) -> None:
    node = bed.node(fresh_name(), role="be2").hello(1234)
    (seen,) = [found for found in bed.switch.nodes() if found.id == node.id]
    assert seen.endpoint == Endpoint.from_sockaddr(node.socket.getsockname())
    assert seen.lease == 1.234
    assert 0 <= seen.age < 1
    assert not bed.switch.end_lease(node.id)  # it is running
    node.hello(1)
    while not bed.switch.end_lease(node.id):
        pass
    assert node.ask(Op.GET, fresh_flow()).status == Status.DENIED
    assert bed.switch.forget_node(node.id)
    assert not bed.switch.forget_node(node.id)
    assert node.id not in {found.id for found in bed.switch.nodes()}
    node.close()


def test_datagrams_to_other_addresses_and_ports_are_left_alone(bed: SwitchBed) -> None:
    """They reach the host they are for, which has no such port."""
    for host, port in ((CONTROL.host, CONTROL.port + 1), (SERVICE, CONTROL.port)):
        node = bed.node(fresh_name())
        node.socket.connect((host, port))
        before = bed.switch.counters()
        node.send(node.request(Op.GET, fresh_flow()))
        with pytest.raises(ConnectionRefusedError):
            node.answer()
        assert bed.switch.counters() == before
        node.close()


def test_a_full_table_says_so() -> None:
    with bpffs() as pins:
        bed = SwitchBed(pins, max_rules=8)
        try:
            node = bed.node(fresh_name()).hello()
            statuses = [node.ask(Op.ADD, fresh_flow()).status for _ in range(10)]
            assert statuses == [Status.OK] * 8 + [Status.FULL] * 2
            counters = bed.switch.counters()
            assert counters["full"] == 2
            assert bed.switch.rule_count == len(list(bed.switch.rules())) == 8
            victim = next(bed.switch.rules())
            assert bed.switch.delete(victim.flow, victim.gen)
            assert node.ask(Op.ADD, fresh_flow()).status == Status.OK
            node.close()
        finally:
            bed.close()


# The userspace table is the model: whatever three nodes ask, both answer alike.

CLIENTS = (Endpoint("198.51.100.1", 1000), Endpoint("198.51.100.1", 1001))
SERVICES = (Endpoint("192.0.2.80", 80), Endpoint("192.0.2.81", 80))
FLOWS = [Flow(client, service) for client in CLIENTS for service in SERVICES]
OWNERS = (Endpoint("10.50.3.2", 8080), Endpoint("10.50.3.2", 8081), SERVICES[0])
STEP = st.tuples(
    st.sampled_from([Op.ADD, Op.LOCK, Op.CHOWN, Op.CHOWN, Op.UNLOCK, Op.DELETE, Op.GET]),
    st.integers(0, 2),  # node
    st.sampled_from(FLOWS),
    st.sampled_from(OWNERS),
    st.sampled_from([0, 0, 0, -1, 1]),  # generation, relative to the rule's
    st.booleans(),  # locked
    st.integers(0, 1),  # cookie
)


@pytest.fixture(scope="module")
def trio(bed: SwitchBed) -> Iterator[list[ControlNode]]:
    nodes = [bed.node(fresh_name()).hello() for _ in range(3)]
    yield nodes
    for node in nodes:
        node.close()


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(STEP, max_size=40))
def test_the_classifier_and_the_userspace_table_agree(
    bed: SwitchBed, trio: list[ControlNode], steps: list[tuple]
) -> None:
    for rule in list(bed.switch.rules()):
        assert bed.switch.delete(rule.flow, rule.gen)
    assert bed.switch._object.map("owners").batch() == ([], None)
    table = RuleTable()
    for node in trio:
        table.handle(node.request(Op.HELLO, cookie=1000), node.endpoint)
    for op, index, flow, owner, ahead, locked, cookie in steps:
        here, there = bed.rule(flow.pack()), table.get(flow.pack())
        request = trio[index].request(op, flow, owner_endpoint=owner, locked=locked, cookie=cookie)
        real = trio[index].ask(
            op,
            flow,
            owner_endpoint=owner,
            locked=locked,
            cookie=cookie,
            owner=request.owner,
            gen=here.gen + ahead if here else 1,
        )
        outcome = table.handle(
            request._replace(gen=there.gen + ahead if there else 1), trio[index].endpoint
        )
        assert outcome is not None
        model = outcome.reply
        assert real[3:9] == model[3:9]  # status, flags, flow, owner, endpoint, MAC
        assert real.cookie == model.cookie
        assert {rule._replace(gen=0) for rule in bed.switch.rules()} == {
            rule._replace(gen=0) for rule in table.rules()
        }


def test_racing_requests_leave_the_tables_consistent(
    bed: SwitchBed, trio: list[ControlNode]
) -> None:
    """Every rule with its owner elsewhere has its reverse entry, and there is no other entry."""
    owners = bed.switch._object.map("owners")
    for rule in list(bed.switch.rules()):
        assert bed.switch.delete(rule.flow, rule.gen)
    failures: list[BaseException] = []

    def play(node: ControlNode, seed: int) -> None:
        chance = random.Random(seed)
        endpoint = node.endpoint._replace(port=9000 + seed)
        try:
            for _ in range(1500):
                flow = chance.choice(FLOWS[::2])
                op = chance.choice([Op.ADD, Op.LOCK, Op.LOCK, Op.CHOWN, Op.CHOWN, Op.DELETE])
                locked = chance.random() < 0.7
                with contextlib.suppress(TimeoutError):  # dropped: the rule was just being deleted
                    gen = node.ask(Op.GET, flow).gen
                    node.ask(op, flow, gen=gen, owner_endpoint=endpoint, locked=locked)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=play, args=(node, seed)) for seed, node in enumerate(trio)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    expected = {
        pack_address(rule.owner_endpoint.host)
        + rule.flow[:16]
        + rule.owner_endpoint.port.to_bytes(2, "big")
        + rule.flow[32:34]
        for rule in bed.switch.rules()
    }
    entries, _ = owners.batch()
    assert {key for key, _ in entries} == expected
