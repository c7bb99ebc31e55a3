"""Small objects in memory: sent only while their file is the one they were read from."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import time
from pathlib import Path

import pytest

from prism._ext.http_scan import answer_ready
from prism.apps import objectcache
from prism.apps.objectcache import LARGEST, ObjectCache
from prism.apps.objects import Objects
from prism.apps.objectstore import ObjectStore
from prism.flow import Endpoint
from prism.http.connection import Connection
from prism.http.exchange import Exchange
from prism.http.head import HttpError, Limits, RequestHead
from prism.http.response import date_line
from prism.http.stream import PlainStream

KEY = b"a/b"


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
        return cache.keep(key, objects.path(key), *opened)
    finally:
        os.close(opened[0])


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as old at once."""
    monkeypatch.setattr(objectcache, "SETTLED", -(1 << 62))


@pytest.mark.usefixtures("settled")
def test_an_object_is_kept_until_its_file_changes(objects: Objects) -> None:
    cache = ObjectCache()
    put(objects, KEY, b"first", (b"Content-Type", b"text/plain"))
    assert cache.get(KEY) is None
    kept = keep(cache, objects, KEY)
    assert kept is not None
    assert kept.body == b"first"
    assert kept.lines.startswith(b"Content-Type: text/plain\r\nETag: ")
    assert cache.get(KEY) is kept
    put(objects, KEY, b"again")  # as long as before
    assert cache.get(KEY) is None
    assert len(cache) == 0
    assert keep(cache, objects, KEY) is not None
    objects.delete(KEY)
    assert cache.get(KEY) is None


def test_what_may_change_unseen_is_not_kept(objects: Objects) -> None:
    """Two changes within one tick of the file system's clock leave the same times."""
    cache = ObjectCache()
    path = put(objects, KEY, b"x")
    assert keep(cache, objects, KEY) is None
    assert cache.get(KEY) is None
    before = time.time_ns() - 60_000_000_000
    os.utime(path, ns=(before, before))  # this cannot set the time of the change
    assert keep(cache, objects, KEY) is None


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
    for number in range(12):
        put(objects, b"%d" % number, bytes(1000))
    for number in range(10):
        keep(cache, objects, b"%d" % number)
    assert cache.get(b"0") is not None  # the one used last
    keep(cache, objects, b"10")
    keep(cache, objects, b"11")
    assert len(cache) == 10
    kept = [cache.get(b"%d" % number) is not None for number in range(12)]
    assert kept == [True, False, False, *[True] * 9]


# -- answered in one call -------------------------------------------------------------------------


class Keeper:
    """Gives every request to the store."""

    limits = Limits()
    body_timeout = 5.0
    server = b"test"

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self.shortcuts = 0

    def dispatch(self, connection: Connection, head: RequestHead) -> None:
        connection.serve(self.store)

    def bad_request(self, connection: Connection, error: HttpError) -> None:
        pass

    def answered(self, connection: Connection, exchange: Exchange) -> None:
        pass

    def closed(self, connection: Connection) -> None:
        pass

    def shortcut(self, connection: Connection) -> bool | None:
        entries, fd = self.store.ready.entries, connection.stream.fileno()
        done = answer_ready(fd, entries, self.limits, b"Server: test\r\n", date_line())
        if done is None:
            return None
        self.shortcuts += 1
        if done[1]:
            connection.send_rest(done[1])
        return done[2]


async def talk(store: ObjectStore, data: bytes, *, shortcut: bool) -> tuple[bytes, int]:
    """Everything that is answered, and how many times in one call."""
    keeper = Keeper(store)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        sock, _ = listener.accept()
    stream = PlainStream(sock)
    local = Endpoint.from_sockaddr(sock.getsockname())
    connection = Connection(stream, stream.flow, b"", keeper, local=local)
    if shortcut:
        connection.shortcut = keeper.shortcut
    connection.start()
    reader, writer = await asyncio.open_connection(sock=client)
    writer.write(data)
    writer.write_eof()
    got = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    return re.sub(rb"Date: [^\r]*", b"Date:", got), keeper.shortcuts


def get(target: str = "/a/b", *fields: str, method: str = "GET") -> bytes:
    lines = "".join(f"{field}\r\n" for field in ("Host: h", *fields))
    return f"{method} {target} HTTP/1.1\r\n{lines}\r\n".encode()


REQUESTS = [
    (get(), 1),
    (get("/a/b?q=1", "Accept: */*", "Prism-Origin: x"), 1),
    (get() * 40, None),
    (get("/a/%62"), 0),
    (get("/a//b"), 0),
    (get("/a/c"), 0),
    (get("/"), 0),
    (get(method="HEAD"), 0),
    (get("/a/b", "Range: bytes=1-2"), 0),
    (get("/a/b", 'IF-NONE-MATCH: "x"'), 0),
    (get("/a/b", "If-Modified-Since: Thu, 01 Jan 2032 00:00:00 GMT"), 0),
    (get("/a/b", "Connection: close") + get(), 0),
    (get("/a/b", "Content-Length: 3") + b"xyz" + get(), 1),
    (get("/a/b", "Content-Length: x"), 0),
    (b"GET /a/b HTTP/1.0\r\n\r\n", 0),
]


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize(("data", "times"), REQUESTS, ids=range(len(REQUESTS)))
async def test_one_call_answers_as_the_store_does(
    tmp_path: Path, data: bytes, times: int | None
) -> None:
    store = ObjectStore(tmp_path, durable=False)
    put(store.objects, KEY, b"the body", (b"Content-Type", b"text/plain"))
    await talk(store, get(), shortcut=False)
    assert len(store.ready) == 1
    slow, none = await talk(store, data, shortcut=False)
    quick, found = await talk(store, data, shortcut=True)
    assert quick == slow
    assert none == 0
    assert found == times if times is not None else found > 20
    put(store.objects, KEY, b"new body")
    assert b"new body" in (await talk(store, get(), shortcut=True))[0]
    store.close()


@pytest.mark.usefixtures("settled")
async def test_a_client_that_does_not_read_gets_everything_in_the_end(tmp_path: Path) -> None:
    store = ObjectStore(tmp_path, durable=False)
    body = os.urandom(LARGEST)
    put(store.objects, KEY, body)
    await talk(store, get(), shortcut=False)
    got, times = await talk(store, get() * 600, shortcut=True)  # 10 MB
    assert got.count(body) == 600
    assert times > 100
    store.close()
