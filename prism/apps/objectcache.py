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


def object_fields(meta: ObjectMeta) -> list[tuple[bytes, bytes]]:
    """The header fields of every answer that tells of an object."""
    return [
        *meta.fields,
        (b"ETag", meta.etag),
        (b"Last-Modified", http_date(meta.modified)),
        (b"Accept-Ranges", b"bytes"),
    ]


class ObjectCache:
    """Objects by path. For one thread.

    Args:
        room: octets to hold at most, everything counted.
    """

    __slots__ = ("_entries", "_left")

    def __init__(self, room: int = 8 << 20) -> None:
        self._left = room
        self._entries: dict[bytes, Ready] = {}  # the one used longest ago first

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, path: bytes) -> Ready | None:
        """The object whose file is at ``path`` now, if it is kept."""
        found = self._entries.pop(path, None)
        if found is None:
            return None
        try:
            current = _stamp(os.stat(path))  # noqa: PTH116 - paths are octets here
        except OSError:
            current = None
        if current != found.stamp:
            self._left += len(found.body) + _OVERHEAD
            return None
        self._entries[path] = found
        return found

    def keep(self, path: bytes, fd: int, meta: ObjectMeta) -> Ready | None:
        """Read an open object and keep it; ``None`` where it is too large, or too young.

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
        ready = Ready(_stamp(status), field_lines(fields), body)
        self._left -= len(body) + _OVERHEAD
        self._entries[path] = ready
        while self._left < 0:
            oldest = self._entries.pop(next(iter(self._entries)))
            self._left += len(oldest.body) + _OVERHEAD
        return ready


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
