"""A cluster in miniature: three nodes with real machines, the real rule table, a bad network.

One client has one connection. ``version`` stands for everything TCP knows about it: each exchange
between the client and whoever its packets reach makes the client's version and that node's copy's
one greater, so a copy that missed an exchange is recognisably stale.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

from prism.errors import ProtocolError
from prism.flow import Endpoint, Flow
from prism.handoff.machine import SWITCH_EVENTS, Command, Event, Machine, Source, Target
from prism.handoff.runner import Runner
from prism.switch.control import Flags, Message, Op, Status, node_id
from prism.switch.table import RuleTable

SERVICE = Endpoint("10.0.0.1", 80)
FLOW = Flow(Endpoint("10.9.9.9", 40000), SERVICE).pack()
_COOKIES = count(1)


class HastySource(Source):
    """Gives up soon, so that random histories get there."""

    __slots__ = ()
    ATTEMPTS = 2


class HastyTarget(Target):
    """Gives up soon, but not as soon as the source."""

    __slots__ = ()
    ATTEMPTS = 3


class Copy:
    """What one node holds of the connection."""

    def __init__(self, node: Node, version: int, state: str, gen: int, port: int) -> None:
        self.node, self.version, self.state = node, version, state
        self.gen, self.port = gen, port
        self.runner: Runner | None = None

    def drop(self) -> None:
        if self in self.node.copies:
            self.node.copies.remove(self)


class Pending:
    """One operation that a node waits for."""

    def __init__(self, request: Message, callback: Callable[[Message | None], None]) -> None:
        self.request, self.callback = request, callback


class Node:
    """A process: its copies, its switch client, its handoffs."""

    def __init__(self, world: World, name: str, endpoint: Endpoint) -> None:
        self.world, self.name, self.endpoint = world, name, endpoint
        self.id = node_id(name)
        self.alive = True
        self.seq = 1
        self.copies: list[Copy] = []
        self.pending: list[Pending] = []
        self.timers: list[Callable[[], None]] = []
        self.unsure = False
        world.table.handle(Message(Op.HELLO, self.id, self.seq, cookie=60_000), endpoint)

    def submit(
        self,
        op: Op,
        callback: Callable[[Message | None], None],
        *,
        gen: int = 0,
        port: int = 0,
        cookie: int = 0,
        locked: bool = False,
    ) -> None:
        endpoint = Endpoint(self.endpoint.host, port or self.endpoint.port)
        flags = int(Flags.LOCKED) if locked else 0
        owner = self.id if op in (Op.ADD, Op.CHOWN) else 0
        self.pending.append(
            Pending(
                Message(op, self.id, 0, 0, flags, FLOW, owner, endpoint, bytes(6), gen, cookie),
                callback,
            )
        )
        self.transmit(self.pending[-1])

    def transmit(self, pending: Pending) -> None:
        self.seq += 1
        pending.request = pending.request._replace(seq=self.seq)
        self.world.datagrams.append((self, pending, pending.request))

    def give_up(self, pending: Pending) -> None:
        self.pending.remove(pending)
        pending.callback(None)

    def doubt(self, unsure: bool) -> None:
        self.unsure = self.unsure or unsure

    def crash(self) -> None:
        """The kernel closes its sockets; what is not frozen says so, if the switch lets it."""
        for copy in self.copies:
            if copy.state == "active" and self.world.reached() is self:
                self.world.closed = True
        self.alive = False
        self.copies.clear()
        self.pending.clear()
        self.timers.clear()
        self.world.break_links(self)


class World:
    """Everything, and the ways in which it goes wrong."""

    def __init__(self, *, in_order: bool = True) -> None:
        self.clock = 1
        self.table = RuleTable(clock=self._tick)
        self.in_order = in_order
        self.newest: dict[str, int] = {}
        self.datagrams: list[tuple[Node, Pending, Message]] = []
        self.replies: list[tuple[Node, Pending, Message]] = []
        self.links: list[list] = []  # [source node, target node, outgoing, queue, alive]
        self.version = 0
        self.closed = False
        self.finished = False
        self.failing: set[str] = set()
        self.violations: list[str] = []
        self.handoffs: list[Outgoing | Incoming] = []
        self.nodes = [
            Node(self, "fe1/0", SERVICE),
            Node(self, "be1/0", Endpoint("10.0.0.2", 80)),
            Node(self, "be2/0", Endpoint("10.0.0.3", 80)),
        ]
        self.nodes[0].copies.append(Copy(self.nodes[0], 0, "active", 0, 80))

    def _tick(self) -> int:
        self.clock += 1000
        return self.clock

    # What the data plane does with a packet of the client.

    def reached(self) -> Node | None:
        """The node that the client's packets reach, and whose packets reach the client."""
        rule = self.table.get(FLOW)
        if rule is None:
            return self.nodes[0]
        if rule.locked:
            return None
        return next(node for node in self.nodes if node.id == rule.owner)

    def copy_at(self, node: Node) -> Copy | None:
        rule = self.table.get(FLOW)
        port = SERVICE.port if rule is None else rule.owner_endpoint.port
        return next((copy for copy in node.copies if copy.port == port), None)

    def talk(self) -> None:
        """One exchange between the client and whoever its packets reach."""
        node = self.reached()
        if self.closed or node is None or not node.alive:
            return
        copy = self.copy_at(node)
        if copy is None:
            self.closed = True  # the kernel resets what it does not know
            return
        self.check_fresh()
        self.version += 1
        copy.version = self.version

    def check_fresh(self) -> None:
        """Whoever can reach the client knows all that the client knows."""
        node = self.reached()
        if node is None or (self.closed and not self.finished):
            return
        for copy in node.copies:
            fits = copy is self.copy_at(node)
            if fits and copy.state == "active" and copy.version != self.version:
                raise AssertionError(f"{node.name} speaks from a stale copy")

    def finish(self, copy: Copy) -> None:
        """The owner ends the connection in good order and withdraws its rule."""
        self.closed = self.finished = True
        self.version += 1
        copy.drop()
        if copy.gen:
            node = copy.node
            node.submit(Op.DELETE, lambda reply: node.doubt(reply is None), gen=copy.gen)

    def fails(self, what: str) -> bool:
        """Whether this step fails; it does once."""
        failing = what in self.failing
        self.failing.discard(what)
        return failing

    # The network.

    def deliver(self, index: int) -> None:
        """One datagram reaches the switch; with ``in_order``, older ones of the node are dead."""
        node, pending, request = self.datagrams.pop(index)
        if self.in_order and request.seq <= self.newest.get(node.name, 0):
            return
        self.newest[node.name] = max(request.seq, self.newest.get(node.name, 0))
        outcome = self.table.handle(request, node.endpoint)
        if outcome is not None:
            self.replies.append((node, pending, outcome.reply))

    def answer(self, index: int) -> None:
        node, pending, reply = self.replies.pop(index)
        if pending in node.pending and reply.seq == pending.request.seq:
            node.pending.remove(pending)
            pending.callback(reply)

    def lose(self, pending: Pending) -> None:
        """All that is under way for one operation is lost."""
        self.datagrams = [entry for entry in self.datagrams if entry[1] is not pending]
        self.replies = [entry for entry in self.replies if entry[1] is not pending]

    def outage(self, heard: bool) -> None:
        """Nobody hears the switch, which may have heard them; they give up, and try again."""
        while heard and self.datagrams:
            self.deliver(0)
        self.datagrams.clear()
        self.replies.clear()
        for node in self.nodes:
            for pending in list(node.pending):
                node.give_up(pending)
        for node in self.nodes:
            timers, node.timers = node.timers, []
            for timer in timers:
                timer()

    def break_links(self, node: Node) -> None:
        for link in [link for link in self.links if node in link[:2]]:
            self.break_link(link)

    def break_link(self, link: list) -> None:
        if link in self.links:
            self.links.remove(link)
            if link[0].alive:
                link[2].lost()

    # Calm.

    def settle(self) -> None:
        """The network works, timers fire, the dead lose their leases, the unsure look."""
        self.failing.clear()
        for _ in range(400):
            if not self._step():
                break
        else:
            raise AssertionError("the cluster does not come to rest")
        rule = self.table.get(FLOW)
        if rule is not None:
            owner = next(node for node in self.nodes if node.id == rule.owner)
            assert self.copy_at(owner), f"{owner.name} owns a rule and has no connection"
        self.talk()

    def advance(self) -> bool:
        """What the network does next by itself; whether there was anything to do."""
        if self.datagrams:
            self.deliver(0)
        elif self.replies:
            self.answer(0)
        elif any(link[3] for link in self.links):
            next(link for link in self.links if link[3])[3].pop(0)()
        else:
            return False
        return True

    def _step(self) -> bool:
        if self.advance():
            return True
        if any(node.pending for node in self.nodes):
            for node in self.nodes:
                for pending in node.pending:
                    node.transmit(pending)
        elif any(node.timers for node in self.nodes):
            next(node for node in self.nodes if node.timers).timers.pop(0)()
        elif waiting := [handoff for handoff in self.handoffs if handoff.times_out()]:
            waiting[0].timed_out()
        else:
            return self.expire() or self._reconcile()
        return True

    def expire(self) -> bool:
        """The lease of a dead owner ends."""
        rule = self.table.get(FLOW)
        owner = rule and next(node for node in self.nodes if node.id == rule.owner)
        if rule is None or owner.alive:
            return False
        self.table.end_lease(owner.id)
        self.table.delete(FLOW, rule.gen)
        return True

    def _reconcile(self) -> bool:
        """Rule 7 of the machine."""
        node = next((node for node in self.nodes if node.alive and node.unsure), None)
        if node is None:
            return False
        node.unsure = False
        rule = self.table.get(FLOW)
        running = [copy for copy in node.copies if copy.runner is not None]
        if rule is None or running:
            return True
        if rule.owner == node.id:
            op = Op.CHOWN if node.copies else Op.DELETE
            node.submit(op, lambda reply: None, gen=rule.gen, port=rule.owner_endpoint.port)
        else:
            node.copies.clear()
        return True

    def check_at_rest(self) -> None:
        """One live owner, or cleanly closed; nothing frozen, nothing half done."""
        for handoff in self.handoffs:
            node = handoff.node
            assert handoff.runner.machine.done or not node.alive, handoff.runner.machine.state
        copies = [copy for node in self.nodes for copy in node.copies]
        assert all(copy.state == "active" for copy in copies), [copy.state for copy in copies]
        assert not self.violations, self.violations
        node = self.reached()
        assert node is not None, "the flow stays locked"
        if not self.closed and node.alive:
            assert len(copies) == 1, f"{len(copies)} copies"
            assert copies[0].node is node
            assert copies[0].version == self.version


