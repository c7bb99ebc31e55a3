"""Waiting until a connection can leave its socket: how long, and what ends it."""

from __future__ import annotations

import asyncio
import socket

import pytest
from test_connection import Echo, Keeper

from prism import settling
from prism.flow import Endpoint
from prism.http.connection import Connection, State
from prism.http.stream import PlainStream


class Busy(PlainStream):
    """A stream that is unsettled so many times."""

    times = 0

    @property
    def unsettled(self) -> bool:
        self.times -= 1
        return self.times >= 0


def deciding(times: int) -> tuple[socket.socket, Connection]:
    """A client and a connection whose request waits for a decision."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        sock, _ = listener.accept()
    client.sendall(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n")
    client.settimeout(5)
    stream = Busy(sock)
    stream.times = times
    keeper = Keeper(Echo())
    keeper.defer = True
    local = Endpoint.from_sockaddr(sock.getsockname())
    connection = Connection(stream, stream.flow, stream.flow.pack(), keeper, local=local)
    connection.start()
    assert connection.state is State.DECIDING
    return client, connection


@pytest.mark.parametrize("times", [0, 3, 1_000_000])
async def test_it_is_decided_in_the_end(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as it is settled, or when it has taken too long; and then the request is served."""
    monkeypatch.setattr(settling, "PATIENCE", 0.05 if times > 3 else 60.0)
    client, connection = deciding(times)
    decided = asyncio.Event()
    settling.settle(connection, decided.set)
    assert connection.state is (State.MOVED if times else State.DECIDING)
    async with asyncio.timeout(5):
        await decided.wait()
    assert connection.state is State.DECIDING
    assert times <= 3 or connection.stream.unsettled
    connection.serve(Echo())
    assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
    connection.close()
    client.close()


async def test_nothing_is_decided_for_a_connection_that_was_closed() -> None:
    client, connection = deciding(1_000_000)
    decided: list[bool] = []
    settling.settle(connection, lambda: decided.append(True))
    connection.close()
    await asyncio.sleep(2 * settling.PATIENCE)
    assert decided == []
    client.close()
