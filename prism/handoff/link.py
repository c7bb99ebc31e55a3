"""The way to one peer: one connection, kept open, on which offers go out and answers come in.

Every offer is answered exactly once by ``Taken``, ``Refused`` (also when it could not be sent),
``LinkLost`` or ``TimedOut``. Only ``TimedOut`` may be followed by a late ``Taken`` or ``Refused``.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import NamedTuple

from prism.errors import HandoffError, ProtocolError
from prism.flow import Endpoint
from prism.handoff import wire
from prism.handoff.connection import Connection, Shared, connect, node_of
from prism.handoff.machine import Event
from prism.handoff.secure import Distrust, Why
from prism.handoff.wire import (
    Hello,
    Message,
    Offer,
    Pong,
    Reason,
    Refused,
    Report,
    Sealer,
    State,
    Taken,
)

__all__ = ["Answer", "Link", "LinkLost", "OnAnswer", "TimedOut", "answer_event"]

DEADLINE = 1.0  # seconds, for an offer's answer
BACKOFF_FIRST = 0.05  # seconds
BACKOFF_LONGEST = 2.0  # seconds
MAX_OUTSTANDING = 4096  # offers on one link without an answer
MAX_QUEUED = 64 << 20  # octets on one link that the kernel has not taken yet
MAX_LATE = 1024  # timed-out offers of which a late answer is still recognised


class LinkLost(NamedTuple):
    """The connection broke before the answer came: the target may have the connection."""

    @property
    def label(self) -> str:
        """For counters: ``link-lost``."""
        return "link-lost"


class TimedOut(NamedTuple):
    """No answer before the deadline: the target may have the connection."""

    @property
    def label(self) -> str:
        """For counters: ``timed-out``."""
        return "timed-out"


Answer = Taken | Refused | LinkLost | TimedOut
OnAnswer = Callable[[Answer], None]
_LINK_LOST = LinkLost()
_TIMED_OUT = TimedOut()


def answer_event(answer: Answer) -> Event:
    """The source machine's event for an answer."""
    if type(answer) is Taken:
        return Event.TAKEN
    if type(answer) is Refused:
        return Event.DROPPED if answer.reason is Reason.DROPPED else Event.REFUSED
    return Event.LINK_LOST if type(answer) is LinkLost else Event.TIMED_OUT


class _Outstanding:
    __slots__ = ("due", "late", "on_answer")

    def __init__(self, on_answer: OnAnswer, due: float) -> None:
        self.on_answer = on_answer
        self.due = due
        self.late = False


