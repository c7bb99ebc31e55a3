r"""The object store: objects by key over HTTP, kept on a local disk.

- ``PUT /key``: stores a body. 201 for a new key, 204 for a replaced one. ``Content-MD5`` is
  verified. ``If-None-Match: *`` creates only, ``If-Match`` replaces only that version.
  Content-Type, -Encoding, -Disposition, -Language and Cache-Control are kept with it.
- ``GET /key``, ``HEAD /key``: with ``Range`` (one range; several are answered with the whole) and
  conditions.
- ``DELETE /key``: 204, or 404.
- ``GET /?prefix=P&start-after=K&max-keys=N``: lists keys in octet order::

      {"keys": [{"key": "a/b", "size": 5, "etag": "\"...\"", "last_modified": "2026-..Z"}],
       "truncated": true, "next_start_after": "a/b"}

  ``max-keys`` is 1000 by default and at most. While ``truncated``, ask again with ``start-after``
  set to ``next_start_after``, which is ``null`` on the last page.

Keys are UTF-8, at most 1024 octets. GET and HEAD are answered inline (the page cache serves them;
a cold read blocks this worker for one disk access); everything that writes, syncs or lists runs
in a small pool of threads. Errors are JSON documents; see :mod:`prism.http.response`.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import errno
import json
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import parse_qsl

from prism.apps.conditions import asks_for_less, conditional, parse_range, precondition
from prism.apps.keytree import MAX_KEY
from prism.apps.objectcache import ObjectCache, object_fields
from prism.apps.objectfile import ObjectMeta, StoreError
from prism.apps.objects import Condition, DigestMismatch, Objects, Upload
from prism.http.exchange import Exchange, Rest
from prism.http.head import HttpError, RequestHead

__all__ = ["ObjectStore", "listing_entry", "listing_query", "refuse_unless", "storage_error"]

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_SIZE: Final = 5 << 30
_BATCH = 256 * 1024  # octets handed to a thread at once; two batches per upload are in memory
_MAX_KEYS = 1000
_KEPT = {
    b"content-type": b"Content-Type",
    b"content-encoding": b"Content-Encoding",
    b"content-disposition": b"Content-Disposition",
    b"content-language": b"Content-Language",
    b"cache-control": b"Cache-Control",
}
_DEFAULT_TYPE = ((b"Content-Type", b"application/octet-stream"),)
_JSON = ((b"Content-Type", b"application/json"),)
_KEY_METHODS = ((b"Allow", b"GET, HEAD, PUT, DELETE, OPTIONS"),)
_ROOT_METHODS = ((b"Allow", b"GET, HEAD, OPTIONS"),)


class ObjectStore:
    """The app. One per process; several processes may share a root.

    Args:
        root: directory, made if it is not there.
        max_size: octets of the largest object.
        durable: sync to disk before an upload is acknowledged.
        threads: for what blocks on the disk.

    Attributes:
        objects: on the disk.
        ready: small ones in memory.
    """

    def __init__(
        self, root: Path, *, max_size: int = MAX_SIZE, durable: bool = True, threads: int = 8
    ) -> None:
        self.objects = Objects(Path(root), durable=durable)
        self.max_size = max_size
        self.ready = ObjectCache()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="objects")

    def close(self) -> None:
        """Waits for writes under way and removes unfinished uploads."""
        self._pool.shutdown()
        self.objects.close()

    def handle(self, exchange: Exchange) -> Rest:
        """Answers one request; see :class:`prism.http.exchange.App`."""
        head = exchange.head
        method, key = head.method, head.key
        if method == b"OPTIONS":
            return exchange.respond(204, _KEY_METHODS if key else _ROOT_METHODS)
        if not key:
            if method not in (b"GET", b"HEAD"):
                raise HttpError(405, "this is the listing; it can only be read", _ROOT_METHODS)
            return self._list(exchange)
        _check_key(key)
        if method in (b"GET", b"HEAD"):
            return self._get(exchange)
        if method == b"PUT":
            return self._put(exchange)
        if method == b"DELETE":
            return self._delete(exchange)
        raise HttpError(405, "objects know GET, HEAD, PUT and DELETE", _KEY_METHODS)

    # -- reading ----------------------------------------------------------------------------

    def _get(self, exchange: Exchange) -> Rest:
        head = exchange.head
        whole_wanted = not asks_for_less(head)
        path = self.objects.path(head.key)  # before anything else: it may be no key at all
        ready = self.ready.get(head.key) if whole_wanted else None
        if ready is not None:
            return exchange.respond_ready(200, ready.lines, ready.body)
        try:
            opened = self.objects.open(head.key)
        except (OSError, StoreError) as error:
            raise storage_error(error) from error
        if opened is None:
            raise HttpError(404, "there is no object with this key")
        fd, meta = opened
        part: tuple[int, int] | None = None
        try:
            ready = self.ready.keep(head.key, path, fd, meta) if whole_wanted else None
            etag = meta.etag
            status = precondition(head, etag, meta.modified)
            if not status:
                part = parse_range(head, etag, meta.modified, meta.size)
        except BaseException:
            os.close(fd)
            raise
        if ready is not None:
            os.close(fd)
            return exchange.respond_ready(200, ready.lines, ready.body)
        headers = object_fields(meta)
        if status or (part is not None and not part[1]):
            os.close(fd)
            if status == 304:
                return exchange.respond(304, headers)
            if status:
                raise HttpError(status, "a precondition does not hold")
            whole = ((b"Content-Range", b"bytes */%d" % meta.size),)
            raise HttpError(416, f"the object has {meta.size} octets", whole)
        if part is None:
            return exchange.send_file(200, headers, fd, 0, meta.size)
        offset, length = part
        where = b"bytes %d-%d/%d" % (offset, offset + length - 1, meta.size)
        headers.append((b"Content-Range", where))
        return exchange.send_file(206, headers, fd, offset, length)

    async def _list(self, exchange: Exchange) -> None:
        prefix, start_after, limit = listing_query(exchange.head.query)
        found, more = await self._run(self.objects.list, prefix, start_after, limit)
        document = {
            "keys": [listing_entry(key, meta) for key, meta in found],
            "truncated": more,
            "next_start_after": found[-1][0].decode("utf-8", "replace") if more else None,
        }
        rest = exchange.respond(200, _JSON, json.dumps(document).encode() + b"\n")
        if rest is not None:
            await rest

    # -- writing ----------------------------------------------------------------------------

    async def _put(self, exchange: Exchange) -> None:
        head = exchange.head
        if head.get(b"content-range") is not None:
            raise HttpError(400, "objects are stored whole: Content-Range is not allowed in PUT")
        if b"aws-chunked" in (head.get_all(b"content-encoding") or b"").lower():
            raise HttpError(
                501,
                "the aws-chunked coding is not understood; tell the client to leave checksums "
                'behind the body out (request_checksum_calculation = "when_required")',
            )
        if (exchange.body.length or 0) > self.max_size:
            raise HttpError(413, f"objects have at most {self.max_size} octets")
        limit = exchange.body.limit  # the policy's
        exchange.body.limit = self.max_size if limit is None else min(limit, self.max_size)
        md5 = _announced_md5(head)
        if conditional(head):
            refuse_unless(head, await self._run(self.objects.meta, head.key))
        fields = tuple((_KEPT[name], value) for name, value in head.headers if name in _KEPT)
        if head.get(b"content-type") is None:
            fields += _DEFAULT_TYPE
        try:
            upload = self.objects.upload(head.key, fields)
        except ValueError as error:
            raise HttpError(400, str(error)) from None
        try:
            last = await self._store(exchange, upload)
            meta, created = await self._commit(head, upload, last, md5)
        except BaseException as error:
            abandoned = self._pool.submit(upload.abandon)
            if isinstance(error, asyncio.CancelledError):
                raise
            await asyncio.wrap_future(abandoned)  # whoever hears of it may use the room at once
            if isinstance(error, DigestMismatch):
                detail = "the body does not have the announced Content-MD5"
                raise HttpError(400, detail) from None
            raise
        rest = exchange.respond(201 if created else 204, ((b"ETag", meta.etag),))
        if rest is not None:
            await rest

    async def _commit(
        self, head: RequestHead, upload: Upload, last: list[bytes], md5: bytes | None
    ) -> tuple[ObjectMeta, bool]:
        """Makes an upload the object, as :meth:`Upload.commit`."""
        return await self._run(
            upload.commit, last, md5, lambda current: refuse_unless(head, current)
        )

    async def _store(self, exchange: Exchange, upload: Upload) -> list[bytes]:
        """Writes the body behind its arrival; returns the last batch, for the commit to write."""
        writing: asyncio.Future[None] | None = None
        try:
            while True:
                batch: list[bytes] = []
                size = 0
                while size < _BATCH and (piece := await exchange.body.read(_BATCH - size)):
                    batch.append(piece)
                    size += len(piece)
                if writing is not None:
                    await writing
                    writing = None
                if size < _BATCH:
                    return batch
                writing = asyncio.ensure_future(self._run(upload.write, batch))
        finally:
            if writing is not None:
                writing.add_done_callback(_forget)

    async def _delete(self, exchange: Exchange) -> None:
        head = exchange.head

        def condition(current: ObjectMeta | None) -> None:
            if current is not None:  # what is not there is 404, whatever the conditions
                refuse_unless(head, current)

        if not await self._remove(head, condition):
            raise HttpError(404, "there is no object with this key")
        rest = exchange.respond(204)
        if rest is not None:
            await rest

    async def _remove(self, head: RequestHead, condition: Condition) -> bool:
        """Removes an object, as :meth:`Objects.delete`."""
        return await self._run(self.objects.delete, head.key, condition)

    async def _run(self, function: Callable[..., T], *args: Any) -> T:
        """Runs in the pool; turns the disk's errors into answers."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)
        except (OSError, StoreError) as error:
            raise storage_error(error) from error


