"""WebSockets of an ASGI application: uvicorn's protocol on a connection of ours (RFC 6455).

From the upgrade on the connection is its owner's for good: there is no next request that could
belong elsewhere. uvicorn's protocol gets the request's head and then whatever comes, through a
transport over the stream, which may be a TLS one.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final

import uvicorn
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState

from prism.apps.asgi_http import headers_of
from prism.http.exchange import Exchange
from prism.http.head import RequestHead
from prism.http.origin import Origin
from prism.http.stream import PEEK_LIMIT, Stream

__all__ = ["StreamTransport", "WebSockets", "wants_websocket"]

log = logging.getLogger(__name__)

_HIGH: Final = 256 * 1024  # octets written and not sent at which the application has to wait
_LOW: Final = 64 * 1024  # octets at which it may go on


def wants_websocket(head: RequestHead) -> bool:
    """Whether a request asks for a WebSocket."""
    return head.upgrade is not None and head.upgrade.lower() == b"websocket"


class WebSockets:
    """All WebSockets of one worker."""

    def __init__(self, config: uvicorn.Config, state: dict[str, Any]) -> None:
        self._config = config
        self._app_state = state
        self._server = ServerState()

    @property
    def tasks(self) -> set[asyncio.Task[None]]:
        """The application's tasks, one for each."""
        return set(self._server.tasks)

    def shutdown(self) -> None:
        """Say good-bye to all clients: the service restarts (close code 1012)."""
        for protocol in list(self._server.connections):
            protocol.shutdown()

    async def serve(self, exchange: Exchange) -> None:
        """Serve one connection to its end."""
        exchange.give_away()
        transport = StreamTransport(exchange.stream, exchange.origin)
        protocol = WebSocketsSansIOProtocol(
            self._config, self._server, self._app_state, asyncio.get_running_loop()
        )
        await transport.run(protocol, _request(exchange.head))
        exchange.status = transport.status


def _request(head: RequestHead) -> bytes:
    """The head as it was sent, but for what does not matter."""
    lines = [b"%b %b HTTP/1.1" % (head.method, head.target)]
    lines += [b"%b: %b" % field for field in headers_of(head)]
    return b"\r\n".join([*lines, b"", b""])


class StreamTransport(asyncio.Transport):
    """A stream as asyncio's kind of transport, for one protocol, with back-pressure both ways.

    Attributes:
        status: of the response that began what was written, 0 before.
    """

    def __init__(self, stream: Stream, origin: Origin | None) -> None:
        ends = {"peername": tuple(origin.client), "sockname": tuple(origin.service),
                "sslcontext": origin.secure or None} if origin is not None else {}  # fmt: skip
        super().__init__(ends)
        self.status = 0
        self._stream = stream
        self._loop = asyncio.get_running_loop()
        self._out = bytearray()
        self._writing: asyncio.Task[None] | None = None
        self._protocol: asyncio.Protocol | None = None
        self._reading = asyncio.Event()
        self._reading.set()
        self._closing = False
        self._paused = False
        self._done: asyncio.Future[None] = self._loop.create_future()

    async def run(self, protocol: asyncio.Protocol, first: bytes) -> None:
        """Serve the protocol until one side has closed; everything written is sent by then."""
        self._protocol = protocol
        protocol.connection_made(self)
        protocol.data_received(first)
        reader = self._loop.create_task(self._read(protocol))
        error: BaseException | None = None
        try:
            await self._done
            if self._writing is not None:
                await asyncio.wait((self._writing,))
        except asyncio.CancelledError as cancelled:
            error = cancelled
            raise
        finally:
            self._closing = True
            for task in (reader, self._writing):
                if task is not None:
                    task.cancel()
                    await asyncio.wait((task,))
            self._out.clear()
            protocol.connection_lost(ConnectionAbortedError() if error else None)

    async def _read(self, protocol: asyncio.Protocol) -> None:
        stream = self._stream
        try:
            while not self._closing:
                await self._reading.wait()
                try:
                    data = stream.receive(PEEK_LIMIT)
                except BlockingIOError:
                    await stream.readable(None)
                    continue
                if not data:
                    break
                protocol.data_received(data)
        except OSError as error:
            log.debug("%s: %s", stream.flow, error)
        except Exception:
            log.exception("%s: a WebSocket failed", stream.flow)
        self.close()

    async def _write(self) -> None:
        """Send what did not fit at once."""
        try:
            while self._out:
                await self._stream.writable(None)
                self._push()
        except OSError:
            self._out.clear()
            self.close()
        finally:
            self._writing = None

    def _push(self) -> None:
        try:
            while self._out:
                # What is given must not move under the stream until it is taken.
                del self._out[: self._stream.send(bytes(self._out[:_HIGH]))]
        except BlockingIOError:
            pass
        if self._paused and len(self._out) <= _LOW and self._protocol is not None:
            self._paused = False
            self._protocol.resume_writing()

    # -- asyncio.Transport -------------------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        """Send; what does not fit is kept, and the protocol is told when that is much."""
        if self._done.done():
            return
        if not self.status and bytes(data[:5]) == b"HTTP/":
            self.status = int(bytes(data[9:12]))
        self._out += data
        if self._writing is not None:
            self._check_room()
            return
        try:
            self._push()
        except OSError:
            self._out.clear()
            self.close()
            return
        if self._out:
            self._writing = self._loop.create_task(self._write())
            self._check_room()

    def _check_room(self) -> None:
        if not self._paused and len(self._out) > _HIGH and self._protocol is not None:
            self._paused = True
            self._protocol.pause_writing()

    def pause_reading(self) -> None:
        """Take no more input; the client comes to a stop by TCP's means."""
        self._reading.clear()

    def resume_reading(self) -> None:
        """Take input again."""
        self._reading.set()

    def is_reading(self) -> bool:
        """Whether input is taken."""
        return self._reading.is_set()

    def is_closing(self) -> bool:
        """Whether nothing more can be written."""
        return self._closing

    def close(self) -> None:
        """Close as soon as everything is sent."""
        self._closing = True
        if not self._done.done():
            self._done.set_result(None)

    def abort(self) -> None:
        """Close now."""
        self._out.clear()
        self.close()
