"""A handoff from another node to this one: carries the target machine's commands out.

Where the switch answers inside the send, everything from the offer's last octet to the response's
first happens in one turn of the event loop: import, ``CHOWN``, leave repair mode, serve.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from time import monotonic_ns
from typing import Any, Protocol

from prism._ext import tcp_repair
from prism._ext.tls_record import Tls
from prism.errors import ProtocolError
from prism.flow import Endpoint, Flow
from prism.handoff.channel import Taken
from prism.handoff.machine import SWITCH_EVENTS, Command, Event, Target
from prism.handoff.runner import Runner
from prism.handoff.wire import Offer, Reason, Refused
from prism.http.stream import PlainStream
from prism.switch.client import SwitchClient
from prism.switch.control import Message, Op, Status
from prism.tls.offload import Mode, stream
from prism.tls.stream import TlsStream

__all__ = ["Incoming", "Replier", "Taker"]

log = logging.getLogger(__name__)


class Replier(Protocol):
    """Answers the offer, once; a :class:`prism.handoff.channel.Reply` or the like."""

    @property
    def peer(self) -> str:
        """The node that offers."""

    def __call__(self, answer: Taken | Refused) -> None:
        """Give the answer."""


class Taker(Protocol):
    """The node that takes connections over."""

    switch: SwitchClient
    trace: bool
    offload: Mode

    def import_endpoint(self, flow: Flow) -> Endpoint | None:
        """The own address and first port for a flow; ``None``: not of this address family."""

    def taken_over(self, handoff: Incoming, stream: PlainStream) -> None:
        """The connection is this node's; serve it."""

    def reconcile(self, flow: bytes) -> None:
        """The rule's state is unknown: look after it when the switch answers again."""

    def settled(self, handoff: Incoming) -> None:
        """The machine is done."""


