"""The object store of a node that replicates: the store's HTTP over the replication protocol.

What this node may answer, it answers from its own disk; the rest it passes on to the node that may.
A write comes to the head of its key's chain, is kept here, and is acknowledged when all replicas
that serve have it. The listing tells of this node's objects alone, with versions and deletions;
whoever asks merges (``GET /?versions``).
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from prism.apps.listing import detail_of
from prism.apps.marks import Marks
from prism.apps.objectfile import ObjectMeta
from prism.apps.objects import Condition, Upload
from prism.apps.objectstore import (
    ObjectStore,
    listing_entry,
    listing_query,
    refuse_unless,
    storage_error,
)
from prism.apps.relay import Relay
from prism.apps.replicadisk import Disk, Kept, StateFile
from prism.apps.replicarelay import MAX_PASSES, ReplicaRelay, forwarded_head, may_repeat, passes_of
from prism.config import BackendConfig, Config
from prism.flow import Endpoint
from prism.http.exchange import Exchange, Rest
from prism.http.fetch import FetchError, ask
from prism.http.head import HttpError, RequestHead
from prism.placement import Node
from prism.replicas import READS, Replicas
from prism.replication.interfaces import NotHead, Refusal, Unavailable
from prism.replication.membership import Membership
from prism.replication.replicator import Replicator
from prism.replication.service import Service
from prism.replication.transport import STILL, Network
from prism.replication.views import Version
from prism.telemetry.metrics import Metrics
from prism.tls.identity import Identity

__all__ = ["ReplicatedStore"]

log = logging.getLogger(__name__)
T = TypeVar("T")

_RETRY_AFTER: Final = ((b"Retry-After", b"1"),)
_PIECE: Final = 256 * 1024
_PAUSE: Final = 0.1  # seconds, at most, until it is looked again who answers


class ReplicatedStore(ObjectStore):
    """The app, and this node's part in replicating.

    Args:
        config: of a cluster that replicates, with a ``[backend]`` section.
        replicas: what this node knows of the others.
        identity: this node's.
        relay: for requests that another node has to answer.
        load: how many connections this node has.

    Raises:
        ConfigError: the store cannot be used for this cluster.
    """

    def __init__(
        self,
        config: Config,
        backend: BackendConfig,
        replicas: Replicas,
        *,
        identity: Identity,
        relay: Relay,
        load: Callable[[], int],
    ) -> None:
        root = Path(backend.store)
        super().__init__(root, max_size=backend.max_object_size)
        self._replicas = replicas
        self._relay = relay
        self._patience = replicas.patience
        self.state = StateFile(root, _layout(config))
        self.disk = Disk(self.objects, self._pool)
        lease = config.cluster.lease
        names = [node.name for node in config.nodes]
        membership = Membership(
            backend.name,
            names,
            replicas.placement.replicas,
            lease,
            saved=self.state.saved,
            now=time.monotonic(),
            serial=self.state.serial,
        )
        self.replicator = Replicator(
            membership,
            replicas.order,
            self.disk,
            Network(replicas.links, self.disk, max(STILL, 3 * lease)),
            save=lambda membership: self.state.write(membership.saved),
        )
        self.service = Service(
            Endpoint(backend.address, backend.replication_port),
            identity,
            self.replicator,
            spools=self.disk,
            members=frozenset(names),
            load=load,
        )
        replicas.local = self.replicator
        self._leaving: asyncio.Task[None] | None = None

    # -- life -----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take part.

        Raises:
            OSError: the replication port cannot be bound.
        """
        await self.service.start()
        self.replicator.start()
        self.replicator.spawn(Marks(self.replicator, self.disk).keep_few())

    async def leave(self, seconds: float) -> None:
        """Have the others go on without this node; other nodes answer its requests from now on."""
        if not await self.replicator.leave(seconds):
            log.info("this node stops without having been left out of the view")

    def measure(self, metrics: Metrics) -> None:
        """Have scrapes tell of this."""
        replicator = self.replicator
        for name, text, read in (
            ("replication_epoch", "Number of the latest view known", lambda: replicator.view.epoch),
            ("replication_serves", "1 while this node may answer", lambda: replicator.serves),
            ("replication_staged", "Writes not known to be done", lambda: len(self.disk.staged)),
            ("replication_fetched", "Objects got while catching up",
             lambda: replicator.catch_up.fetched),
        ):  # fmt: skip
            metrics.sample(name, text, read)

    def begin_leaving(self, seconds: float) -> None:
        """:meth:`leave`, while this node goes on passing requests to the others."""
        if self._leaving is None:
            self._leaving = self.replicator.spawn(self.leave(seconds))

    def stay(self) -> None:
        """Take part again after all."""
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None
        self.replicator.stay()

    async def stop(self) -> None:
        """End everything that replicates."""
        await self.service.close()
        await self.replicator.close()

    def status(self) -> dict[str, Any]:
        """For the status document."""
        catch_up = self.replicator.catch_up
        return {
            "state": self.replicator.state,
            "applied": self.replicator.membership.applied,
            "staged": len(self.disk.staged),
            "compared": catch_up.compared,
            "fetched": catch_up.fetched,
            "removed": catch_up.removed,
        }

    # -- requests -------------------------------------------------------------------------------

    def handle(self, exchange: Exchange) -> Rest:
        """Answer one request, or have the node answer it that may."""
        head = exchange.head
        if not head.key or head.method == b"OPTIONS":
            return super().handle(exchange)
        if head.method in READS:
            if self.replicator.reading(head.key).node == self.replicator.me:
                return super().handle(exchange)
            return self._when_possible(exchange, self._reader)
        if head.method in (b"PUT", b"DELETE"):
            return self._when_possible(exchange, self._writer)
        return super().handle(exchange)

    def _reader(self, key: bytes) -> str:
        return self.replicator.reading(key).node

    def _writer(self, key: bytes) -> str:
        replicator = self.replicator
        head = replicator.head(key)
        ready = replicator.serves and not replicator.retiring
        return head if head != replicator.me or ready else ""

    async def _when_possible(self, exchange: Exchange, who: Callable[[bytes], str]) -> None:
        """Answer as soon as this node may, or another one does; 503 when nobody can for long."""
        head, replicator = exchange.head, self.replicator
        deadline = replicator.clock() + self._patience
        passing = passes_of(head) < MAX_PASSES
        while True:
            name = who(head.key)
            if name == replicator.me:
                rest = super().handle(exchange)
                if rest is not None:
                    await rest
                return
            try:
                if name and passing:
                    await self._pass(exchange, self._node(name))
                    return
            except HttpError as error:
                if replicator.clock() >= deadline or not may_repeat(exchange, error):
                    raise
            if replicator.clock() >= deadline:
                raise HttpError(503, "no replica can answer now", _RETRY_AFTER)
            await replicator.changed(_PAUSE)

    def _node(self, name: str) -> Node:
        return next(node for node in self._replicas.placement.nodes if node.name == name)

    async def _pass(self, exchange: Exchange, node: Node) -> None:
        await ReplicaRelay(self._replicas, self._relay).once(exchange, node)

    # -- writes ---------------------------------------------------------------------------------

    async def _commit(
        self, head: RequestHead, upload: Upload, last: list[bytes], md5: bytes | None
    ) -> tuple[ObjectMeta, bool]:
        await self._run(upload.finish, last, md5)

        async def make(version: Version) -> tuple[Kept, tuple[ObjectMeta, bool]]:
            current = await self._run(self._current, head.key)
            refuse_unless(head, current)
            path, meta = await self._run(upload.seal, version)
            return Kept(path, meta), (meta, current is None)

        try:
            return await self._write(head.key, make)
        except NotHead:
            status = await self._forward(head, upload)
            digest = await self._run(upload.digest)
            return ObjectMeta(upload.size, 0, digest, ()), status == 201
        finally:
            await self._run(upload.abandon)

    async def _forward(self, head: RequestHead, upload: Upload) -> int:
        """Send a write on whose body has been read here, to who takes it now; the status.

        Raises:
            HttpError: what was answered instead.
        """
        replicator = self.replicator
        name = replicator.head(head.key)
        if name in ("", replicator.me) or passes_of(head) >= MAX_PASSES:
            raise HttpError(503, "the view is changing", _RETRY_AFTER)
        endpoint = self._node(name).relay_endpoint
        request = forwarded_head(head, endpoint, upload.size)

        async def pieces() -> AsyncIterator[bytes]:
            at = 0
            while piece := await self._run(upload.body, at, _PIECE):
                at += len(piece)
                yield piece

        try:
            status, answer = await ask(endpoint, request, pieces(), 2 * self._patience)
        except FetchError as error:
            raise HttpError(503, f"the write was sent on, to no avail: {error}") from None
        if status >= 300:
            raise HttpError(status, detail_of(answer), _RETRY_AFTER if status == 503 else ())
        return status

    async def _remove(self, head: RequestHead, condition: Condition) -> bool:
        upload = self.objects.upload(head.key)

        async def make(version: Version) -> tuple[Kept, bool]:
            current = await self._run(self._current, head.key)
            condition(current)
            if current is None:
                raise HttpError(404, "there is no object with this key")
            path, meta = await self._run(lambda: upload.seal(version, deleted=True))
            return Kept(path, meta), True

        try:
            return await self._write(head.key, make)
        except NotHead:
            return await self._forward(head, upload) < 300
        finally:
            await self._run(upload.abandon)

    def _current(self, key: bytes) -> ObjectMeta | None:
        return self.objects._current(key)

    async def _write(self, key: bytes, make: Callable[[Version], Awaitable[tuple[Kept, T]]]) -> T:
        """Replicate a write; it goes on to its end when the client is gone.

        Raises:
            HttpError: it was refused, or its outcome is not known.
            NotHead: another node takes it now; nothing was done.
        """
        replicator = self.replicator
        deadline = replicator.clock() + self._patience
        while True:
            left = deadline - replicator.clock()
            task = replicator.spawn(self._written(key, make, left))
            task.add_done_callback(_forget)
            try:
                return await asyncio.shield(task)
            except Refusal as error:
                raise HttpError(error.status, str(error)) from None
            except NotHead as error:
                # Nothing was done. If this node is to be the head, wait for that.
                if replicator.head(key) not in ("", replicator.me):
                    raise
                if replicator.clock() >= deadline:
                    raise HttpError(503, str(error), _RETRY_AFTER) from None
                await replicator.changed(_PAUSE)
            except Unavailable as error:
                raise HttpError(503, str(error), _RETRY_AFTER) from None
            except OSError as error:
                raise storage_error(error) from error

    async def _written(
        self, key: bytes, make: Callable[[Version], Awaitable[tuple[Kept, T]]], seconds: float
    ) -> T:
        blobs: list[Kept] = []

        async def making(version: Version) -> tuple[Kept, T]:
            blob, result = await make(version)
            blobs.append(blob)
            return blob, result

        try:
            return await self.replicator.write(key, making, seconds)
        finally:
            for blob in blobs:  # gone already, unless it could not be staged
                await self.disk.discard(blob)

    # -- listing --------------------------------------------------------------------------------

    async def _list(self, exchange: Exchange) -> None:
        """This node's objects, with what merging needs; refused unless it serves."""
        query = exchange.head.query
        prefix, start_after, limit = listing_query(query)
        replicator = self.replicator
        epoch = self._listing_epoch()
        found, more = await self._run(self.disk.list, prefix, start_after, limit)
        if self._listing_epoch() != epoch:
            raise HttpError(503, "the view is changing", _RETRY_AFTER)
        entries = [
            listing_entry(key, meta) | {"version": meta.version, "deleted": meta.deleted}
            for key, meta in found
        ]
        document = {
            "epoch": epoch,
            "node": replicator.me,
            "keys": entries,
            "truncated": more,
            "next_start_after": entries[-1]["key"] if more else None,
        }
        headers = ((b"Content-Type", b"application/json"),)
        rest = exchange.respond(200, headers, json.dumps(document).encode() + b"\n")
        if rest is not None:
            await rest

    def _listing_epoch(self) -> int:
        replicator = self.replicator
        if not replicator.serves or replicator.unsettled:
            raise HttpError(503, f"{replicator.me} does not serve now", _RETRY_AFTER)
        return replicator.view.epoch


def _layout(config: Config) -> dict[str, Any]:
    """What must not change in the life of a store that replicates."""
    nodes = sorted([node.name, node.weight] for node in config.nodes)
    return {"nodes": nodes, "replicas": config.placement.replicas}


def _forget(task: asyncio.Task[Any]) -> None:
    """Take note of a failure that nobody waits for any more."""
    if not task.cancelled():
        task.exception()
