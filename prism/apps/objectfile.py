"""An object's file: the body, then what is known about it (the *footer*).

Objects that are not replicated::

    body | kept header fields | size (8) modified (8) MD5 (16) length of the fields (4) magic (8)

Replicated ones also have their key, their version and a mark if this is a deletion::

    body | fields | key | size (8) modified (8) MD5 (16) epoch (8) serial (8) flags (1)
                          length of the key (2) length of the fields (4) magic (8)
"""

from __future__ import annotations

import os
import struct
from typing import Final, NamedTuple

from prism.errors import PrismError
from prism.replication.views import NO_VERSION, Version

__all__ = ["ObjectMeta", "StoreError", "footer", "read_meta", "replicated_footer"]

_FOOTER = struct.Struct("!QQ16sI8s")
_MAGIC = b"PrismOb1"
_REPLICATED = struct.Struct("!QQ16sQQBHI8s")
_REPLICATED_MAGIC = b"PrismOb2"
_DELETED: Final = 1
_TAIL = 512  # octets read at once from a file's end: footer and, nearly always, the rest


class StoreError(PrismError):
    """A file in the store is not a whole object."""


class ObjectMeta(NamedTuple):
    """What is known about an object."""

    size: int  # octets
    modified: int  # seconds since the epoch
    md5: bytes  # 16 octets
    fields: tuple[tuple[bytes, bytes], ...]  # header fields kept with it
    version: Version = NO_VERSION  # of a replicated one
    key: bytes = b""  # of a replicated one
    deleted: bool = False  # whether it says that there is no object any more

    @property
    def etag(self) -> bytes:
        """A strong entity tag (RFC 9110, section 8.8.3): the body's MD5, as S3 does."""
        return b'"%s"' % self.md5.hex().encode()


def footer(meta: ObjectMeta) -> bytes:
    """What comes behind the body of an object that is not replicated."""
    fields = _packed(meta)
    return fields + _FOOTER.pack(meta.size, meta.modified, meta.md5, len(fields), _MAGIC)


def replicated_footer(meta: ObjectMeta) -> bytes:
    """What comes behind the body of a replicated object, or of its deletion."""
    fields = _packed(meta)
    fixed = _REPLICATED.pack(
        meta.size,
        meta.modified,
        meta.md5,
        *meta.version,
        _DELETED if meta.deleted else 0,
        len(meta.key),
        len(fields),
        _REPLICATED_MAGIC,
    )
    return fields + meta.key + fixed


def _packed(meta: ObjectMeta) -> bytes:
    return b"\0".join(part for field in meta.fields for part in field)


def read_meta(fd: int) -> ObjectMeta:
    """What an object's file says.

    Raises:
        StoreError: it is damaged, or no object's.
    """
    total = os.fstat(fd).st_size
    tail = os.pread(fd, _TAIL, max(0, total - _TAIL))
    if tail.endswith(_REPLICATED_MAGIC) and len(tail) >= _REPLICATED.size:
        return _read_replicated(fd, tail, total)
    if len(tail) < _FOOTER.size:
        raise StoreError("a file in the store is too short to be an object")
    size, modified, md5, length, magic = _FOOTER.unpack_from(tail, len(tail) - _FOOTER.size)
    if magic != _MAGIC or size + length + _FOOTER.size != total:
        raise StoreError("a file in the store is not a whole object")
    block = _block(fd, tail, size, length, _FOOTER.size)
    return ObjectMeta(size, modified, md5, _unpacked(block))


def _read_replicated(fd: int, tail: bytes, total: int) -> ObjectMeta:
    values = _REPLICATED.unpack_from(tail, len(tail) - _REPLICATED.size)
    size, modified, md5, epoch, serial, flags, key_length, length, _ = values
    if size + length + key_length + _REPLICATED.size != total:
        raise StoreError("a file in the store is not a whole object")
    block = _block(fd, tail, size, length + key_length, _REPLICATED.size)
    fields, key = _unpacked(block[:length]), block[length:]
    deleted = bool(flags & _DELETED)
    return ObjectMeta(size, modified, md5, fields, Version(epoch, serial), key, deleted)


def _block(fd: int, tail: bytes, size: int, length: int, fixed: int) -> bytes:
    """The octets between body and footer."""
    if length + fixed <= len(tail):
        return tail[len(tail) - fixed - length : len(tail) - fixed]
    return os.pread(fd, length, size)


def _unpacked(block: bytes) -> tuple[tuple[bytes, bytes], ...]:
    if not block:
        return ()
    parts = block.split(b"\0")
    if len(parts) % 2:
        raise StoreError("a file in the store has damaged header fields")
    return tuple(zip(parts[::2], parts[1::2], strict=True))
