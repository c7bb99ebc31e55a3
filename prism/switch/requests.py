"""Requests to the switch: sequence numbers, retransmission, and which reply belongs to which.

One layer below :class:`prism.switch.client.SwitchClient`, which knows what the operations mean;
here a request is only something that is sent again until it is answered.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from prism._ext.control import build, exchange
from prism.errors import ProtocolError
from prism.switch.control import (
    NO_ENDPOINT,
    NO_FLOW,
    NO_MAC,
    Message,
    decode,
    decode_all,
    encode,
    packed_address,
)

__all__ = ["RETRY_DELAYS", "Answer", "Counters", "Fields", "Request", "Requests"]

RETRY_DELAYS: Final = (0.02, 0.04, 0.08, 0.16, 0.32, 0.4)
"""Seconds to wait for each try's answer; the sum, about one second, bounds an operation."""

Answer = Sequence[Message] | None
_MAX_DATAGRAM: Final = 1472
_RECEIVE_BATCH: Final = 64


@dataclass(slots=True)
class Counters:
    """What a client has done since it was made."""

    requests: int = 0
    answered_inline: int = 0
    answered_late: int = 0
    retransmissions: int = 0
    timeouts: int = 0
    send_errors: int = 0
    bad_datagrams: int = 0
    unexpected: int = 0
    queries: int = 0
    denied: int = 0
    incarnations: int = 0
    lapses: int = 0


class Fields(NamedTuple):
    """What a request says beside its operation, in the order of ``_ext.control.build``."""

    flags: int = 0
    flow: bytes = NO_FLOW
    address: bytes = packed_address(NO_ENDPOINT.host)
    port: int = 0
    mac: bytes = NO_MAC
    owner: int = 0
    gen: int = 0
    cookie: int = 0


class Request:
    """One request without an answer yet."""

    __slots__ = ("attempt", "fields", "greeted", "on_answer", "op", "sequences", "timer")

    def __init__(self, op: int, fields: Fields, on_answer: Callable[[Answer], None]) -> None:
        self.op = op
        self.fields = fields
        self.on_answer = on_answer
        self.attempt = 0
        self.greeted = False  # a HELLO has been sent because this was DENIED
        self.sequences: list[int] = []
        self.timer: asyncio.TimerHandle | None = None


