"""Small objects kept in memory, ready to be sent: bounded, and never staler than the disk.

An entry is used only while the file at its path is the one it was read from: the same inode, with
the same times and size. A file that has just changed could be replaced by another one with the
same times, since clocks tick; so nothing is kept that is younger than :data:`SETTLED`.
"""

from __future__ import annotations

import os
import time
from typing import Final, NamedTuple

from prism.apps.conditions import http_date
from prism.apps.objectfile import ObjectMeta
from prism.http.exchange import Headers, field_lines

__all__ = ["LARGEST", "SETTLED", "ObjectCache", "Ready", "object_fields"]

LARGEST: Final = 16 * 1024  # octets of a body; larger ones go out by sendfile(2)
SETTLED: Final = 2_000_000_000  # nanoseconds since a file's last change
_OVERHEAD = 1024  # octets that an entry counts for beside its body

Stamp = tuple[int, int, int, int]


class Ready(NamedTuple):
    """An object that can be sent as it is."""

    stamp: Stamp
    lines: bytes  # header fields, with their line ends
    body: bytes
    path: bytes


def object_fields(meta: ObjectMeta) -> list[tuple[bytes, bytes]]:
    """The header fields of every answer that tells of an object."""
    return [
        *meta.fields,
        (b"ETag", meta.etag),
        (b"Last-Modified", http_date(meta.modified)),
        (b"Accept-Ranges", b"bytes"),
    ]


class ObjectCache:
    """Objects by key. For one thread.

    Args:
        room: octets to hold at most, everything counted.

    Attributes:
        entries: what is kept; the one used longest ago first.
    """

    __slots__ = ("_left", "entries")

    def __init__(self, room: int = 8 << 20) -> None:
        self._left = room
        self.entries: dict[bytes, Ready] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def get(self, key: bytes) -> Ready | None:
        """The object, if it is kept and its file is still the same."""
        found = self.entries.pop(key, None)
        if found is None:
            return None
        try:
            current = _stamp(os.stat(found.path))  # noqa: PTH116 - paths are octets here
        except OSError:
            current = None
        if current != found.stamp:
            self._left += len(found.body) + _OVERHEAD
            return None
        self.entries[key] = found
        return found

    def keep(self, key: bytes, path: bytes, fd: int, meta: ObjectMeta) -> Ready | None:
        """Read an open object and keep it; ``None`` where it is too large, or too young.

        Args:
            key: of the object.
            path: of the file, where it was opened.
            fd: the open file.
            meta: what it says.

        Raises:
            ValueError: its fields cannot be sent.
        """
        if meta.size > LARGEST:
            return None
        try:
            status, body = os.fstat(fd), os.pread(fd, meta.size, 0)
        except OSError:
            return None  # whoever sends it will meet this again
        age = time.time_ns() - max(status.st_ctime_ns, status.st_mtime_ns)
        if age < SETTLED or len(body) != meta.size:
            return None
        fields: Headers = object_fields(meta)
        if any(name.lower() in (b"date", b"server") for name, _ in fields):
            return None
        ready = Ready(_stamp(status), field_lines(fields), body, path)
        self._left -= len(body) + _OVERHEAD
        self.entries[key] = ready
        while self._left < 0:
            oldest = self.entries.pop(next(iter(self.entries)))
            self._left += len(oldest.body) + _OVERHEAD
        return ready


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