class Link:
    """The way to one peer. Made by :meth:`Channel.link`."""

    def __init__(self, shared: Shared, peer: str, endpoint: Endpoint) -> None:
        self.shared = shared
        self.peer = peer
        self.endpoint = endpoint
        self._loop = asyncio.get_running_loop()
        self._calling: Calling | None = None
        self._outstanding: dict[int, _Outstanding] = {}
        self._next = 1
        self._late = 0
        self._timer: asyncio.TimerHandle | None = None
        self._up = asyncio.Event()
        self._closed = False
        self._unreachable: set[str] = set()  # why, as far as it was logged since it was up
        self.task = self._loop.create_task(self._keep_connected())

    @property
    def connected(self) -> bool:
        """Whether offers can be sent now."""
        return self._calling is not None

    @property
    def outstanding(self) -> int:
        """Offers without an answer."""
        return len(self._outstanding) - self._late

    async def wait_connected(self, seconds: float) -> bool:
        """Wait until connected, ``seconds`` at most; returns whether it is."""
        try:
            async with asyncio.timeout(seconds):
                await self._up.wait()
        except TimeoutError:
            return False
        return True

    def offer(self, offer: Offer, on_answer: OnAnswer, deadline: float = DEADLINE) -> None:
        """Send an offer; ``on_answer`` is called once within ``deadline`` seconds.

        It may be called before this returns (``Refused`` with ``LINK_DOWN``, ``LINK_BUSY`` or
        ``TOO_LARGE``: the offer has not left this node), and a second time with a late ``Taken``
        or ``Refused`` after ``TimedOut``. It must not raise.
        """
        calling = self._calling
        counters = self.shared.counters
        if calling is None or calling.transport is None:
            counters.refused_here += 1
            on_answer(Refused(Reason.LINK_DOWN, f"no link to {self.peer}"))
            return
        if len(self._outstanding) - self._late >= MAX_OUTSTANDING or (
            calling.blocked and calling.transport.get_write_buffer_size() >= MAX_QUEUED
        ):
            counters.refused_here += 1
            on_answer(Refused(Reason.LINK_BUSY, f"the link to {self.peer} is busy"))
            return
        number = self._next
        try:
            frame = calling.sealer.offer(offer, number)
        except HandoffError as error:
            counters.refused_here += 1
            on_answer(Refused(Reason.TOO_LARGE, str(error)))
            return
        self._next = number + 1
        due = self._loop.time() + deadline
        self._outstanding[number] = _Outstanding(on_answer, due)
        if self._timer is None or self._timer.when() > due:
            self._arm(due)
        counters.offers_sent += 1
        calling.write(frame)

    def close(self) -> None:
        """Stop connecting, drop the connection; outstanding offers get ``LinkLost``."""
        self._closed = True
        self.task.cancel()
        if self._calling is not None:
            self._calling.drop()
        if self._timer is not None:
            self._timer.cancel()

    # What the connection reports.

    def up(self, calling: Calling) -> None:
        """The handshake is done."""
        self._calling = calling
        self._unreachable.clear()
        self._up.set()
        self.shared.on_link(self.peer, True)

    def down(self, calling: Calling) -> None:
        """The connection is gone; all that was outstanding on it is uncertain."""
        if self._calling is not calling:
            return
        self._calling = None
        self._up.clear()
        self.shared.on_link(self.peer, False)
        lost, self._outstanding = self._outstanding, {}
        self._late = 0
        for entry in lost.values():
            if not entry.late:
                self.shared.counters.link_lost += 1
                entry.on_answer(_LINK_LOST)

    def answered(self, number: int, answer: Taken | Refused) -> None:
        """The peer has answered an offer."""
        counters = self.shared.counters
        entry = self._outstanding.pop(number, None)
        if entry is None:
            counters.late_answers += 1
            return
        if entry.late:
            self._late -= 1
            counters.late_answers += 1
        elif type(answer) is Taken:
            counters.taken += 1
        else:
            counters.refused += 1
        entry.on_answer(answer)

    def _arm(self, due: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(due, self._sweep)

    def _sweep(self) -> None:
        """Time out what is due; one timer serves all offers of the link."""
        self._timer = None
        now = self._loop.time()
        waiting = [entry for entry in self._outstanding.values() if not entry.late]
        expired = [entry for entry in waiting if entry.due <= now]
        pending = [entry.due for entry in waiting if entry.due > now]
        if pending:
            self._arm(min(pending))
        for entry in expired:
            entry.late = True
            self._late += 1
            self.shared.counters.timed_out += 1
        if self._late > MAX_LATE:
            self._forget_late(self._late - MAX_LATE)
        for entry in expired:
            entry.on_answer(_TIMED_OUT)

    def _forget_late(self, count: int) -> None:
        late = [number for number, entry in self._outstanding.items() if entry.late]
        for number in late[:count]:
            del self._outstanding[number]
            self._late -= 1

    async def _keep_connected(self) -> None:
        backoff = 0.0
        while not self._closed:
            started = time.monotonic()
            try:
                await self._connect_once()
            except OSError as error:
                self._complain(error)
            stayed = time.monotonic() - started
            backoff = 0.0 if stayed > BACKOFF_LONGEST else min(backoff * 2, BACKOFF_LONGEST)
            backoff = max(backoff, BACKOFF_FIRST)
            spread = 0.75 + int.from_bytes(os.urandom(1)) / 512
            await asyncio.sleep(backoff * spread)

    def _complain(self, error: OSError) -> None:
        """Say why there is no connection: once for each cause, while the peer cannot be reached."""
        cause = error.strerror or str(error) or f"no answer in {self.shared.handshake_time:g} s"
        if error.errno is not None and error.errno > 0:
            cause = os.strerror(error.errno)  # without the address, which event loops put there
        if cause not in self._unreachable:
            self._unreachable.add(cause)
            topic = error.errno or 0
            text = f"{self.peer} at {self.endpoint} cannot be reached: {cause}"
            self.shared.complaints.say(self.peer, topic, text)

    async def _connect_once(self) -> None:
        calling = Calling(self)
        async with asyncio.timeout(self.shared.handshake_time):
            await connect(self._loop, lambda: calling, self.endpoint)
        try:
            await asyncio.shield(calling.closed)
        finally:
            calling.drop()


class Calling(Connection):
    """Our connection to a peer: we offer, it answers."""

    server = False

    def __init__(self, link: Link) -> None:
        shared = link.shared
        caller_key, listener_key = wire.hello_keys(shared.key)
        super().__init__(shared, seal_key=caller_key, open_key=listener_key)
        self.link = link
        self.blocked = False
        self._hello = Hello(shared.name, link.peer, os.urandom(wire.NONCE_SIZE))
        self._greeted = False

    def secured(self) -> None:
        """Greets, if the listener is the node that is called."""
        node, wanted = self.tls.peer.node, node_of(self.link.peer)
        if node != wanted:
            whose = f"is node {node}'s" if node else "is no node's"
            raise Distrust(Why.WRONG_NODE, f"its certificate {whose}, not {wanted}'s")
        self.write(self.sealer.hello(self._hello))

    def describe(self) -> str:
        """The listener, for the log."""
        return f"{self.link.peer} at {self.where} not accepted"

    def pause_writing(self) -> None:
        """The kernel takes no more for now."""
        self.blocked = True

    def resume_writing(self) -> None:
        """The kernel takes more again."""
        self.blocked = False

    def received(self, message: Message) -> None:
        """An answer, or the handshake."""
        if type(message) is Taken or type(message) is Refused:
            self.link.answered(message.id, message)
        elif type(message) is Report and self.ready:
            self.shared.on_report(message.data)
        elif type(message) is State and self.ready:
            self.shared.on_state(self.link.peer, message)
        elif type(message) is Pong and self._greeted:
            if not self.ready:
                self.established()
                self.link.up(self)
        elif type(message) is Hello and not self._greeted:
            self._greet(message)
        else:
            raise ProtocolError(f"a listener cannot send {type(message).__name__} now")

    def _greet(self, hello: Hello) -> None:
        if hello.name != self.link.peer or hello.answers != self._hello.nonce:
            raise ProtocolError(f"{hello.name} answers where {self.link.peer} should")
        self._greeted = True
        outbound, inbound = wire.session_keys(self.shared.key, self._hello, hello)
        self.sealer = Sealer(outbound)
        self.decoder.rekey(inbound, wire.MAX_HELLO)
        self.keep_alive()

    def keep_alive(self) -> None:
        """Ask whether the peer is there."""
        self.write(self.sealer.ping(0))

    def lost(self) -> None:
        """The link is down."""
        self.link.down(self)
