"""How long each step of moving a connection takes, each as one call, over loopback.

Run as root: pytest benchmarks/bench_tcp_repair.py. Compare medians; every round has a connection
of its own, made outside the measured time.
"""

from __future__ import annotations

import os
import socket
import struct
import uuid
from collections.abc import Callable, Iterator

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from prism._ext import tcp_repair
from prism.lab.netns import Namespace

ROUNDS = 800
REQUEST = b"GET /bucket/object HTTP/1.1\r\nHost: store.example\r\nAccept: */*\r\n\r\n"
RESET = struct.pack("ii", 1, 0)


class Connections:
    """Makes connections with a request waiting, and ends them."""

    def __init__(self, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.address = address
        self._listener = socket.socket(family)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind((address, 80))
        self._listener.listen()
        self._clients: list[socket.socket] = []

    def open(self) -> int:
        """The server's end of a new connection, its request unread."""
        client = socket.create_connection((self.address, 80))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        server, _ = self._listener.accept()
        client.sendall(REQUEST)
        self._clients.append(client)
        return server.detach()

    def state(self) -> bytes:
        """An exported connection that is closed here."""
        descriptor = self.open()
        state = tcp_repair.export_state(descriptor)
        tcp_repair.close_quietly(descriptor)
        return state

    def end(self) -> None:
        """Reset all clients."""
        while self._clients:
            self._clients.pop().close()

    def close(self) -> None:
        """End everything."""
        self.end()
        self._listener.close()


@pytest.fixture(params=["127.0.0.1", "::1"])
def connections(request: pytest.FixtureRequest) -> Iterator[Connections]:
    namespace = Namespace.create(f"pb-{uuid.uuid4().hex[:6]}")
    try:
        with namespace.entered():
            made = Connections(request.param)
            yield made
            made.close()
    finally:
        namespace.remove()


def measure(
    benchmark: BenchmarkFixture,
    connections: Connections,
    prepare: Callable[[], object],
    step: Callable[[object], object],
    tidy: Callable[[object, object], None],
) -> None:
    """Time ``step`` on what ``prepare`` made; ``tidy`` gets its argument and its result."""

    def setup() -> tuple[tuple[object], dict[str, object]]:
        if last:
            tidy(*last.pop())
            connections.end()
        return (prepare(),), {}

    def timed(argument: object) -> None:
        last.append((argument, step(argument)))

    last: list[tuple[object, object]] = []
    benchmark.pedantic(timed, setup=setup, rounds=ROUNDS, warmup_rounds=50)
    tidy(*last.pop())


def test_export(benchmark: BenchmarkFixture, connections: Connections) -> None:
    measure(
        benchmark,
        connections,
        connections.open,
        tcp_repair.export_state,
        lambda descriptor, _: tcp_repair.close_quietly(descriptor),
    )


def test_close_quietly(benchmark: BenchmarkFixture, connections: Connections) -> None:
    def frozen() -> int:
        descriptor = connections.open()
        tcp_repair.export_state(descriptor)
        return descriptor

    measure(benchmark, connections, frozen, tcp_repair.close_quietly, lambda *_: None)


def test_import(benchmark: BenchmarkFixture, connections: Connections) -> None:
    measure(
        benchmark,
        connections,
        connections.state,
        lambda state: tcp_repair.import_state(state, connections.address, 80),
        lambda _, imported: imported.discard(),
    )


@pytest.mark.parametrize("probe", [False, True])
def test_activate(benchmark: BenchmarkFixture, connections: Connections, probe: bool) -> None:
    measure(
        benchmark,
        connections,
        lambda: tcp_repair.import_state(connections.state(), connections.address, 80),
        lambda imported: imported.activate(probe=probe),
        lambda _, descriptor: os.close(descriptor),
    )


def test_freeze_and_resume(benchmark: BenchmarkFixture, connections: Connections) -> None:
    def step(descriptor: int) -> None:
        tcp_repair.freeze(descriptor)
        tcp_repair.resume(descriptor, probe=False)

    measure(
        benchmark, connections, connections.open, step, lambda descriptor, _: os.close(descriptor)
    )
