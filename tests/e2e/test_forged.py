"""Forged, replayed and random octets at the control address and at a handoff port."""

from __future__ import annotations

import os
import random
import socket
import ssl
import time
from collections.abc import Callable, Iterator

import pytest
from e2e_bed import Bed, wait_for
from e2e_http import digest

from prism.flow import Endpoint, Flow
from prism.handoff import wire
from prism.switch.control import MESSAGE_SIZE, Message, Op, Status, decode, encode, node_id
from prism.tls.identity import Identity

CLUSTER = {"backends": 2}
ETH_P_ALL = 3


@pytest.fixture
def probe(shared: Bed) -> Iterator[socket.socket]:
    """A UDP socket of the client that is connected to the switch's control address."""
    sock = shared.client.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(0.3)
    sock.connect(tuple(shared.cluster.topology.control))
    yield sock
    sock.close()


def _silent(sock: socket.socket) -> bool:
    try:
        sock.recv(2000)
    except TimeoutError:
        return True
    return False


def _delete(shared: Bed, flow: bytes, gen: int) -> Message:
    return Message(Op.DELETE, node_id("be1/0"), time.time_ns() + 10**12, flow=flow, gen=gen)


def test_control_datagram_with_a_wrong_mac(shared: Bed, probe: socket.socket) -> None:
    """Not answered, counted, without effect on the connection it aims at."""
    path = shared.key("be1", "forged")
    data = shared.store(path, 1000)
    with shared.client.open() as conn:
        assert conn.request("GET", path).sha256 == digest(data)
        flow = Flow(Endpoint(*conn.local), shared.client.service).pack()
        gen = shared.events("be1", "handoff-in")[-1]["gen"]
        before, rules = shared.switch("bad_mac"), shared.rules()
        good = encode(
            _delete(shared, flow, gen), shared.cluster.config("fe1").cluster.control_key()
        )
        for at in (4, 30, 60, 112, 119):
            probe.send(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        probe.send(encode(_delete(shared, flow, gen), os.urandom(16)))
        assert _silent(probe)
        assert shared.switch("bad_mac") + shared.switch("bad_format") >= before + 6
        assert shared.rules() == rules
        assert conn.request("GET", path).sha256 == digest(data)


def test_control_datagram_of_no_shape(shared: Bed, probe: socket.socket) -> None:
    """Random octets of many sizes."""
    rng = random.Random(1)
    before = shared.switch("bad_format") + shared.switch("bad_mac")
    sizes = [1, 16, 119, 120, 121, 1000, 1400, *[120] * 30]
    for size in sizes:
        probe.send(rng.randbytes(size))
    assert _silent(probe)
    assert shared.switch("bad_format") + shared.switch("bad_mac") >= before + len(sizes)


def _capture_control(shared: Bed) -> list[bytes]:
    """Control datagrams that the frontend sends, as they are on its wire."""
    with shared.cluster.topology.namespace("fe1").entered():
        tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        tap.bind(("eth0", ETH_P_ALL))
    found = []
    try:
        tap.settimeout(3.0)  # a HELLO each third of the lease at the latest
        shared.client.once("GET", shared.key("be1", "bait"))
        deadline = time.monotonic() + 3.0
        while len(found) < 3 and time.monotonic() < deadline:
            frame, address = tap.recvfrom(2000)
            udp = frame[12:14] == b"\x08\0" and frame[23] == socket.IPPROTO_UDP
            if udp and address[2] == socket.PACKET_OUTGOING and len(frame) == 42 + MESSAGE_SIZE:
                found.append(frame[42:])
    finally:
        tap.close()
    return found


def test_replayed_control_datagram(shared: Bed, probe: socket.socket) -> None:
    """A real, well-signed datagram sent once more is dropped and counted."""
    real = _capture_control(shared)
    assert real
    before = shared.switch("replay")
    for datagram in real:
        probe.send(datagram)
    assert _silent(probe)
    assert shared.switch("replay") == before + len(real)


def test_unknown_node_is_denied(shared: Bed, probe: socket.socket) -> None:
    """Signed with the key, but by a node that never said HELLO: answered DENIED."""
    key = shared.cluster.config("fe1").cluster.control_key()
    probe.send(encode(Message(Op.GET, node_id("nobody"), time.time_ns()), key))
    assert decode(probe.recv(2000), key).status == Status.DENIED


class Caller:
    """Speaks the handoff protocol to a backend by hand; with fe1's certificate, unless plain."""

    def __init__(self, shared: Bed, key: bytes, *, plain: bool = False) -> None:
        self.sock: socket.socket = shared.client.namespace.socket()
        self.sock.settimeout(4.0)
        self.sock.connect(("10.77.101.2", 4800))
        if not plain:
            config = shared.cluster.config("fe1")
            assert config.frontend is not None
            identity = Identity("fe1", config.identity_files(config.frontend))
            self.sock = identity.client_context().wrap_socket(self.sock)
        self.key = key
        seal, self._open = wire.hello_keys(key)
        self.sealer = wire.Sealer(seal)
        self.sent: list[bytes] = []

    def say(self, frame: bytes) -> None:
        self.sent.append(frame)
        self.sock.sendall(frame)

    def greet(self) -> None:
        hello = wire.Hello("fe1/9", "be1/0", os.urandom(wire.NONCE_SIZE))
        self.say(self.sealer.hello(hello))
        decoder = wire.Decoder(self._open)
        while (answer := self._pop(decoder)) is None:
            pass
        assert isinstance(answer, wire.Hello)
        outbound, inbound = wire.session_keys(self.key, hello, answer)
        self.sealer = wire.Sealer(outbound)
        decoder.rekey(inbound)
        self.say(self.sealer.ping(1))
        while (pong := self._pop(decoder)) is None:
            pass
        assert pong == wire.Pong(1)

    def _pop(self, decoder: wire.Decoder) -> wire.Message | None:
        data = self.sock.recv(4096)
        assert data, "the backend hung up"
        decoder.push(data)
        return decoder.pop()

    def hung_up(self) -> bool:
        """Whether the other end goes; what it reports of itself before is passed over."""
        deadline = time.monotonic() + 6.0
        try:
            while self.sock.recv(4096):
                if time.monotonic() > deadline:
                    return False
        except (ConnectionResetError, ssl.SSLError):
            pass
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        self.sock.close()


@pytest.fixture
def call(shared: Bed) -> Iterator[Callable[..., Caller]]:
    made: list[Caller] = []

    def make(key: bytes | None = None, *, plain: bool = False) -> Caller:
        key = key or shared.cluster.config("be1").cluster.channel_key()
        made.append(Caller(shared, key, plain=plain))
        return made[-1]

    yield make
    for caller in made:
        caller.close()


def _channel(shared: Bed) -> dict[str, int]:
    return dict(shared.cluster.statuses("be1")[0]["channel"])


OFFER = wire.Offer(bytes(36), 1, b"\0" * 200)


@pytest.mark.parametrize("plain", [True, False])
def test_handoff_port_gets_random_octets(
    shared: Bed, call: Callable[..., Caller], plain: bool
) -> None:
    """Instead of TLS, or inside it: hung up on at once, counted, no offer heard of."""
    rng = random.Random(2)
    for size in (40, 200, 5000):
        before = _channel(shared)
        caller = call(plain=plain)
        caller.say(rng.randbytes(size))
        assert caller.hung_up()
        now = _channel(shared)
        faults = ("malformed", "bad_mac", "replays", "handshakes_failed")
        assert sum(now[n] for n in faults) > sum(before[n] for n in faults)
        assert now["tls_not_tls"] == before["tls_not_tls"] + plain
        assert now["offers_received"] == before["offers_received"]


def test_caller_that_is_another_node(shared: Bed, call: Callable[..., Caller]) -> None:
    """The cluster key and a node's certificate, but the name of another one in the HELLO."""
    before = _channel(shared)
    caller = call()
    caller.say(caller.sealer.hello(wire.Hello("be2/0", "be1/0", os.urandom(16))))
    assert caller.hung_up()
    assert _channel(shared)["tls_wrong_node"] == before["tls_wrong_node"] + 1
    assert (
        "it says it is be2/0; its certificate is node fe1's"
        in shared.cluster.node("be1").log.read_text()
    )


def test_caller_without_the_key(shared: Bed, call: Callable[..., Caller]) -> None:
    """A HELLO under another key."""
    before = _channel(shared)
    caller = call(os.urandom(32))
    caller.say(caller.sealer.hello(wire.Hello("fe1/0", "be1/0", os.urandom(16))))
    assert caller.hung_up()
    assert _channel(shared)["bad_mac"] == before["bad_mac"] + 1


def test_offer_with_a_wrong_mac(shared: Bed, call: Callable[..., Caller]) -> None:
    """In a good session, one octet of an offer changed on the way."""
    for at in (20, 60, -1):
        before = _channel(shared)
        caller = call()
        caller.greet()
        frame = bytearray(caller.sealer.offer(OFFER, 1))
        frame[at] ^= 0x80
        caller.say(bytes(frame))
        assert caller.hung_up()
        now = _channel(shared)
        assert now["bad_mac"] == before["bad_mac"] + 1
        assert now["offers_received"] == before["offers_received"]


def test_offer_that_is_replayed(shared: Bed, call: Callable[..., Caller]) -> None:
    """The same frame twice in its session, and in another session."""
    before = _channel(shared)
    caller = call()
    caller.greet()
    frame = caller.sealer.offer(OFFER, 1)
    caller.say(frame)
    assert wait_for(lambda: _channel(shared)["offers_received"] == before["offers_received"] + 1)
    caller.say(frame)
    time.sleep(0.1)
    assert wait_for(lambda: _channel(shared)["replays"] == before["replays"] + 1)
    other = call()
    other.greet()
    other.say(frame)
    assert other.hung_up()
    now = _channel(shared)
    assert now["bad_mac"] == before["bad_mac"] + 1
    assert now["offers_received"] == before["offers_received"] + 1


def test_offer_of_nonsense(shared: Bed, call: Callable[..., Caller]) -> None:
    """Well-signed, but its state is none: refused; the backend goes on."""
    path = shared.key("be1", "sane")
    data = shared.store(path, 1000)
    before = shared.snapshot()
    caller = call()
    caller.greet()
    rng = random.Random(3)
    for number in range(1, 30):
        flow = Flow(Endpoint("10.77.1.2", number), shared.client.service).pack()
        state = rng.randbytes(rng.randrange(0, 2000))
        caller.say(caller.sealer.offer(wire.Offer(flow, number, state), number))
    caller.say(caller.sealer.offer(wire.Offer(bytes(36), 1, b""), 30))
    time.sleep(0.3)
    caller.close()
    assert shared.client.once("GET", path).sha256 == digest(data)
    shared.assert_clean(before)
