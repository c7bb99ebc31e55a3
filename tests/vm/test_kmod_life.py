"""The monitor module's life: who keeps it loaded, what killed programs leave, much at once."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kmod_device import (
    PARAMETERS,
    Device,
    close_behind,
    load_module,
    references,
    settled_references,
    unload_module,
)
from monitor_conformance import pair, reset, use_port_again

from prism.flow import Endpoint
from prism.monitor.kmod import CLOSED, RESET, TIME_WAIT

pytestmark = pytest.mark.usefixtures("module")
HERE = Path(__file__).parent


@pytest.fixture
def held(module) -> Iterator[None]:
    """Whatever the test did, nothing keeps the module in the end; it is loaded again."""
    assert settled_references() == 0
    yield
    # The namespace has been removed, and the kernel ends its TIME_WAITs in the background.
    assert settled_references(seconds=30.0) == 0
    unload_module()
    load_module()


@pytest.fixture
def inside(held, make_namespace):
    with make_namespace("life").entered():
        yield


@pytest.fixture
def listener(inside):
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        yield listener


def assert_held() -> None:
    assert references() > 0
    with pytest.raises(subprocess.CalledProcessError) as caught:
        unload_module()
    assert "in use" in caught.value.stderr


class TestUnloading:
    """A module that is not used can be unloaded; its memory is accounted for by the kernel."""

    def test_not_while_a_descriptor_is_open(self, inside):
        with Device():
            assert_held()

    def test_not_while_a_registered_socket_exists(self, listener):
        client, ours = pair(listener)
        with Device() as device:
            device.register(ours, 1)
        assert_held()
        close_behind(client, ours)

    def test_not_while_the_time_wait_of_a_registered_socket_stands(self, listener):
        client, ours = pair(listener)
        port = Endpoint.from_sockaddr(client.getsockname())
        with Device() as device:
            device.register(ours, 1)
            ours.shutdown(socket.SHUT_WR)
            close_behind(client, ours)
        time.sleep(0.1)
        assert_held()
        use_port_again(listener, port)

    def test_unread_events_go_with_their_descriptor(self, listener):
        with Device() as device:
            for number in range(10):
                client, ours = pair(listener)
                device.register(ours, number)
                reset(client)
                ours.close()
            time.sleep(0.1)
            assert device.info.unread == 10

    def test_registered_again_and_again(self, listener):
        """Each socket is hooked once, however often it is registered."""
        client, ours = pair(listener)
        for number in range(20):
            with Device() as device:
                mine = device.register(ours, number)
                if number % 2:
                    device.unregister(mine)
        assert references() == 1
        with Device() as device:
            device.register(ours, 99)
            close_behind(client, ours)
            (event,) = device.wait()
            assert (event.cookie, event.reason) == (99, CLOSED)

    def test_the_family_of_a_socket_may_change(self, inside):
        """IPV6_ADDRFORM turns an IPv6 socket into an IPv4 one; its creator stays."""
        with (
            socket.create_server(
                ("::", 0), family=socket.AF_INET6, dualstack_ipv6=True
            ) as listener,
            Device() as device,
        ):
            client = socket.create_connection(("127.0.0.1", listener.getsockname()[1]))
            ours, _ = listener.accept()
            device.register(ours, 1)
            addrform = 1
            ours.setsockopt(socket.IPPROTO_IPV6, addrform, socket.AF_INET)
            port = client.getsockname()
            ours.shutdown(socket.SHUT_WR)
            close_behind(client, ours)
            told = [] if device.info.sees_time_wait else device.wait()
            assert device.silent(0.3)
            again = socket.socket()
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(port)
            again.connect(("127.0.0.1", listener.getsockname()[1]))
            again.close()
            assert [event.reason for event in told or device.wait()] == [TIME_WAIT]

    def test_with_kernel_tls_above(self, listener):
        """The tls layer copies a socket's protocol; none of ours may be in the copy."""
        client, ours = pair(listener)
        tcp_ulp = 31
        with Device() as device:
            device.register(ours, 1)
            ours.setsockopt(socket.IPPROTO_TCP, tcp_ulp, b"tls")
            other_client, other = pair(listener)
            other.setsockopt(socket.IPPROTO_TCP, tcp_ulp, b"tls")
            close_behind(client, ours)
            assert device.wait()[0].reason == CLOSED
        assert settled_references() == 0
        other_client.close()
        other.close()