class Requests:
    """The requests of one node to one switch, over one connected UDP socket.

    Attributes:
        reachable: whether the switch answered the last time it was given the time to.
        counters: what has happened so far.
    """

    __slots__ = (
        "_delays",
        "_fd",
        "_key",
        "_loop",
        "_max_pending",
        "_node",
        "_on_answered",
        "_on_query",
        "_pending",
        "_seq",
        "_sock",
        "_wait_us",
        "counters",
        "reachable",
    )

    def __init__(
        self,
        node: int,
        key: bytes,
        on_answered: Callable[[Request, Sequence[Message]], bool],
        on_query: Callable[[Message], None],
        *,
        delays: tuple[float, ...],
        wait_us: int,
        max_pending: int,
    ) -> None:
        """Prepare; :meth:`open` gives it a socket.

        Args:
            node: the id of the node that asks.
            key: the cluster key, 16 octets.
            on_answered: sees every answer that did not come inline; ``True`` means that it will
                deal with the request itself.
            on_query: takes requests of the switch's agent.
            delays: seconds to wait for the answer of each try.
            wait_us: microseconds to stay in a call for an answer that is not there at once.
            max_pending: requests without an answer; more are given up at once.
        """
        self.reachable = False
        self.counters = Counters()
        self._node = node
        self._key = key
        self._on_answered = on_answered
        self._on_query = on_query
        self._delays = delays
        self._wait_us = wait_us
        self._max_pending = max_pending
        self._pending: dict[int, Request] = {}
        self._seq = time.time_ns()
        self._fd = -1
        self._sock: socket.socket | None = None
        self._loop: asyncio.AbstractEventLoop

    @property
    def is_open(self) -> bool:
        """Whether there is a socket."""
        return self._fd >= 0

    def open(self, loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
        """Take over a connected, non-blocking UDP socket."""
        self._loop = loop
        self._sock = sock
        self._fd = sock.fileno()
        loop.add_reader(self._fd, self._on_readable)

    def close(self) -> None:
        """Close the socket; every request that waits gets ``None``. Idempotent."""
        sock, self._sock = self._sock, None
        if sock is None:
            return
        self._loop.remove_reader(self._fd)
        self._fd = -1
        sock.close()
        for request in list(dict.fromkeys(self._pending.values())):
            self.finish(request, None)

    def ask(  # noqa: PLR0917
        self,
        op: int,
        flags: int,
        flow: bytes,
        address: bytes,
        port: int,
        mac: bytes,
        owner: int,
        gen: int,
        cookie: int,
        on_reply: Callable[[Message | None], None],
        late_status: int,
    ) -> None:
        """A request on a flow, by the short way: an inline answer goes straight to ``on_reply``.

        An inline answer whose status is ``late_status`` takes the long way, by ``on_answered``.

        Raises:
            ValueError: a field has the wrong size.
            OverflowError: a number does not fit its field.
        """
        counters = self.counters
        counters.requests += 1
        if self._fd < 0:
            on_reply(None)
            return
        seq = self._seq
        self._seq = seq + 1
        node = self._node
        answer = self._exchange(
            build(self._key, op, 0, flags, node, seq, flow, address, port, mac, owner, gen, cookie)
        )
        message = None
        if answer is not None:
            try:
                message = decode(answer, self._key)
            except ProtocolError:
                counters.bad_datagrams += 1
            else:
                counters.answered_inline += 1
                self.reachable = True
                if message.status != late_status:
                    on_reply(message)
                    return
        request = Request(
            op,
            Fields(flags, flow, address, port, mac, owner, gen, cookie),
            lambda messages: on_reply(messages[0] if messages else None),
        )
        if message is not None:
            self._answered(request, (message,))
        else:
            self._wait(request, seq)

    def start(self, request: Request) -> None:
        """Send a request, new or :meth:`forget`-ed, until it is answered or the tries are up."""
        if self._fd < 0:
            self.finish(request, None)
            return
        self.counters.requests += not request.attempt
        seq = self._seq
        self._seq = seq + 1
        answer = self._exchange(
            build(self._key, request.op, 0, request.fields[0], self._node, seq, *request.fields[1:])
        )
        self._wait(request, seq)
        if answer is not None:
            self._on_datagram(answer)

    def forget(self, request: Request) -> None:
        """Stop waiting for a request, without telling it."""
        if request.timer is not None:
            request.timer.cancel()
            request.timer = None
        for seq in request.sequences:
            self._pending.pop(seq, None)
        request.sequences.clear()

    def finish(self, request: Request, answer: Answer) -> None:
        """Tell a request its end."""
        self.forget(request)
        request.on_answer(answer)

    def send(self, message: Message) -> None:
        """Send a message that is no request (the answer to a QUERY); it may be lost."""
        if self._sock is None:
            return
        try:
            self._sock.send(encode(message, self._key))
        except OSError:
            self.counters.send_errors += 1

    def _exchange(self, data: bytes) -> bytes | None:
        try:
            answer, others = exchange(self._fd, data, self._wait_us)
        except OSError:  # a full queue, a link that is down: the same as a datagram lost
            self.counters.send_errors += 1
            return None
        if others:  # later, so that no callback runs inside another
            self._loop.call_soon(self._on_datagrams, others)
        return answer

    def _wait(self, request: Request, seq: int) -> None:
        if len(self._pending) >= self._max_pending:
            self.finish(request, None)
            return
        request.sequences.append(seq)
        self._pending[seq] = request
        delay = self._delays[request.attempt]
        request.timer = self._loop.call_later(delay, self._on_timeout, request)

    def _on_timeout(self, request: Request) -> None:
        request.attempt += 1
        if request.attempt < len(self._delays):
            self.counters.retransmissions += 1
            self.start(request)
            return
        self.counters.timeouts += 1
        self.reachable = False
        self.finish(request, None)

    def _on_readable(self) -> None:
        sock = self._sock
        for _ in range(_RECEIVE_BATCH):
            if sock is None or sock is not self._sock:
                return
            try:
                data = sock.recv(_MAX_DATAGRAM)
            except BlockingIOError:
                return
            except OSError:  # an ICMP error about a datagram sent before: the timers deal with it
                continue
            self._on_datagram(data)

    def _on_datagrams(self, datagrams: Iterable[bytes]) -> None:
        for data in datagrams:
            self._on_datagram(data)

    def _on_datagram(self, data: bytes) -> None:
        try:
            messages = decode_all(data, self._key)
        except ProtocolError:
            self.counters.bad_datagrams += 1
            return
        first = messages[0]
        if not first.is_reply:
            self._on_query(first)
            return
        request = self._pending.get(first.seq)
        if request is None or first.node != self._node:
            self.counters.unexpected += 1  # the answer to a try whose successor was answered
            return
        self.counters.answered_late += 1
        self.reachable = True
        self._answered(request, messages)

    def _answered(self, request: Request, messages: Sequence[Message]) -> None:
        self.forget(request)
        if not self._on_answered(request, messages):
            request.on_answer(messages)
