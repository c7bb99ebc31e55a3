"""The way to other nodes: one connection to hear and tell of views, some to ask for things.

All under mutual TLS 1.3 with the nodes' certificates. Questions go over connections of their own,
one at a time on each, so that none waits behind another's file; the number is bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, NamedTuple

from prism.errors import PrismError, ProtocolError
from prism.flow import Endpoint
from prism.replication import frames
from prism.replication.frames import Document, Failed
from prism.tls.identity import Identity, peer_certificate

__all__ = ["HANDSHAKE", "NOTICE_PERIOD", "Ends", "Link", "Notice", "secure"]

log = logging.getLogger(__name__)

HANDSHAKE: Final = 3.0  # seconds, to connect and to introduce oneself
NOTICE_PERIOD: Final = 0.2  # seconds between two notices
_SILENCE: Final = 3.0  # seconds without a notice after which a connection is given up
_PAUSES: Final = (0.05, 0.5)  # seconds before the next try to connect: first, longest
_ASKING: Final = 32  # questions to a node at a time
_UNSENT: Final = 256 * 1024  # octets queued for a node beyond which it is told nothing more
_READ_LIMIT: Final = 512 * 1024
_USER_TIMEOUT_MS: Final = 10_000  # unacknowledged for so long: the connection is lost


class Ends(NamedTuple):
    """A connection's two ends."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


class Notice(NamedTuple):
    """What a node says of itself.

    Attributes:
        epoch, serving, joining: the latest view that it knows.
        state: as of :attr:`prism.replication.member.Member.state`.
        load: connections that it has.
    """

    epoch: int
    serving: tuple[str, ...]
    joining: tuple[str, ...]
    state: str
    load: int

    def document(self) -> Document:
        """For a frame."""
        return {"op": "notice", **self._asdict()}

    @classmethod
    def of(cls, document: Document) -> Notice:
        """The inverse; raises ``ValueError``, ``KeyError``, ``TypeError``."""
        return cls(
            int(document["epoch"]),
            tuple(map(str, document["serving"])),
            tuple(map(str, document["joining"])),
            str(document["state"]),
            int(document["load"]),
        )


