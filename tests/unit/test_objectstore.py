"""The object store: keys on disk, and HTTP over real loopback sockets with curl as a client."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest
from http_loop import serving
from hypothesis import given, settings
from hypothesis import strategies as st

from prism.apps.conditions import parse_date, parse_range, precondition
from prism.apps.keytree import key_path, walk
from prism.apps.objects import DigestMismatch, Objects
from prism.apps.objectstore import ObjectStore
from prism.http.head import RequestHead, parse_head

# -- keys ---------------------------------------------------------------------------------------

SEGMENT = st.one_of(
    st.text("ab!.-0", min_size=1, max_size=3),
    st.sampled_from(["..", ".", "o", "c", "d", "a" * 80, "a" * 81, "a" * 80 + "!", "ä%", "\n"]),
)
KEYS = st.builds(
    lambda segments, tail: ("/".join(segments) + tail).encode(),
    st.lists(SEGMENT, min_size=1, max_size=4),
    st.sampled_from(["", "/"]),
)


@settings(max_examples=60, deadline=None)
@given(st.sets(KEYS, max_size=25), KEYS, KEYS, st.integers(1, 30))
def test_walks_in_key_order(keys: set[bytes], prefix: bytes, after: bytes, page: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        tree = os.fsencode(directory)
        for key in keys:
            path = Path(directory, os.fsdecode(key_path(key)))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        ordered = sorted(keys)
        assert list(walk(tree, b"", b"", page)) == ordered
        for start in (prefix, prefix[:1], b""):
            wanted = [key for key in ordered if key.startswith(start) and key > after]
            assert list(walk(tree, start, after, page)) == wanted


def test_order_around_a_split_segment(tmp_path: Path) -> None:
    objects = Objects(tmp_path, durable=False)
    long = b"a" * 80
    keys = sorted(long + tail for tail in (b"", b"!", b"/", b"/b", b"0", long + b"/c", long + b"!"))
    for key in keys:
        objects.upload(key).commit()
    assert [key for key, _ in objects.list()[0]] == keys
    objects.close()


@pytest.mark.parametrize(
    "key",
    [b"\xff" * 1024, b"/".join([b"\xff"] * 512), b"a" * 1024, b"../../etc/passwd", b"."],
)
def test_any_key_has_a_legal_path(key: bytes, tmp_path: Path) -> None:
    objects = Objects(tmp_path, durable=False)
    path = objects.path(key)
    assert os.path.realpath(path) == path
    assert path.startswith(os.fsencode(tmp_path / "objects") + b"/")
    assert objects.upload(key).commit([b"x"])[1]
    assert objects.list()[0][0][0] == key
    assert objects.delete(key)
    assert list((tmp_path / "objects").iterdir()) == []
    objects.close()


@pytest.mark.parametrize("key", [b"", b"/a", b"a//b", b"a\0b", b"a" * 1025])
def test_what_is_no_key(key: bytes) -> None:
    with pytest.raises(ValueError, match="not a key"):
        key_path(key)


# -- objects ------------------------------------------------------------------------------------


def test_uploads_are_seen_whole_or_not_at_all(tmp_path: Path) -> None:
    objects = Objects(tmp_path)
    upload = objects.upload(b"k", ((b"Content-Type", b"text/x"),))
    upload.write([b"ab"])
    assert objects.meta(b"k") is None
    meta, created = upload.commit([b"c"])
    assert created
    assert objects.meta(b"k") == meta
    assert (meta.size, meta.md5) == (3, hashlib.md5(b"abc").digest())
    upload.abandon()
    bad = objects.upload(b"k")
    with pytest.raises(DigestMismatch):
        bad.commit([b"x"], md5=bytes(16))
    bad.abandon()
    assert objects.meta(b"k") == meta
    assert list(next((tmp_path / "tmp").iterdir()).iterdir()) == []
    objects.close()
    assert list((tmp_path / "tmp").iterdir()) == []


def test_synced_before_and_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, rename = os.fsync, os.rename

    def spy_fsync(fd: int) -> None:
        calls.append(Path(f"/proc/self/fd/{fd}").readlink().name)
        fsync(fd)

    def spy_rename(source: bytes, target: bytes) -> None:
        rename(source, target)
        calls.append("rename")

    for durable in (True, False):
        objects = Objects(tmp_path / str(durable), durable=durable)
        monkeypatch.setattr(os, "fsync", spy_fsync)
        monkeypatch.setattr(os, "rename", spy_rename)
        objects.upload(b"dir/key").commit([b"x"])
        objects.delete(b"dir/key")
        monkeypatch.undo()
        objects.close()
    # The file; the tree, for the new directory; the directory, for the name in it and without it.
    assert calls == ["1", "objects", "rename", "ddir", "ddir", "rename"]


def test_many_fields_are_kept(tmp_path: Path) -> None:
    objects = Objects(tmp_path, durable=False)
    fields = ((b"Content-Type", b"a/" + b"b" * 900), (b"Cache-Control", b""))
    objects.upload(b"k", fields).commit([b"x" * 600])
    meta = objects.meta(b"k")
    assert meta is not None
    assert meta.fields == fields
    objects.close()


def test_two_processes_do_not_remove_each_others_uploads(tmp_path: Path) -> None:
    first = Objects(tmp_path)
    upload = first.upload(b"k")
    upload.write([b"x"])
    (tmp_path / "tmp" / "leftover").mkdir()
    (tmp_path / "tmp" / "leftover" / "1").write_bytes(b"half")
    second = Objects(tmp_path)
    assert not (tmp_path / "tmp" / "leftover").exists()
    upload.commit()
    assert second.meta(b"k") is not None
    first.close()
    second.close()


CRASHER = """
import sys
from pathlib import Path
from prism.apps.objects import Objects
objects = Objects(Path(sys.argv[1]))
print("ready", flush=True)
number = 0
while True:
    number += 1
    upload = objects.upload(b"dir%d/key" % (number % 3))
    for _ in range(8):
        upload.write([bytes([number % 256]) * 100_000])
    upload.commit()
    print(number, flush=True)
