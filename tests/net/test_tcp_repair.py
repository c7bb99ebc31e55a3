"""Export and import on one host: what is carried, and that nothing is said."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import threading

import pytest
from tcp_bed import (
    CLOSE_WAIT,
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
    settle,
    tcp_info,
    until,
)

from prism._ext import tcp_repair
from prism.lab.netns import Namespace

pytestmark = pytest.mark.net

LOOPBACK = [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("127.0.0.1", "::")]
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33
REQUEST = b"GET /bucket/object HTTP/1.1\r\nHost: store\r\n\r\n"
IP_FAMILIES = ["127.0.0.1", "::1"]


@pytest.fixture
def host(make_namespace: MakeNamespace) -> Namespace:
    return make_namespace("host")


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
    settle(client)
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


def test_a_live_connection_can_be_closed_quietly(host: Namespace) -> None:
    client, server = pair(host, host, "127.0.0.1")
    client.sendall(REQUEST)
    until(lambda: server.recv(1000, socket.MSG_PEEK) == REQUEST)
    settle(client)
    sniffer = Sniffer(host)
    tcp_repair.close_quietly(server.detach())
    assert sniffer.segments() == []
    client.close()
    sniffer.close()


@pytest.mark.parametrize("length", [0, 700, 60_000])
@pytest.mark.parametrize("address", IP_FAMILIES)
def test_half_closed_client(host: Namespace, address: str, length: int) -> None:
    host.sysctl("ipv4/conf/all/rp_filter", 1)
    client, server = pair(host, host, address)
    client.sendall(pattern(length))
    client.shutdown(socket.SHUT_WR)
    until(lambda: tcp_info(server)["state"] == CLOSE_WAIT)
    until(lambda: numbers(server)["receive_queue"] == length)
    settle(client)
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
    settle(client)
    for _ in range(5):
        server = rebuild(host, server)
    with client, server:
        assert server.recv(1000) + server.recv(1000) == REQUEST


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


def export_while_reading(server: socket.socket, stream: bytes, base: int) -> tuple[int, int]:
    """Export again and again, reading a little in between; how many exports, how many refused."""
    read = exports = moved = 0
    while read < len(stream):
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
        read += len(server.recv(2000))
    return exports, moved


@pytest.mark.parametrize("address", IP_FAMILIES)
def test_exports_are_consistent_while_data_arrives(host: Namespace, address: str) -> None:
    client, server = pair(host, host, address)
    base = int(numbers(server)["rcv_nxt"])
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # many segments, not few
    total = 2 << 20
    stream = pattern(total)
    cores = sorted(os.sched_getaffinity(0))
    sender = os.fork()  # a thread would wait for the interpreter just when it matters
    if sender == 0:
        try:
            os.sched_setaffinity(0, cores[-1:])  # truly at the same time
            for offset in range(0, total, 400):
                client.sendall(stream[offset : offset + 400])
            os._exit(0)
        finally:
            os._exit(1)
    os.sched_setaffinity(0, cores[:1])
    try:
        exports, moved = export_while_reading(server, stream, base)
    finally:
        os.sched_setaffinity(0, cores)
        client.close()
        server.close()
        status = os.waitpid(sender, 0)[1]
    assert status == 0
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
    first = 2 << 20
    with client:
        client.sendall(stream[:first])
        settle(client)
        before = numbers(server)
        assert before["buffers_fixed"] == 0
        server = rebuild(host, server)
        with server:
            after = numbers(server)
            assert after["buffers_fixed"] == 0
            assert 0 <= int(after["receive_buffer"]) - int(before["receive_buffer"]) < 2
            assert int(after["window_clamp"]) >= int(before["window_clamp"])
            assert after["receive_queue"] == before["receive_queue"] == first
            feeder = threading.Thread(daemon=True, target=lambda: client.sendall(stream[first:]))
            feeder.start()
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
