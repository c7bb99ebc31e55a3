"""One TCP connection between two nodes: frames in, liveness, faults; either end of it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import cast

from prism.errors import ProtocolError
from prism.flow import Endpoint
from prism.handoff.wire import Decoder, Fault, Message, Sealer, WireError

__all__ = ["ChannelCounters", "Connection", "Shared", "connect", "serve"]

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


@dataclass(slots=True)
class Shared:
    """What all connections of a channel share. Times in seconds."""

    name: str
    key: bytes
    counters: ChannelCounters = field(default_factory=ChannelCounters)
    ping_interval: float = PING_INTERVAL
    silence: float = SILENCE
    handshake_time: float = HANDSHAKE_TIME


async def serve(
    loop: asyncio.AbstractEventLoop, factory: Callable[[], asyncio.Protocol], endpoint: Endpoint
) -> asyncio.Server:
    """Where listening transports are made; the one place to put TLS."""
    return await loop.create_server(factory, endpoint.host, endpoint.port, backlog=256)


async def connect(
    loop: asyncio.AbstractEventLoop, factory: Callable[[], asyncio.Protocol], endpoint: Endpoint
) -> None:
    """Where connecting transports are made; the one place to put TLS."""
    await loop.create_connection(factory, endpoint.host, endpoint.port)


class Connection(asyncio.Protocol):
    """What both ends of a connection share: frames in, liveness, faults."""

    def __init__(self, shared: Shared, seal_key: bytes, open_key: bytes) -> None:
        self.shared = shared
        self.counters = shared.counters
        self.loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[None] = self.loop.create_future()
        self.sealer = Sealer(seal_key)
        self.decoder = Decoder(open_key)
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
        self._heard = self.loop.time()
        self._timer = self.loop.call_later(self.shared.handshake_time, self._tick)

    def data_received(self, data: bytes) -> None:
        """See :class:`asyncio.Protocol`; calls ``received`` for each whole frame."""
        self._heard = self.loop.time()
        decoder = self.decoder
        decoder.push(data)
        try:
            while (message := decoder.pop()) is not None:
                self.received(message)
                if self.transport is None:
                    return
        except WireError as error:
            self.counters.fault(error.fault)
            self.drop()
        except ProtocolError:
            self.counters.malformed += 1
            self.drop()

    def received(self, message: Message) -> None:
        """One authenticated message."""
        raise NotImplementedError

    def quiet(self) -> None:
        """A ping interval has passed without a frame from the peer."""

    def _tick(self) -> None:
        """Liveness: no handshake in time, or silence."""
        silent = self.loop.time() - self._heard
        if not self.ready or silent > self.shared.silence:
            if self.ready:
                self.counters.silent += 1
            self.drop()
            return
        if silent >= self.shared.ping_interval * 0.9:
            self.quiet()
        self._timer = self.loop.call_later(self.shared.ping_interval, self._tick)

    def established(self) -> None:
        """The peer has proved that it has the cluster key now."""
        self.ready = True
        self.counters.connects += 1
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(self.shared.ping_interval, self._tick)

    def write(self, data: bytes) -> None:
        """Send; a lost connection is noticed elsewhere."""
        if self.transport is not None:
            self.transport.write(data)

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
