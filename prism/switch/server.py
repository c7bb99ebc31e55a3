"""The control protocol over UDP, with the rule table in this process.

For switches whose data plane cannot answer by itself: a driver (:class:`DataPlane`) is programmed
*before* an answer is sent, so ``OK`` means that the packets already go the new way. Changes that
arrive while the driver is busy go to it together.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from prism.errors import ProtocolError, SwitchError
from prism.flow import Endpoint
from prism.switch.base import Change, DataPlane, Rule
from prism.switch.control import AGENT, KEY_SIZE, Message, Op, Status, decode, encode, has_form
from prism.switch.listing import Lister
from prism.switch.table import Outcome, RuleTable, rule_message

__all__ = ["ServerCounters", "SwitchServer"]

_log = logging.getLogger(__name__)
_Address = tuple[Any, ...]
_MAX_WAITING: Final = 65536  # requests that wait for the driver
_REAPED: Final = 1  # in place of a node: the rule goes with its owner's lease
_MAX_BATCH: Final = 256  # changes in one call of the driver


@dataclass(slots=True)
class ServerCounters:
    """What a server has seen since it was made; names are the eBPF switch's where it has them."""

    requests: int = 0
    refused: int = 0
    bad_format: int = 0
    bad_mac: int = 0
    replay: int = 0
    overflows: int = 0
    driver_errors: int = 0
    expired_nodes: int = 0
    expired_rules: int = 0


