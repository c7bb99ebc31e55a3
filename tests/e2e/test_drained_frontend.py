"""A drained frontend: nobody who is connected, as the client sees it, is reset or left alone."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from e2e_bed import Bed, bed, wait_for
from e2e_http import Client, Conn
from e2e_tls import SUITES, TlsConn, TlsSocket, tls_client
from openssl_peer import TLS1_3, Peer

from prism.errors import PrismError

PATH = "/drained"


@pytest.fixture(scope="module")
def shared() -> Iterator[Bed]:
    with bed(tls=True) as found:
        found.store(PATH, 300)
        yield found


@pytest.fixture
def clients(shared: Bed) -> Iterator[Bed]:
    """A cluster whose frontend is back afterwards, whatever has become of it."""
    yield shared
    process = shared.cluster.node("fe1").process
    assert process is not None
    if not stays(shared):
        process.wait(40)
        shared.cluster.restart("fe1")
    assert wait_for(lambda: shared.client.once("GET", PATH).status == 200)
    assert shared.no_unexpected_errors() == []


def stays(bed: Bed) -> bool:
    """Whether the frontend is there, and not about to end."""
    try:
        told = [status["draining"] for status in bed.cluster.statuses("fe1")]
    except PrismError:
        return False
    return bool(told) and not any(told)


@contextlib.contextmanager
def draining(bed: Bed, *options: str) -> Iterator[Callable[[], float]]:
    """The frontend is being drained; yields what waits for its end, and tells its seconds."""
    command = [sys.executable, "-m", "prism", "drain", "fe1", "--lab", bed.cluster.name, *options]
    ran = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    began = time.monotonic()

    def ended() -> float:
        out, _ = ran.communicate(timeout=60)
        assert (ran.returncode, "fe1/0: has ended" in out) == (0, True), out
        return time.monotonic() - began

    try:
        assert wait_for(lambda: bed.cluster.statuses("fe1")[0]["draining"])
        yield ended
    finally:
        ran.kill()
        ran.communicate()


def served(conn: Conn) -> bool:
    """Whether a request is answered, by a backend."""
    answer = conn.request("GET", PATH)
    return answer.status == 200 and answer.node.startswith("be")


def shaking(bed: Bed, octets: int) -> TlsConn:
    """A TLS client that has sent so much of its first message."""
    client = tls_client(bed)
    conn = Client(client.namespace, client.service).connect()
    peer = Peer(TLS1_3, SUITES[TLS1_3][0])
    assert not peer.handshake()
    hello = peer.output()
    conn.send(hello[:octets])
    sock = TlsSocket(conn.sock, peer)
    sock.rest = hello[octets:]  # type: ignore[attr-defined]
    return TlsConn(sock, conn.host)  # type: ignore[arg-type]


def test_who_has_said_nothing_yet_is_handed_on(clients: Bed) -> None:
    """They are the kernel's until they speak; with TLS, they have their handshakes before them."""
    silent = [clients.client.connect() for _ in range(70)]  # more than are accepted in one go
    plain, kept = silent[::2], silent[1::2]
    tls = [shaking(clients, octets) for octets in (0, 0, 1, 100)]
    just_now = [tls_client(clients).connect() for _ in range(4)]
    with draining(clients) as ended:
        assert all(served(conn) for conn in plain)
        time.sleep(0.5)
        for conn in tls:
            conn.sock.raw.sendall(conn.sock.rest)
            conn.sock.handshake()
        assert ended() < 15
    assert all(served(conn) for conn in (*plain, *kept, *tls, *just_now))
    for conn in (*plain, *kept, *tls, *just_now):
        conn.close()
    with pytest.raises(ConnectionRefusedError):
        clients.client.connect()


def test_clients_that_come_meanwhile_are_served_or_refused(clients: Bed) -> None:
    """At no moment is somebody let in who is reset then."""
    counts = {"served": 0, "refused": 0}
    failed: list[BaseException] = []
    over = threading.Event()

    def come() -> None:
        while not over.is_set():
            try:
                with clients.client.open(timeout=10.0) as conn:
                    time.sleep(0.01)
                    assert served(conn)
                    counts["served"] += 1
            except ConnectionRefusedError:
                counts["refused"] += 1
                time.sleep(0.01)
            except BaseException as error:
                failed.append(error)

    threads = [threading.Thread(target=come) for _ in range(6)]
    for thread in threads:
        thread.start()
    try:
        assert wait_for(lambda: counts["served"] > 20)
        with draining(clients) as ended:
            ended()
        assert wait_for(lambda: counts["refused"] > 20)
    finally:
        over.set()
        for thread in threads:
            thread.join(30)
    assert failed == []


def test_whose_handshake_does_not_end_is_told_goodbye(clients: Bed) -> None:
    """When the time is up: with a FIN, though there is part of a record that nobody has read."""
    slow = [shaking(clients, octets) for octets in (1, 100)]
    with draining(clients, "--timeout", "6") as ended:
        assert ended() > 5.5
    for conn in slow:
        assert conn.sock.raw.recv(1) == b""
        conn.sock.raw.close()


def test_a_frontend_whose_draining_is_undone_listens_as_before(clients: Bed) -> None:
    silent = [clients.client.connect() for _ in range(4)]
    holding = shaking(clients, 1)  # keeps the node from ending
    with draining(clients, "--no-wait"):
        command = ["drain", "fe1", "--lab", clients.cluster.name, "--undo"]
        subprocess.run([sys.executable, "-m", "prism", *command], check=True, timeout=30)
    assert not clients.cluster.statuses("fe1")[0]["draining"]
    late = [clients.client.connect() for _ in range(4)]
    assert all(served(conn) for conn in (*silent, *late))
    holding.sock.raw.sendall(holding.sock.rest)
    holding.sock.handshake()
    assert served(holding)
    for conn in (*silent, *late, holding):
        conn.close()