class _Handoff(Runner[Machine]):
    def __init__(self, world: World, node: Node, machine: Machine, copy: Copy | None) -> None:
        super().__init__(machine)
        self.world, self.node, self.copy = world, node, copy
        self.gen = 0
        self.cookie = next(_COOKIES)
        self.runner = self
        world.handoffs.append(self)

    def violation(self, error: ProtocolError) -> None:
        self.world.violations.append(str(error))

    def times_out(self) -> bool:
        return False

    def execute(self, command: Command) -> None:
        getattr(self, command.name.lower())()

    def post(self, event: Event) -> None:
        if self.node.alive:
            super().post(event)

    def submit(self, op: Op, **fields: int) -> None:
        port = self.copy.port if self.copy else 0
        self.node.submit(op, self.switched, gen=self.gen, port=port, cookie=self.cookie, **fields)

    def switched(self, reply: Message | None) -> None:
        if reply is not None and reply.status == Status.OK:
            self.gen = reply.gen
            if self.copy is not None:
                self.copy.gen = reply.gen
        self.post(Event.NO_ANSWER if reply is None else SWITCH_EVENTS[reply.status])

    def switch_chown(self) -> None:
        self.submit(Op.CHOWN)

    def switch_delete(self) -> None:
        self.submit(Op.DELETE)

    def arm_retry(self) -> None:
        self.node.timers.append(lambda: self.post(Event.RETRY_DUE))

    def reconcile(self) -> None:
        self.node.unsure = True