class SwitchServer(asyncio.DatagramProtocol):
    """Answers control datagrams over a :class:`RuleTable`.

    Attributes:
        table: the rules and leases.
        counters: what has happened so far.
        endpoint: where it listens, once started.
        suspended: whether all but HELLO is dropped, for the data plane cannot be reached.
        strangers_die_at: when (loop time) rules of owners that never said HELLO are deleted.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        key: bytes,
        *,
        table: RuleTable | None = None,
        driver: DataPlane | None = None,
        sweep: float = 0.25,
        on_reply: Callable[[Message], object] | None = None,
        on_expired: Callable[[bytes], object] | None = None,
    ) -> None:
        """Prepare a server.

        Args:
            endpoint: the control address; port 0 takes any.
            key: the cluster key, 16 octets.
            table: a table to serve, by default a new one.
            driver: the switch to program; without one the table is all there is.
            sweep: seconds between two looks for nodes whose lease ran out.
            on_reply: takes the nodes' answers to QUERY.
            on_expired: told the packed flow of every rule deleted with its owner's lease.

        Raises:
            ValueError: the key has not 16 octets.
        """
        if len(key) != KEY_SIZE:
            raise ValueError(f"a cluster key has {KEY_SIZE} octets, not {len(key)}")
        self.table = RuleTable() if table is None else table
        self.counters = ServerCounters()
        self.endpoint = endpoint
        self.suspended = False
        self._key = key
        self._driver = driver
        self._sweep = sweep
        self._lister = Lister(self.table)
        self._on_reply = on_reply
        self._on_expired = on_expired
        self._then: dict[bytes, Callable[[], object]] = {}  # what waits for a rule's end
        self.strangers_die_at = math.inf
        self._busy: dict[bytes, deque[tuple[Message, _Address]]] = {}  # flow -> what waits for it
        self._waiting = 0
        self._queue: deque[tuple[Outcome, _Address | None]] = deque()
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._transport: asyncio.DatagramTransport | None = None

    async def start(self) -> None:
        """Begin to listen.

        Raises:
            SwitchError: the address cannot be used.
        """
        loop = asyncio.get_running_loop()
        try:
            transport, _ = await loop.create_datagram_endpoint(
                lambda: self, local_addr=(self.endpoint.host, self.endpoint.port)
            )
        except OSError as error:
            raise SwitchError(f"cannot listen on {self.endpoint}: {error}") from error
        self._transport = transport
        self.endpoint = Endpoint.from_sockaddr(transport.get_extra_info("sockname"))
        self._tasks.append(asyncio.create_task(self._sweep_leases()))
        if self._driver is not None:
            self._tasks.append(asyncio.create_task(self._drive(self._driver)))

    async def close(self) -> None:
        """Stop listening; the data plane keeps its rules. Idempotent."""
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._tasks.clear()
        if self._transport is not None:
            self._transport.close()
            self._transport = None
            await asyncio.sleep(0)  # the loop closes the socket at its next turn

    # Datagrams

    def datagram_received(self, data: bytes, addr: _Address) -> None:
        """Answer one datagram, or set it aside until the driver is ready for it."""
        try:
            request = decode(data, self._key)
        except ProtocolError:
            if has_form(data):
                self.counters.bad_mac += 1
            else:
                self.counters.bad_format += 1
            return
        if request.is_reply:
            if request.op == Op.QUERY and self._on_reply is not None:
                self._on_reply(request)
            else:
                self.counters.bad_format += 1
            return
        if self.suspended and request.op != Op.HELLO:
            self.counters.overflows += 1
            return
        try:
            answer = self.table.admit(request, Endpoint.from_sockaddr(addr))
        except LookupError:
            self.counters.replay += 1
            return
        self.counters.requests += 1
        if answer is not None:
            self._send([answer], addr)
        elif request.op == Op.LIST:
            self._send(self._lister.answer(request), addr)
        else:
            self._execute(request, addr)

    def error_received(self, exc: Exception) -> None:
        """ICMP errors about answers: the asker repeats itself if it is still there."""

    def _execute(self, request: Message, addr: _Address) -> None:
        waiting = self._busy.get(request.flow)
        if waiting is not None:  # its answer depends on a change that is still under way
            if self._waiting >= _MAX_WAITING:
                self.counters.overflows += 1
                return
            self._waiting += 1
            waiting.append((request, addr))
            return
        if len(self._queue) >= _MAX_WAITING:
            self.counters.overflows += 1
            return
        outcome = self.table.execute(request)
        if outcome.change is None or self._driver is None:
            self._send([outcome.reply], addr)
        else:
            self._enqueue(outcome, addr)

    def _send(self, messages: Sequence[Message], addr: _Address) -> None:
        if messages[0].status not in (Status.OK, Status.NOENT):
            self.counters.refused += 1
        if self._transport is not None:
            self._transport.sendto(b"".join(encode(m, self._key) for m in messages), addr)

    # The driver

    def _enqueue(self, outcome: Outcome, addr: _Address | None) -> None:
        self._busy[outcome.reply.flow] = deque()
        self._queue.append((outcome, addr))
        self._wake.set()

    async def _drive(self, driver: DataPlane) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queue:
                batch = [self._queue.popleft() for _ in range(min(_MAX_BATCH, len(self._queue)))]
                changes = [outcome.change for outcome, _ in batch if outcome.change is not None]
                for (outcome, addr), status in zip(
                    batch, await self._apply(driver, changes), strict=True
                ):
                    self._settle(outcome, addr, status)

    async def _apply(self, driver: DataPlane, changes: Sequence[Change]) -> Sequence[Status | None]:
        """What became of each change; ``None``: the driver could not be asked."""
        try:
            return await driver.apply(changes)
        except SwitchError as error:
            self.counters.driver_errors += 1
            _log.warning("the data plane took none of %d changes: %s", len(changes), error)
            return [None] * len(changes)

    def _settle(self, outcome: Outcome, addr: _Address | None, status: Status | None) -> None:
        change, reply = outcome.change, outcome.reply
        if status != Status.OK and change is not None:
            self.counters.driver_errors += status is not None
            self.table.restore(change)
            before, refusal = change.before, status or Status.FULL
            reply = reply.reply(refusal) if before is None else rule_message(reply, before, refusal)
        elif addr is None and self._on_expired is not None and reply.node == _REAPED:
            self._on_expired(reply.flow)
        then = self._then.pop(reply.flow, None)
        if then is not None:
            then()
        if addr is not None and status is not None:  # else: let the node ask again
            self._send([reply], addr)
        waiting = self._busy.pop(reply.flow, deque())
        while waiting:
            request, sender = waiting.popleft()
            self._waiting -= 1
            self._execute(request, sender)
            later = self._busy.get(reply.flow)
            if later is not None:  # that one is under way now; the others wait behind it
                later.extend(waiting)
                return

    # Leases

    async def _sweep_leases(self) -> None:
        ended: set[int] = set()  # nodes without lease whose rules are gone
        while True:
            await asyncio.sleep(self._sweep)
            nodes = self.table.nodes()
            for node in nodes:
                if node.lease > 0 and not node.alive and self.table.end_lease(node.id):
                    self.counters.expired_nodes += 1
            dead = {node.id for node in nodes if not node.alive}
            if asyncio.get_running_loop().time() >= self.strangers_die_at:
                self.strangers_die_at = math.inf
                known = {node.id for node in nodes}
                dead |= {rule.owner for rule in self.table.rules()} - known
            ended &= dead
            if dead - ended:
                ended = dead - self._drop_rules(dead - ended)

    def _drop_rules(self, dead: set[int]) -> set[int]:
        """Delete the rules of these nodes; those that still have some, which are busy."""
        busy: set[int] = set()
        for rule in self.table.rules():
            if rule.owner not in dead:
                continue
            if rule.flow in self._busy:
                busy.add(rule.owner)
            elif self._remove(rule, _REAPED):
                self.counters.expired_rules += 1
        return busy

    def _remove(self, rule: Rule, why: int) -> bool:
        if self.suspended or not self.table.delete(rule.flow, rule.gen):
            return False
        if self._driver is not None:
            change = Change(rule.flow, rule, None)
            self._enqueue(Outcome(Message(Op.DELETE, why, 0, flow=rule.flow), change), None)
        elif why == _REAPED and self._on_expired is not None:
            self._on_expired(rule.flow)
        return True

    def discard(self, flow: bytes, gen: int) -> bool:
        """Delete a rule for the switch's own reasons, if it has this generation and is idle."""
        rule = self.table.get(flow)
        idle = rule is not None and rule.gen == gen and flow not in self._busy
        return idle and rule is not None and self._remove(rule, AGENT)

    def when_idle(self, flow: bytes, then: Callable[[], object]) -> None:
        """Call once no change of a flow is under way: at once, as a rule."""
        if flow in self._busy:
            self._then[flow] = then
        else:
            then()

    def send(self, message: Message, endpoint: Endpoint) -> None:
        """Send one message to a node; lost ones are not told."""
        if self._transport is not None:
            self._transport.sendto(encode(message, self._key), (endpoint.host, endpoint.port))
