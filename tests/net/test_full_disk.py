"""A full disk, made of a small tmpfs: needs root to mount it."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from prism.apps.objectstore import ObjectStore
from prism.http.exchange import Exchange
from prism.http.head import HttpError, parse_head
from prism.http.stream import PlainStream

pytestmark = pytest.mark.net


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], check=True)
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


async def put(store: ObjectStore, size: int) -> int:
    """Uploads an object of zeros; the status."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        stream = PlainStream(listener.accept()[0])
    head = parse_head(b"PUT /k HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % size)
    assert head is not None
    client.sendall(bytes(size))
    exchange = Exchange(head, stream)
    try:
        rest = store.handle(exchange)
        assert rest is not None
        await rest
    except HttpError as error:
        return error.status
    finally:
        stream.close()
        client.close()
    return exchange.status


async def test_507_and_then_there_is_room_again(small: Path) -> None:
    store = ObjectStore(small)
    assert await put(store, 400_000) == 201
    assert await put(store, 700_000) == 507
    assert await put(store, 300_000) == 204
    store.close()
    assert [path for path in (small / "tmp").rglob("*") if path.is_file()] == []