class Outgoing(_Handoff):
    def __init__(self, world: World, copy: Copy, target: Node) -> None:
        super().__init__(world, copy.node, HastySource(), copy)
        self.target, self.gen = target, copy.gen
        self.offered = self.late = False
        copy.runner = self.runner
        self.runner.post(Event.START_RULE if copy.gen else Event.START_NEW)

    def times_out(self) -> bool:
        return self.offered and self.node.alive

    def timed_out(self) -> None:
        self.offered, self.late = False, True
        self.post(Event.TIMED_OUT)

    def lost(self) -> None:
        if self.offered:
            self.offered = False
            self.post(Event.LINK_LOST)

    def answered(self, event: Event) -> None:
        if self.offered or self.late:
            self.offered = self.late = False
            self.post(event)

    def switch_add(self) -> None:
        self.submit(Op.ADD, locked=True)

    def switch_lock(self) -> None:
        self.submit(Op.LOCK)

    def freeze_export(self) -> None:
        self.copy.state = "frozen"
        if self.world.fails("export"):
            self.post(Event.EXPORT_FAILED)
        else:
            self.exported = self.copy.version
            self.post(Event.EXPORTED)

    def send_offer(self) -> None:
        if not self.target.alive:
            self.post(Event.REFUSED)
            return
        self.offered = True
        link = [self.node, self.target, self, [], True]
        version, gen = self.exported, self.gen
        link[3].append(lambda: Incoming(self.world, self.target, link, version, gen))
        self.world.links.append(link)

    def resume(self) -> None:
        self.copy.state = "active"

    def serve_here(self) -> None:
        assert self.copy.state == "active"

    def close_quietly(self) -> None:
        self.copy.drop()

    def abort(self) -> None:
        if self.world.reached() is self.node and self.world.copy_at(self.node) is self.copy:
            self.world.closed = True
        self.copy.drop()

    def done(self) -> None:
        self.copy.runner = None
        state = self.runner.machine.state.name
        if state == "KEPT" and self.node is not self.world.nodes[0]:
            # A backend whose rule is gone adds it again; if it cannot, somebody else has the flow.
            self.copy.gen = 0
            self.submit(Op.ADD)
        elif state == "KEPT":
            self.copy.gen = 0

    def switched(self, reply: Message | None) -> None:
        if self.runner.machine.done and self.copy in self.node.copies and not self.copy.gen:
            if reply is None:
                self.node.unsure = True
            elif reply.status == Status.OK:
                self.copy.gen = reply.gen
            else:
                self.copy.drop()
            return
        super().switched(reply)


