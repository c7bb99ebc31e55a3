"""Export and import on one host: what is carried, what is refused, and that nothing is said."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import socket
import struct
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tcp_bed import (
    CLOSE_WAIT,
    ESTABLISHED,
    SO_BUF_LOCK,
    MakeNamespace,
    Sniffer,
    connect,
    listen,
    numbers,
    pair,
    pattern,
    rebuild,
    receive,
    tcp_info,
    until,
)

from prism._ext import tcp_repair
from prism.lab.netns import Namespace, join

pytestmark = pytest.mark.net

LOOPBACK = [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("127.0.0.1", "::")]
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33
REQUEST = b"GET /bucket/object HTTP/1.1\r\nHost: store\r\n\r\n"
IP_FAMILIES = ["127.0.0.1", "::1"]


@pytest.fixture
def host(make_namespace: MakeNamespace) -> Namespace:
    return make_namespace("host")


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize(("address", "listening"), LOOPBACK)
def test_a_peeked_request_is_there_to_read_after_the_move(
    host: Namespace, address: str, listening: str
) -> None:
    client, server = pair(host, host, address, wildcard=listening)
    with client:
        client.sendall(REQUEST)
        assert server.recv(4096, socket.MSG_PEEK) == REQUEST
        with rebuild(host, server) as new:
            assert new.recv(4096) == REQUEST
            new.sendall(b"response")
            assert client.recv(4096) == b"response"
            client.sendall(b"next")
            assert new.recv(4096) == b"next"
        assert client.recv(4096) == b""


def test_mapped_connection_travels_as_ipv4(host: Namespace) -> None:
    client, server = pair(host, host, "127.0.0.1", wildcard="::")
    assert server.family == socket.AF_INET6
    state = tcp_repair.export_state(server.fileno())
    told = tcp_repair.describe(state)
    assert (told["family"], told["local"], told["peer"]) == (4, "127.0.0.1", "127.0.0.1")
    tcp_repair.close_quietly(server.detach())
    with client, host.entered():
        imported = tcp_repair.import_state(state, "::ffff:127.0.0.1", 80)
        assert imported.local == ("127.0.0.1", 80)
        assert imported.peer == client.getsockname()
        with socket.socket(fileno=imported.activate()) as new:
            assert new.family == socket.AF_INET


@pytest.mark.parametrize("address", IP_FAMILIES)
def test_numbers_survive_unchanged(host: Namespace, address: str) -> None:
    client, server = pair(host, host, address)
    client.sendall(pattern(5000))
    server.recv(1000)
    server.sendall(pattern(3000))
    until(lambda: numbers(server)["send_queue"] == 0)
    before = numbers(server)
    with client, rebuild(host, server, probe=False) as new:
        after = numbers(new)
        for key in set(before) - {"timestamp", "send_buffer"}:
            assert after[key] == before[key], key
        assert (int(after["timestamp"]) - int(before["timestamp"])) % 2**32 < 1_000_000
        assert new.recv(8000) == pattern(4000, 1000)


@pytest.mark.parametrize("address", IP_FAMILIES)
def test_descriptor_flags_and_address_reuse(host: Namespace, address: str) -> None:
    client, server = pair(host, host, address)
    with client, rebuild(host, server) as new:
        descriptor = new.fileno()
        assert fcntl.fcntl(descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        assert os.get_blocking(descriptor) is False or new.gettimeout() == 3
        assert new.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        assert new.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
        assert new.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1
        listen(host, address).close()  # a restarted server must be able to bind to the port


def test_resume_lets_listeners_bind_again(host: Namespace) -> None:
    client, server = pair(host, host, "127.0.0.1")
    with client, server:
        tcp_repair.freeze(server.fileno())
        tcp_repair.resume(server.fileno())
        listen(host, "127.0.0.1").close()


def test_activated_descriptor_does_not_block(host: Namespace) -> None:
    client, server = pair(host, host, "127.0.0.1")
    state = tcp_repair.export_state(server.fileno())
    tcp_repair.close_quietly(server.detach())
    with client, host.entered():
        descriptor = tcp_repair.import_state(state, "127.0.0.1", 80).activate()
        assert os.get_blocking(descriptor) is False
        os.close(descriptor)


def test_resume_goes_on(host: Namespace) -> None:
    client, server = pair(host, host, "127.0.0.1")
    with client, server:
        client.sendall(b"one")
        tcp_repair.export_state(server.fileno())
        client.sendall(b"two")
        for use in (lambda: server.recv(10), lambda: server.send(b"lost")):
            with pytest.raises(OSError):
                use()
        tcp_repair.resume(server.fileno())
        until(lambda: len(server.recv(10, socket.MSG_PEEK)) == 6)
        assert server.recv(10) == b"onetwo"
        server.sendall(b"three")
        assert client.recv(10) == b"three"


@pytest.mark.parametrize("address", IP_FAMILIES)
def test_quiet_means_that_no_packet_leaves(host: Namespace, address: str) -> None:
    client, server = pair(host, host, address)
    client.sendall(REQUEST)
    until(lambda: server.recv(1000, socket.MSG_PEEK) == REQUEST)
    sniffer = Sniffer(host)
    state = tcp_repair.export_state(server.fileno())
    tcp_repair.close_quietly(server.detach())
    with host.entered():
        tcp_repair.import_state(state, address, 80).discard()
        dropped = tcp_repair.import_state(state, address, 80)
        del dropped
        imported = tcp_repair.import_state(state, address, 80)
        assert sniffer.segments() == []
        with socket.socket(fileno=imported.activate(probe=False)) as new:
            assert sniffer.segments() == []
            tcp_repair.probe(new.fileno())
            assert [length for _, length, out in sniffer.segments() if out] == [0, 0]
    client.close()
    sniffer.close()


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


@pytest.mark.parametrize("length", [0, 700, 60_000])
@pytest.mark.parametrize("address", IP_FAMILIES)
def test_half_closed_client(host: Namespace, address: str, length: int) -> None:
    host.sysctl("ipv4/conf/all/rp_filter", 1)
    client, server = pair(host, host, address)
    client.sendall(pattern(length))
    client.shutdown(socket.SHUT_WR)
    until(lambda: tcp_info(server)["state"] == CLOSE_WAIT)
    until(lambda: numbers(server)["receive_queue"] == length)
    before = numbers(server)
    assert before["half_closed"] is True
    sniffer = Sniffer(host)
    with client, rebuild(host, server) as new:
        assert tcp_info(new)["state"] == CLOSE_WAIT
        assert numbers(new)["rcv_nxt"] == before["rcv_nxt"]
        received = b""
        while part := new.recv(100_000):
            received += part
        assert received == pattern(length)
        new.sendall(b"answer")
        new.shutdown(socket.SHUT_WR)
        assert client.recv(100) == b"answer"
        assert client.recv(100) == b""
    assert not [flags for flags, _, _ in sniffer.segments() if flags & Sniffer.RST]
    sniffer.close()


def test_half_closed_moves_on_and_on(host: Namespace) -> None:
    client, server = pair(host, host, "127.0.0.1")
    client.sendall(REQUEST)
    client.shutdown(socket.SHUT_WR)
    until(lambda: tcp_info(server)["state"] == CLOSE_WAIT)
    for _ in range(5):
        server = rebuild(host, server)
    with client, server:
        assert server.recv(1000) + server.recv(1000) == REQUEST


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


@pytest.mark.parametrize("address", IP_FAMILIES)
def test_taken_address_gets_the_next_port(host: Namespace, address: str) -> None:
    client, server = pair(host, host, address)
    state = tcp_repair.export_state(server.fileno())
    with client, server, host.entered():
        first = tcp_repair.import_state(state, address, 80)
        second = tcp_repair.import_state(state, address, 80)
        assert (first.local, second.local) == ((address, 81), (address, 82))
        with pytest.raises(OSError) as caught:
            tcp_repair.import_state(state, address, 80, alternatives=2)
        assert caught.value.errno == errno.EADDRNOTAVAIL
        tcp_repair.resume(server.fileno())


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


@pytest.mark.parametrize("address", IP_FAMILIES)
def test_exports_are_consistent_while_data_arrives(host: Namespace, address: str) -> None:
    client, server = pair(host, host, address)
    base = int(numbers(server)["rcv_nxt"])
    total = 6 << 20
    stream = pattern(total)

    def feed() -> None:
        for offset in range(0, total, 3001):
            client.sendall(stream[offset : offset + 3001])

    feeder = threading.Thread(daemon=True, target=feed)
    feeder.start()
    read = exports = moved = 0
    with client, server:
        while read < total:
            try:
                state = tcp_repair.export_state(server.fileno())
            except OSError as problem:
                assert problem.errno == errno.EBUSY
                moved += 1
            else:
                told = tcp_repair.describe(state)
                end = (int(told["rcv_nxt"]) - base) % 2**32
                begin = end - int(told["receive_queue"])
                assert begin == read
                assert state[tcp_repair.HEADER_SIZE :] == stream[begin:end]
                exports += 1
            tcp_repair.resume(server.fileno())
            read += len(server.recv(40_000))
        feeder.join()
    assert exports > 50
    assert moved < exports / 10


def test_large_receive_queue_comes_whole_and_the_buffer_stays_tunable(host: Namespace) -> None:
    stream = pattern(12 << 20)
    with listen(host, "127.0.0.1") as listener:
        listener.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
        listener.setsockopt(socket.SOL_SOCKET, SO_BUF_LOCK, 0)  # as if the kernel had tuned it
        client = connect(host, "127.0.0.1")
        server, _ = listener.accept()
    server.settimeout(3)
    feeder = threading.Thread(daemon=True, target=lambda: client.sendall(stream))
    feeder.start()
    with client:
        until(lambda: int(numbers(server)["receive_queue"]) > 2 << 20)
        before = numbers(server)
        assert before["buffers_fixed"] == 0
        server = rebuild(host, server)
        with server:
            after = numbers(server)
            assert after["buffers_fixed"] == 0
            assert 0 <= int(after["receive_buffer"]) - int(before["receive_buffer"]) < 2
            assert int(after["window_clamp"]) >= int(before["window_clamp"])
            assert int(after["receive_queue"]) >= int(before["receive_queue"])
            assert receive(server, len(stream)) == stream
        feeder.join()


def test_fixed_buffers_stay_fixed(host: Namespace) -> None:
    with listen(host, "127.0.0.1") as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 100_000)
        client = connect(host, "127.0.0.1")
        server, _ = listener.accept()
    with client, rebuild(host, server) as new:
        assert new.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 200_000
        assert new.getsockopt(socket.SOL_SOCKET, SO_BUF_LOCK) == 2


def test_small_window_clamp_is_not_inherited(host: Namespace) -> None:
    client, server = pair(host, host, "127.0.0.1")
    usual = server.getsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP)
    server.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, 20_000)
    with client, rebuild(host, server) as new:
        assert new.getsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP) >= usual - 1000


@pytest.mark.parametrize("address", IP_FAMILIES)
def test_unsent_and_unacknowledged_octets_arrive(host: Namespace, address: str) -> None:
    with listen(host, address) as listener:
        client = connect(host, address, rcvbuf=8192)
        server, _ = listener.accept()
    stream = pattern(12 << 20)
    server.setblocking(False)
    written = 0
    with pytest.raises(BlockingIOError):
        while written < len(stream):
            written += server.send(stream[written : written + 100_000])
    told = numbers(server)
    assert int(told["unsent"]) > 100_000
    assert int(told["snd_wnd"]) < 20_000
    with client, rebuild(host, server) as new:
        assert 0 <= int(told["send_queue"]) - int(numbers(new)["send_queue"]) < 100_000
        assert receive(client, written) == stream[:written]
        new.sendall(b"more")
        assert client.recv(10) == b"more"


@pytest.mark.parametrize("address", IP_FAMILIES)
@pytest.mark.parametrize(
    ("timestamps", "sack", "scaling"), [(1, 1, 1), (0, 1, 1), (1, 0, 1), (1, 1, 0), (0, 0, 0)]
)
def test_options_as_negotiated(
    host: Namespace, address: str, timestamps: int, sack: int, scaling: int
) -> None:
    for key, value in (("timestamps", timestamps), ("sack", sack), ("window_scaling", scaling)):
        host.sysctl(f"ipv4/tcp_{key}", value)
    client, server = pair(host, host, address)
    for key in ("timestamps", "sack", "window_scaling"):
        host.sysctl(f"ipv4/tcp_{key}", 1)  # the new owner's defaults are others
    before = numbers(server)
    assert (before["timestamps"], before["sack"], before["window_scaling"]) == (
        bool(timestamps),
        bool(sack),
        bool(scaling),
    )
    with client, rebuild(host, server) as new:
        after = numbers(new)
        for key in ("timestamps", "sack", "snd_wscale", "rcv_wscale", "mss"):
            assert after[key] == before[key]
        client.sendall(b"x")
        assert new.recv(1) == b"x"
        new.sendall(b"y")
        assert client.recv(1) == b"y"
        assert int(numbers(client)["snd_wnd"]) > 30_000  # the window is scaled as the client reads
        stream = pattern(1 << 20)
        feeder = threading.Thread(daemon=True, target=lambda: client.sendall(stream))
        feeder.start()
        assert receive(new, len(stream)) == stream
        feeder.join()
        feeder = threading.Thread(daemon=True, target=lambda: new.sendall(stream))
        feeder.start()
        assert receive(client, len(stream)) == stream
        feeder.join()


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
