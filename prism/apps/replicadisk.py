"""The disk of a node that replicates: versions of objects, and writes on their way.

Beside ``objects/`` (see :mod:`prism.apps.objects`) the root has ``pending/``, with a file for each
key that is staged, and ``replication/state``: what the node must not forget of views. A deletion
is a file in the object's place that says so; it goes when it is no use any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, Final, TypeVar

from prism.apps.keytree import key_path, walk
from prism.apps.objectfile import ObjectMeta, StoreError, read_meta
from prism.apps.objects import Objects
from prism.errors import ConfigError, ProtocolError
from prism.replication.interfaces import Refusal
from prism.replication.views import NO_VERSION, Saved, Version, dump, load

__all__ = ["Disk", "Kept", "Sending", "Spool", "StateFile"]

T = TypeVar("T")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_PIECE: Final = 256 * 1024


class Kept:
    """A whole file, durable, that has no place yet."""

    def __init__(self, path: bytes, meta: ObjectMeta) -> None:
        self.path = path
        self.meta = meta
        self.placed = False


class Sending:
    """An object's file on its way to another node.

    Attributes:
        size: octets of the file.
        body: octets of it that are the object's body.
    """

    def __init__(self, fd: int, meta: ObjectMeta, run: Callable[..., Any]) -> None:
        self.meta = meta
        self.size = os.fstat(fd).st_size
        self.body = meta.size
        self._fd = fd
        self._at = 0
        self._run = run

    async def read(self) -> bytes:
        """The next piece; empty at the end.

        Raises:
            OSError: the disk has failed, or the file was cut.
        """
        length = min(_PIECE, self.size - self._at)
        if not length:
            return b""
        if self.size <= _PIECE:  # most likely in the page cache
            data = os.pread(self._fd, length, self._at)
        else:
            data = await self._run(os.pread, self._fd, length, self._at)
        if not data:
            raise OSError(errno.EIO, "an object's file was cut")
        self._at += len(data)
        return data

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Spool:
    """An object's file as it comes from another node."""

    def __init__(self, disk: Disk, size: int, body: int) -> None:
        self._disk = disk
        self._path = disk.objects.temporary()
        self._fd = -1
        self._left = size
        self._body = body
        self._digest = hashlib.md5(usedforsecurity=False)

    async def write(self, data: bytes) -> None:
        """Keep a piece."""
        await self._disk.run(self._write, data)

    def _write(self, data: bytes) -> None:
        if self._fd < 0:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._fd = os.open(self._path, flags, 0o666)
        self._left -= len(data)
        view = memoryview(data)
        self._digest.update(view[: self._body])
        self._body -= min(self._body, len(view))
        while view:
            view = view[os.write(self._fd, view) :]

    async def finish(self, key: bytes, version: Version) -> Kept:
        """All of it has come.

        Raises:
            ProtocolError: it is not what it was said to be.
        """
        return await self._disk.run(self._finish, key, version)

    def _finish(self, key: bytes, version: Version) -> Kept:
        try:
            meta = read_meta(self._fd)
        except StoreError as error:
            raise ProtocolError(f"another node's object is damaged: {error}") from None
        good = meta.key == key and meta.version == version and meta.md5 == self._digest.digest()
        if self._left or not good:
            raise ProtocolError("another node's object is not what it was said to be")
        if self._disk.objects.durable:
            os.fsync(self._fd)
        os.close(self._fd)
        self._fd = -1
        return Kept(self._path, meta)

    def abandon(self) -> None:
        """Remove what has come."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)  # noqa: PTH108 - paths are octets here


class Disk:
    """:class:`prism.replication.interfaces.Storage` over an :class:`Objects`.

    Args:
        objects: where they are.
        pool: for what blocks.

    Attributes:
        staged: as of ``Storage``.
        marked: whether there may be marks of deletion.
        tree: path of the objects' tree.
    """

    def __init__(self, objects: Objects, pool: Executor) -> None:
        self.objects = objects
        self.staged: dict[bytes, Version] = {}
        self.marked = True
        self._pool = pool
        self._pending = os.fsencode(objects.root / "pending")
        self.tree = os.fsencode(objects.root / "objects")
        os.makedirs(self._pending, exist_ok=True)  # noqa: PTH103
        self._find_staged()

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run in the pool."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    def _find_staged(self) -> None:
        for name in os.listdir(self._pending):  # noqa: PTH208
            path = self._pending + b"/" + name
            meta = _meta_at(path)
            if meta is not None and name == _name(meta.key):
                self.staged[meta.key] = meta.version
            else:  # cannot be of ours
                os.unlink(path)  # noqa: PTH108

    def spool(self, size: int, body: int) -> Spool:
        """For a file that comes from another node."""
        return Spool(self, size, body)

    # -- Storage --------------------------------------------------------------------------------

    async def version(self, key: bytes) -> Version:
        """See :class:`Storage`."""
        return self._version(key)

    def _version(self, key: bytes) -> Version:
        try:
            opened = self.objects.open_file(key)
        except StoreError:
            return NO_VERSION  # so that it is replaced
        if opened is None:
            return NO_VERSION
        os.close(opened[0])
        return opened[1].version

    async def stage(self, key: bytes, version: Version, blob: Kept) -> None:
        """See :class:`Storage`."""
        try:
            await self.run(self._stage, key, blob)
        except OSError as error:
            if error.errno in _NO_SPACE:
                raise Refusal(507, "there is no space left for this object") from None
            raise
        self.staged[key] = version
        self.marked |= blob.meta.deleted

    def _stage(self, key: bytes, blob: Kept) -> None:
        os.rename(blob.path, self._staged_path(key))  # noqa: PTH104
        blob.placed = True
        self.objects.sync_directory(self._pending)

    async def install(self, key: bytes) -> None:
        """See :class:`Storage`."""
        await self.run(self.objects.install, self._staged_path(key), key, None)
        self.staged.pop(key)

    async def unstage(self, key: bytes) -> None:
        """See :class:`Storage`."""
        if self.staged.pop(key, None) is not None:
            await self.run(_unlink, self._staged_path(key))

    async def blob(self, key: bytes) -> Sending:
        """See :class:`Storage`."""
        fd = os.open(self._staged_path(key), os.O_RDONLY | os.O_CLOEXEC)
        return self._sending(fd, read_meta(fd))

    async def installed(self, key: bytes) -> tuple[Version, Sending] | None:
        """See :class:`Storage`."""
        opened = self.objects.open_file(key)
        if opened is None:
            return None
        return opened[1].version, self._sending(*opened)

    def _sending(self, fd: int, meta: ObjectMeta) -> Sending:
        return Sending(fd, meta, self.run)

    async def page(self, after: bytes, limit: int) -> tuple[list[tuple[bytes, Version]], bool]:
        """See :class:`Storage`."""
        return await self.run(self._page, after, limit)

    def _page(self, after: bytes, limit: int) -> tuple[list[tuple[bytes, Version]], bool]:
        keys: list[bytes] = []
        for key in walk(self.tree, b"", after, limit + 1):
            if len(keys) == limit:
                return [(each, self._version(each)) for each in keys], True
            keys.append(key)
        return [(each, self._version(each)) for each in keys], False

    async def put(self, key: bytes, version: Version, blob: Kept) -> None:
        """See :class:`Storage`."""
        await self.run(self.objects.install, blob.path, key, None)
        blob.placed = True
        self.marked |= blob.meta.deleted

    async def discard(self, blob: Kept) -> None:
        """See :class:`Storage`."""
        if not blob.placed:
            await self.run(_unlink, blob.path)

    async def remove(self, key: bytes, version: Version) -> None:
        """See :class:`Storage`."""
        if self._version(key) == version:
            await self.run(self.objects.delete, key)

    # -- listing --------------------------------------------------------------------------------

    def list(
        self, prefix: bytes, after: bytes, limit: int
    ) -> tuple[Sequence[tuple[bytes, ObjectMeta]], bool]:
        """As :meth:`Objects.list`, marks of deletion among them. May block."""
        found: list[tuple[bytes, ObjectMeta]] = []
        for key in walk(self.tree, prefix, after, limit + 1):
            meta = self.meta(key)
            if meta is None:
                continue
            if len(found) == limit:
                return found, True
            found.append((key, meta))
        return found, False

    def meta(self, key: bytes) -> ObjectMeta | None:
        """What a key's file says, also a mark of deletion; ``None``: there is no whole one."""
        return _meta_at(self.tree + b"/" + key_path(key))

    def _staged_path(self, key: bytes) -> bytes:
        return self._pending + b"/" + _name(key)


