"""Objects on a disk: atomic, durable, listed in key order.

One object is one file: the body, then what is known about it (the *footer*,
:mod:`prism.apps.objectfile`), so that one rename makes both visible and ``sendfile`` can send the
body from offset 0.

Below the root there are ``objects/`` (the tree), ``tmp/`` (uploads under way, one directory per
process, locked by it while it lives) and ``locks/`` (shared by all processes that use this root).

Names and their order: :mod:`prism.apps.keytree`.

**Durability.** File, then rename, then directory are synced before an upload is acknowledged. A
crash leaves at most a file in ``tmp/``, which the next start removes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from prism.apps.keytree import key_path, walk
from prism.apps.objectfile import ObjectMeta, StoreError, footer, read_meta, replicated_footer
from prism.errors import PrismError
from prism.replication.views import Version

__all__ = ["Condition", "DigestMismatch", "Objects", "Upload"]

MAX_FIELDS: Final = 2048  # octets of kept header fields

_STRIPES = 64
_RETRIES = 16

Condition = Callable[["ObjectMeta | None"], None]


class DigestMismatch(PrismError):
    """A body does not have the digest that was announced."""


class Objects:
    """The objects below one root directory. Every method may block on the disk.

    Several processes may share a root.

    Args:
        root: made if it is not there.
        durable: sync files and directories before an upload counts as done.
    """

    def __init__(self, root: Path, *, durable: bool = True) -> None:
        self.root = root
        self.durable = durable
        self._tree = os.fsencode(root / "objects")
        self._serial = 0
        for name in ("objects", "tmp", "locks"):
            (root / name).mkdir(parents=True, exist_ok=True)
        self.sync_directory(os.fsencode(root))
        self._locks = [threading.Lock() for _ in range(_STRIPES)]
        self._lock_files = [-1] * _STRIPES
        self._temporary, self._temporary_lock = self._own_temporary()
        self._remove_leftovers()

    def close(self) -> None:
        """Removes this process's unfinished uploads."""
        shutil.rmtree(self._temporary, ignore_errors=True)
        for fd in (self._temporary_lock, *self._lock_files):
            if fd >= 0:
                os.close(fd)
        self._temporary_lock = -1
        self._lock_files = [-1] * _STRIPES

    def _own_temporary(self) -> tuple[Path, int]:
        """A directory for uploads, locked so that a starting process leaves it alone."""
        while True:
            path = self.root / "tmp" / secrets.token_hex(8)
            path.mkdir()
            with contextlib.suppress(OSError):
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                fcntl.flock(fd, fcntl.LOCK_EX)
                if path.exists():
                    return path, fd
                os.close(fd)

    def _remove_leftovers(self) -> None:
        for path in (self.root / "tmp").iterdir():
            if path == self._temporary:
                continue
            with contextlib.suppress(OSError):
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
                finally:
                    os.close(fd)

    # -- one object -------------------------------------------------------------------------

    def path(self, key: bytes) -> bytes:
        """The path of a key's file; raises like :func:`~prism.apps.keytree.key_path`."""
        return self._tree + b"/" + key_path(key)

    def open(self, key: bytes) -> tuple[int, ObjectMeta] | None:
        """Opens an object for reading: its descriptor, for the caller to close, and its facts.

        Raises:
            StoreError: the file is damaged.
            ValueError: see :func:`key_path`.
        """
        opened = self.open_file(key)
        if opened is not None and opened[1].deleted:
            os.close(opened[0])
            return None
        return opened

    def open_file(self, key: bytes) -> tuple[int, ObjectMeta] | None:
        """As :meth:`open`, also for what stands in the place of a deleted object."""
        try:
            fd = os.open(self.path(key), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            return fd, read_meta(fd)
        except BaseException:
            os.close(fd)
            raise

    def meta(self, key: bytes) -> ObjectMeta | None:
        """An object's facts; raises like :meth:`open`."""
        opened = self.open(key)
        if opened is None:
            return None
        os.close(opened[0])
        return opened[1]

    def upload(self, key: bytes, fields: tuple[tuple[bytes, bytes], ...] = ()) -> Upload:
        """Begins a new object; nothing of it is seen before :meth:`Upload.commit`.

        Raises:
            ValueError: see :func:`key_path`; or the fields are over 2048 octets.
        """
        return Upload(self, key, self.temporary(), fields)

    def temporary(self) -> bytes:
        """A new name for a file that is of this process alone."""
        self._serial += 1
        return os.fsencode(self._temporary / str(self._serial))

    def delete(self, key: bytes, condition: Condition | None = None) -> bool:
        """Removes an object; whether there was one. ``condition`` as in :meth:`Upload.commit`."""
        path = self.path(key)
        with self._locked(key):
            if condition is not None:
                condition(self._current(key))
            try:
                os.unlink(path)  # noqa: PTH108 - paths are octets here
            except FileNotFoundError:
                return False
        parent = os.path.dirname(path)  # noqa: PTH120
        self.sync_directory(parent)
        with contextlib.suppress(OSError):
            while parent != self._tree:
                os.rmdir(parent)  # noqa: PTH106
                parent = os.path.dirname(parent)  # noqa: PTH120
        return True

    def install(self, temporary: bytes, key: bytes, condition: Condition | None) -> bool:
        """Gives a finished file its place; whether the key is new."""
        path = self.path(key)
        with self._locked(key):
            current = self._current(key)
            if condition is not None:
                condition(current)
            for _ in range(_RETRIES):
                try:
                    os.rename(temporary, path)  # noqa: PTH104
                    break
                except FileNotFoundError:  # no directory yet, or one that a deletion cleared away
                    self._make_directories(os.path.dirname(path))  # noqa: PTH120
            else:
                raise StoreError("the object's directory goes away again and again")
        self.sync_directory(os.path.dirname(path))  # noqa: PTH120
        return current is None

    def _current(self, key: bytes) -> ObjectMeta | None:
        """The facts of what would be replaced; a damaged file is nothing, so that it can be."""
        try:
            return self.meta(key)
        except StoreError:
            return None

    def _make_directories(self, path: bytes) -> None:
        missing = []
        while not os.path.isdir(path):  # noqa: PTH112
            missing.append(path)
            path = os.path.dirname(path)  # noqa: PTH120
        for directory in reversed(missing):
            try:
                os.mkdir(directory)  # noqa: PTH102
            except FileExistsError:
                pass  # another write made it meanwhile
            except FileNotFoundError:
                return  # cleared away behind us: the caller tries again
            self.sync_directory(os.path.dirname(directory))  # noqa: PTH120

    def sync_directory(self, path: bytes) -> None:
        """Have a directory's entries on disk, where that is wanted."""
        if not self.durable:
            return
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return  # emptied and removed meanwhile, with what was to be kept
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _locked(self, key: bytes) -> Iterator[None]:
        """Makes looking at an object and replacing it one step, among threads and processes."""
        stripe = hashlib.blake2b(key, digest_size=1).digest()[0] % _STRIPES
        with self._locks[stripe]:
            fd = self._lock_files[stripe]
            if fd < 0:
                path = self.root / "locks" / f"{stripe:02}"
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                self._lock_files[stripe] = fd
            fcntl.flock(fd, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(fd, fcntl.LOCK_UN)

    # -- listing ----------------------------------------------------------------------------

    def list(
        self, prefix: bytes = b"", start_after: bytes = b"", limit: int = 1000
    ) -> tuple[list[tuple[bytes, ObjectMeta]], bool]:
        """Up to ``limit`` objects in key order, and whether there are more.

        Args:
            prefix: only keys that begin so.
            start_after: only keys greater than this one.
            limit: at least 1.
        """
        found: list[tuple[bytes, ObjectMeta]] = []
        for key in walk(self._tree, prefix, start_after, limit + 1):
            try:
                meta = self.meta(key)
            except StoreError:
                continue  # not an object: damaged, or put there by somebody else
            if meta is None:
                continue
            if len(found) == limit:
                return found, True
            found.append((key, meta))
        return found, False


class Upload:
    """A body on its way to the disk. Methods may be called from any thread, one after another."""

    def __init__(
        self,
        objects: Objects,
        key: bytes,
        temporary: bytes,
        fields: tuple[tuple[bytes, bytes], ...],
    ) -> None:
        objects.path(key)
        self._objects = objects
        self._key = key
        self._temporary = temporary
        self._fields = b"\0".join(part for field in fields for part in field)
        if len(self._fields) > MAX_FIELDS:
            raise ValueError(f"the header fields to keep are over {MAX_FIELDS} octets")
        self._kept = fields
        self._digest = hashlib.md5(usedforsecurity=False)
        self._size = 0
        self._fd = -1
        self._over = False
        self._lock = threading.Lock()

    def write(self, pieces: Sequence[bytes]) -> None:
        """Appends to the body; does nothing when the upload was given up meanwhile."""
        with self._lock:
            if not self._over:
                self._write(pieces)

    def _write(self, pieces: Sequence[bytes]) -> None:
        if self._over:
            raise StoreError("the upload was given up")
        if self._fd < 0:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._fd = os.open(self._temporary, flags, 0o666)
        for piece in pieces:
            self._append(piece)
            self._digest.update(piece)
            self._size += len(piece)

    def _append(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def commit(
        self,
        pieces: Sequence[bytes] = (),
        md5: bytes | None = None,
        condition: Condition | None = None,
    ) -> tuple[ObjectMeta, bool]:
        """Makes the object visible, whole and durable.

        Args:
            pieces: the last of the body.
            md5: the digest the body must have.
            condition: called with the facts of the object that would be replaced, or ``None``,
                in one step with replacing it; raises to refuse.

        Returns:
            The new object's facts, and whether the key is new.

        Raises:
            DigestMismatch: the body's digest is not ``md5``.
        """
        with self._lock:
            digest = self._checked(pieces, md5)
            meta = ObjectMeta(self._size, int(time.time()), digest, self._kept)
            self._close_with(footer(meta))
            created = self._objects.install(self._temporary, self._key, condition)
            self._over = True
            return meta, created

    def finish(self, pieces: Sequence[bytes] = (), md5: bytes | None = None) -> None:
        """The body is whole; arguments and errors as of :meth:`commit`. :meth:`seal` comes next."""
        with self._lock:
            self._checked(pieces, md5)

    def body(self, offset: int, n: int) -> bytes:
        """Octets of the body after :meth:`finish`; empty at its end."""
        with self._lock:
            return os.pread(self._fd, min(n, self._size - offset), offset)

    def digest(self) -> bytes:
        """The body's MD5."""
        return self._digest.digest()

    @property
    def size(self) -> int:
        """Octets of the body so far."""
        return self._size

    def seal(self, version: Version, *, deleted: bool = False) -> tuple[bytes, ObjectMeta]:
        """Makes a durable file of a version that nobody sees: its path and facts.

        The file is the caller's then.
        """
        with self._lock:
            digest = self._checked((), None)
            meta = ObjectMeta(
                self._size, int(time.time()), digest, self._kept, version, self._key, deleted
            )
            self._close_with(replicated_footer(meta))
            self._over = True
            return self._temporary, meta

    def _checked(self, pieces: Sequence[bytes], md5: bytes | None) -> bytes:
        self._write(pieces)
        digest = self._digest.digest()
        if md5 is not None and md5 != digest:
            raise DigestMismatch("the body's MD5 is not the one announced")
        return digest

    def _close_with(self, end: bytes) -> None:
        self._append(end)
        if self._objects.durable:
            os.fsync(self._fd)
        os.close(self._fd)
        self._fd = -1

    def abandon(self) -> None:
        """Removes what was written, unless it is committed; calling it again does nothing."""
        with self._lock:
            if self._over:
                return
            self._over = True
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._temporary)  # noqa: PTH108