"""


def test_killed_in_the_middle_leaves_no_half_object(tmp_path: Path) -> None:
    for delay in (0.0, 0.011, 0.023, 0.037):
        with subprocess.Popen(
            [sys.executable, "-c", CRASHER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            for _ in range(5):
                process.stdout.readline()
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            acknowledged = [int(line) for line in process.stdout.read().split()]
        objects = Objects(tmp_path)
        assert [path.name for path in (tmp_path / "tmp").iterdir()] == [objects._temporary.name]
        found, _ = objects.list()
        assert len(found) == 3
        for key, meta in found:
            opened = objects.open(key)
            assert opened is not None
            body = os.read(opened[0], meta.size)
            os.close(opened[0])
            assert len(body) == 800_000 == meta.size
            assert hashlib.md5(body).digest() == meta.md5
            newest = max((n for n in acknowledged if b"dir%d/key" % (n % 3) == key), default=None)
            if newest is not None:
                assert body[0] in (newest % 256, (newest + 3) % 256)
        objects.close()


# -- conditions ---------------------------------------------------------------------------------


def head_of(method: str, *fields: str) -> RequestHead:
    lines = "".join(f"{field}\r\n" for field in ("Host: h", *fields))
    head = parse_head(f"{method} /k HTTP/1.1\r\n{lines}\r\n".encode())
    assert head is not None
    return head


DAY = "Sun, 06 Nov 1994 08:49:37 GMT"
DAY_BEFORE = "Sat, 05 Nov 1994 08:49:37 GMT"


@pytest.mark.parametrize(
    ("method", "fields", "exists", "status"),
    [
        ("GET", ('If-Match: "e"',), True, 0),
        ("GET", ('If-Match: "x", "e"',), True, 0),
        ("GET", ('If-Match: W/"e"',), True, 412),
        ("GET", ('If-Match: "x"',), True, 412),
        ("PUT", ("If-Match: *",), True, 0),
        ("PUT", ("If-Match: *",), False, 412),
        ("GET", ('If-None-Match: "e"',), True, 304),
        ("GET", ('If-None-Match: "x","e"',), True, 304),
        ("GET", ('If-None-Match: W/"e"',), True, 304),
        ("GET", ('If-None-Match: "x"',), True, 0),
        ("PUT", ("If-None-Match: *",), True, 412),
        ("PUT", ("If-None-Match: *",), False, 0),
        ("GET", (f"If-Modified-Since: {DAY}",), True, 304),
        ("GET", (f"If-Modified-Since: {DAY_BEFORE}",), True, 0),
        ("GET", ("If-Modified-Since: yesterday",), True, 0),
        ("PUT", (f"If-Modified-Since: {DAY}",), True, 0),
        ("GET", (f"If-Unmodified-Since: {DAY}",), True, 0),
        ("GET", (f"If-Unmodified-Since: {DAY_BEFORE}",), True, 412),
        ("GET", ('If-Match: "e"', f"If-Unmodified-Since: {DAY_BEFORE}"), True, 0),
        ("GET", ('If-None-Match: "x"', f"If-Modified-Since: {DAY}"), True, 0),
        ("GET", ('If-Match: "e"', 'If-None-Match: "e"'), True, 304),
    ],
)
def test_preconditions(method: str, fields: tuple[str, ...], exists: bool, status: int) -> None:
    modified = parse_date(DAY.encode())
    assert modified == 784111777
    etag = b'"e"' if exists else None
    assert precondition(head_of(method, *fields), etag, modified) == status


@pytest.mark.parametrize(
    ("value", "size", "part"),
    [
        ("bytes=0-0", 10, (0, 1)),
        ("bytes=2-5", 10, (2, 4)),
        ("bytes=2-", 10, (2, 8)),
        ("bytes=9-100", 10, (9, 1)),
        ("bytes=-3", 10, (7, 3)),
        ("bytes=-30", 10, (0, 10)),
        ("bytes=-0", 10, (10, 0)),
        ("bytes=10-", 10, (10, 0)),
        ("bytes=0-", 0, (0, 0)),
        ("bytes=-5", 0, None),
        ("bytes=5-2", 10, None),
        ("bytes=0-1,3-4", 10, None),
        ("bytes=", 10, None),
        ("bytes=-", 10, None),
        ("lines=0-1", 10, None),
    ],
)
def test_ranges(value: str, size: int, part: tuple[int, int] | None) -> None:
    assert parse_range(head_of("GET", f"Range: {value}"), b'"e"', 0, size) == part


def test_if_range() -> None:
    for field, applies in (('"e"', True), ('"x"', False), ('W/"e"', False), (DAY, True),
                           (DAY_BEFORE, False)):  # fmt: skip
        head = head_of("GET", "Range: bytes=0-0", f"If-Range: {field}")
        part = parse_range(head, b'"e"', 784111777, 5)
        assert part == ((0, 1) if applies else None)


# -- HTTP ---------------------------------------------------------------------------------------


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


@dataclass
class Site:
    port: int
    store: ObjectStore
    root: Path

    async def curl(self, path: str, *args: str) -> Answer:
        process = await asyncio.create_subprocess_exec(
            "curl", "-sS", "-i", "--path-as-is", "--max-time", "20", "-H", "Expect:", *args,
            f"http://127.0.0.1:{self.port}{path}",
            stdout=subprocess.PIPE,
        )  # fmt: skip
        out, _ = await process.communicate()
        assert process.returncode == 0
        head, _, body = out.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        fields = dict(line.split(": ", 1) for line in lines[1:])
        return Answer(int(lines[0].split()[1]), {k.lower(): v for k, v in fields.items()}, body)

    async def put(self, path: str, body: bytes, *args: str) -> Answer:
        file = self.root / "upload"
        file.write_bytes(body)
        return await self.curl(path, "-T", str(file), *args)

    def temporary(self) -> list[Path]:
        return [file for path in (self.root / "tmp").iterdir() for file in path.iterdir()]


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    store = ObjectStore(tmp_path, max_size=40_000_000)
    async with serving(store) as port:
        yield Site(port, store, tmp_path)
    store.close()


async def test_put_get_head_delete(site: Site) -> None:
    body = os.urandom(3_000_000)
    etag = f'"{hashlib.md5(body).hexdigest()}"'
    kept = ("-H", "Content-Type: image/x", "-H", "Cache-Control: no-store")
    first = await site.put("/b/k", body, *kept)
    assert (first.status, first.headers["etag"]) == (201, etag)
    assert (await site.put("/b/k", body, *kept)).status == 204
    got = await site.curl("/b/k")
    assert (got.status, got.body) == (200, body)
    assert got.headers["etag"] == etag
    assert got.headers["content-type"] == "image/x"
    assert got.headers["cache-control"] == "no-store"
    assert got.headers["content-length"] == str(len(body))
    assert abs((parse_date(got.headers["last-modified"].encode()) or 0) - time.time()) < 60
    head = await site.curl("/b/k", "-I")
    assert head.headers == got.headers | {"date": head.headers["date"]}
    assert (await site.curl("/b/k", "-X", "DELETE")).status == 204
    assert (await site.curl("/b/k", "-X", "DELETE")).status == 404
    assert (await site.curl("/b/k")).status == 404
    assert site.temporary() == []


async def test_empty_and_chunked_bodies(site: Site) -> None:
    assert (await site.put("/empty", b"")).status == 201
    got = await site.curl("/empty")
    assert (got.status, got.body, got.headers["content-length"]) == (200, b"", "0")
    assert got.headers["content-type"] == "application/octet-stream"
    body = os.urandom(1_500_000)
    answer = await site.put("/chunked", body, "-H", "Transfer-Encoding: chunked")
    assert answer.status == 201
    assert (await site.curl("/chunked")).body == body


async def test_ranges_over_http(site: Site) -> None:
    await site.put("/k", b"0123456789")
    part = await site.curl("/k", "-r", "2-4")
    assert (part.status, part.body) == (206, b"234")
    assert part.headers["content-range"] == "bytes 2-4/10"
    assert (await site.curl("/k", "-r", "-2")).body == b"89"
    several = await site.curl("/k", "-r", "0-1,3-4")
    assert (several.status, several.body) == (200, b"0123456789")
    none = await site.curl("/k", "-r", "10-")
    assert (none.status, none.headers["content-range"]) == (416, "bytes */10")


async def test_conditions_over_http(site: Site) -> None:
    assert (await site.put("/k", b"1", "-H", "If-Match: *")).status == 412
    assert (await site.put("/k", b"1", "-H", "If-None-Match: *")).status == 201
    assert (await site.put("/k", b"2", "-H", "If-None-Match: *")).status == 412
    got = await site.curl("/k")
    etag = got.headers["etag"]
    not_modified = await site.curl("/k", "-H", f"If-None-Match: {etag}")
    assert (not_modified.status, not_modified.body) == (304, b"")
    assert not_modified.headers["etag"] == etag
    assert (await site.curl("/k", "-H", 'If-Match: "x"')).status == 412
    assert (await site.put("/k", b"3", "-H", f"If-Match: {etag}")).status == 204
    assert (await site.put("/k", b"4", "-H", f"If-Match: {etag}")).status == 412
    assert (await site.curl("/k", "-X", "DELETE", "-H", f"If-Match: {etag}")).status == 412
    assert (await site.curl("/k")).body == b"3"
    assert site.temporary() == []


async def test_create_only_has_one_winner(site: Site) -> None:
    async def create(number: int) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
        writer.write(
            b"PUT /one HTTP/1.1\r\nHost: h\r\nIf-None-Match: *\r\nContent-Length: 1\r\n\r\n%d"
            % number
        )
        status = int((await reader.readline()).split()[1])
        writer.close()
        return status

    statuses = await asyncio.gather(*(create(number) for number in range(10)))
    assert sorted(statuses) == [201] + [412] * 9


async def test_content_md5(site: Site) -> None:
    good = base64.b64encode(hashlib.md5(b"body").digest()).decode()
    assert (await site.put("/k", b"body", "-H", f"Content-MD5: {good}")).status == 201
    assert (await site.put("/k", b"BODY", "-H", f"Content-MD5: {good}")).status == 400
    assert (await site.put("/k", b"body", "-H", "Content-MD5: x")).status == 400
    assert (await site.curl("/k")).body == b"body"
    assert site.temporary() == []


async def test_refusals(site: Site) -> None:
    assert (await site.curl("/k", "-X", "POST", "-d", "x")).status == 405
    assert "PUT" in (await site.curl("/k", "-X", "POST")).headers["allow"]
    assert (await site.curl("/", "-X", "PUT", "-d", "x")).status == 405
    framed = await site.curl("/k", "-X", "PUT", "-d", "x", "-H", "Content-Encoding: aws-chunked")
    assert framed.status == 501
    assert b"when_required" in framed.body
    assert (await site.curl("/k")).status == 404
    assert (await site.put("/" + "k" * 1025, b"")).status == 414
    assert (await site.put("/%ff", b"")).status == 400
    assert (await site.put("/k", b"x", "-H", "Content-Range: bytes 0-0/2")).status == 400
    assert (await site.put("/k", b"x", "-H", "Content-Type: " + "x" * 3000)).status == 400
    assert (await site.put("/../k", b"x")).status == 400
    assert (await site.curl("/k", "-X", "OPTIONS")).status == 204
    answer = await site.curl("/none")
    assert json.loads(answer.body)["detail"] == "there is no object with this key"


async def test_too_large(site: Site) -> None:
    request = (
        b"PUT /k HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 50000000\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
    writer.write(request)
    assert (await reader.readline()).startswith(b"HTTP/1.1 413")
    writer.close()
    answer = await site.put("/k", bytes(41_000_000), "-H", "Transfer-Encoding: chunked")
    assert answer.status == 413
    assert (await site.curl("/k")).status == 404
    await asyncio.sleep(0.1)
    assert site.temporary() == []


async def test_a_cut_off_upload_leaves_nothing(site: Site) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", site.port)
    writer.write(
        b"PUT /k HTTP/1.1\r\nHost: h\r\nContent-Length: 3000000\r\n\r\n" + bytes(2_000_000)
    )
    await writer.drain()
    for _ in range(100):
        await asyncio.sleep(0.01)
        if site.temporary():
            break
    assert site.temporary()
    writer.close()
    for _ in range(100):
        await asyncio.sleep(0.01)
        if not site.temporary():
            break
    assert site.temporary() == []
    assert (await site.curl("/k")).status == 404


async def test_listing(site: Site) -> None:
    keys = ["a", "a!", "a/b", "a/c/d", "a0", "b/ä ö", "c" * 100, "z\\"]
    for key in keys:
        site.store.objects.upload(key.encode()).commit([key.encode()])
    keys.sort(key=str.encode)
    whole = json.loads((await site.curl("/")).body)
    assert [entry["key"] for entry in whole["keys"]] == keys
    assert whole["truncated"] is False
    assert whole["next_start_after"] is None
    entry = whole["keys"][0]
    assert entry["size"] == 1
    assert entry["etag"] == f'"{hashlib.md5(b"a").hexdigest()}"'
    assert entry["last_modified"].endswith("Z")
    seen: list[str] = []
    after = ""
    while True:
        page = json.loads((await site.curl(f"/?max-keys=3&start-after={quote(after)}")).body)
        seen += [entry["key"] for entry in page["keys"]]
        if not page["truncated"]:
            break
        assert len(page["keys"]) == 3
        after = page["next_start_after"]
    assert seen == keys
    below = json.loads((await site.curl("/?prefix=a/")).body)
    assert [entry["key"] for entry in below["keys"]] == ["a/b", "a/c/d"]
    got = await site.curl("/" + quote("b/ä ö"))
    assert got.body == "b/ä ö".encode()
    for query in ("max-keys=0", "max-keys=x", "prefix=%ff"):
        assert (await site.curl(f"/?{query}")).status == 400
    assert (await site.curl("/", "-I")).status == 200


async def test_a_foreign_or_damaged_file_is_no_object(site: Site) -> None:
    site.store.objects.upload(b"k").commit([b"x" * 100])
    path = Path(os.fsdecode(site.store.objects.path(b"k")))
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole + b"x", whole[1:], b"x" * 200):
        path.write_bytes(damaged)
        assert (await site.curl("/k")).status == 500
    path.with_name("readme").write_bytes(b"not ours")
    assert json.loads((await site.curl("/")).body)["keys"] == []
    assert (await site.put("/k", b"new")).status == 201
    assert (await site.curl("/k")).body == b"new"
    path.write_bytes(b"")
    assert (await site.curl("/k", "-X", "DELETE")).status == 204


async def test_memory_is_constant_and_others_are_served(site: Site) -> None:
    """A large upload neither grows the process nor stalls a small GET beside it."""
    site.store.objects.upload(b"small").commit([b"x" * 1000])
    size = 39_000_000

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    file = site.root / "upload"
    with file.open("wb") as handle:
        handle.truncate(size)
    before = resident()
    uploading = asyncio.ensure_future(site.curl("/large", "-T", str(file), "--limit-rate", "60M"))
    worst = peak = 0.0
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
    while not uploading.done():
        started = time.monotonic()
        writer.write(b"GET /small HTTP/1.1\r\nHost: h\r\n\r\n")
        await reader.readuntil(b"x" * 1000)
        worst = max(worst, time.monotonic() - started)
        peak = max(peak, resident())
        await asyncio.sleep(0.005)
    writer.close()
    assert (await uploading).status == 201
    assert peak - before < 16_000_000
    assert worst < 0.25


async def test_pipelined_requests_behind_a_body(site: Site) -> None:
    sock = socket.create_connection(("127.0.0.1", site.port))
    sock.sendall(
        b"PUT /k HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello"
        b"GET /k HTTP/1.1\r\nHost: h\r\n\r\n"
        b"DELETE /k HTTP/1.1\r\nHost: h\r\n\r\n"
        b"GET /k HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection(sock=sock)
    answer = await reader.read()
    writer.close()
    assert re.findall(rb"HTTP/1.1 ([0-9]{3})", answer) == [b"201", b"200", b"204", b"404"]