def _forget(future: asyncio.Future[None]) -> None:
    """Takes note of the failure of a write whose upload has failed already."""
    if not future.cancelled():
        future.exception()


def _check_key(key: bytes) -> None:
    if len(key) > MAX_KEY:
        raise HttpError(414, f"keys have at most {MAX_KEY} octets")
    try:
        key.decode()
    except UnicodeDecodeError:
        raise HttpError(400, "the key is not UTF-8") from None


def refuse_unless(head: RequestHead, meta: ObjectMeta | None) -> None:
    """Raises 412 when the request's preconditions do not hold for the object there is."""
    etag, modified = (None, 0) if meta is None else (meta.etag, meta.modified)
    if precondition(head, etag, modified):
        raise HttpError(412, "a precondition does not hold")


def _announced_md5(head: RequestHead) -> bytes | None:
    """The digest in Content-MD5 (RFC 1864)."""
    value = head.get(b"content-md5")
    if value is None:
        return None
    try:
        digest = base64.b64decode(value, validate=True)
    except binascii.Error:
        digest = b""
    if len(digest) != 16:
        raise HttpError(400, "Content-MD5 is not 16 octets in base64")
    return digest


def listing_query(query: bytes) -> tuple[bytes, bytes, int]:
    """Prefix, start-after and limit of a listing; raises :class:`HttpError`."""
    try:
        fields = dict(parse_qsl(query.decode("ascii"), keep_blank_values=True, errors="strict"))
        limit = int(fields.get("max-keys", _MAX_KEYS))
    except ValueError:
        raise HttpError(400, "the query is not understood") from None
    if limit < 1:
        raise HttpError(400, "max-keys must be at least 1")
    prefix, start_after = fields.get("prefix", ""), fields.get("start-after", "")
    return prefix.encode(), start_after.encode(), min(limit, _MAX_KEYS)


def listing_entry(key: bytes, meta: ObjectMeta) -> dict[str, object]:
    """What a listing says of an object."""
    return {
        "key": key.decode("utf-8", "replace"),
        "size": meta.size,
        "etag": meta.etag.decode(),
        "last_modified": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(meta.modified)),
    }


def storage_error(error: OSError | StoreError) -> HttpError:
    """The answer to what the disk says; the paths in its message are not for clients."""
    code = error.errno if isinstance(error, OSError) else None
    if code in (errno.ENOSPC, errno.EDQUOT):
        return HttpError(507, "there is no space left for this object")
    if code in (errno.EMFILE, errno.ENFILE):
        return HttpError(503, "too many files are open", ((b"Retry-After", b"1"),))
    log.error("the object store's disk failed: %s", error)
    return HttpError(500, "the object store's disk failed")
