"""Small objects in memory: sent only while their file is the one they were read from."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from prism.apps import objectcache
from prism.apps.objectcache import LARGEST, ObjectCache
from prism.apps.objects import Objects

Store = Callable[[bytes, bytes], bytes]


@pytest.fixture
def objects(tmp_path: Path) -> Objects:
    return Objects(tmp_path, durable=False)


def put(objects: Objects, key: bytes, body: bytes, *fields: tuple[bytes, bytes]) -> bytes:
    objects.upload(key, fields).commit([body])
    return objects.path(key)


def keep(cache: ObjectCache, objects: Objects, key: bytes) -> objectcache.Ready | None:
    opened = objects.open(key)
    assert opened is not None
    try:
        return cache.keep(objects.path(key), *opened)
    finally:
        os.close(opened[0])


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as old at once."""
    monkeypatch.setattr(objectcache, "SETTLED", -(1 << 62))


@pytest.mark.usefixtures("settled")
def test_an_object_is_kept_until_its_file_changes(objects: Objects) -> None:
    cache = ObjectCache()
    path = put(objects, b"a/b", b"first", (b"Content-Type", b"text/plain"))
    assert cache.get(path) is None
    kept = keep(cache, objects, b"a/b")
    assert kept is not None
    assert kept.body == b"first"
    assert kept.lines.startswith(b"Content-Type: text/plain\r\nETag: ")
    assert cache.get(path) is kept
    put(objects, b"a/b", b"again")  # as long as before
    assert cache.get(path) is None
    assert len(cache) == 0
    assert keep(cache, objects, b"a/b") is not None
    objects.delete(b"a/b")
    assert cache.get(path) is None


def test_what_may_change_unseen_is_not_kept(objects: Objects) -> None:
    """Two changes within one tick of the file system's clock leave the same times."""
    cache = ObjectCache()
    path = put(objects, b"k", b"x")
    assert keep(cache, objects, b"k") is None
    assert cache.get(path) is None
    before = time.time_ns() - 60_000_000_000
    os.utime(path, ns=(before, before))  # this cannot set the time of the change
    assert keep(cache, objects, b"k") is None


@pytest.mark.usefixtures("settled")
def test_large_ones_are_not_kept(objects: Objects) -> None:
    cache = ObjectCache()
    put(objects, b"large", bytes(LARGEST + 1))
    put(objects, b"fits", bytes(LARGEST))
    assert keep(cache, objects, b"large") is None
    assert keep(cache, objects, b"fits") is not None


@pytest.mark.usefixtures("settled")
def test_the_room_is_bounded_and_the_oldest_goes(objects: Objects) -> None:
    cache = ObjectCache(room=10 * 2024)
    paths = [put(objects, b"%d" % number, bytes(1000)) for number in range(12)]
    for number in range(10):
        keep(cache, objects, b"%d" % number)
    assert cache.get(paths[0]) is not None  # the one used last
    keep(cache, objects, b"10")
    keep(cache, objects, b"11")
    assert len(cache) == 10
    assert [cache.get(path) is not None for path in paths] == [True, False, False, *[True] * 9]
