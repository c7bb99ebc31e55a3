"""The monitor module's device: what it tells, when it tells it, and what it refuses."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import select
import socket
import struct
import threading
import time

import pytest
from kmod_device import PARAMETERS, Device, close_behind, release, time_waits
from monitor_conformance import pair, reset, use_port_again

from prism._ext import tcp_repair
from prism.flow import Endpoint
from prism.lab.netns import join
from prism.monitor.kmod import CLOSED, HANDED_OFF, LOST, RESET, STARTS, TIME_WAIT, TIMED_OUT
from prism.monitor.sockdiag import cookie_of

TCP_LINGER2 = 8


@pytest.fixture
def inside(module, make_namespace):
    with make_namespace("kmod").entered():
        yield


@pytest.fixture
def device(inside):
    with Device() as device:
        yield device


@pytest.fixture(params=["127.0.0.1", "::1", "mapped"])
def listener(inside, request):
    """An IPv4 listener, an IPv6 one, and an IPv6 one that IPv4 clients talk to."""
    if request.param == "mapped":
        listener = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    else:
        family = socket.AF_INET6 if ":" in request.param else socket.AF_INET
        listener = socket.create_server((request.param, 0), family=family)
    with listener:
        yield listener


@pytest.fixture
def listener4(inside):
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        yield listener


def connect(listener: socket.socket) -> tuple[socket.socket, socket.socket]:
    """A connection: (the client's socket, ours); to a dual-stack listener over IPv4."""
    if listener.getsockname()[0] != "::":
        return pair(listener)
    client = socket.create_connection(("127.0.0.1", listener.getsockname()[1]))
    return client, listener.accept()[0]


def end_time_wait(client: tuple, listener: socket.socket) -> None:
    """Cut a TIME_WAIT short, as a client does that uses its port again."""
    if listener.getsockname()[0] == "::":
        again = socket.socket()
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(client[:2])
        again.connect(("127.0.0.1", listener.getsockname()[1]))
        ours, _ = listener.accept()
        reset(again)
        ours.close()
    else:
        use_port_again(listener, Endpoint(*client[:2]))


def only_begins(device: Device) -> bool:
    """Whether this kernel cannot tell the end of TIME_WAIT: then the event comes, and says so."""
    if device.info.sees_time_wait:
        return False
    (event,) = device.wait()
    assert (event.reason, event.flags) == (TIME_WAIT, STARTS)
    return True


def close_in_order(first: socket.socket, second: socket.socket) -> None:
    first.shutdown(socket.SHUT_WR)
    assert second.recv(1) == b""
    close_behind(second, first)


class TestWhatItTells:
    def test_the_peer_closed_first(self, device, listener):
        client, ours = connect(listener)
        before = time.monotonic_ns()
        mine = device.register(ours, 0xFEDC_BA98_7654_3210)
        assert mine == cookie_of(ours.fileno())
        ends = ours.getsockname()[:2], ours.getpeername()[:2]
        client.close()
        assert device.silent()  # half closed is not gone
        ours.close()
        (event,) = device.wait()
        assert (event.cookie, event.socket) == (0xFEDC_BA98_7654_3210, mine)
        assert (event.reason, event.flags, event.family) == (CLOSED, 0, ours.family)
        assert (event.local, event.peer) == ends
        assert before < event.when < time.monotonic_ns()

    def test_time_wait_is_waited_for(self, device, listener):
        client, ours = connect(listener)
        device.register(ours, 1)
        port = client.getsockname()
        close_in_order(ours, client)
        assert time_waits() == 1
        if only_begins(device):
            return
        assert device.silent(0.5)
        end_time_wait(port, listener)
        (event,) = device.wait()
        assert (event.reason, event.flags) == (TIME_WAIT, 0)

    def test_both_close_at_the_same_time(self, device, listener4):
        """CLOSING: both ends come to TIME_WAIT, each with the same two addresses."""
        client, ours = connect(listener4)
        device.register(ours, 1)
        device.register(client, 2)
        socks = [client, ours]
        barrier = threading.Barrier(2)

        def close(sock: socket.socket) -> None:
            barrier.wait()
            sock.close()

        threads = [threading.Thread(target=close, args=(sock,)) for sock in socks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        time.sleep(0.1)
        waiting = time_waits()
        assert waiting in (1, 2)
        told = [event.reason for event in device.read() if not event.flags]
        assert told == [CLOSED] * (2 - waiting)

    def test_a_peer_that_never_closes(self, device, listener):
        """FIN_WAIT2 without a socket is kept like TIME_WAIT, for TCP_LINGER2 seconds."""
        client, ours = connect(listener)
        device.register(ours, 1)
        ours.setsockopt(socket.IPPROTO_TCP, TCP_LINGER2, 2)
        ours.close()
        if only_begins(device):
            client.close()
            return
        began = time.monotonic()
        assert device.silent(1.0)
        (event,) = device.wait()
        assert event.reason == TIME_WAIT
        assert 1.5 < time.monotonic() - began < 4.5
        client.close()

    def test_where_there_is_no_room_for_time_wait(self, device, listener, sysctl):
        sysctl("/proc/sys/net/ipv4/tcp_max_tw_buckets", 0)
        client, ours = connect(listener)
        device.register(ours, 1)
        close_in_order(ours, client)
        (event,) = device.wait()
        assert (event.reason, time_waits()) == (CLOSED, 0)

    def test_a_namespace_that_goes_takes_time_wait_along(self, module, make_namespace):
        namespace = make_namespace("short")
        with Device() as device:
            with namespace.entered():
                listener = socket.create_server(("127.0.0.1", 0))
                client, ours = pair(listener)
                device.register(ours, 1)
                close_in_order(ours, client)
                listener.close()
                assert time_waits() == 1
            if only_begins(device):
                return
            assert device.silent(0.3)
            namespace.remove()
            (event,) = device.wait(seconds=20.0)
            assert (event.reason, event.flags) == (TIME_WAIT, 0)

    @pytest.mark.parametrize("read_first", [False, True])
    def test_reset_by_the_peer(self, device, listener, read_first):
        client, ours = connect(listener)
        device.register(ours, 1)
        reset(client)
        time.sleep(0.02)
        if read_first:  # the program takes the error away
            with pytest.raises(ConnectionResetError):
                ours.recv(1)
        assert device.silent()
        ours.close()
        assert device.wait()[0].reason == RESET

    def test_reset_by_us(self, device, listener):
        client, ours = connect(listener)
        device.register(ours, 1)
        reset(ours)
        assert device.wait()[0].reason == RESET
        client.close()

    @pytest.mark.parametrize("closed", [False, True])
    def test_closed_with_unread_octets(self, device, listener, closed):
        client, ours = connect(listener)
        device.register(ours, 1)
        client.sendall(b"unread")
        if closed:
            client.shutdown(socket.SHUT_WR)
        time.sleep(0.02)
        ours.close()
        assert device.wait()[0].reason == RESET
        client.close()

    def test_read_to_the_end_is_no_reset(self, device, listener):
        client, ours = connect(listener)
        device.register(ours, 1)
        client.sendall(b"all of it")
        client.close()
        assert ours.recv(9) == b"all of it"  # and the FIN is not asked for
        ours.close()
        assert device.wait()[0].reason == CLOSED

    def test_timed_out(self, module, make_namespace):
        here, there = make_namespace("here"), make_namespace("there")
        join(here, "a", there, "b")
        here.add_address("a", "10.77.0.1/24")
        there.add_address("b", "10.77.0.2/24")
        with here.entered(), Device() as device:
            with socket.create_server(("10.77.0.1", 0)) as listener:
                client = there.socket()
                client.connect(listener.getsockname())
                ours, _ = listener.accept()
            device.register(ours, 1)
            there.run(["ip", "link", "set", "dev", "b", "down"])
            ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 300)
            ours.send(b"are you there?")
            ours.close()
            (event,) = device.wait(seconds=10.0)
            assert event.reason == TIMED_OUT
            client.close()

    def test_handed_off(self, device, listener):
        client, ours = connect(listener)
        device.register(ours, 1)
        tcp_repair.freeze(ours.fileno())
        assert device.silent()
        tcp_repair.close_quietly(ours.detach())
        assert device.wait()[0].reason == HANDED_OFF
        client.close()

    def test_a_packet_in_a_queue_belongs_to_the_connection(self, module, make_namespace):
        """Not before the last packet has left the machine's own queue is all of it gone."""
        here, there = make_namespace("here"), make_namespace("there")
        join(here, "a", there, "b")
        here.add_address("a", "10.77.0.1/24")
        there.add_address("b", "10.77.0.2/24")
        with here.entered(), Device() as device:
            with socket.create_server(("10.77.0.1", 0)) as listener:
                client = there.socket()
                client.connect(listener.getsockname())
                ours, _ = listener.accept()
            command = "tc qdisc add dev a root tbf rate 24kbit burst 2000 latency 60s"
            here.run(command.split())
            device.register(ours, 1)
            ours.setblocking(False)
            ours.send(bytes(9000))  # 3 s at 24 kbit/s
            time.sleep(0.1)
            began = time.monotonic()
            reset(ours)
            (event,) = device.wait(seconds=10.0)
            assert event.reason == RESET
            assert 1.0 < time.monotonic() - began < 6.0
            client.close()

    @pytest.mark.parametrize("named", [False, True])
    def test_a_time_wait_from_before_the_registration(self, device, listener, named):
        """Its end is not observed, and the event says so instead of waiting for ever."""
        client, ours = connect(listener)
        if named:  # a socket has its cookie from the time when somebody first asks for it
            cookie_of(ours.fileno())
        ours.shutdown(socket.SHUT_WR)
        client.close()
        time.sleep(0.05)
        assert time_waits() == 1
        device.register(ours, 1)
        assert device.silent()
        ours.close()
        (event,) = device.wait()
        assert (event.reason, event.flags) == (TIME_WAIT, STARTS)

    def test_a_time_wait_that_ends_before_its_socket(self, device, listener):
        client, ours = connect(listener)
        device.register(ours, 1)
        port = client.getsockname()
        ours.shutdown(socket.SHUT_WR)
        client.close()
        time.sleep(0.05)
        assert time_waits() == 1
        end_time_wait(port, listener)
        assert time_waits() == 0
        assert device.silent()  # the program still has the socket
        ours.close()
        (event,) = device.wait()
        # What has ended unseen is not there any more: no TIME_WAIT to wait for either.
        wanted = TIME_WAIT if device.info.sees_time_wait else CLOSED
        assert (event.reason, event.flags) == (wanted, 0)

    def test_the_time_wait_of_a_later_connection_is_not_its_own(self, device, listener4):
        """The program still has the socket when the client has used its port again."""
        client, ours = connect(listener4)
        device.register(ours, 1)
        port = client.getsockname()
        reset(client)
        with socket.socket() as later:
            later.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            later.bind(port)
            later.connect(listener4.getsockname())
            accepted, _ = listener4.accept()
            device.register(accepted, 2)
            close_in_order(accepted, later)
        assert time_waits() == 1
        only_begins(device)
        ours.close()
        (event,) = device.wait()
        assert (event.cookie, event.reason, event.flags) == (1, RESET, 0)

    def test_a_socket_that_was_reset_before_the_registration(self, device, listener):
        client, ours = connect(listener)
        reset(client)
        time.sleep(0.02)
        device.register(ours, 1)
        assert device.silent()
        ours.close()
        assert device.wait()[0].reason == RESET

    def test_a_socket_in_two_descriptors(self, device, listener4):
        client, ours = connect(listener4)
        device.register(ours, 1)
        twin = ours.dup()
        client.close()
        ours.close()
        assert device.silent()
        twin.close()
        assert device.wait()[0].reason == CLOSED


class TestWhatItRefuses:
    def test_what_is_no_connected_tcp_socket(self, device, listener4):
        def refusal(sock, flags=0):
            with pytest.raises(OSError) as caught:
                device.register(sock, 1, flags)
            return caught.value.errno

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.connect(("127.0.0.1", 9))
            assert refusal(udp) == errno.EPROTONOSUPPORT
        ours, theirs = socket.socketpair()
        assert refusal(ours) == errno.EPROTONOSUPPORT
        ours.close()
        theirs.close()
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4) as netlink:
            assert refusal(netlink) == errno.EPROTONOSUPPORT
        assert refusal(device.fd) == errno.ENOTSOCK
        assert refusal(9999) == errno.EBADF
        assert refusal(-1) == errno.EBADF
        assert refusal(listener4) == errno.ENOTCONN
        with socket.socket() as fresh:
            assert refusal(fresh) == errno.ENOTCONN
            fresh.bind(("127.0.0.1", 0))
            assert refusal(fresh) == errno.ENOTCONN
        with socket.socket() as connecting:  # nobody answers there
            connecting.setblocking(False)
            listener4.listen(0)
            fillers = [socket.socket() for _ in range(8)]
            for filler in fillers:
                filler.setblocking(False)
                filler.connect_ex(listener4.getsockname())
            connecting.connect_ex(listener4.getsockname())
            assert refusal(connecting) == errno.ENOTCONN
            for filler in fillers:
                filler.close()
        client, ours = connect_anew()
        assert refusal(ours, flags=1) == errno.EINVAL
        assert device.info.registered == 0
        close_behind(client, ours)
        assert device.silent()

    def test_bad_commands_and_pointers(self, device):
        with pytest.raises(OSError, match="Inappropriate ioctl"):
            fcntl.ioctl(device.fd, 0x5099)
        libc = ctypes.CDLL(None, use_errno=True)
        for command in (0xC018_50A0, 0x4008_50A1, 0x8018_50A2, 0x4008_50A3):
            assert libc.ioctl(device.fd, ctypes.c_ulong(command), ctypes.c_void_p(8)) == -1
            assert ctypes.get_errno() == errno.EFAULT
        with pytest.raises(OSError, match="Invalid argument"):
            os.read(device.fd, 63)
        with pytest.raises(OSError, match="Invalid argument"):
            os.write(device.fd, b"x")

    def test_the_same_socket_twice(self, device, listener4):
        client, ours = connect(listener4)
        mine = device.register(ours, 1)
        with pytest.raises(FileExistsError):
            device.register(ours, 2)
        with Device() as other:
            with pytest.raises(OSError) as caught:
                other.register(ours, 3)
            assert caught.value.errno == errno.EBUSY
            with pytest.raises(FileNotFoundError):
                other.unregister(mine)
            device.unregister(mine)
            with pytest.raises(FileNotFoundError):
                device.unregister(mine)
            assert other.register(ours, 4) == mine
            close_behind(client, ours)
            assert other.wait()[0].cookie == 4
        assert device.silent()

    def test_unregistered_while_in_time_wait(self, device, listener4):
        client, ours = connect(listener4)
        mine = device.register(ours, 1)
        port = client.getsockname()
        close_in_order(ours, client)
        if only_begins(device):
            return
        device.unregister(mine)
        assert device.info.registered == 0
        end_time_wait(port, listener4)
        assert device.silent(0.3)

    def test_the_bound_of_registrations(self, device, listener4, sysctl):
        sysctl(PARAMETERS / "max_registrations", 4)
        pairs = [connect(listener4) for _ in range(6)]

        def is_refused() -> bool:
            with pytest.raises(OSError) as caught:
                device.register(pairs[4][1], 4)
            return caught.value.errno == errno.ENOSPC

        mine = [device.register(pairs[number][1], number) for number in range(4)]
        assert is_refused()
        assert (device.info.limit, device.info.registered) == (4, 4)
        with Device() as other:  # the bound is each descriptor's own
            other.register(pairs[5][1], 5)
        device.unregister(mine[0])
        device.register(pairs[0][1], 0)
        assert is_refused()
        close_behind(*pairs[1])
        assert [event.cookie for event in device.wait()] == [1]
        device.register(pairs[4][1], 4)
        for number in (0, 2, 3, 4, 5):
            close_behind(*pairs[number])
        assert sorted(event.cookie for event in device.wait(4)) == [0, 2, 3, 4]
        assert (device.info.registered, device.info.unread) == (0, 0)