async def secure(sock: socket.socket, identity: Identity, *, server: bool) -> tuple[Ends, str]:
    """Speak TLS on a connected socket; returns its ends, and the peer's node.

    Raises:
        OSError: the handshake fails (ssl.SSLError is one), or takes too long.
        ProtocolError: the peer's certificate is no node's.
    """
    loop = asyncio.get_running_loop()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)
    reader = asyncio.StreamReader(_READ_LIMIT, loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    if server:
        transport, _ = await loop.connect_accepted_socket(
            lambda: protocol,
            sock,
            ssl=identity.server_context(),
            ssl_handshake_timeout=HANDSHAKE,
        )
    else:
        transport, _ = await loop.create_connection(
            lambda: protocol,
            sock=sock,
            ssl=identity.client_context(),
            server_hostname="",
            ssl_handshake_timeout=HANDSHAKE,
        )
    writer = asyncio.StreamWriter(transport, protocol, reader, loop)
    found: ssl.SSLObject = transport.get_extra_info("ssl_object")
    node = peer_certificate(found).node
    if not node:
        transport.abort()
        raise ProtocolError("its certificate is no node's")
    return Ends(reader, writer), node


class Link:
    """The way to one node.

    Args:
        me: this node's name.
        peer: that one's name.
        endpoint: where it replicates.
        identity: this node's.
        on_notice: called with each notice; ``None``: the connection to it is lost.
    """

    def __init__(
        self,
        me: str,
        peer: str,
        endpoint: Endpoint,
        identity: Identity,
        on_notice: Callable[[str, Notice | None], None],
    ) -> None:
        self.me = me
        self.peer = peer
        self.endpoint = endpoint
        self._identity = identity
        self._on_notice = on_notice
        self._writer: asyncio.StreamWriter | None = None
        self._idle: list[Ends] = []
        self._places = asyncio.Semaphore(_ASKING)
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def start(self) -> None:
        """Begin to keep the connection up."""
        self._task = asyncio.get_running_loop().create_task(self._keep_up())

    async def close(self) -> None:
        """Close all connections at once."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))
        self._drop_idle()

    @property
    def connected(self) -> bool:
        """Whether the node is heard of now."""
        return self._writer is not None

    # -- views ------------------------------------------------------------------------------------

    def tell(self, document: Document) -> None:
        """Send a document, unless the node is not there or too much is queued for it already."""
        writer = self._writer
        if writer is not None and writer.transport.get_write_buffer_size() < _UNSENT:
            frames.send(writer, document)

    async def _keep_up(self) -> None:
        pause = _PAUSES[0]
        while True:
            try:
                ends = await self._connect("watch")
            except (OSError, PrismError, TimeoutError) as error:
                log.debug("no connection to %s: %s", self.peer, error)
            else:
                pause = _PAUSES[0]
                await self._watch(ends)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _PAUSES[1])

    async def _watch(self, ends: Ends) -> None:
        self._writer = ends.writer
        try:
            while True:
                async with asyncio.timeout(_SILENCE):
                    document = await frames.take(ends.reader)
                if document is None:
                    break
                self._on_notice(self.peer, Notice.of(document))
        except (OSError, PrismError, TimeoutError, ValueError, KeyError, TypeError) as error:
            log.info("the connection to %s is lost: %s", self.peer, error or type(error).__name__)
        finally:
            self._writer = None
            ends.writer.transport.abort()
            self._drop_idle()
            if not self._closed:
                self._on_notice(self.peer, None)

    async def _connect(self, purpose: str) -> Ends:
        loop = asyncio.get_running_loop()
        sock = socket.socket(self.endpoint.family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            async with asyncio.timeout(HANDSHAKE):
                await loop.sock_connect(sock, self.endpoint)
                ends, node = await secure(sock, self._identity, server=False)
        except BaseException:
            sock.close()
            raise
        try:
            if node != self.peer:
                raise ProtocolError(f"{self.endpoint} is node {node}, not {self.peer}")
            frames.send(ends.writer, {"op": purpose, "node": self.me})
        except BaseException:
            ends.writer.transport.abort()
            raise
        return ends

    # -- questions --------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def asking(self, seconds: float) -> AsyncIterator[Ends]:
        """A connection for one question; kept for the next one unless something fails.

        Args:
            seconds: for a free place among the questions to this node.

        Raises:
            Failed: it cannot be asked, or the question failed with an error of the connection.
        """
        try:
            async with asyncio.timeout(seconds):
                await self._places.acquire()
        except TimeoutError:
            raise Failed(f"too many questions to {self.peer}") from None
        ends: Ends | None = None
        try:
            ends = await self._ends()
            yield ends
            self._keep(ends)
            ends = None
        except (OSError, TimeoutError, ProtocolError, ValueError, KeyError, TypeError) as error:
            text = str(error) or type(error).__name__
            raise Failed(f"{self.peer} does not answer: {text}") from error
        finally:
            if ends is not None:
                ends.writer.transport.abort()
            self._places.release()

    async def _ends(self) -> Ends:
        while self._idle:
            ends = self._idle.pop()
            if not ends.reader.at_eof() and not ends.writer.transport.is_closing():
                return ends
            ends.writer.transport.abort()
        return await self._connect("ask")

    def _keep(self, ends: Ends) -> None:
        if self._closed or ends.reader.at_eof():
            ends.writer.transport.abort()
        else:
            self._idle.append(ends)

    def _drop_idle(self) -> None:
        while self._idle:
            self._idle.pop().writer.transport.abort()


async def ask(ends: Ends, document: dict[str, Any]) -> None:
    """Send a question without a file."""
    frames.send(ends.writer, document)
    await ends.writer.drain()
