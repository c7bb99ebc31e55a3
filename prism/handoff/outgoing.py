"""A handoff from this node to another: carries the source machine's commands out.

One :class:`Outgoing` lives from the decision to hand a connection over until the machine is done.
The commands run in the machine's order; most of them are one system call, and a switch that
answers inside the send lets the whole of lock, freeze, export and offer run in one turn of the
event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from time import monotonic_ns
from typing import Protocol

from prism._ext import tcp_repair
from prism._ext.tls_record import TlsError
from prism.errors import ProtocolError
from prism.handoff.channel import Answer, answer_event
from prism.handoff.machine import SWITCH_EVENTS, Command, Event, Source, SourceState
from prism.handoff.runner import Runner
from prism.handoff.wire import Offer, Refused
from prism.http.connection import Connection
from prism.switch.client import SwitchClient
from prism.switch.control import Message, Op, Status

__all__ = ["Outgoing", "Reporter", "Way"]

log = logging.getLogger(__name__)


class Way(Protocol):
    """What offers go by: a :class:`prism.handoff.channel.Link`, or the way to this very node."""

    def offer(self, offer: Offer, on_answer: Callable[[Answer], None], deadline: float) -> None:
        """As :meth:`prism.handoff.channel.Link.offer`."""


class Reporter(Protocol):
    """The node a handoff belongs to."""

    switch: SwitchClient
    deadline: float
    trace: bool

    def serve_here(self, connection: Connection, why: str) -> None:
        """The connection stays; answer its request some other way. ``why`` is counted."""

    def handed_over(self, handoff: Outgoing) -> None:
        """The connection is another node's now."""

    def taken_back(self, handoff: Outgoing) -> None:
        """No answer came in time, and the switch has given the connection back."""

    def reconcile(self, flow: bytes) -> None:
        """The rule's state is unknown: look after it when the switch answers again."""

    def finished(self, handoff: Outgoing) -> None:
        """The machine is done."""


