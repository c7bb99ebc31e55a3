"""How keys become paths, and how a tree of such paths is walked in key order.

A key's segments become directories, its last one a file. A name's first letter says what it is:
``d`` a segment that a slash follows, ``o`` an object, ``c`` the first 80 octets of a longer
segment. Octets outside ``A-Za-z0-9._-`` are percent-encoded. So ``a`` and ``a/b`` live side by
side, no key can name anything outside the tree, and no name or path outgrows Linux's limits.

Comparing siblings by their decoded name, with a slash behind a ``d``, is comparing keys octet by
octet. Walking reads only the directories on its way: time is proportional to the number of
entries in those, memory to the page's size (times the depth).
"""

from __future__ import annotations

import heapq
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Final
from urllib.parse import unquote_to_bytes

__all__ = ["MAX_KEY", "key_path", "walk"]

MAX_KEY: Final = 1024  # octets
_PIECE = 80  # octets of a segment in one name; encoded they are 241 at most, of 255 allowed
_UNSAFE = re.compile(rb"[^A-Za-z0-9._-]")


@lru_cache(maxsize=4096)
def key_path(key: bytes) -> bytes:
    """The path of a key's file, relative to the tree.

    Raises:
        ValueError: the key is empty, over 1024 octets or not in its normal form.
    """
    if not 0 < len(key) <= MAX_KEY or b"\0" in key or key.startswith(b"/") or b"//" in key:
        raise ValueError("not a key")
    names = []
    segments = key.split(b"/")
    for index, segment in enumerate(segments):
        last = index + 1 == len(segments)
        rest = segment
        # A piece that is full and followed by anything, a slash too, is a "c": then the slash is
        # a sibling of the octets that may come in its place, and siblings sort rightly.
        while len(rest) > _PIECE or (len(rest) == _PIECE and not last):
            names.append(b"c" + _encode(rest[:_PIECE]))
            rest = rest[_PIECE:]
        names.append((b"o" if last else b"d") + _encode(rest))
    return b"/".join(names)


def _encode(piece: bytes) -> bytes:
    return _UNSAFE.sub(lambda match: b"%%%02X" % match[0][0], piece)


def walk(tree: bytes, prefix: bytes, after: bytes, page: int) -> Iterator[bytes]:
    """The keys below ``tree`` that begin with ``prefix`` and are greater than ``after``, in order.

    ``page`` bounds the entries of one directory held in memory, and should be about the number of
    keys wanted. Files that came or went meanwhile may or may not be told.
    """
    stack = [_children(tree, b"", prefix, after, page)]
    while stack:
        for key, path, is_object in stack[-1]:
            if not is_object:
                stack.append(_children(path, key, prefix, after, page))
                break
            yield key
        else:
            stack.pop()


def _children(
    directory: bytes, base: bytes, prefix: bytes, after: bytes, page: int
) -> Iterator[tuple[bytes, bytes, bool]]:
    """A directory's entries in order, in bounded batches: (key or its start, path, leaf?)."""
    last: tuple[bytes, int] | None = None
    while True:
        entries = _entries(directory, base, prefix, after, last)
        batch = heapq.nsmallest(page, entries)
        for key, rank, path in batch:
            yield key, path, rank == 0
        if len(batch) < page:
            return
        last = batch[-1][:2]


def _entries(
    directory: bytes,
    base: bytes,
    prefix: bytes,
    after: bytes,
    last: tuple[bytes, int] | None,
) -> Iterator[tuple[bytes, int, bytes]]:
    """What of a directory can hold wanted keys: (key or its start, 0 for objects, path)."""
    try:
        scan = os.scandir(directory)
    except FileNotFoundError:
        return
    with scan:
        for entry in scan:
            kind, key = entry.name[:1], base + unquote_to_bytes(entry.name[1:])
            if kind == b"o":
                wanted = key.startswith(prefix) and key > after
                rank = 0
            elif kind in (b"d", b"c"):
                if kind == b"d":
                    key += b"/"
                inside = key.startswith(prefix) or prefix.startswith(key)
                wanted = inside and (key > after or after.startswith(key))
                rank = 1
            else:
                continue
            if wanted and (last is None or (key, rank) > last):
                yield key, rank, entry.path