class Incoming(_Handoff):
    def __init__(self, world: World, node: Node, link: list, version: int, gen: int) -> None:
        super().__init__(world, node, HastyTarget(), None)
        self.link, self.version, self.gen, self.port = link, version, gen, 80
        self.runner.post(Event.OFFER)

    def import_(self) -> None:
        if self.world.fails("import"):
            self.post(Event.IMPORT_FAILED)
            return
        while any(copy.port == self.port for copy in self.node.copies):
            self.port += 1
        self.copy = Copy(self.node, self.version, "imported", self.gen, self.port)
        self.copy.runner = self.runner
        self.node.copies.append(self.copy)
        self.post(Event.IMPORTED)

    def import_elsewhere(self) -> None:
        self.discard()
        self.port += 1
        self.import_()

    def execute(self, command: Command) -> None:
        if command is Command.IMPORT:
            self.import_()
        else:
            super().execute(command)

    def activate(self) -> None:
        if self.world.fails("activate"):
            self.copy.drop()
            self.post(Event.ACTIVATE_FAILED)
        else:
            self.copy.state = "active"
            self.post(Event.ACTIVATED)

    def discard(self) -> None:
        self.copy.drop()

    def serve(self) -> None:
        self.copy.runner = None

    def done(self) -> None:
        pass

    def _send(self, event: Event) -> None:
        if self.link in self.world.links:
            self.link[3].append(lambda: self.link[2].answered(event))

    def send_taken(self) -> None:
        self._send(Event.TAKEN)

    def send_refused(self) -> None:
        self._send(Event.REFUSED)

    def send_dropped(self) -> None:
        self._send(Event.DROPPED)
