"""The monitor with a kernel module: what every monitor does, and what it does without room."""

from __future__ import annotations

import asyncio
import socket

import pytest
from kmod_device import PARAMETERS, release
from monitor_conformance import MonitorConformance, Notes, ends, pair, reset, use_port_again

from prism.config import BackendConfig
from prism.monitor.base import Gone, Reason
from prism.monitor.choose import monitor_for
from prism.monitor.kmod import KmodMonitor

pytestmark = pytest.mark.usefixtures("module")


class TestKmod(MonitorConformance):
    sees_time_wait = release() < (6, 18)
    burst = 1_000  # the emulated machine is slow

    def make_monitor(self) -> KmodMonitor:
        return KmodMonitor()

    async def test_without_room_it_looks_for_itself(self, monitor, listener4, sysctl, caplog):
        sysctl(PARAMETERS / "max_registrations", 2)
        notes = Notes()
        pairs = [pair(listener4) for _ in range(5)]
        for _, ours in pairs:
            monitor.watch(ours.fileno(), *ends(ours), notes.append)
        assert monitor.counters.no_room == 3
        assert "no room" in caplog.text
        forgotten = ends(pairs[4][1])
        monitor.forget(*forgotten)
        wanted = [ends(ours) for _, ours in pairs[:4]]
        for client, ours in pairs:
            reset(ours)
            client.close()
        await notes.wait(4, 5.0)
        assert sorted(map(str, ((note.local, note.peer) for note in notes))) == sorted(
            map(str, wanted)
        )
        assert [note.reason for note in notes].count(Reason.UNKNOWN) == 2

    async def test_lost_events_are_made_up_for(self, monitor, listener4, sysctl, caplog):
        """More end at once than the module's queue holds; one stays, and is told in its turn."""
        sysctl(PARAMETERS / "max_unread", 2)
        notes, stays = Notes(), Notes()
        pairs = [pair(listener4) for _ in range(20)]
        for _, ours in pairs[1:]:
            monitor.watch(ours.fileno(), *ends(ours), notes.append)
        client, ours = pairs[0]
        monitor.watch(ours.fileno(), *ends(ours), stays.append)
        wanted = {ends(ours) for _, ours in pairs[1:]}
        for client, ours in pairs[1:]:
            reset(ours)
            client.close()
        await notes.wait(19)
        assert {(note.local, note.peer) for note in notes} == wanted
        assert [note.reason for note in notes].count(Reason.UNKNOWN) == 17
        assert monitor.counters.lost == 17
        assert "17 events of the monitor module were lost" in caplog.text
        assert stays == []
        client, ours = pairs[0]
        reset(ours)
        client.close()
        await stays.wait()
        assert stays[0].reason is Reason.ENDED
        assert len(monitor) == 0

    async def test_lost_while_looking_for_the_lost(self, monitor, listener4, sysctl, monkeypatch):
        """What was found well already may be lost before the others have been looked at."""
        monkeypatch.setattr("prism.monitor.kmod._BATCH", 1)
        sysctl(PARAMETERS / "max_unread", 0)
        pairs = [pair(listener4) for _ in range(4)]
        first = pairs[0][1]
        wanted = [ends(ours) for _, ours in pairs[:2]]
        notes = Notes()

        def tell(gone: Gone) -> None:
            notes.append(gone)
            if first.fileno() >= 0:
                reset(first)

        for _, ours in pairs:
            monitor.watch(ours.fileno(), *ends(ours), tell)
        reset(pairs[1][1])
        await notes.wait(2)
        assert [(note.local, note.peer) for note in notes] == wanted[::-1]
        assert monitor.counters.lost == 2
        for sock in [client for client, _ in pairs] + [ours for _, ours in pairs[2:]]:
            reset(sock)

    async def test_a_lost_time_wait_is_waited_for(self, monitor, listener4, sysctl):
        """Where its beginning is told and that got lost, the kernel is asked until it is over."""
        sysctl(PARAMETERS / "max_unread", 0)
        notes = Notes()
        client, ours = pair(listener4)
        local, peer = ends(ours)
        monitor.watch(ours.fileno(), local, peer, notes.append)
        ours.shutdown(socket.SHUT_WR)
        client.close()
        await asyncio.sleep(0.05)
        ours.close()
        await asyncio.sleep(0.3)
        assert notes == []
        use_port_again(listener4, peer)
        await notes.wait(seconds=5.0)
        assert notes == [Gone(local, peer, Reason.UNKNOWN, False)]
        assert monitor.counters.lost == 1

    async def test_the_same_socket_under_other_ends(self, monitor, listener4):
        client, ours = pair(listener4)
        local, peer = ends(ours)
        before, after = Notes(), Notes()
        monitor.watch(ours.fileno(), local, peer, before.append)
        monitor.watch(ours.fileno(), peer, local, after.append)
        client.close()
        ours.close()
        await after.wait()
        assert before == []
        assert len(monitor) == 0

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
        await asyncio.sleep(0.2)
        assert closing
        await asyncio.gather(*closing)

    async def test_a_socket_without_connection_is_refused(self, monitor):
        with socket.socket() as fresh, pytest.raises(OSError, match="not connected"):
            monitor.watch(fresh.fileno(), *([None] * 2), print)  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("wanted", "name"), [("auto", "kmod"), ("kmod", "kmod"), ("sockdiag", "sockdiag")]
)
def test_which_monitor_is_chosen(wanted, name):
    backend = BackendConfig(name="be1", address="10.77.0.1", monitor=wanted)
    assert monitor_for(backend).name == name
