"""The switch's rule table in this process; sans-I/O.

It answers every operation of ``docs/protocol.md`` exactly as the kernel's classifier does (one
suite of tests runs against both) and is what a switch without a processor of its own, such as a P4
target, is driven from. Its order of checks, for every operation on a rule::

    replay -> dropped       node without lease -> DENIED    ADD, CHOWN for another -> DENIED
    no rule -> NOENT        another generation -> STALE     not the owner -> DENIED

A former owner has the wrong generation *and* is not the owner; it is told STALE, which means that
somebody else has committed.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

from prism.flow import Endpoint
from prism.switch.base import Change, Node, Rule
from prism.switch.control import (
    AGENT,
    Flags,
    Message,
    Op,
    ReplayWindow,
    Status,
    packed_address,
)

__all__ = ["Outcome", "RuleTable", "rule_message"]

_LOCKED: Final = int(Flags.LOCKED)
_REPLY: Final = int(Flags.REPLY)
_GEN_LIMIT: Final = 1 << 64
_V4_MAPPED: Final = packed_address("0.0.0.0")[:12]


class Outcome(NamedTuple):
    """The answer to a request, and what the request changed."""

    reply: Message
    change: Change | None = None


class _Node:
    __slots__ = ("endpoint", "lease_ms", "renewed_ns", "window")

    def __init__(self) -> None:
        self.endpoint = Endpoint("::", 0)
        self.lease_ms = 0
        self.renewed_ns = 0
        self.window = ReplayWindow()


class RuleTable:
    """Rules and leases, changed only by :meth:`handle` and by deleting.

    Attributes:
        incarnation: a number that no other table has; sent with every answer to HELLO.
        replays: datagrams dropped because their sequence number had been used.
    """

    def __init__(
        self,
        *,
        max_rules: int = 1_000_000,
        max_nodes: int = 4096,
        max_lease: float = 60.0,
        clock: Callable[[], int] = time.monotonic_ns,
        gen_clock: Callable[[], int] | None = None,
    ) -> None:
        """Make an empty table.

        Args:
            max_rules: more than these are FULL.
            max_nodes: more than these are FULL; nodes that left make room.
            max_lease: the longest lease granted, in seconds.
            clock: nanoseconds that never go back; generations and leases are taken from it.
            gen_clock: another clock for generations, such as one that several hosts have.
        """
        self.incarnation = secrets.randbits(64) or 1
        self.replays = 0
        self._rules: dict[bytes, Rule] = {}
        self._owners: dict[bytes, bytes] = {}  # owner and client -> flow
        self._nodes: dict[int, _Node] = {}
        self._max_rules = max_rules
        self._max_nodes = max_nodes
        self._max_lease_ms = round(max_lease * 1000)
        self._clock = clock
        self._gen_clock = gen_clock or clock
        self._last_gen = 0
        self._operations: dict[int, Callable[[Message, Rule | None], Outcome]] = {
            Op.ADD: self._add,
            Op.LOCK: self._lock,
            Op.CHOWN: self._chown,
            Op.UNLOCK: self._lock,
            Op.DELETE: self._delete,
            Op.GET: self._get,
        }

    def __len__(self) -> int:
        return len(self._rules)

    # RuleStore

    def rules(self) -> Iterable[Rule]:
        """All rules, as they stand now."""
        return list(self._rules.values())

    def get(self, flow: bytes) -> Rule | None:
        """The rule of a packed flow."""
        return self._rules.get(flow)

    def delete(self, flow: bytes, gen: int) -> bool:
        """Delete a rule if it still has this generation; whether it was deleted."""
        rule = self._rules.get(flow)
        if rule is None or rule.gen != gen:
            return False
        self._put(flow, None)
        return True

    def nodes(self) -> Sequence[Node]:
        """All nodes that said HELLO."""
        now = self._clock()
        return [
            Node(id, node.endpoint, node.lease_ms / 1000, (now - node.renewed_ns) / 1e9)
            for id, node in self._nodes.items()
        ]

    def restore(self, change: Change) -> None:
        """Take back a change that the data plane refused. It must be the flow's last one."""
        if self._rules.get(change.flow) == change.after:
            self._put(change.flow, change.before)

    def adopt(self, rules: Iterable[Rule], incarnation: int = 0) -> None:
        """Replace all rules by those that a data plane has; leases stay.

        Args:
            rules: what was read back.
            incarnation: of the table that they were made in; 0: unknown.
        """
        self._rules.clear()
        self._owners.clear()
        for rule in rules:
            self._put(rule.flow, rule)
            self._last_gen = max(self._last_gen, rule.gen)
        self.incarnation = incarnation or self.incarnation

    # Requests

    def admit(self, request: Message, source: Endpoint) -> Message | None:
        """Check who asks; the answer when that is all, ``None`` to go on.

        Sets the sequence number aside as used; call it once for each datagram.

        Raises:
            LookupError: a replay; it must not be answered.
        """
        node = self._nodes.get(request.node)
        if node is not None and not node.window.accept(request.seq):
            self.replays += 1
            raise LookupError("a sequence number used before")
        if request.op == Op.HELLO:
            return self._hello(request, source, node)
        if node is None or not node.lease_ms:
            return request.reply(Status.DENIED)
        return None

    def execute(self, request: Message) -> Outcome:
        """Carry out one admitted operation on a flow."""
        operation = self._operations.get(request.op)
        if operation is None:
            return Outcome(request.reply(Status.INVALID))
        return operation(request, self._rules.get(request.flow))

    def handle(self, request: Message, source: Endpoint) -> Outcome | None:
        """Admit and execute; ``None``: drop the datagram.

        Args:
            request: a message whose MAC was right.
            source: where it came from.
        """
        if request.is_reply:
            return None
        try:
            answer = self.admit(request, source)
        except LookupError:
            return None
        return self.execute(request) if answer is None else Outcome(answer)

    def _hello(self, request: Message, source: Endpoint, node: _Node | None) -> Message:
        if request.node == AGENT:
            return request.reply(Status.DENIED)
        lease_ms = min(request.cookie, self._max_lease_ms)
        if node is None and lease_ms:
            if len(self._nodes) >= self._max_nodes and not self._forget_a_node():
                return request.reply(Status.FULL)
            node = self._nodes[request.node] = _Node()
            node.window.accept(request.seq)
        if node is not None:
            node.endpoint = source
            node.renewed_ns = self._clock()
            node.lease_ms = lease_ms
        return request.reply(Status.OK, gen=lease_ms, cookie=self.incarnation)

    def _forget_a_node(self) -> bool:
        for id, node in self._nodes.items():
            if not node.lease_ms:
                del self._nodes[id]
                return True
        return False

    def end_lease(self, node: int) -> bool:
        """Take a node for dead: what it asks is ``DENIED`` until its next HELLO.

        Its sequence numbers stay used.

        Returns:
            ``False`` if the lease is running (renewed meanwhile), or the node is not known.
        """
        entry = self._nodes.get(node)
        if entry is None or self._clock() - entry.renewed_ns <= entry.lease_ms * 1_000_000:
            return False
        entry.lease_ms = 0
        return True

    # Operations

    def _add(self, request: Message, rule: Rule | None) -> Outcome:
        if request.owner != request.node:
            return self._outcome(request, Status.DENIED, None)
        if not _makes_sense(request):
            return self._outcome(request, Status.INVALID, None)
        if rule is not None:
            same = rule.owner == request.owner and rule.cookie == request.cookie
            return self._outcome(request, Status.OK if same else Status.EXISTS, rule)
        fresh = self._wanted(request, 0)
        if self._is_taken(fresh):
            return self._outcome(request, Status.EXISTS, None)
        if len(self._rules) >= self._max_rules:
            return self._outcome(request, Status.FULL, None)
        self._last_gen = max(self._gen_clock(), self._last_gen + 1)
        return self._changed(request, None, fresh._replace(gen=self._last_gen))

    def _lock(self, request: Message, rule: Rule | None) -> Outcome:
        if rule is None:
            return self._outcome(request, Status.NOENT, None)
        refusal = self._refusal(request, rule)
        if refusal is not None:
            return self._outcome(request, refusal, rule)
        locked = request.op == Op.LOCK
        if rule.locked == locked:
            return self._outcome(request, Status.OK, rule)
        return self._changed(request, rule, rule._replace(locked=locked))

    def _chown(self, request: Message, rule: Rule | None) -> Outcome:
        if request.owner != request.node:
            return self._outcome(request, Status.DENIED, None)
        if not _makes_sense(request):
            return self._outcome(request, Status.INVALID, None)
        if rule is None:
            return self._outcome(request, Status.NOENT, None)
        next_gen = (request.gen + 1) % _GEN_LIMIT
        if rule.gen == next_gen and rule.owner == request.node:
            return self._outcome(request, Status.OK, rule)  # a repetition
        if rule.gen != request.gen:
            return self._outcome(request, Status.STALE, rule)
        if not rule.locked and rule.owner != request.node:
            return self._outcome(request, Status.DENIED, rule)
        fresh = self._wanted(request, next_gen)._replace(cookie=rule.cookie)
        if self._is_taken(fresh):
            return self._outcome(request, Status.EXISTS, rule)
        return self._changed(request, rule, fresh)

    def _delete(self, request: Message, rule: Rule | None) -> Outcome:
        if rule is None:
            return self._outcome(request, Status.NOENT, None)
        refusal = self._refusal(request, rule)
        if refusal is not None:
            return self._outcome(request, refusal, rule)
        return self._changed(request, rule, None)

    def _get(self, request: Message, rule: Rule | None) -> Outcome:
        return self._outcome(request, Status.NOENT if rule is None else Status.OK, rule)

    @staticmethod
    def _refusal(request: Message, rule: Rule) -> Status | None:
        if rule.gen != request.gen:
            return Status.STALE
        return None if rule.owner == request.node else Status.DENIED

    @staticmethod
    def _wanted(request: Message, gen: int) -> Rule:
        return Rule(
            request.flow,
            request.owner,
            request.owner_endpoint,
            request.owner_mac,
            gen,
            request.locked,
            request.cookie,
        )

    # Both maps

    @staticmethod
    def _owner_key(rule: Rule) -> bytes | None:
        """Owner's and client's ends; ``None`` when the owner has the service address itself."""
        flow = rule.flow
        end = packed_address(rule.owner_endpoint.host) + rule.owner_endpoint.port.to_bytes(2, "big")
        if end == flow[16:32] + flow[34:36]:
            return None
        return end + flow[:16] + flow[32:34]

    def _is_taken(self, rule: Rule) -> bool:
        key = self._owner_key(rule)
        return key is not None and self._owners.get(key, rule.flow) != rule.flow

    def _put(self, flow: bytes, rule: Rule | None) -> None:
        old = self._rules.pop(flow, None)
        if old is not None:
            key = self._owner_key(old)
            if key is not None:
                del self._owners[key]
        if rule is not None:
            self._rules[flow] = rule
            key = self._owner_key(rule)
            if key is not None:
                self._owners[key] = flow

    def _changed(self, request: Message, before: Rule | None, after: Rule | None) -> Outcome:
        self._put(request.flow, after)
        reply = self._answer(request, Status.OK, after or before)
        return Outcome(reply, Change(request.flow, before, after))

    def _outcome(self, request: Message, status: Status, rule: Rule | None) -> Outcome:
        return Outcome(self._answer(request, status, rule))

    @staticmethod
    def _answer(request: Message, status: Status, rule: Rule | None) -> Message:
        if rule is None:
            return request.reply(status)
        return rule_message(request, rule, status)


def _makes_sense(request: Message) -> bool:
    """Whether the flow and the owner have ports, and addresses of one family."""
    flow, endpoint = request.flow, request.owner_endpoint
    is_v4 = flow.startswith(_V4_MAPPED)
    return (
        any(flow[32:34])
        and any(flow[34:36])
        and endpoint.port != 0
        and flow.startswith(_V4_MAPPED, 16) == is_v4
        and (":" not in endpoint.host) == is_v4
    )


def rule_message(request: Message, rule: Rule, status: Status = Status.OK) -> Message:
    """A reply that tells a rule as it stands."""
    return Message(
        request.op,
        request.node,
        request.seq,
        status,
        _REPLY | _LOCKED if rule.locked else _REPLY,
        rule.flow,
        rule.owner,
        rule.owner_endpoint,
        rule.owner_mac,
        rule.gen,
        rule.cookie,
    )
