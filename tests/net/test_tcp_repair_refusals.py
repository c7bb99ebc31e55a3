"""What cannot be carried or imported is refused with a reason, and nothing is left behind."""

from __future__ import annotations

import errno
import os
import resource
import socket
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tcp_bed import (
    CLOSE_WAIT,
    ESTABLISHED,
    MakeNamespace,
    connect,
    listen,
    numbers,
    pair,
    pattern,
    tcp_info,
    until,
)

from prism._ext import tcp_repair
from prism.lab.netns import Namespace, join

pytestmark = pytest.mark.net

SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33


@pytest.fixture
def host(make_namespace: MakeNamespace) -> Namespace:
    return make_namespace("host")


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_closing_quietly_takes_anything(host: Namespace) -> None:
    left, right = socket.socketpair()
    tcp_repair.close_quietly(left.detach())
    assert right.recv(1) == b""
    right.close()
    client, server = pair(host, host, "127.0.0.1")
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    until(lambda: tcp_info(server)["state"] == 7)
    tcp_repair.close_quietly(server.detach())
    tcp_repair.close_quietly(host.socket().detach())
    tcp_repair.close_quietly(-1)


def test_fin_that_cannot_be_restored_is_an_error(host: Namespace) -> None:
    client, server = pair(host, host, "127.0.0.1")
    client.shutdown(socket.SHUT_WR)
    until(lambda: tcp_info(server)["state"] == CLOSE_WAIT)
    state = tcp_repair.export_state(server.fileno())
    tcp_repair.close_quietly(server.detach())
    with client, host.entered():
        before = descriptors()
        imported = tcp_repair.import_state(state, "127.0.0.1", 80)
        with host.route() as route:
            route.link("set", index=1, state="down")
        with pytest.raises(OSError, match="FIN"):
            imported.activate()
        with pytest.raises(ValueError, match="already"):
            imported.activate()
        assert descriptors() == before


def test_foreign_address_is_refused_at_once(host: Namespace) -> None:
    client, server = pair(host, host, "127.0.0.1")
    state = tcp_repair.export_state(server.fileno())
    before = descriptors()
    with client, server, host.entered():
        with pytest.raises(OSError, match="bind") as caught:
            tcp_repair.import_state(state, "192.0.2.7", 80)
        assert caught.value.errno == errno.EADDRNOTAVAIL
        with pytest.raises(ValueError, match="family"):
            tcp_repair.import_state(state, "::1", 80)
        with pytest.raises(ValueError, match="not an IP address"):
            tcp_repair.import_state(state, "localhost", 80)
    assert descriptors() == before - 2


def refused(descriptor: int) -> int | None:
    with pytest.raises(tcp_repair.NotCarriable) as caught:
        tcp_repair.export_state(descriptor)
    return caught.value.errno


def test_states_that_cannot_be_carried(host: Namespace) -> None:
    with host.socket() as fresh:
        assert refused(fresh.fileno()) == errno.ENOTCONN
    with listen(host, "127.0.0.1", 81) as listener, pytest.raises(OSError) as caught:
        tcp_repair.export_state(listener.fileno())
    assert caught.value.errno == errno.EPERM
    client, server = pair(host, host, "127.0.0.1")
    with client, server:
        server.shutdown(socket.SHUT_WR)  # FIN_WAIT2
        assert refused(server.fileno()) == errno.EOPNOTSUPP
        tcp_repair.resume(server.fileno())
        client.shutdown(socket.SHUT_WR)
    client, server = pair(host, host, "127.0.0.1")
    with client, server:
        server.shutdown(socket.SHUT_RD)
        assert refused(server.fileno()) == errno.EOPNOTSUPP
    with pytest.raises(OSError):
        tcp_repair.export_state(-1)
    left, right = socket.socketpair()
    with left, right, pytest.raises(OSError):
        tcp_repair.export_state(left.fileno())


def test_syn_sent_is_not_carried(host: Namespace, make_namespace: MakeNamespace) -> None:
    with host.socket() as half:
        join(host, "hole", make_namespace("other"), "hole")
        host.add_address("hole", "203.0.113.2/24")
        half.setblocking(False)
        assert half.connect_ex(("203.0.113.1", 80)) == errno.EINPROGRESS
        assert refused(half.fileno()) in (errno.EOPNOTSUPP, errno.ENOTCONN)


