"""The network of a node that replicates: what it answers others."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from typing import Any, Final

from prism.errors import PrismError, ProtocolError
from prism.flow import Endpoint
from prism.replication import frames
from prism.replication.frames import Document
from prism.replication.links import HANDSHAKE, NOTICE_PERIOD, Ends, Notice, secure
from prism.replication.replicator import Replicator
from prism.replication.transport import Spools, receive_file, send_file
from prism.replication.views import decode
from prism.tls.identity import Identity

__all__ = ["Service"]

log = logging.getLogger(__name__)

_MAX_CALLERS: Final = 4096
_IDLE: Final = 300.0  # seconds that a connection for questions may wait for the next one
_WAIT: Final = 1.0  # seconds after which somebody who waits for an answer is told to go on
_UNREAD: Final = 1 << 20  # octets that a watcher has not taken: it is dropped


class Service:
    """Listens, and answers what comes.

    Args:
        endpoint: where.
        identity: this node's.
        replicator: its part.
        spools: where files that come are kept.
        members: names of the nodes that replicate; others may only watch.
        load: how many connections this node has, for notices.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        identity: Identity,
        replicator: Replicator,
        *,
        spools: Spools,
        members: frozenset[str],
        load: Callable[[], int],
    ) -> None:
        self._endpoint = endpoint
        self._identity = identity
        self._replicator = replicator
        self._spools = spools
        self._members = members
        self._load = load
        self._sock: socket.socket | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self.turned_away = 0

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: the address cannot be bound.
        """
        sock = socket.socket(self._endpoint.family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(self._endpoint)
            sock.listen(256)
        except BaseException:
            sock.close()
            raise
        self._sock = sock
        self.spawn(self._accept(sock))

    async def close(self) -> None:
        """Close everything at once."""
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def spawn(self, work: Any) -> None:
        """Have work done that ends with the service."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:  # too many open files, say
                log.warning("cannot accept a node's connection: %s", error)
                await asyncio.sleep(0.1)
                continue
            if len(self._tasks) > _MAX_CALLERS:
                sock.close()
                continue
            self.spawn(self._serve(sock))

    async def _serve(self, sock: socket.socket) -> None:
        where = sock.getpeername()[0]
        ends: Ends | None = None
        try:
            async with asyncio.timeout(HANDSHAKE):
                ends, node = await secure(sock, self._identity, server=True)
                hello = await frames.take(ends.reader)
            if hello is None:
                return
            if hello.get("node") != node:
                raise ProtocolError(f"it says it is {hello.get('node')}, and is {node}")
            if hello.get("op") == "watch":
                await self._watched(ends, node)
            elif hello.get("op") == "ask" and node in self._members:
                await self._asked(ends, node)
            else:
                raise ProtocolError(f"{node} cannot ask for {hello.get('op')!r}")
        except (OSError, TimeoutError) as error:
            log.debug("a connection from %s ends: %s", where, error or type(error).__name__)
        except (PrismError, ValueError, KeyError, TypeError) as error:
            self.turned_away += 1
            log.warning("a connection from %s is ended: %s", where, error)
        finally:
            if ends is not None:
                ends.writer.transport.abort()
            else:
                sock.close()

    # -- those who watch --------------------------------------------------------------------------

    async def _watched(self, ends: Ends, node: str) -> None:
        telling = asyncio.get_running_loop().create_task(self._tell(ends.writer))
        try:
            while (document := await frames.take(ends.reader)) is not None:
                message = decode(str(document["message"]).encode())
                if node not in self._members or message.sender != node:
                    raise ProtocolError(f"{node} sends a message of {message.sender}")
                self._replicator.on_message(message)
        finally:
            telling.cancel()

    async def _tell(self, writer: asyncio.StreamWriter) -> None:
        replicator = self._replicator
        while writer.transport.get_write_buffer_size() < _UNREAD:
            view = replicator.view
            notice = Notice(view.epoch, view.serving, view.joining, replicator.state, self._load())
            frames.send(writer, notice.document())
            await replicator.changed(NOTICE_PERIOD)
        writer.transport.abort()

    # -- questions --------------------------------------------------------------------------------

    async def _asked(self, ends: Ends, node: str) -> None:
        while True:
            async with asyncio.timeout(_IDLE):
                question = await frames.take(ends.reader)
            if question is None:
                return
            await _QUESTIONS[str(question.get("op"))](self, ends, node, question)
            await ends.writer.drain()

    async def _stage(self, ends: Ends, node: str, question: Document) -> None:
        stage = frames.stage_of(question)
        blob = await receive_file(ends, self._spools, question, stage.key, stage.version)
        # Goes on to its end when whoever has asked is gone: half a step would be none.
        task = self._replicator.spawn(self._staged(stage, blob))
        while not (await asyncio.wait((task,), timeout=_WAIT))[0]:
            _say(ends, {"wait": True})  # a large file on its way along the chain
        try:
            reply = task.result()
        except (OSError, PrismError, asyncio.CancelledError) as error:
            log.error("cannot keep a write: %s", error)
            _say(ends, {"error": "the disk failed"})
            return
        _say(ends, reply._asdict())

    async def _staged(self, stage: Any, blob: Any) -> Any:
        try:
            return await self._replicator.on_stage(stage, blob)
        finally:
            await self._replicator.storage.discard(blob)

    async def _page(self, ends: Ends, node: str, question: Document) -> None:
        after = str(question["after"]).encode("utf-8", "surrogateescape")
        try:
            page = await self._replicator.on_page(node, int(question["epoch"]), after)
        except PrismError as error:
            _say(ends, {"error": str(error)})
            return
        entries = [(frames.text_of(key), version) for key, version in page.entries]
        _say(ends, {"entries": entries, "end": frames.text_of(page.end)})

    async def _fetch(self, ends: Ends, node: str, question: Document) -> None:
        try:
            found = await self._replicator.on_fetch(int(question["epoch"]), frames.key_of(question))
        except (OSError, PrismError) as error:
            _say(ends, {"error": str(error)})
            return
        if found is None:
            _say(ends, {"none": True})
            return
        version, blob = found
        await send_file(ends, {"version": version}, blob)

    async def _settled(self, ends: Ends, node: str, question: Document) -> None:
        try:
            found = self._replicator.on_settled(int(question["epoch"]), frames.key_of(question))
        except PrismError as error:
            _say(ends, {"error": str(error)})
            return
        _say(ends, {"settled": found.key, "all": found.all})


def _say(ends: Ends, document: Document) -> None:
    with contextlib.suppress(OSError):
        frames.send(ends.writer, document)


_QUESTIONS: dict[str, Any] = {
    "stage": Service._stage,
    "page": Service._page,
    "fetch": Service._fetch,
    "settled": Service._settled,
}
