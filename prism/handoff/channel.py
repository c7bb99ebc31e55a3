"""The handoff channel: one connection from each node to each peer, kept open.

Offers carry keys and requests, so it is always under mutual TLS 1.3, with certificates of the
cluster's own CA (``prism.tls.pki``).

Offers go out on a node's own connections (``Link``); what comes in on the others' connections is
answered there. So a link carries offers one way and answers the other way::

    A's Link  -- OFFER, PING -->  B's Channel
              <-- TAKEN, REFUSED, PONG --

The low latency comes from doing everything inside ``data_received``: a frame is parsed and its
handler called before the loop turns again. Bytes become frames in ``wire.py``;
``link.py`` has the calling side, ``connection.py`` what both sides share.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from prism.errors import HandoffError, ProtocolError
from prism.flow import Endpoint
from prism.handoff import wire
from prism.handoff.connection import ChannelCounters, Connection, Shared, node_of, serve
from prism.handoff.link import Answer, Link, LinkLost, TimedOut, answer_event
from prism.handoff.secure import Distrust, Why
from prism.handoff.wire import Hello, Message, Offer, Ping, Reason, Refused, Sealer, State, Taken
from prism.tls.identity import Identity

__all__ = [
    "Answer",
    "Channel",
    "ChannelCounters",
    "Link",
    "LinkLost",
    "Offer",
    "Reason",
    "Refused",
    "Reply",
    "Taken",
    "TimedOut",
    "answer_event",
]

MAX_CALLERS = 1024  # accepted connections
MAX_UNREAD = 65536  # octets a caller may not have read for it to get reports
OnOffer = Callable[[Offer, "Reply"], None]


class Channel:
    """A node's end of all handoffs.

    Args:
        name: this node's name.
        key: the cluster key, at least 16 octets.
        on_offer: called as ``on_offer(offer, reply)`` inside the receive; must not raise, and must
            see to it that ``reply`` is called with ``Taken()`` or ``Refused(reason, text)`` once,
            then or later.
        identity: this node's certificate and the CA it trusts.

    Raises:
        ValueError: the key is too short or the name too long for the wire.
    """

    def __init__(self, name: str, key: bytes, on_offer: OnOffer, identity: Identity) -> None:
        if len(key) < 16:
            raise ValueError("the cluster key must have at least 16 octets")
        if not 0 < len(name.encode()) <= 64:
            raise ValueError("a node name has 1 to 64 octets")
        self.name = name
        if node_of(name) != identity.node:
            raise ValueError(f"{name} cannot show the certificate of node {identity.node}")
        self.shared = Shared(name, key, identity)
        self.on_offer = on_offer
        self._links: dict[str, Link] = {}
        self._callers: dict[Caller, None] = {}  # in the order they came
        self._servers: list[asyncio.Server] = []
        self._state = State()

    @property
    def counters(self) -> ChannelCounters:
        """What has happened on all connections since the start."""
        return self.shared.counters

    async def listen(self, endpoint: Endpoint) -> Endpoint:
        """Accept peers' connections; port 0 takes a free port. Returns the true endpoint.

        Raises:
            OSError: the endpoint cannot be bound.
        """
        loop = asyncio.get_running_loop()
        server = await serve(loop, lambda: Caller(self), endpoint)
        self._servers.append(server)
        return Endpoint.from_sockaddr(server.sockets[0].getsockname())

    def link(self, peer: str, endpoint: Endpoint) -> Link:
        """The link to a peer, made at the first call; it connects, and reconnects, by itself."""
        found = self._links.get(peer)
        if found is None or found.endpoint != endpoint:
            if found is not None:
                found.close()
            self._links[peer] = found = Link(self.shared, peer, endpoint)
        return found

    def links(self) -> dict[str, Link]:
        """The links by peer name."""
        return dict(self._links)

    async def close(self) -> None:
        """Close everything; outstanding offers get ``LinkLost``."""
        for link in self._links.values():
            link.close()
        tasks = [link.task for link in self._links.values()]
        self._links.clear()
        for server in self._servers:
            server.close()
        for caller in list(self._callers):
            caller.drop()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._servers.clear()

    def report(self, data: bytes) -> None:
        """Tell all callers what was learned, in up to ``MAX_REPORT`` octets.

        It is a hint: who is slow to read, or not known yet, is left out.
        """
        for caller in self._callers:
            transport = caller.transport
            if caller.ready and transport and transport.get_write_buffer_size() < MAX_UNREAD:
                caller.write(caller.sealer.report(data))

    @property
    def state(self) -> State:
        """What callers are told of this node, now and when they come."""
        return self._state

    def tell(self, state: State) -> None:
        """Tell all callers how this node is. Who is slow to read gets it with the next change."""
        self._state = state
        for caller in self._callers:
            transport = caller.transport
            if caller.ready and transport and transport.get_write_buffer_size() < MAX_UNREAD:
                caller.write(caller.sealer.state(state))

    def admit(self, caller: Caller) -> bool:
        """Count a new caller in, or turn it away.

        A stranger that connects and says nothing must not keep peers out: where there is no room,
        the oldest that has not proved anything has to go.
        """
        if len(self._callers) >= MAX_CALLERS:
            self.counters.callers_turned_away += 1
            stranger = next((each for each in self._callers if not each.ready), None)
            if stranger is None:
                return False
            stranger.drop()
        self._callers[caller] = None
        return True

    def dismiss(self, caller: Caller) -> None:
        """Count a caller out."""
        self._callers.pop(caller, None)


class Reply:
    """Answers one offer, once: ``reply(Taken())`` or ``reply(Refused(reason, text))``."""

    __slots__ = ("_caller", "_number")

    def __init__(self, caller: Caller, number: int) -> None:
        self._caller: Caller | None = caller
        self._number = number

    @property
    def peer(self) -> str:
        """The node that offers."""
        return "" if self._caller is None else self._caller.peer_name

    def __call__(self, answer: Taken | Refused) -> None:
        """Send the answer; where the link has been lost meanwhile, nothing happens.

        Raises:
            HandoffError: this offer has been answered already.
        """
        caller = self._caller
        if caller is None:
            raise HandoffError("an offer is answered once")
        self._caller = None
        if caller.transport is None:
            caller.counters.answers_lost += 1
        elif type(answer) is Taken:
            caller.write(caller.sealer.taken(self._number))
        elif type(answer) is Refused:
            frame = caller.sealer.refused(self._number, answer.reason, answer.text)
            caller.write(frame)


class Caller(Connection):
    """A peer's connection to us: it offers, we answer."""

    server = True

    def __init__(self, channel: Channel) -> None:
        caller_key, listener_key = wire.hello_keys(channel.shared.key)
        self.channel = channel
        super().__init__(channel.shared, seal_key=listener_key, open_key=caller_key)
        self.peer_name = ""
        self._greeted = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """One more caller, if there is room."""
        super().connection_made(transport)
        if not self.channel.admit(self):
            self.drop()

    def received(self, message: Message) -> None:
        """An offer, a ping, or the handshake."""
        if type(message) is Offer and self.ready:
            self.counters.offers_received += 1
            self.channel.on_offer(message, Reply(self, message.id))
        elif type(message) is Ping and self._greeted:
            news = not self.ready
            if news:
                self.established()
            self.write(self.sealer.pong(message.id))
            if news:
                self.write(self.sealer.state(self.channel.state))
        elif type(message) is Hello and not self._greeted:
            self._greet(message)
        else:
            raise ProtocolError(f"a caller cannot send {type(message).__name__} now")

    def describe(self) -> str:
        """The caller, for the log."""
        return f"{self.where} turned away"

    def _greet(self, hello: Hello) -> None:
        node = self.tls.peer.node
        if not node or node_of(hello.name) != node:
            whose = f"is node {node}'s" if node else "is no node's"
            raise Distrust(Why.WRONG_NODE, f"it says it is {hello.name}; its certificate {whose}")
        if hello.peer != self.channel.name:
            raise ProtocolError(f"{hello.name} takes this node for {hello.peer}")
        self.peer_name = hello.name
        self._greeted = True
        answer = Hello(self.channel.name, hello.name, os.urandom(wire.NONCE_SIZE), hello.nonce)
        self.write(self.sealer.hello(answer))
        inbound, outbound = wire.session_keys(self.shared.key, hello, answer)
        self.sealer = Sealer(outbound)
        self.decoder.rekey(inbound)

    def lost(self) -> None:
        """One caller less."""
        self.channel.dismiss(self)
