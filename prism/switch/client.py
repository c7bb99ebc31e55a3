"""A node's side of the switch control protocol.

The classifier answers a datagram in the softirq that delivers it, so the answer is normally there
when the send returns: :meth:`SwitchClient.submit` then runs its callback before it returns, and a
handoff needs no turn of the event loop. An answer that takes longer (another host, a P4 switch, a
lost datagram) arrives by the loop's reader, and what is lost is sent again under a new sequence
number, which is safe because every operation is idempotent in its effect and its answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final

from prism.errors import SwitchError
from prism.flow import Endpoint
from prism.switch.control import (
    AGENT,
    KEY_SIZE,
    NO_MAC,
    Flags,
    Message,
    Op,
    ReplayWindow,
    Status,
    node_id,
    packed_address,
)
from prism.switch.hardware import hardware_address
from prism.switch.requests import RETRY_DELAYS, Answer, Counters, Fields, Request, Requests

__all__ = ["RETRY_DELAYS", "Counters", "OnReply", "SwitchClient"]

OnReply = Callable[[Message | None], None]

_LOCKED: Final = int(Flags.LOCKED)
_DENIED: Final = int(Status.DENIED)


class SwitchClient:
    """Talks to one switch for one node. Belongs to one event loop; not thread-safe.

    Attributes:
        id: the node's id.
        incarnation: the rule table's number, ``None`` before :meth:`start`.
        on_query: asked by the agent whether a connection still exists, ``(flow, gen) -> bool``.
            ``False`` lets the client delete the rule and say that the connection is gone. Without
            it every connection is said to be alive.
        on_incarnation: called when the table was lost: add the rules again.
        on_lapse: called when the lease was renewed too late: the agent may have deleted rules.
    """

    def __init__(
        self,
        node_name: str,
        address: Endpoint,
        key: bytes,
        local_endpoint: Endpoint,
        *,
        lease: float = 1.0,
        mac: bytes | None = None,
        delays: tuple[float, ...] = RETRY_DELAYS,
        wait_us: int = 0,
        max_pending: int = 16384,
    ) -> None:
        """Prepare a client; nothing is sent before :meth:`start`.

        Args:
            node_name: this node's name, ``be1/0`` for instance.
            address: the switch's control address (UDP).
            key: the cluster key, 16 octets.
            local_endpoint: the owner's address and port that ``ADD`` and ``CHOWN`` name unless
                told otherwise; its host is also where the datagrams come from.
            lease: seconds after which the switch may take this node for dead; renewed four
                times as often.
            mac: the owner's MAC address, 6 octets; by default that of the device that has
                ``local_endpoint``'s address.
            delays: seconds to wait for the answer of each try.
            wait_us: microseconds to stay in ``submit`` for an answer that is not there at once.
            max_pending: operations without an answer; more are given up at once.

        Raises:
            ProtocolError: the node's name cannot be used, or an address is no IP address.
            ValueError: the key's length, or a lease or delays that make no sense.
        """
        if len(key) != KEY_SIZE:
            raise ValueError(f"a cluster key has {KEY_SIZE} octets, not {len(key)}")
        if not 0.004 <= lease <= 3600 or not delays or min(delays) <= 0:
            raise ValueError("lease must be 0.004 to 3600 seconds, and every delay above 0")
        self.name = node_name
        self.id = node_id(node_name)
        self.address = address
        self.local_endpoint = local_endpoint
        self.incarnation: int | None = None
        self.on_query: Callable[[bytes, int], bool] | None = None
        self.on_incarnation: Callable[[], None] | None = None
        self.on_lapse: Callable[[], None] | None = None
        self._renewed_at = 0.0
        self._lease_ms = max(1, round(lease * 1000))
        self._renewal = lease / 4
        self._mac = mac or NO_MAC
        self._find_mac = mac is None
        self._owner_address = packed_address(local_endpoint.host)
        self._owner_port = local_endpoint.port
        self._agent_window = ReplayWindow()
        self._renewing = False
        self._hello_timer: asyncio.TimerHandle | None = None
        self._requests = Requests(
            self.id,
            key,
            self._on_answered,
            self._answer_query,
            delays=delays,
            wait_us=wait_us,
            max_pending=max_pending,
        )
        self._loop: asyncio.AbstractEventLoop

    @property
    def reachable(self) -> bool:
        """Whether the switch answered the last time it was given the time to."""
        return self._requests.reachable

    @property
    def counters(self) -> Counters:
        """What has happened so far."""
        return self._requests.counters

    # Life

    async def start(self, timeout: float = 5.0) -> None:  # noqa: ASYNC109
        """Say HELLO and begin to renew the lease.

        Args:
            timeout: seconds to keep trying.

        Raises:
            SwitchError: the switch does not answer, or refuses; nothing is left open.
        """
        self._loop = asyncio.get_running_loop()
        self._requests.open(self._loop, self._connect())
        deadline = self._loop.time() + timeout
        try:
            reply = await self._hello(self._lease_ms)
            while reply is None and self._loop.time() < deadline:
                reply = await self._hello(self._lease_ms)
            if reply is None:
                raise SwitchError(
                    f"the switch at {self.address} does not answer {self.name}: is it running, "
                    "and is the cluster key the same?"
                )
            if reply.status != Status.OK:
                raise SwitchError(f"the switch at {self.address} refuses {self.name}: {reply!r}")
        except BaseException:
            self._requests.close()
            raise
        self._hello_timer = self._loop.call_later(self._renewal, self._renew)

    async def close(self) -> None:
        """End the lease and close the socket; what is pending gets ``None``. Idempotent."""
        if self._hello_timer is not None:
            self._hello_timer.cancel()
            self._hello_timer = None
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hello(0), 0.1)
        self._requests.close()

    def _connect(self) -> socket.socket:
        host = self.local_endpoint.host
        sock = None
        try:
            sock = socket.socket(self.address.family, socket.SOCK_DGRAM)
            sock.setblocking(False)
            if self.local_endpoint.family == self.address.family:
                sock.bind((host, 0))
            sock.connect((self.address.host, self.address.port))
            if self._find_mac:
                self._mac = hardware_address(host) or NO_MAC
        except OSError as error:
            if sock is not None:
                sock.close()
            raise SwitchError(f"cannot reach the switch at {self.address}: {error}") from error
        return sock

    # Operations

    def submit(
        self,
        op: int,
        flow: bytes,
        on_reply: OnReply,
        *,
        gen: int = 0,
        cookie: int = 0,
        locked: bool = False,
        endpoint: Endpoint | None = None,
        mac: bytes | None = None,
    ) -> None:
        """Start one operation on a flow.

        ``on_reply`` runs exactly once: inside this call when the answer is there at once, else
        from the event loop; with ``None`` after the last try, or when the client is closed.
        ``DENIED`` is reported only when it is not for want of a ``HELLO``.

        Args:
            op: what to do.
            flow: the packed flow, 36 octets.
            on_reply: takes the answer.
            gen: the generation expected (``LOCK``, ``UNLOCK``, ``CHOWN``, ``DELETE``).
            cookie: makes a repeated ``ADD`` recognisable; the same for all tries.
            locked: ``ADD`` and ``CHOWN``: leave the rule locked.
            endpoint: ``ADD`` and ``CHOWN``: the owner's address and port, if not the default.
            mac: ``ADD`` and ``CHOWN``: the owner's MAC address, if not the default.

        Raises:
            ValueError: ``flow`` has not 36 octets, or ``mac`` not 6.
            OverflowError: a number does not fit its field.
            ProtocolError: ``endpoint`` is no IP address.
        """
        if endpoint is None:
            address, port = self._owner_address, self._owner_port
        else:
            address, port = packed_address(endpoint[0]), endpoint[1]
        self._requests.ask(
            op,
            _LOCKED if locked else 0,
            flow,
            address,
            port,
            mac or self._mac,
            self.id,
            gen,
            cookie,
            on_reply,
            _DENIED,
        )

    async def request(
        self,
        op: int,
        flow: bytes,
        *,
        gen: int = 0,
        cookie: int = 0,
        locked: bool = False,
        endpoint: Endpoint | None = None,
        mac: bytes | None = None,
    ) -> Message | None:
        """:meth:`submit`, awaited; ``None`` when the switch did not answer."""
        future: asyncio.Future[Message | None] = self._loop.create_future()

        def done(message: Message | None) -> None:
            if not future.done():
                future.set_result(message)

        self.submit(
            op, flow, done, gen=gen, cookie=cookie, locked=locked, endpoint=endpoint, mac=mac
        )
        return await future

    async def list(
        self,
        owner: int = 0,
        *,
        timeout: float = 10.0,  # noqa: ASYNC109
    ) -> AsyncIterator[Message]:
        """All rules of one owner (0: of all), one message each.

        Rules that come, go or change meanwhile may be missing or told twice.

        Args:
            owner: a node's id.
            timeout: seconds to wait for each page; the first of a very long list takes some.

        Raises:
            SwitchError: the agent does not answer, or refuses.
        """
        cursor = 0
        while True:
            messages = await self._page(Fields(owner=owner, cookie=cursor), timeout)
            if messages[0].status == Status.NOENT:
                return
            for message in messages:
                if message.status != Status.OK:
                    raise SwitchError(f"LIST failed: {message!r}")
                yield message
            if not messages[-1].more:
                return
            cursor = messages[-1].cookie

    async def _page(self, fields: Fields, patience: float) -> Sequence[Message]:
        deadline = self._loop.time() + patience
        while True:
            messages = await self._send(Op.LIST, fields)
            if messages:
                return messages
            if self._loop.time() >= deadline or not self._requests.is_open:
                raise SwitchError(f"the switch agent at {self.address} does not answer LIST")

    async def _send(self, op: Op, fields: Fields) -> Answer:
        future: asyncio.Future[Answer] = self._loop.create_future()

        def done(answer: Answer) -> None:
            if not future.done():
                future.set_result(answer)

        self._requests.start(Request(op, fields, done))
        return await future

    # HELLO and QUERY

    async def _hello(self, lease_ms: int) -> Message | None:
        answer = await self._send(Op.HELLO, Fields(owner=self.id, cookie=lease_ms))
        return answer[0] if answer else None

    def _greet(self, then: Callable[[Answer], None]) -> None:
        fields = Fields(owner=self.id, cookie=self._lease_ms)
        self._requests.start(Request(Op.HELLO, fields, then))

    def _renew(self) -> None:
        self._hello_timer = self._loop.call_later(self._renewal, self._renew)
        if not self._renewing:  # else the last one is still being repeated
            self._renewing = True
            self._greet(self._renewed)

    def _renewed(self, answer: Answer) -> None:
        self._renewing = False

    def _on_answered(self, request: Request, messages: Sequence[Message]) -> bool:
        """See an answer first; ``True``: the request goes on, do not deliver it."""
        if request.op == Op.HELLO:
            self._note_hello(messages[0])
            return False
        if messages[0].status != _DENIED:
            return False
        self.counters.denied += 1
        if request.greeted:
            return False
        request.greeted = True  # perhaps the lease has run out: greet, then repeat

        def repeat(hello: Answer) -> None:
            if hello:
                self._requests.start(request)
            else:
                self._requests.finish(request, messages)

        self._greet(repeat)
        return True

    def _note_hello(self, reply: Message) -> None:
        if reply.status != Status.OK:
            return
        lease = (reply.gen or self._lease_ms) / 1000
        self._renewal = min(self._lease_ms / 1000, lease) / 4
        now, before = self._loop.time(), self._renewed_at
        self._renewed_at = now
        if before and now - before > lease and self.on_lapse is not None:
            self.counters.lapses += 1
            self.on_lapse()
        known, self.incarnation = self.incarnation, reply.cookie
        if known is not None and known != reply.cookie:
            self.counters.incarnations += 1
            if self.on_incarnation is not None:
                self.on_incarnation()

    def _answer_query(self, query: Message) -> None:
        if query.op != Op.QUERY or query.node != AGENT or not self._agent_window.accept(query.seq):
            self.counters.unexpected += 1
            return
        self.counters.queries += 1
        if self.on_query is None or self.on_query(query.flow, query.gen):
            self._answer(query, Status.OK)
        else:
            # The rule goes first: the agent lets the client's SYN pass when it hears NOENT.
            self.submit(
                Op.DELETE,
                query.flow,
                lambda reply: self._answer(query, Status.NOENT) if reply is not None else None,
                gen=query.gen,
            )

    def _answer(self, query: Message, status: Status) -> None:
        # A loss needs no care here: the agent asks again.
        self._requests.send(query.reply(status, gen=query.gen)._replace(owner=self.id))