def connect_anew() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return pair(listener)


def end(device: Device, listener: socket.socket, count: int) -> None:
    """Have so many connections end, one after the other; registered as 0, 1, ..."""
    for number in range(count):
        client, ours = connect(listener)
        device.register(ours, number)
        close_behind(client, ours)


class TestOverflow:
    """What finds the queue full is counted, and the reader told; never silence."""

    def test_what_is_lost_is_counted_and_the_rest_can_be_found(self, device, listener4, sysctl):
        sysctl(PARAMETERS / "max_unread", 3)
        pairs = [connect(listener4) for _ in range(9)]
        mine = [device.register(ours, number) for number, (_, ours) in enumerate(pairs)]
        assert all(device.registered(cookie) for cookie in mine)
        for client, ours in pairs[:8]:
            close_behind(client, ours)
        info = device.info
        assert (info.registered, info.unread, info.lost) == (1, 3, 5)
        lost, *told = device.read()
        assert (lost.reason, lost.cookie, lost.socket, lost.flags) == (LOST, 5, 0, 0)
        assert [(event.cookie, event.reason) for event in told] == [(n, CLOSED) for n in range(3)]
        assert [device.registered(cookie) for cookie in mine] == [False] * 8 + [True]
        info = device.info
        assert (info.registered, info.unread, info.lost) == (1, 0, 0)
        close_behind(*pairs[8])  # there is room again
        assert [event.cookie for event in device.wait()] == [8]
        assert not device.registered(mine[8])
        assert device.silent()

    def test_whoever_has_only_lost_events_is_woken(self, device, listener4, sysctl):
        sysctl(PARAMETERS / "max_unread", 0)
        epoll = select.epoll()
        epoll.register(device.fd, select.EPOLLIN | select.EPOLLET)
        for _ in range(2):
            end(device, listener4, 2)
            assert epoll.poll(2.0) == [(device.fd, select.EPOLLIN)]
            assert not device.silent(0.0)
            assert [(event.reason, event.cookie) for event in device.read()] == [(LOST, 2)]
            assert device.silent()
        epoll.close()

    def test_a_fault_does_not_lose_the_number(self, device, listener4, sysctl):
        sysctl(PARAMETERS / "max_unread", 1)
        end(device, listener4, 4)
        with pytest.raises(OSError, match="Bad address"):
            device.read_into(8, 64)
        assert device.info.lost == 3
        end(device, listener4, 1)
        assert [(event.reason, event.cookie) for event in device.read(1)] == [(LOST, 4)]
        assert [(event.reason, event.cookie) for event in device.read(9)] == [(CLOSED, 0)]

    def test_lost_at_the_end_of_time_wait(self, device, listener4, sysctl):
        sysctl(PARAMETERS / "max_unread", 0)
        client, ours = connect(listener4)
        mine = device.register(ours, 1)
        port = client.getsockname()
        close_in_order(ours, client)
        sees = device.info.sees_time_wait
        assert device.registered(mine) == sees  # its event is yet to come
        assert device.silent() == sees
        end_time_wait(port, listener4)
        (event,) = device.wait()
        assert (event.reason, event.cookie) == (LOST, 1)
        assert not device.registered(mine)

    def test_another_descriptor_has_its_own_queue(self, device, listener4, sysctl):
        sysctl(PARAMETERS / "max_unread", 1)
        with Device() as other:
            end(device, listener4, 2)
            end(other, listener4, 1)
            assert [event.reason for event in other.wait()] == [CLOSED]
            client, ours = connect(listener4)
            mine = other.register(ours, 2)
            assert not device.registered(mine)
            close_behind(client, ours)
        assert [event.reason for event in device.wait(2)] == [LOST, CLOSED]


