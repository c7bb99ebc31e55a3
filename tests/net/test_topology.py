"""The lab's network: everybody reaches everybody, links have their rate, nothing is left behind."""

from __future__ import annotations

import socket
import subprocess
import time

import pytest

from prism.errors import ConfigError, PrismError
from prism.lab.topology import Topology, namespaces_of, parse_rate, processes_in, remove_all

pytestmark = pytest.mark.net


@pytest.fixture
def name(lab_name: str) -> str:
    return lab_name


def ping(topology: Topology, role: str, address: str) -> bool:
    command = ["ping", "-n", "-c", "1", "-W", "2", address]
    return topology.namespace(role).run(command, stdout=subprocess.DEVNULL).returncode == 0


def test_everybody_reaches_everybody_over_both_families(name: str) -> None:
    topology = Topology(name, backends=2, frontends=2)
    topology.build()
    for role in ("client", "fe1", "be2"):
        for site in (topology.client, *topology.nodes):
            assert ping(topology, role, site.address)
            assert ping(topology, role, site.address6)
        assert ping(topology, role, topology.control.host)
        for service in topology.services(80):
            assert ping(topology, role, service.host)


def test_flows_are_spread_over_the_frontends_by_port(name: str) -> None:
    topology = Topology(name, backends=1, frontends=2)
    topology.build()
    for service in topology.services(8000):
        listeners = [site.namespace.socket(service.family) for site in topology.frontends]
        for listener in listeners:
            listener.bind((service.host, service.port))
            listener.listen(64)
            listener.setblocking(False)
        clients = []
        for _ in range(32):
            client = topology.client.namespace.socket(service.family)
            client.settimeout(2)
            client.connect((service.host, service.port))
            clients.append(client)
        accepted = []
        for listener in listeners:
            accepted.append(0)
            while True:
                try:
                    listener.accept()[0].close()
                except BlockingIOError:
                    break
                accepted[-1] += 1
        assert sum(accepted) == 32
        assert min(accepted) >= 4
        for each in (*clients, *listeners):
            each.close()


@pytest.mark.parametrize("towards_client", [True, False])
def test_links_have_their_rate_each_way(name: str, towards_client: bool) -> None:
    topology = Topology(name, backends=1, rate=parse_rate("40mbit"))
    topology.build()
    backend = topology.backends[0]
    with backend.namespace.socket() as listener, topology.client.namespace.socket() as client:
        listener.bind((backend.address, 8000))
        listener.listen()
        client.settimeout(10)
        client.connect((backend.address, 8000))
        server, _ = listener.accept()
        server.settimeout(10)
        sender, receiver = (server, client) if towards_client else (client, server)
        amount = 3_000_000
        import threading

        started = time.monotonic()
        thread = threading.Thread(target=sender.sendall, args=(bytes(amount),))
        thread.start()
        left = amount
        while left:
            left -= len(receiver.recv(min(left, 65536)))
        took = time.monotonic() - started
        thread.join()
        server.close()
    # 40 Mbit/s carry 3 MB in 0.6 s; the burst of 256 KiB is free.
    assert 0.4 < took < 2.0


def test_removal_ends_the_processes_inside(name: str) -> None:
    topology = Topology(name, backends=1)
    topology.build()
    stubborn = topology.namespace("be1").popen(
        ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.1; done"],
        stdout=subprocess.PIPE,
    )
    assert stubborn.stdout is not None
    assert stubborn.stdout.readline() == b"ready\n"
    assert stubborn.pid in set(processes_in(namespaces_of(name)))
    topology.remove()
    assert stubborn.wait(timeout=5) == -9
    stubborn.stdout.close()
    assert namespaces_of(name) == []
    topology.remove()


def test_a_second_lab_of_the_same_name_is_refused_and_harms_nothing(name: str) -> None:
    topology = Topology(name, backends=1)
    topology.build()
    with pytest.raises(PrismError, match="exists already"):
        Topology(name, backends=2).build()
    assert ping(topology, "client", topology.backends[0].address)


def test_a_failed_build_leaves_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    topology = Topology(name, backends=2)

    def fail() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(topology, "_route_services", fail)
    with pytest.raises(KeyboardInterrupt):
        topology.build()
    assert namespaces_of(name) == []


def test_labs_with_similar_names_leave_each_other_alone(name: str) -> None:
    longer = Topology(f"{name}-be1", backends=1)
    longer.build()
    try:
        assert remove_all(name) == []
        assert longer.switch.exists
    finally:
        longer.remove()


def test_switch_forwards_without_redirects_or_filters(name: str) -> None:
    topology = Topology(name, backends=1)
    topology.build()
    read = ["cat", "ipv4/ip_forward", "ipv4/conf/be1/rp_filter", "ipv4/conf/be1/send_redirects"]
    out = topology.switch.run(read, cwd="/proc/sys/net", capture_output=True, text=True).stdout
    assert out.split() == ["1", "0", "0"]
    assert socket.if_nameindex() == [pair for pair in socket.if_nameindex() if pair[1] != "be1"]


@pytest.mark.parametrize("text", ["", "fast", "10", "0mbit", "-5mbit", "999999gbit"])
def test_a_rate_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="200mbit"):
        parse_rate(text)


@pytest.mark.parametrize("name", ["", "UPPER", "a/b", "../x", "a" * 25])
def test_an_unsafe_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="lab name"):
        Topology(name)
