"""One connection between two nodes: TLS, frames in, liveness, faults; either end of it.

Who the peer is, TLS says: its certificate names a node, and the HELLO inside has to be of that
node. The frames' own MACs prove in addition that the peer has the cluster key.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import cast

from prism.errors import ProtocolError
from prism.flow import Endpoint
from prism.handoff.secure import Complaints, Distrust, End, Why
from prism.handoff.wire import Decoder, Fault, Message, Sealer, State, WireError
from prism.tls.identity import Identity

__all__ = ["ChannelCounters", "Connection", "Shared", "connect", "node_of", "serve"]

log = logging.getLogger(__name__)

PING_INTERVAL = 1.0  # seconds
SILENCE = 3.5  # seconds without a frame after which a connection is given up
HANDSHAKE_TIME = 3.0  # seconds


@dataclass(slots=True)
class ChannelCounters:
    """What has happened on all of a channel's connections since the start."""

    connects: int = 0
    disconnects: int = 0
    handshakes_failed: int = 0
    malformed: int = 0
    bad_mac: int = 0
    replays: int = 0
    silent: int = 0
    offers_sent: int = 0
    offers_received: int = 0
    taken: int = 0
    refused: int = 0
    refused_here: int = 0
    timed_out: int = 0
    link_lost: int = 0
    late_answers: int = 0
    answers_lost: int = 0
    callers_turned_away: int = 0
    tls_no_certificate: int = 0
    tls_untrusted: int = 0
    tls_expired: int = 0
    tls_wrong_node: int = 0
    tls_old_tls: int = 0
    tls_not_tls: int = 0
    tls_refused_us: int = 0
    tls_broken: int = 0

    def as_dict(self) -> dict[str, int]:
        """By name."""
        return asdict(self)

    def fault(self, fault: Fault) -> None:
        """Count a frame that the peer could not have sent."""
        if fault is Fault.BAD_MAC:
            self.bad_mac += 1
        elif fault is Fault.REPLAY:
            self.replays += 1
        else:
            self.malformed += 1

    def distrust(self, why: Why) -> None:
        """Count a peer that is not who it should be."""
        name = f"tls_{why.name.lower()}"
        setattr(self, name, getattr(self, name) + 1)


@dataclass(slots=True)
class Shared:
    """What all connections of a channel share. Times in seconds."""

    name: str
    key: bytes
    identity: Identity
    complaints: Complaints = field(default_factory=Complaints)
    counters: ChannelCounters = field(default_factory=ChannelCounters)
    ping_interval: float = PING_INTERVAL
    silence: float = SILENCE
    handshake_time: float = HANDSHAKE_TIME
    on_report: Callable[[bytes], None] = lambda data: None
    on_state: Callable[[str, State], None] = lambda peer, state: None
    on_link: Callable[[str, bool], None] = lambda peer, up: None


async def serve(
    loop: asyncio.AbstractEventLoop, factory: Callable[[], asyncio.Protocol], endpoint: Endpoint
) -> asyncio.Server:
    """Where listening transports are made."""
    return await loop.create_server(factory, endpoint.host, endpoint.port, backlog=256)


async def connect(
    loop: asyncio.AbstractEventLoop, factory: Callable[[], asyncio.Protocol], endpoint: Endpoint
) -> None:
    """Where connecting transports are made."""
    await loop.create_connection(factory, endpoint.host, endpoint.port)


def node_of(worker: str) -> str:
    """The node that a worker (``be1/0``) belongs to."""
    return worker.partition("/")[0]