class Incoming(Runner[Target]):
    """One connection on its way here.

    Attributes:
        offer: what was offered.
        flow: the connection as the client sees it.
        local: the imported socket's own address and port.
        gen: the rule's generation: the lock's, after the commit this node's.
        tls: what :meth:`TlsStream.parse_tls` gave; ``None`` without TLS.
        steps: nanoseconds from the request's arrival at the source (same host) to the end of
            each step, in order; only filled where the node traces.
    """

    __slots__ = (
        "_imported",
        "_next_port",
        "_reply",
        "_sock",
        "_taker",
        "_text",
        "_timer",
        "flow",
        "gen",
        "local",
        "offer",
        "peer",
        "steps",
        "tls",
    )

    def __init__(self, taker: Taker, offer: Offer, reply: Replier) -> None:
        """Prepare.

        Raises:
            ProtocolError: the offer's flow is none.
        """
        super().__init__(Target())
        self.offer = offer
        self.flow = Flow.unpack(offer.flow)
        self.gen = offer.gen
        self.local = Endpoint("", 0)
        self.peer = reply.peer
        self.steps: dict[str, int] = {}
        self._taker = taker
        self.tls: tuple[Tls, int, bytes] | None = None
        self._reply = reply
        self._text = ""
        self._next_port = 0
        self._imported: tcp_repair.Imported | None = None
        self._sock: socket.socket | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Take it over, if all goes well."""
        self._mark("received")
        self.post(Event.OFFER)

    def execute(self, command: Command) -> None:
        """As :meth:`Runner.execute`."""
        _COMMANDS[command](self)

    def violation(self, error: ProtocolError) -> None:
        """As :meth:`Runner.violation`."""
        log.error("%s: %s", self.flow, error)

    def _mark(self, step: str) -> None:
        if self._taker.trace:
            self.steps[step] = monotonic_ns() - self.offer.arrived_ns

    # -- the socket ------------------------------------------------------------------------

    def _import(self) -> None:
        endpoint = self._taker.import_endpoint(self.flow)
        if endpoint is None:
            self._fail(f"this node has no address of the family of {self.flow.service}")
            return
        self._build(endpoint.host, self._next_port or endpoint.port)

    def _import_elsewhere(self) -> None:
        # The switch knows another flow of this client at that address and port.
        self._discard()
        self._next_port = self.local.port + 1
        self._import()

    def _build(self, host: str, port: int) -> None:
        try:
            if self.offer.tls and self.tls is None:
                self.tls = TlsStream.parse_tls(self.offer.tls)
            self._imported = tcp_repair.import_state(self.offer.tcp, host, port)
        except (OSError, ValueError, ProtocolError) as error:
            self._fail(str(error))
            return
        if self._imported.peer != self.flow.client:
            self._discard()
            self._fail("the offer's state is of another client than its flow")
            return
        self.local = Endpoint(*self._imported.local)
        self._mark("import")
        self.post(Event.IMPORTED)

    def _fail(self, text: str) -> None:
        self._text = text
        log.info("%s cannot be taken over: %s", self.flow, text)
        self.post(Event.IMPORT_FAILED)

    def _activate(self) -> None:
        imported, self._imported = self._imported, None
        if imported is None:
            raise RuntimeError("nothing was imported")
        try:
            fd = imported.activate()
        except OSError as error:
            log.warning("%s was taken over and lost: %s", self.flow, error)
            self._text = str(error)
            self.post(Event.ACTIVATE_FAILED)
            return
        # With all that is known about it, or Python would ask the kernel again.
        family = self.local.family
        self._sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, fd)
        self._mark("activate")
        self.post(Event.ACTIVATED)

    def _serve(self) -> None:
        sock, self._sock = self._sock, None
        if sock is None:
            raise RuntimeError("nothing was activated")
        self._taker.taken_over(self, self._stream_of(sock))

    def _stream_of(self, sock: socket.socket) -> PlainStream:
        if self.tls is None:
            return PlainStream(sock, self.flow, self.offer.pending)
        tls, skip, facts = self.tls
        pending = self.offer.pending
        return stream(self._taker.offload, sock, tls, self.flow, pending, skip=skip, facts=facts)

    def _discard(self) -> None:
        imported, self._imported = self._imported, None
        if imported is not None:
            imported.discard()

    # -- the switch ------------------------------------------------------------------------

    def _submit(self, op: Op) -> None:
        self._taker.switch.submit(
            op, self.offer.flow, self._on_switch, gen=self.gen, endpoint=self.local
        )

    def _chown(self) -> None:
        self._submit(Op.CHOWN)

    def _delete(self) -> None:
        self._submit(Op.DELETE)

    def _on_switch(self, reply: Message | None) -> None:
        if reply is None:
            self.post(Event.NO_ANSWER)
            return
        if reply.status == Status.OK:
            self.gen = reply.gen
        else:
            self._text = f"the switch answers {Status(reply.status).name}"
        self._mark("chown")
        self.post(SWITCH_EVENTS[reply.status])

    def _arm_retry(self) -> None:
        loop = asyncio.get_running_loop()
        delay = self.machine.retry_delay
        self._timer = loop.call_later(delay, self.post, Event.RETRY_DUE)

    # -- the other node --------------------------------------------------------------------

    def _send_taken(self) -> None:
        self._reply(Taken())

    def _send_refused(self) -> None:
        cause = self.machine.why
        reason = Reason.IMPORT_FAILED if cause is Event.IMPORT_FAILED else Reason.SWITCH
        self._reply(Refused(reason, self._text))

    def _send_dropped(self) -> None:
        self._reply(Refused(Reason.DROPPED, self._text))

    # -- the end ---------------------------------------------------------------------------

    def _reconcile(self) -> None:
        self._taker.reconcile(self.offer.flow)

    def _done(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._taker.settled(self)


_COMMANDS: dict[Command, Callable[[Incoming], Any]] = {
    Command.IMPORT: Incoming._import,
    Command.IMPORT_ELSEWHERE: Incoming._import_elsewhere,
    Command.SWITCH_CHOWN: Incoming._chown,
    Command.SWITCH_DELETE: Incoming._delete,
    Command.ARM_RETRY: Incoming._arm_retry,
    Command.ACTIVATE: Incoming._activate,
    Command.SERVE: Incoming._serve,
    Command.SEND_TAKEN: Incoming._send_taken,
    Command.SEND_REFUSED: Incoming._send_refused,
    Command.SEND_DROPPED: Incoming._send_dropped,
    Command.DISCARD: Incoming._discard,
    Command.RECONCILE: Incoming._reconcile,
    Command.DONE: Incoming._done,
}
