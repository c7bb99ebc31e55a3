"""The SOCK_DIAG monitor: what every monitor does, and its own way of losing notifications."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest
from monitor_conformance import MonitorConformance, Notes, ends, pair, reset

from prism.flow import Endpoint
from prism.monitor.base import Reason
from prism.monitor.sockdiag import SockDiagMonitor

pytestmark = pytest.mark.net


class TestSockDiag(MonitorConformance):
    def make_monitor(self) -> SockDiagMonitor:
        return SockDiagMonitor()

    async def test_lost_notifications_are_made_up_for(self, monitor, listener):
        monitor._events.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        staying, going = Notes(), Notes()
        pairs = [pair(listener) for _ in range(400)]
        for number, (_, ours) in enumerate(pairs):
            monitor.watch(ours.fileno(), *ends(ours), (going if number % 2 else staying).append)
        for client, ours in pairs[1::2]:
            reset(ours)
            client.close()
        time.sleep(0.1)  # the kernel notifies from a work queue; nobody reads meanwhile
        await going.wait(200)
        assert monitor.counters.overflows > 0
        assert monitor.counters.found_missing > 100
        assert {gone.reason for gone in going} <= {Reason.UNKNOWN, Reason.ENDED}
        assert staying == []
        assert len(monitor) == 200
        for client, ours in pairs[0::2]:
            reset(ours)
            client.close()
        await staying.wait(200)

    async def test_a_lost_time_wait_is_recognised(self, monitor, listener4):
        monitor._events.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        notes = Notes()
        pairs = [pair(listener4) for _ in range(100)]
        for _, ours in pairs:
            monitor.watch(ours.fileno(), *ends(ours), notes.append)
        for client, ours in pairs:
            ours.close()
            client.close()
        time.sleep(0.1)
        await notes.wait(100)
        assert monitor.counters.found_missing > 0
        assert all(gone.time_wait for gone in notes)

    async def test_a_callback_may_close_the_monitor(self, monitor, listener4):
        closing = []
        pairs = [pair(listener4) for _ in range(20)]
        for _, ours in pairs:
            monitor.watch(
                ours.fileno(),
                *ends(ours),
                lambda gone: closing.append(asyncio.ensure_future(monitor.close())),
            )
        for client, ours in pairs:
            reset(ours)
            client.close()
        await asyncio.sleep(0.05)
        assert closing
        await asyncio.gather(*closing)
        with pytest.raises(OSError, match="not started"):
            monitor.alive(Endpoint("127.0.0.1", 9), Endpoint("127.0.0.1", 10))