class TestReading:
    def test_as_many_as_fit_and_in_order(self, device, listener4):
        end(device, listener4, 10)
        assert len(os.read(device.fd, 64 + 63)) == 64
        assert [event.cookie for event in device.read(4)] == [1, 2, 3, 4]
        assert [event.cookie for event in device.read(100)] == [5, 6, 7, 8, 9]
        with pytest.raises(BlockingIOError):
            os.read(device.fd, 64)

    def test_a_fault_in_the_middle_of_a_read_loses_nothing(self, device, listener4):
        end(device, listener4, 5)
        page = mmap.PAGESIZE
        area = mmap.mmap(-1, 2 * page)
        address = ctypes.addressof(ctypes.c_char.from_buffer(area))
        libc = ctypes.CDLL(None)
        assert libc.mprotect(ctypes.c_void_p(address + page), page, 0) == 0
        with pytest.raises(OSError, match="Bad address"):
            device.read_into(address + page, 64)
        with pytest.raises(OSError, match="Bad address"):
            device.read_into(address + page - 30, 64 * 5)
        assert device.read_into(address + page - 64 * 2 - 30, 64 * 5) == 128
        assert device.info.unread == 3
        assert [event.cookie for event in device.read()] == [2, 3, 4]
        assert libc.mprotect(ctypes.c_void_p(address + page), page, 3) == 0

    def test_poll_and_epoll(self, device, listener4):
        assert device.silent(0.0)
        epoll = select.epoll()
        epoll.register(device.fd, select.EPOLLIN | select.EPOLLET)
        end(device, listener4, 2)
        assert epoll.poll(2.0) == [(device.fd, select.EPOLLIN)]
        assert len(device.read(1)) == 1
        assert not device.silent(0.0)
        assert len(device.read(5)) == 1
        end(device, listener4, 1)
        assert epoll.poll(2.0) == [(device.fd, select.EPOLLIN)]
        epoll.close()

    def test_a_blocking_reader_is_woken(self, inside, listener4):
        with Device(blocking=True) as device:
            found: list[int] = []
            reader = threading.Thread(
                target=lambda: found.extend(event.cookie for event in device.read(1)), daemon=True
            )
            reader.start()
            time.sleep(0.1)
            assert found == []
            end(device, listener4, 1)
            reader.join(10.0)
            assert found == [0]

    def test_many_readers_get_each_event_once(self, inside, listener4):
        with Device(blocking=True) as device:
            found: list[int] = []

            def read() -> None:
                while (cookie := device.read(1)[0].cookie) < 100:
                    found.append(cookie)

            readers = [threading.Thread(target=read, daemon=True) for _ in range(4)]
            for reader in readers:
                reader.start()
            end(device, listener4, 100)
            until = time.monotonic() + 10
            while len(found) < 100 and time.monotonic() < until:
                time.sleep(0.05)
            assert sorted(found) == list(range(100))
            for number in range(4):
                client, ours = connect(listener4)
                device.register(ours, 100 + number)
                close_behind(client, ours)
            for reader in readers:
                reader.join(10.0)
                assert not reader.is_alive()

    def test_the_info(self, device):
        assert device.info.sees_time_wait == (release() < (6, 18))
        assert device.info.limit == 1 << 20
        assert struct.calcsize("=QQQHBB2s2s16s16s") == 64
