"""The disk of a node that replicates: formats, what survives a restart, what is refused."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism.apps.marks import Marks
from prism.apps.objectfile import ObjectMeta, StoreError, footer, read_meta, replicated_footer
from prism.apps.objects import Objects
from prism.apps.replicadisk import Disk, Kept, StateFile
from prism.apps.replicalisting import merge_replicas
from prism.errors import ConfigError, ProtocolError
from prism.replication.rules import KeyLocks
from prism.replication.views import NO_VERSION, Saved, Version, View

LAYOUT = {"nodes": [["a", 1.0], ["b", 1.0]], "replicas": 2}
FIELDS = st.lists(
    st.tuples(st.just(b"Content-Type"), st.text("abc/;= ").map(str.encode)), max_size=3
)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[[], Disk]]:
    pools: list[tuple[Objects, ThreadPoolExecutor]] = []

    def make() -> Disk:
        pools.append((Objects(tmp_path), ThreadPoolExecutor(2)))
        return Disk(*pools[-1])

    yield make
    for objects, pool in pools:
        pool.shutdown()
        objects.close()


def kept(disk: Disk, key: bytes, version: Version, body: bytes, *, deleted: bool = False) -> Kept:
    upload = disk.objects.upload(key, ((b"Content-Type", b"text/plain"),))
    upload.write([body])
    return Kept(*upload.seal(version, deleted=deleted))


async def copied(source: Disk, target: Disk, key: bytes, change: Any = None) -> Kept:
    """One object from disk to disk, as the network does it."""
    found = await source.installed(key)
    assert found is not None
    version, sending = found
    spool = target.spool(sending.size, sending.body)
    try:
        while data := await sending.read():
            await spool.write(change(data) if change else data)
        return await spool.finish(key, version)
    finally:
        sending.close()
        spool.abandon()


@given(st.binary(max_size=40), FIELDS, st.binary(min_size=1, max_size=700), st.booleans())
def test_both_formats_are_read_back(
    body: bytes, fields: list[tuple[bytes, bytes]], key: bytes, deleted: bool
) -> None:
    old = ObjectMeta(len(body), 17, bytes(16), tuple(fields))
    new = old._replace(version=Version(3, 1 << 50), key=key, deleted=deleted)
    for meta, end in ((old, footer(old)), (new, replicated_footer(new))):
        fd = os.memfd_create("object")
        try:
            os.write(fd, body + end)
            assert read_meta(fd) == meta
            os.ftruncate(fd, len(body + end) - 1)
            with pytest.raises(StoreError):
                read_meta(fd)
        finally:
            os.close(fd)


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(work())  # type: ignore[arg-type]


def test_what_is_staged_is_seen_when_it_is_installed(opened: Callable[[], Disk]) -> None:
    async def work() -> None:
        disk, key, version = opened(), b"a/b", Version(1, 5)
        await disk.stage(key, version, kept(disk, key, version, b"one"))
        assert disk.staged == {key: version} and disk.objects.meta(key) is None
        assert await disk.version(key) == NO_VERSION
        again = opened()  # a node that was killed finds it
        assert again.staged == {key: version}
        await again.install(key)
        assert again.staged == {} and await again.version(key) == version
        meta = again.objects.meta(key)
        assert meta is not None and (meta.size, meta.fields) == (
            3,
            ((b"Content-Type", b"text/plain"),),
        )
        assert await again.page(b"", 10) == ([(key, version)], False)
        assert opened().staged == {}

    run(work)


def test_a_deletion_has_a_version_and_is_no_object(opened: Callable[[], Disk]) -> None:
    async def work() -> None:
        disk, key = opened(), b"k"
        for version, deleted in ((Version(1, 1), False), (Version(1, 2), True)):
            await disk.stage(key, version, kept(disk, key, version, b"", deleted=deleted))
            await disk.install(key)
        assert disk.objects.meta(key) is None and disk.objects.list() == ([], False)
        assert await disk.version(key) == Version(1, 2)
        assert [meta.deleted for _, meta in disk.list(b"", b"", 5)[0]] == [True]
        await disk.remove(key, Version(1, 1))
        assert await disk.version(key) == Version(1, 2)
        await disk.remove(key, Version(1, 2))
        assert await disk.version(key) == NO_VERSION

    run(work)


class _Part:
    """As much of a replicator as marks ask for."""

    def __init__(self, serving: int) -> None:
        self.view = View(3, tuple("abc"[:serving]))
        self.membership = SimpleNamespace(nodes=("a", "b", "c"))
        self.lock = KeyLocks()


def test_marks_of_deletion_go_when_all_serve(opened: Callable[[], Disk]) -> None:
    async def work() -> None:
        disk = opened()
        for number in range(600):
            key, version = b"k/%d" % number, Version(1, 1 + number)
            copy = kept(disk, key, version, b"", deleted=number % 2 == 0)
            await disk.put(key, version, copy)
        assert disk.marked
        marks = Marks(_Part(2), disk)  # type: ignore[arg-type]
        await marks.remove_old(-60.0)
        assert len(disk.list(b"", b"", 999)[0]) == 600
        marks = Marks(_Part(3), disk)  # type: ignore[arg-type]
        disk.marked = False
        await marks.remove_old(60.0)  # they are not so old
        assert len(disk.list(b"", b"", 999)[0]) == 600 and disk.marked
        await marks.remove_old(-60.0)
        left = disk.list(b"", b"", 999)[0]
        assert len(left) == 300 and not any(meta.deleted for _, meta in left)

    run(work)


def test_a_copy_is_checked(opened: Callable[[], Disk], tmp_path: Path) -> None:
    async def work() -> None:
        disk, key, version = opened(), b"k", Version(2, 1)
        await disk.stage(key, version, kept(disk, key, version, b"x" * 700_000))
        await disk.install(key)
        for change in (lambda data: b"y" + data[1:], lambda data: data + b"z"):
            with pytest.raises((ProtocolError, StoreError)):
                await copied(disk, disk, key, change)
        copy = await copied(disk, disk, key)
        assert copy.meta.size == 700_000
        await disk.discard(copy)
        left = [path for path in (tmp_path / "tmp").rglob("*") if path.is_file()]
        assert left == []

    run(work)


def test_a_damaged_object_counts_as_missing(opened: Callable[[], Disk]) -> None:
    async def work() -> None:
        disk, key, version = opened(), b"k", Version(2, 1)
        await disk.stage(key, version, kept(disk, key, version, b"x"))
        await disk.install(key)
        with open(disk.objects.path(key), "ab") as file:  # noqa: PTH123
            file.write(b"?")
        assert await disk.version(key) == NO_VERSION
        assert await disk.page(b"", 9) == ([(key, NO_VERSION)], False)

    run(work)


def test_the_state_is_kept_and_belongs_to_a_layout(tmp_path: Path) -> None:
    (tmp_path / "objects").mkdir()
    first = StateFile(tmp_path, LAYOUT)
    saved = Saved(view=View(4, ("a",), ("b",)), votes_from=0, whole=True)
    first.write(saved)
    second = StateFile(tmp_path, LAYOUT)
    assert second.saved == saved and second.serial > first.serial
    with pytest.raises(ConfigError, match="other nodes, weights or replicas"):
        StateFile(tmp_path, LAYOUT | {"replicas": 3})
    (tmp_path / "replication/state").write_text("{}")
    with pytest.raises(ConfigError, match="is damaged"):
        StateFile(tmp_path, LAYOUT)
    (tmp_path / "replication/state").unlink()
    (tmp_path / "objects/oa").touch()
    with pytest.raises(ConfigError, match="objects that were not replicated"):
        StateFile(tmp_path, LAYOUT)


def _page(entries: list[tuple[str, int, bool]], truncated: bool = False) -> dict[str, Any]:
    keys = [
        {"key": key, "size": serial, "version": [1, serial], "deleted": deleted}
        for key, serial, deleted in entries
    ]
    return {"keys": keys, "truncated": truncated}


def test_listings_merge_to_the_newest_versions() -> None:
    pages = [
        _page([("a", 1, False), ("b", 1, False), ("c", 1, False)]),
        _page([("a", 2, False), ("b", 2, True), ("d", 1, True)]),
    ]
    found = merge_replicas(pages, 10)
    assert found["keys"] == [{"key": "a", "size": 2}, {"key": "c", "size": 1}]
    assert found["truncated"] is False and found["next_start_after"] is None


STORED = st.dictionaries(
    st.text("ab/", min_size=1, max_size=4), st.tuples(st.integers(1, 3), st.booleans()), max_size=12
)


@given(st.lists(STORED, min_size=1, max_size=3), st.integers(1, 4))
def test_pages_of_replicas_make_the_whole_listing(
    stores: list[dict[str, tuple[int, bool]]], limit: int
) -> None:
    newest: dict[str, tuple[int, bool]] = {}
    for store in stores:
        for key, entry in store.items():
            newest[key] = max(newest.get(key, entry), entry)
            store[key] = (entry[0], entry[1])
    told: list[str] = []
    after: str | None = ""
    for _ in range(50):
        pages = []
        for store in stores:
            keys = sorted(key for key in store if key > (after or ""))
            entries = [
                (key, store[key][0] * 2 + store[key][1], store[key][1]) for key in keys[:limit]
            ]
            pages.append(_page(entries, len(keys) > limit))
        page = merge_replicas(pages, limit)
        assert len(page["keys"]) <= limit
        told += [entry["key"] for entry in page["keys"]]
        if not page["truncated"]:
            break
        assert page["next_start_after"] > after
        after = page["next_start_after"]
    else:
        raise AssertionError("the listing does not end")
    assert told == sorted(key for key, (_, deleted) in newest.items() if not deleted)
