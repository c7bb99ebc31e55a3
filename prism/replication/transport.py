"""The network of a node that replicates: what it asks others (:class:`Network`)."""

from __future__ import annotations

import asyncio
from typing import Any, Final, Protocol

from prism.errors import PrismError, ProtocolError
from prism.replication import frames
from prism.replication.frames import Document, Failed
from prism.replication.interfaces import Page, Settled
from prism.replication.links import Ends, Link, ask
from prism.replication.rules import Reply, Stage
from prism.replication.views import Message, Version, encode

__all__ = ["STILL", "Network", "Outgoing", "Spools", "receive_file", "send_file"]

STILL: Final = 5.0  # seconds that a file may stand still on its way, or an answer take
_PIECE: Final = 256 * 1024


class Outgoing(Protocol):
    """A file to be sent."""

    size: int
    body: int

    async def read(self) -> bytes:
        """The next piece; empty at the end."""

    def close(self) -> None:
        """Close it."""


class Incoming(Protocol):
    """A file that comes."""

    async def write(self, data: bytes) -> None:
        """Keep a piece."""

    async def finish(self, key: bytes, version: Version) -> Any:
        """All has come: the blob; raises :class:`ProtocolError` if it is not what it should be."""

    def abandon(self) -> None:
        """Remove what has come."""


class Spools(Protocol):
    """Where files that come are kept."""

    def spool(self, size: int, body: int) -> Incoming:
        """For one of ``size`` octets, the first ``body`` of which are the object's body."""


async def send_file(ends: Ends, document: Document, file: Outgoing) -> None:
    """Send a document and a file behind it; closes the file.

    Raises:
        OSError: the connection or the disk fails.
        TimeoutError: the other side takes nothing.
    """
    try:
        frames.send(ends.writer, document | {"size": file.size, "body": file.body})
        while data := await file.read():
            ends.writer.write(data)
            async with asyncio.timeout(STILL):
                await ends.writer.drain()
        async with asyncio.timeout(STILL):
            await ends.writer.drain()
    finally:
        file.close()


async def receive_file(
    ends: Ends, spools: Spools, document: Document, key: bytes, version: Version
) -> Any:
    """The file behind a document, as a blob.

    Raises:
        OSError: the connection or the disk fails.
        TimeoutError: nothing comes.
        ProtocolError: it is not what it was said to be.
    """
    left, body = int(document["size"]), int(document["body"])
    if not 0 <= body <= left:
        raise ProtocolError("a file whose body is longer than itself")
    incoming = spools.spool(left, body)
    try:
        while left:
            async with asyncio.timeout(STILL):
                data = await _read_piece(ends.reader, min(left, _PIECE))
            left -= len(data)
            await incoming.write(data)
        return await incoming.finish(key, version)
    except BaseException:
        incoming.abandon()
        raise


async def _read_piece(reader: asyncio.StreamReader, n: int) -> bytes:
    """Up to ``n`` octets in one piece: few large pieces cost the disk less than many small ones."""
    try:
        return await reader.readexactly(n)
    except asyncio.IncompleteReadError:
        raise ConnectionResetError("the connection was cut") from None


class Network:
    """:class:`prism.replication.interfaces.Transport` over links.

    Args:
        links: to all other nodes, by name.
        spools: where files that come are kept.
        patience: seconds for the answer of a whole chain.
    """

    def __init__(self, links: dict[str, Link], spools: Spools, patience: float) -> None:
        self._links = links
        self._spools = spools
        self._patience = patience

    def _link(self, peer: str) -> Link:
        link = self._links.get(peer)
        if link is None:
            raise Failed(f"there is no node {peer}")
        return link

    def tell(self, peer: str, message: Message) -> None:
        """See :class:`Transport`."""
        self._link(peer).tell({"op": "view", "message": encode(message).decode()})

    async def stage(self, peer: str, stage: Stage, blob: Any) -> Reply:
        """See :class:`Transport`."""
        document = {
            "op": "stage",
            "view": stage.view,
            "key": frames.text_of(stage.key),
            "version": stage.version,
            "chain": stage.chain,
        }
        try:
            async with self._link(peer).asking(self._patience) as ends:
                await send_file(ends, document, blob)
                return frames.reply_of(await self._answer(ends))
        finally:
            blob.close()

    async def page(self, peer: str, epoch: int, after: bytes) -> Page:
        """See :class:`Transport`."""
        async with self._link(peer).asking(self._patience) as ends:
            question = {"op": "page", "epoch": epoch, "after": frames.text_of(after)}
            await ask(ends, question)
            answer = await self._answer(ends)
            entries = [
                (str(key).encode("utf-8", "surrogateescape"), frames.version_of(version))
                for key, version in answer["entries"]
            ]
            return Page(entries, str(answer["end"]).encode("utf-8", "surrogateescape"))

    async def fetch(self, peer: str, epoch: int, key: bytes) -> tuple[Version, Any] | None:
        """See :class:`Transport`."""
        async with self._link(peer).asking(self._patience) as ends:
            await ask(ends, {"op": "fetch", "epoch": epoch, "key": frames.text_of(key)})
            answer = await self._answer(ends)
            if answer.get("none"):
                return None
            version = frames.version_of(answer["version"])
            return version, await receive_file(ends, self._spools, answer, key, version)

    async def settled(self, peer: str, epoch: int, key: bytes) -> Settled:
        """See :class:`Transport`."""
        async with self._link(peer).asking(self._patience) as ends:
            await ask(ends, {"op": "settled", "epoch": epoch, "key": frames.text_of(key)})
            answer = await self._answer(ends)
            return Settled(answer["settled"] is True, answer["all"] is True)

    async def _answer(self, ends: Ends) -> Document:
        document: Document | None = {"wait": True}
        while document is not None and document.get("wait"):  # its own steps have time-outs
            async with asyncio.timeout(self._patience):
                document = await frames.take(ends.reader)
        if document is None:
            raise ConnectionResetError("the connection was closed")
        if "error" in document:
            raise _Said(str(document["error"]))
        return document


class _Said(PrismError):
    """The node has answered that it cannot; the connection is good."""