def test_reset_while_frozen_is_noticed(host: Namespace) -> None:
    client, server = pair(host, host, "127.0.0.1")
    with server:
        tcp_repair.freeze(server.fileno())
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        until(lambda: tcp_info(server)["state"] == 7)
        assert refused(server.fileno()) in (errno.ECONNRESET, errno.ENOTCONN)
        tcp_repair.resume(server.fileno())
        with pytest.raises(ConnectionResetError):  # the error is still there to be seen
            server.recv(1)


def test_urgent_data_is_noticed(host: Namespace) -> None:
    client, server = pair(host, host, "127.0.0.1")
    with client, server:
        client.sendall(b"abc")
        client.send(b"!", socket.MSG_OOB)
        until(lambda: refused(server.fileno()) == errno.EOPNOTSUPP)


def test_offset_peeking_is_noticed(host: Namespace) -> None:
    client, server = pair(host, host, "127.0.0.1")
    with client, server:
        client.sendall(b"abcdef")
        until(lambda: server.recv(10, socket.MSG_PEEK) == b"abcdef")
        server.setsockopt(socket.SOL_SOCKET, 42, 3)  # SO_PEEK_OFF
        assert refused(server.fileno()) == errno.EINVAL


def test_queues_beyond_the_bound_are_not_carried(host: Namespace) -> None:
    listener = listen(host, "127.0.0.1")
    listener.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 40 << 20)
    client = connect(host, "127.0.0.1")
    server, _ = listener.accept()
    with listener, client, server:
        client.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 64 << 20)
        client.sendall(bytes(20 << 20))
        until(lambda: len(server.recv(18 << 20, socket.MSG_PEEK)) > 16 << 20)
        assert refused(server.fileno()) == errno.EMSGSIZE


def test_two_thousand_cycles_leak_nothing(host: Namespace) -> None:
    client, server = pair(host, host, "127.0.0.1")
    client.sendall(pattern(20_000))
    until(lambda: numbers(server)["receive_queue"] == 20_000)
    descriptor = server.detach()
    with client, host.entered():

        def cycle() -> None:
            nonlocal descriptor
            state = tcp_repair.export_state(descriptor)
            tcp_repair.close_quietly(descriptor)
            tcp_repair.import_state(state, "127.0.0.1", 80).discard()
            descriptor = tcp_repair.import_state(state, "127.0.0.1", 80).activate(probe=False)

        for _ in range(200):
            cycle()
        before, memory = descriptors(), resident()
        for _ in range(2000):
            cycle()
        assert descriptors() == before
        assert resident() - memory < 1 << 20
        assert os.read(descriptor, 30_000) == pattern(20_000)
        tcp_repair.close_quietly(descriptor)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@settings(
    max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_mutated_states_import_or_are_refused(host: Namespace, data: st.DataObject) -> None:
    mutated = bytearray(_sample())
    for _ in range(data.draw(st.integers(1, 4))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    before = descriptors()
    with host.entered():
        try:
            imported = tcp_repair.import_state(bytes(mutated), "127.0.0.1", 80, alternatives=1)
            os.close(imported.activate())
        except (tcp_repair.StateError, OSError):
            pass
        except ValueError as problem:
            assert "family" in str(problem)
    assert descriptors() == before


def _sample() -> bytes:
    """A connection with both queues, described by hand (see tcp_state.h)."""
    local = bytes(10) + b"\xff\xff\x7f\0\0\1"
    header = struct.pack(
        "!4sBBBB16s16sHHHBBIIIIIIIIIIIIIIB7x",
        *(b"PTCP", 1, 0, 4, 7, local, local, 80, 40_000, 1460, 7, 7, 1_000_001),
        *(5_000, 9_000, 9_000, 60_000, 60_000, 50_000, 9_000, 40, 60, 20, 65_536, 0, 0, 0),
    )
    return header + pattern(100)


def test_the_sample_is_valid(host: Namespace) -> None:
    assert tcp_repair.describe(_sample())["unsent"] == 20
    with host.entered():
        imported = tcp_repair.import_state(_sample(), "127.0.0.1", 80)
        assert (imported.received, imported.unacknowledged, imported.unsent) == (40, 40, 20)
        with socket.socket(fileno=imported.fileno()) as watched:
            assert tcp_info(watched)["state"] == ESTABLISHED
            watched.detach()
        imported.discard()
        imported.discard()
