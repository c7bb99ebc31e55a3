"""What every monitor has to do, with real sockets in namespaces of their own.

A test module makes a subclass of :class:`MonitorConformance` named ``Test...``, says in
``make_monitor`` how its monitor is made, and in ``sees_time_wait`` whether it tells the end of
TIME_WAIT rather than its beginning.
"""

from __future__ import annotations

import asyncio
import resource
import socket
import struct
import time
from pathlib import Path

import pytest

from prism._ext import tcp_repair
from prism.flow import Endpoint
from prism.lab.netns import join
from prism.monitor.base import Gone, Monitor, Reason

pytestmark = pytest.mark.net


def ends(sock: socket.socket) -> tuple[Endpoint, Endpoint]:
    return Endpoint.from_sockaddr(sock.getsockname()), Endpoint.from_sockaddr(sock.getpeername())


def pair(listener: socket.socket) -> tuple[socket.socket, socket.socket]:
    """A connection: (the client's socket, ours)."""
    client = socket.socket(listener.family)
    client.connect(listener.getsockname()[:2])
    ours, _ = listener.accept()
    return client, ours


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def use_port_again(listener: socket.socket, client: Endpoint) -> None:
    """A new connection with the same ends, which cuts the TIME_WAIT of the last one short."""
    again = socket.socket(listener.family)
    again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    again.bind((client.host, client.port))
    again.connect(listener.getsockname()[:2])
    ours, _ = listener.accept()
    reset(again)
    ours.close()


class Notes(list[Gone]):
    """Collects what a monitor tells."""

    async def wait(self, count: int = 1, seconds: float = 3.0) -> None:
        """Wait for so many, then a little longer for one too many."""
        until = time.monotonic() + seconds
        while len(self) < count and time.monotonic() < until:
            await asyncio.sleep(0.002)
        await asyncio.sleep(0.02)
        assert len(self) == count, f"{len(self)} notifications, not {count}"