class TestProcesses:
    def test_a_killed_process(self, listener):
        """Its sockets and its descriptor go in whatever order; others are not disturbed."""
        with Device() as device:
            client, ours = pair(listener)
            device.register(ours, 7)
            pairs = [pair(listener) for _ in range(50)]
            pid = os.fork()
            if pid == 0:
                ours.close()
                mine = Device()
                for number, (_, sock) in enumerate(pairs):
                    mine.register(sock, number)
                signal.pause()
            for _, sock in pairs:
                sock.close()
            time.sleep(0.5)
            assert references() == 2 + 1 + 50  # two descriptors
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            assert device.silent(0.3)
            for peer, _ in pairs:
                peer.close()
            close_behind(client, ours)
            assert [event.cookie for event in device.wait()] == [7]

    def test_closed_on_two_cores_at_once(self, listener):
        """Each end comes exactly once, whichever core was the last to let go."""
        count = 300
        with Device() as device:
            pairs = [pair(listener) for _ in range(count)]
            for number, (_, ours) in enumerate(pairs):
                device.register(ours, number)
            start, go = os.pipe()
            child = os.fork()
            if child == 0:  # has all sockets, too
                os.sched_setaffinity(0, {1})
                os.close(go)
                os.read(start, 1)
                for client, ours in pairs:
                    ours.close()
                    client.close()
                os._exit(0)
            os.sched_setaffinity(0, {0})
            os.close(start)
            os.close(go)
            for client, ours in pairs:
                client.close()
                ours.close()
            os.waitpid(child, 0)
            os.sched_setaffinity(0, {0, 1})
            time.sleep(0.2)
            told = device.read(1000)
            info = device.info
            assert len({event.cookie for event in told}) == len(told)
            assert len(told) + info.registered == count  # the others are in TIME_WAIT
            assert {event.reason for event in told} <= {
                CLOSED,
                RESET,
                *([] if info.sees_time_wait else [TIME_WAIT]),
            }
        # Theirs ends with the namespace.

    @pytest.mark.parametrize("unregister", [False, True])
    def test_descriptors_closed_while_sockets_end(self, listener, unregister):
        """One core closes sockets while the other closes what they are registered at."""
        for _ in range(10):
            device = Device()
            pairs = [pair(listener) for _ in range(30)]
            cookies = [device.register(ours, 0) for _, ours in pairs]
            child = os.fork()
            if child == 0:
                os.close(device.fd)
                for client, ours in pairs:
                    reset(client)
                    ours.close()
                os._exit(0)
            for client, ours in pairs:
                client.close()
                ours.close()
            for cookie in cookies if unregister else ():
                with contextlib.suppress(FileNotFoundError):
                    device.unregister(cookie)
            device.close()
            os.waitpid(child, 0)

    def test_stress(self, listener, sysctl):
        """Two processes do at random whatever can be done, for some seconds."""
        sysctl(PARAMETERS / "max_unread", 4)  # now and then one is lost
        address = "{}:{}".format(*listener.getsockname()[:2])
        command = [sys.executable, str(HERE / "kmod_stress.py"), address, "5"]
        seeds = [random.randrange(1 << 30) for _ in range(2)]
        workers = [subprocess.Popen([*command, str(seed)]) for seed in seeds]
        listener.settimeout(0.2)
        while any(worker.poll() is None for worker in workers):
            with contextlib.suppress(TimeoutError):
                client, _ = listener.accept()
                client.close() if random.random() < 0.5 else reset(client)
        assert [worker.returncode for worker in workers] == [0, 0], seeds


def test_many_registrations_at_one_descriptor(listener):
    """Half of a descriptor's sockets end, the other half stays; it is closed with those."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    count = 1500
    with Device() as device:
        pairs = [pair(listener) for _ in range(count)]
        for number, (_, ours) in enumerate(pairs):
            device.register(ours, number)
        assert device.info.registered == count
        for client, ours in pairs[::2]:
            close_behind(client, ours)
        told = device.wait(count // 2, 20.0)
        assert sorted(event.cookie for event in told) == list(range(0, count, 2))
        began = time.monotonic()
    assert time.monotonic() - began < 2.0
    for client, ours in pairs[1::2]:
        close_behind(client, ours)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