class Connection(asyncio.Protocol):
    """What both ends of a connection share: TLS, frames in, liveness, faults."""

    server: bool  # whether this end accepts the connection

    def __init__(self, shared: Shared, seal_key: bytes, open_key: bytes) -> None:
        self.shared = shared
        self.counters = shared.counters
        self.loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[None] = self.loop.create_future()
        self.sealer = Sealer(seal_key)
        self.decoder = Decoder(open_key)
        self.tls = End(shared.identity, server=self.server)
        self.transport: asyncio.Transport | None = None
        self.ready = False
        self._heard = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See :class:`asyncio.Protocol`."""
        self.transport = cast(asyncio.Transport, transport)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        address = transport.get_extra_info("peername")
        self.where = Endpoint.from_sockaddr(address) if address else Endpoint("?", 0)
        self._heard = self.loop.time()
        self._timer = self.loop.call_later(self.shared.handshake_time, self._tick)
        if not self.server:
            self._shake(b"")

    def data_received(self, data: bytes) -> None:
        """See :class:`asyncio.Protocol`; calls ``received`` for each whole frame."""
        self._heard = self.loop.time()
        try:
            if not self.tls.secured:
                self._shake(data)
                if not self.tls.secured:
                    return
                data = b""  # what followed the handshake is inside already
            decoder = self.decoder
            decoder.push(self.tls.open(data))
            while (message := decoder.pop()) is not None:
                self.received(message)
                if self.transport is None:
                    return
        except Distrust as error:
            self.distrust(error)
        except WireError as error:
            self.counters.fault(error.fault)
            self._give_up(str(error))
        except ProtocolError as error:
            self.counters.malformed += 1
            self._give_up(str(error))
        except EOFError:
            self.drop()

    def _shake(self, data: bytes) -> None:
        tls = self.tls
        tls.shake(data)
        if self.transport is not None and (more := tls.outgoing()):
            self.transport.write(more)
        if tls.secured:
            self.secured()

    def secured(self) -> None:
        """The TLS handshake is done: ``tls.peer`` says who the peer is.

        Raises:
            Distrust: it is not who it should be.
        """

    def distrust(self, error: Distrust) -> None:
        """Have nothing to do with this peer any more; an alert that is on its way still goes."""
        self.counters.distrust(error.why)
        self.shared.complaints.say(self.where.host, error.why, f"{self.describe()}: {error}")
        transport = self.transport
        if transport is None:
            return
        if alert := self.tls.outgoing():
            transport.write(alert)
        self._gone()
        if self.ready:
            transport.abort()
        else:
            transport.close()

    def describe(self) -> str:
        """The peer, for the log."""
        return str(self.where)

    def _give_up(self, text: str) -> None:
        self.shared.complaints.say(self.where.host, 0, f"{self.describe()}: {text}")
        self.drop()

    def received(self, message: Message) -> None:
        """One authenticated message."""
        raise NotImplementedError

    def keep_alive(self) -> None:
        """A ping interval has passed: have the peer say something, and so hear something."""

    def _tick(self) -> None:
        """Liveness: no handshake in time, or silence."""
        now = self.loop.time()
        silent = now - self._heard > self.shared.silence
        # Where this process stood still itself, the peer's frames are still to be read.
        stood = self._timer is not None and now - self._timer.when() > self.shared.ping_interval
        if not self.ready or (silent and not stood):
            if self.ready:
                self.counters.silent += 1
                log.warning("link with %s: nothing heard for too long, given up", self.where)
            self.drop()
            return
        if time.time() > self.tls.peer.not_after:
            self.distrust(Distrust(Why.EXPIRED, "its certificate has expired meanwhile"))
            return
        # Whatever was heard: the peer must hear of us, too, and reports are not answered.
        self.keep_alive()
        self._timer = self.loop.call_later(self.shared.ping_interval, self._tick)

    def established(self) -> None:
        """The peer has proved that it has the cluster key now."""
        self.ready = True
        self.counters.connects += 1
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(self.shared.ping_interval, self._tick)

    def write(self, data: bytes) -> None:
        """Send frames; a lost connection is noticed elsewhere."""
        if self.transport is not None:
            self.transport.write(self.tls.seal(data))

    def drop(self) -> None:
        """Give the connection up at once."""
        if self.transport is not None:
            transport = self.transport
            self._gone()
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """See :class:`asyncio.Protocol`."""
        self._gone()

    def _gone(self) -> None:
        if self.closed.done():
            return
        self.transport = None
        if self._timer is not None:
            self._timer.cancel()
        if self.ready:
            self.counters.disconnects += 1
        else:
            self.counters.handshakes_failed += 1
        self.closed.set_result(None)
        self.lost()

    def lost(self) -> None:
        """The connection is gone."""