class MonitorConformance:
    sees_time_wait = False
    burst = 10_000

    def make_monitor(self) -> Monitor:
        raise NotImplementedError

    @pytest.fixture
    def inside(self, make_namespace):
        """The test's thread is in a namespace of its own."""
        with make_namespace("mon").entered():
            yield

    @pytest.fixture
    async def monitor(self, inside):
        """A started monitor in that namespace."""
        monitor = self.make_monitor()
        await monitor.start()
        yield monitor
        await monitor.close()

    @pytest.fixture
    def neighbours(self, make_namespace):
        """Two joined namespaces; the test's thread is in the first."""
        here, there = make_namespace("here"), make_namespace("there")
        join(here, "a", there, "b")
        here.add_address("a", "10.77.0.1/24")
        there.add_address("b", "10.77.0.2/24")
        with here.entered():
            yield here, there

    @pytest.fixture(params=["127.0.0.1", "::1"])
    def listener(self, monitor, request):
        family = socket.AF_INET6 if ":" in request.param else socket.AF_INET
        with socket.create_server((request.param, 0), family=family, backlog=4096) as listener:
            yield listener

    @pytest.fixture
    def listener4(self, monitor):
        with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
            yield listener

    async def time_wait_is_told(self, monitor, notes, listener, local, peer):
        """This side has closed first, and the peer too; the monitor is asked and has to tell."""
        if self.sees_time_wait:
            await asyncio.sleep(0.1)
            assert notes == []
            assert not monitor.alive(local, peer)
            use_port_again(listener, peer)
        await notes.wait()
        assert notes == [Gone(local, peer, Reason.TIME_WAIT, not self.sees_time_wait)]

    async def test_the_peer_closes_first(self, monitor, listener):
        client, ours = pair(listener)
        local, peer = ends(ours)
        notes = Notes()
        monitor.watch(ours.fileno(), local, peer, notes.append)
        client.close()
        await asyncio.sleep(0.02)
        assert notes == []  # half closed is not gone
        assert monitor.alive(local, peer)
        ours.close()
        await notes.wait()
        assert notes == [Gone(local, peer, Reason.ENDED, False)]
        assert not monitor.alive(local, peer)

    async def test_we_close_first(self, monitor, listener):
        client, ours = pair(listener)
        local, peer = ends(ours)
        notes = Notes()
        monitor.watch(ours.fileno(), local, peer, notes.append)
        ours.shutdown(socket.SHUT_WR)
        client.close()
        await asyncio.sleep(0.02)
        ours.close()
        await self.time_wait_is_told(monitor, notes, listener, local, peer)
        assert not monitor.alive(local, peer)

    async def test_we_close_and_the_peer_does_not(self, monitor, listener):
        client, ours = pair(listener)
        local, peer = ends(ours)
        notes = Notes()
        monitor.watch(ours.fileno(), local, peer, notes.append)
        ours.close()
        if not self.sees_time_wait:
            await notes.wait()  # a socket that nobody has and that waits for a FIN counts, too
        await asyncio.sleep(0.02)
        client.close()
        await self.time_wait_is_told(monitor, notes, listener, local, peer)

    @pytest.mark.parametrize("by_us", [False, True])
    async def test_a_reset(self, monitor, listener, by_us):
        client, ours = pair(listener)
        local, peer = ends(ours)
        notes = Notes()
        monitor.watch(ours.fileno(), local, peer, notes.append)
        reset(ours if by_us else client)
        await asyncio.sleep(0.02)
        (client if by_us else ours).close()
        await notes.wait()
        assert notes == [Gone(local, peer, Reason.ENDED, False)]

    async def test_data_that_is_still_to_be_sent_keeps_it_alive(self, monitor, listener):
        client, ours = pair(listener)
        local, peer = ends(ours)
        notes = Notes()
        monitor.watch(ours.fileno(), local, peer, notes.append)
        ours.setblocking(False)
        sent = 0
        with pytest.raises(BlockingIOError):
            while True:
                sent += ours.send(bytes(65536))
        ours.close()
        await asyncio.sleep(0.05)
        assert notes == []
        assert monitor.alive(local, peer)
        while sent:
            sent -= len(client.recv(1 << 20))
        client.close()
        await self.time_wait_is_told(monitor, notes, listener, local, peer)

    async def test_a_peer_that_vanishes(self, neighbours):
        _, there = neighbours
        monitor = self.make_monitor()
        await monitor.start()
        with socket.create_server(("10.77.0.1", 0)) as listener:
            client = there.socket()
            client.connect(listener.getsockname())
            ours, _ = listener.accept()
        local, peer = ends(ours)
        notes = Notes()
        monitor.watch(ours.fileno(), local, peer, notes.append)
        await asyncio.to_thread(there.run, ["ip", "link", "set", "dev", "b", "down"])
        ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 300)
        ours.send(b"are you there?")
        ours.close()
        await notes.wait(seconds=6.0)
        assert notes == [Gone(local, peer, Reason.TIMED_OUT, False)]
        await monitor.close()
        client.close()

    async def test_handed_over_quietly(self, monitor, listener):
        client, ours = pair(listener)
        local, peer = ends(ours)
        notes = Notes()
        monitor.watch(ours.fileno(), local, peer, notes.append)
        tcp_repair.freeze(ours.fileno())
        await asyncio.sleep(0.01)
        assert notes == []
        assert monitor.alive(local, peer)
        tcp_repair.close_quietly(ours.detach())
        await notes.wait()
        assert notes == [Gone(local, peer, Reason.ENDED, False)]
        client.close()

    async def test_an_imported_connection_is_watched_like_any_other(self, monitor, listener4):
        client, ours = pair(listener4)
        local, peer = ends(ours)
        before, after = Notes(), Notes()
        monitor.watch(ours.fileno(), local, peer, before.append)
        state = tcp_repair.export_state(ours.fileno())
        tcp_repair.close_quietly(ours.detach())
        again = socket.socket(fileno=tcp_repair.import_state(state, *local).activate())
        monitor.watch(again.fileno(), local, peer, after.append)
        await asyncio.sleep(0.05)
        assert before == after == []  # the end of the first socket is not the end of the second
        client.close()
        await asyncio.sleep(0.02)
        again.close()
        await after.wait()
        assert after[0].reason is Reason.ENDED
        assert before == []

    async def test_what_is_forgotten_is_not_told(self, monitor, listener4):
        client, ours = pair(listener4)
        local, peer = ends(ours)
        notes = Notes()
        monitor.watch(ours.fileno(), local, peer, notes.append)
        monitor.forget(local, peer)
        monitor.forget(local, peer)
        reset(ours)
        client.close()
        await notes.wait(0, 0.05)

    async def test_a_failing_callback_harms_nobody_else(self, monitor, listener4, caplog):
        notes = Notes()
        pairs = [pair(listener4) for _ in range(2)]

        def fail(gone: Gone) -> None:
            raise RuntimeError("a bug")

        for (_, ours), told in zip(pairs, (fail, notes.append), strict=True):
            monitor.watch(ours.fileno(), *ends(ours), told)
        for client, ours in pairs:
            reset(ours)
            client.close()
        await notes.wait()
        assert "a bug" in caplog.text

    async def test_a_listener_does_not_make_a_connection_alive(self, monitor, listener):
        local = Endpoint.from_sockaddr(listener.getsockname())
        assert not monitor.alive(local, Endpoint(local.host, 9))

    async def test_a_descriptor_that_is_not_open(self, monitor):
        end = Endpoint("127.0.0.1", 1)
        with pytest.raises(OSError, match="Bad file descriptor"):
            monitor.watch(9999, end, end, print)

    async def test_many_ends_in_a_burst(self, monitor, listener4):
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
        notes = Notes()
        waiting = []
        for _ in range(self.burst):
            client, ours = pair(listener4)
            monitor.watch(ours.fileno(), *ends(ours), notes.append)
            waiting.append((ours, ends(ours)))
            client.close()
        for ours, _ in waiting:
            ours.close()
        await notes.wait(self.burst, 10.0)
        assert {(gone.local, gone.peer) for gone in notes} == {both for _, both in waiting}
        assert not any(gone.time_wait for gone in notes)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    async def test_nothing_is_left_open(self, monitor):
        before = set(Path("/proc/self/fd").iterdir())
        other = self.make_monitor()
        await other.start()
        await other.close()
        assert set(Path("/proc/self/fd").iterdir()) <= before
