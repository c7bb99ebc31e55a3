"""Random histories of a small cluster: one owner at most, one in the end, whatever goes wrong."""

from __future__ import annotations

import os
from random import Random

import pytest
from handoff_world import FLOW, Outgoing, World
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from prism.handoff.machine import Event, SourceState

EXAMPLES = int(os.environ.get("PRISM_SIMULATION_EXAMPLES", "100"))
HISTORIES = int(os.environ.get("PRISM_SIMULATION_HISTORIES", "400"))
some = st.integers(0, 5)


class Cluster(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    def _idle_copies(self) -> list:
        copies = [copy for node in self.world.nodes for copy in node.copies]
        return [copy for copy in copies if copy.runner is None and copy.state == "active"]

    @precondition(lambda self: self._idle_copies() and not self.world.closed)
    @rule(which=some, step=st.integers(1, 2))
    def hand_over(self, which: int, step: int) -> None:
        copies = self._idle_copies()
        copy = copies[which % len(copies)]
        nodes = self.world.nodes
        Outgoing(self.world, copy, nodes[(nodes.index(copy.node) + step) % 3])

    @rule(steps=st.integers(1, 8))
    def go_on(self, steps: int) -> None:
        for _ in range(steps):
            self.world.advance()

    @rule(steps=st.integers(1, 3))
    def go_on_a_little(self, steps: int) -> None:
        for _ in range(steps):
            self.world.advance()

    @precondition(lambda self: self.world.datagrams)
    @rule(which=some, what=st.sampled_from(["lose", "repeat", "overtake"]))
    def disturb_request(self, which: int, what: str) -> None:
        datagrams = self.world.datagrams
        index = which % len(datagrams)
        if what == "lose":
            datagrams.pop(index)
        elif what == "repeat":
            datagrams.append(datagrams[index])
        else:
            self.world.deliver(index)

    @precondition(lambda self: self.world.replies)
    @rule(which=some, lose=st.booleans())
    def disturb_reply(self, which: int, lose: bool) -> None:
        index = which % len(self.world.replies)
        if lose:
            self.world.replies.pop(index)
        else:
            self.world.answer(index)

    @precondition(lambda self: any(node.pending for node in self.world.nodes))
    @rule(which=some, give_up=st.booleans(), lose=st.booleans())
    def no_answer_yet(self, which: int, give_up: bool, lose: bool) -> None:
        waiting = [(node, op) for node in self.world.nodes for op in node.pending]
        node, pending = waiting[which % len(waiting)]
        if lose:
            self.world.lose(pending)
        if give_up:
            node.give_up(pending)
        else:
            node.transmit(pending)

    @precondition(lambda self: any(node.pending for node in self.world.nodes))
    @rule(heard=st.lists(st.booleans(), min_size=1, max_size=4))
    def outage(self, heard: list[bool]) -> None:
        for each in heard:
            self.world.outage(each)

    @precondition(lambda self: any(node.timers for node in self.world.nodes))
    @rule(which=some)
    def timer(self, which: int) -> None:
        nodes = [node for node in self.world.nodes if node.timers]
        node = nodes[which % len(nodes)]
        node.timers.pop(0)()

    @precondition(lambda self: self.world.links)
    @rule(which=some)
    def link_breaks(self, which: int) -> None:
        self.world.break_link(self.world.links[which % len(self.world.links)])

    @precondition(lambda self: any(each.times_out() for each in self.world.handoffs))
    @rule()
    def deadline(self) -> None:
        next(each for each in self.world.handoffs if each.times_out()).timed_out()

    @rule(what=st.sampled_from(["export", "import", "activate"]))
    def fail_once(self, what: str) -> None:
        self.world.failing.add(what)

    @precondition(lambda self: all(node.alive for node in self.world.nodes))
    @rule(which=st.integers(0, 2))
    def crash(self, which: int) -> None:
        self.world.nodes[which].crash()

    @precondition(lambda self: not all(node.alive for node in self.world.nodes))
    @rule()
    def lease_ends(self) -> None:
        self.world.expire()

    @precondition(lambda self: self._speaking())
    @rule()
    def finish(self) -> None:
        self.world.finish(self._speaking()[0])

    def _speaking(self) -> list:
        return [
            copy
            for copy in self._idle_copies()
            if self.world.copy_at(copy.node) is copy
            and self.world.reached() is copy.node
            and not self.world.closed
        ]

    @rule()
    def exchange(self) -> None:
        self.world.talk()

    @invariant()
    def nobody_speaks_from_a_stale_copy(self) -> None:
        self.world.check_fresh()

    def teardown(self) -> None:
        self.world.settle()
        self.world.check_at_rest()


Cluster.TestCase.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestCluster = Cluster.TestCase


def run(world: World, steps: int = 1000) -> None:
    """Deliver everything, in order, but let no time pass."""
    for _ in range(steps):
        if not world.advance():
            return


def test_undisturbed_the_connection_goes_round_and_comes_back():
    world = World()
    for step in range(6):
        source, target = world.nodes[step % 3], world.nodes[(step + 1) % 3]
        world.talk()
        Outgoing(world, source.copies[0], target)
        run(world)
        world.talk()
        assert not source.copies
        assert target.copies[0].state == "active"
    world.settle()
    world.check_at_rest()
    assert not world.closed


def test_a_source_that_dies_after_its_offer_does_not_take_the_connection_along():
    world = World()
    frontend, backend, _ = world.nodes
    Outgoing(world, frontend.copies[0], backend)
    while not any(link[3] for link in world.links):
        world.deliver(0) if world.datagrams else world.answer(0)
    next(iter(world.links))[3].pop(0)()  # the offer has arrived
    frontend.crash()
    run(world)
    world.talk()
    assert not world.closed
    assert backend.copies[0].version == world.version == 1


def test_a_target_that_dies_before_it_commits_leaves_the_connection_with_the_source():
    world = World()
    frontend, backend, _ = world.nodes
    handoff = Outgoing(world, frontend.copies[0], backend)
    while not any(link[3] for link in world.links):
        world.deliver(0) if world.datagrams else world.answer(0)
    next(iter(world.links))[3].pop(0)()
    world.datagrams.clear()  # its CHOWN is lost
    backend.crash()
    run(world)
    assert handoff.runner.machine.why is Event.LINK_LOST
    assert handoff.runner.machine.state is SourceState.KEPT
    assert world.table.get(FLOW) is None
    world.talk()
    assert frontend.copies[0].version == world.version == 1


def test_a_deadline_just_after_the_commit_leaves_it_with_the_target():
    world = World()
    frontend, backend, _ = world.nodes
    handoff = Outgoing(world, frontend.copies[0], backend)
    while backend.copies == [] or world.datagrams:
        if world.datagrams:
            world.deliver(0)
        elif world.replies:
            world.answer(0)
        else:
            world.links[0][3].pop(0)()
    handoff.timed_out()  # B's CHOWN is answered OK, but neither B nor A knows yet
    run(world)
    assert handoff.runner.machine.state is SourceState.GONE
    world.talk()
    assert backend.copies[0].version == world.version == 1
    world.check_at_rest()


def disturb(cluster: Cluster, random: Random) -> None:
    """One thing goes wrong, or merely happens."""
    world = cluster.world
    which = random.randrange(6)
    waiting = any(node.pending for node in world.nodes)
    match random.randrange(12):
        case 0 | 1 if waiting:
            for _ in range(random.randrange(1, 5)):
                world.outage(random.random() < 0.5)
        case 2 if world.links:
            world.break_link(random.choice(world.links))
        case 3 if any(each.times_out() for each in world.handoffs):
            cluster.deadline()
        case 4 if world.datagrams:
            cluster.disturb_request(which, random.choice(("lose", "repeat", "overtake")))
        case 5 if world.replies:
            cluster.disturb_reply(which, random.random() < 0.5)
        case 6 if waiting:
            cluster.no_answer_yet(which, random.random() < 0.5, random.random() < 0.5)
        case 7:
            cluster.fail_once(random.choice(("export", "import", "activate")))
        case 8 if random.random() < 0.2 and all(node.alive for node in world.nodes):
            random.choice(world.nodes).crash()
        case 9:
            world.expire()
        case 10 if random.random() < 0.2 and cluster._speaking():
            cluster.finish()
        case 11 if any(node.timers for node in world.nodes):
            cluster.timer(which)


def one_history(seed: int) -> None:
    """Handoffs with pauses and mishaps between any two steps."""
    random = Random(seed)
    cluster = Cluster()
    world = cluster.world
    mishaps = random.choice((0.1, 0.3, 0.6))
    for _ in range(40):
        if cluster._idle_copies() and not world.closed and random.random() < 0.4:
            cluster.hand_over(random.randrange(6), random.randrange(1, 3))
        for _ in range(random.randrange(4)):
            world.advance()
            world.check_fresh()
        if random.random() < mishaps:
            disturb(cluster, random)
            world.check_fresh()
        if random.random() < 0.4:
            world.talk()
    cluster.teardown()


@pytest.mark.parametrize("block", range(8))
def test_many_histories(block):
    for seed in range(block * HISTORIES, (block + 1) * HISTORIES):
        try:
            one_history(seed)
        except AssertionError as error:
            raise AssertionError(f"history {seed}: {error}") from error