def _name(key: bytes) -> bytes:
    return hashlib.blake2b(key, digest_size=24).hexdigest().encode()


def _meta_at(path: bytes) -> ObjectMeta | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return read_meta(fd)
    except StoreError:
        return None
    finally:
        os.close(fd)


def _unlink(path: bytes) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)  # noqa: PTH108


class StateFile:
    """``replication/state`` below a store's root.

    Args:
        root: the store's.
        layout: what must not change in a store's life: the nodes and the number of replicas.

    Attributes:
        saved: what the last life left.
        serial: where the numbers of this life's messages begin: behind all earlier ones.

    Raises:
        ConfigError: the store is one of another layout, or of objects that are not replicated.
    """

    def __init__(self, root: Path, layout: dict[str, Any]) -> None:
        self._path = root / "replication" / "state"
        self._layout = layout
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self.saved, last = self._read(root)
        # By the clock, for a node that has lost its disk; by the last one, if the clock was put
        # back.
        self.serial = max(int(time.time() * 1e6), last + (1 << 20))
        self.write(self.saved)

    def _read(self, root: Path) -> tuple[Saved, int]:
        try:
            text = self._path.read_bytes()
        except FileNotFoundError:
            if any((root / "objects").iterdir()):
                raise ConfigError(
                    f"{root} has objects that were not replicated: begin with an empty directory, "
                    "and put them in through the service"
                ) from None
            return Saved(), 0
        try:
            values = json.loads(text)
            layout, serial, saved = values["layout"], int(values["serial"]), values["saved"]
            found = load(json.dumps(saved).encode())
        except (ValueError, KeyError, TypeError, ProtocolError) as error:
            raise ConfigError(
                f"{self._path} is damaged ({error}): empty {root}, and the node gets all it should "
                "have from the others"
            ) from None
        if layout != self._layout:
            raise ConfigError(
                f"{root} was begun with other nodes, weights or replicas ({layout}): these cannot "
                "be changed in a store that replicates"
            )
        return found, serial

    def write(self, saved: Saved) -> None:
        """Have it on disk. Blocks."""
        self.saved = saved
        text = json.dumps(
            {"layout": self._layout, "serial": self.serial, "saved": json.loads(dump(saved))}
        )
        temporary = self._path.with_suffix(".new")
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)
        fd = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