class Outgoing(Runner[Source]):
    """One connection on its way to another node.

    Attributes:
        machine: for its state and the first event that led off the good path.
        steps: nanoseconds from the request's arrival to the end of each step, in order; only
            filled where the node traces.
    """

    __slots__ = (
        "_answer",
        "_cookie",
        "_gen",
        "_link",
        "_reporter",
        "_state",
        "_timer",
        "_tls",
        "connection",
        "steps",
        "target",
    )

    def __init__(
        self, reporter: Reporter, connection: Connection, link: Way, target: str, cookie: int
    ) -> None:
        super().__init__(Source())
        self.connection = connection
        self.target = target
        self.steps: dict[str, int] = {}
        self._reporter = reporter
        self._link = link
        self._cookie = cookie
        self._gen = connection.gen
        self._state = b""
        self._tls = b""
        self._answer: str = ""
        self._timer: asyncio.TimerHandle | None = None

    @property
    def gen(self) -> int:
        """The rule's generation, as far as the switch has told."""
        return self._gen

    @property
    def why(self) -> str:
        """Why the connection was not handed over, in words fit for a counter's label."""
        cause = self.machine.why
        return self._answer or (cause.name.lower().replace("_", "-") if cause else "other")

    def start(self) -> None:
        """Hand over, beginning with the lock."""
        self.connection.detach()
        self.post(Event.START_RULE if self.connection.gen else Event.START_NEW)

    def superseded(self, gen: int) -> None:
        """The connection is offered back under ``gen``: a later one proves that it was taken.

        The target's answer and a later offer of the same connection come by two connections, so
        they may come in either order.
        """
        waiting = (SourceState.OFFERED, SourceState.TAKING_BACK)
        if gen > self._gen and self.machine.state in waiting:
            self.post(Event.TAKEN)

    def execute(self, command: Command) -> None:
        """As :meth:`Runner.execute`."""
        _COMMANDS[command](self)

    def violation(self, error: ProtocolError) -> None:
        """As :meth:`Runner.violation`."""
        log.error("%s: %s", self.connection.flow, error)

    def _mark(self, step: str) -> None:
        if self._reporter.trace:
            self.steps[step] = monotonic_ns() - self.connection.asked_ns

    # -- the switch ------------------------------------------------------------------------

    def _submit(self, op: Op, locked: bool = False) -> None:
        self._reporter.switch.submit(
            op,
            self.connection.key,
            self._on_switch,
            gen=self._gen,
            cookie=self._cookie,
            locked=locked,
            endpoint=self.connection.local,
        )

    def _add(self) -> None:
        self._submit(Op.ADD, locked=True)

    def _lock(self) -> None:
        self._submit(Op.LOCK)

    def _chown(self) -> None:
        self._submit(Op.CHOWN)

    def _delete(self) -> None:
        self._submit(Op.DELETE)

    def _on_switch(self, reply: Message | None) -> None:
        if reply is None:
            self.post(Event.NO_ANSWER)
            return
        if reply.status == Status.OK:
            # What another owner has made of the rule is not ours to act on: only an OK tells
            # a generation to go on with.
            self._gen = reply.gen
        self._mark(reply.op.name.lower() if isinstance(reply.op, Op) else "switch")
        self.post(SWITCH_EVENTS[reply.status])

    def _arm_retry(self) -> None:
        loop = asyncio.get_running_loop()
        delay = self.machine.retry_delay
        self._timer = loop.call_later(delay, self.post, Event.RETRY_DUE)

    # -- the socket ------------------------------------------------------------------------

    def _freeze_export(self) -> None:
        try:
            self.connection.stream.widen()
            self._state = tcp_repair.export_state(self.connection.stream.fileno())
            self._tls = self.connection.stream.export_tls()
        except (OSError, TlsError) as error:
            log.info("%s cannot be exported: %s", self.connection.flow, error)
            self.post(Event.EXPORT_FAILED)
            return
        self._mark("export")
        self.post(Event.EXPORTED)

    def _resume(self) -> None:
        self._state = self._tls = b""
        try:
            tcp_repair.resume(self.connection.stream.fileno())
        except OSError as error:
            log.info("%s cannot be resumed: %s", self.connection.flow, error)

    def _serve_here(self) -> None:
        cause = self.machine.why
        if cause in (Event.TIMED_OUT, Event.LINK_LOST):
            self._reporter.taken_back(self)
        if self.connection.head is None:
            self.connection.stay()
            return
        self.connection.attach()
        self._reporter.serve_here(self.connection, self.why)

    def _close_quietly(self) -> None:
        self._state = b""
        tcp_repair.close_quietly(self.connection.stream.release())
        self.connection.moved()
        self._reporter.handed_over(self)

    def _abort(self) -> None:
        self._state = b""
        stream = self.connection.stream
        if stream.fileno() >= 0:
            try:
                tcp_repair.resume(stream.fileno())
            except OSError as error:
                log.debug("%s cannot be resumed: %s", self.connection.flow, error)
        self.connection.close(abort=True)

    # -- the other node --------------------------------------------------------------------

    def _send_offer(self) -> None:
        connection = self.connection
        offer = Offer(
            connection.key,
            self._gen,
            self._state,
            self._tls,
            connection.stream.pending,
            connection.hops,
            connection.asked_ns or monotonic_ns(),
            monotonic_ns(),
        )
        self._state = self._tls = b""
        self._link.offer(offer, self._on_answer, self._reporter.deadline)
        self._mark("offer")

    def _on_answer(self, answer: Answer) -> None:
        if self.machine.state is SourceState.GONE:
            return  # known by other means already
        if type(answer) is Refused:
            self._answer = f"refused-{answer.reason.name.lower().replace('_', '-')}"
            if answer.text:
                log.info("%s refuses %s: %s", self.target, self.connection.flow, answer.text)
        self._mark("answer")
        self.post(answer_event(answer))

    # -- the end ---------------------------------------------------------------------------

    def _reconcile(self) -> None:
        self._reporter.reconcile(self.connection.key)

    def _done(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._reporter.finished(self)


_COMMANDS: dict[Command, Callable[[Outgoing], None]] = {
    Command.SWITCH_ADD: Outgoing._add,
    Command.SWITCH_LOCK: Outgoing._lock,
    Command.SWITCH_CHOWN: Outgoing._chown,
    Command.SWITCH_DELETE: Outgoing._delete,
    Command.ARM_RETRY: Outgoing._arm_retry,
    Command.FREEZE_EXPORT: Outgoing._freeze_export,
    Command.SEND_OFFER: Outgoing._send_offer,
    Command.RESUME: Outgoing._resume,
    Command.SERVE_HERE: Outgoing._serve_here,
    Command.CLOSE_QUIETLY: Outgoing._close_quietly,
    Command.ABORT: Outgoing._abort,
    Command.RECONCILE: Outgoing._reconcile,
    Command.DONE: Outgoing._done,
}
