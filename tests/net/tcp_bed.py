"""A client, a router and two servers that can carry the same address; sockets to look into them."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
import time
from collections.abc import Callable, Iterator

from prism._ext import tcp_repair
from prism.lab.netns import Namespace, join

ADDRESSES = {4: "10.99.0.1", 6: "fd99::1"}
PREFIX = {4: 32, 6: 128}
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
SO_BUF_LOCK = 72
SIOCOUTQ = 0x5411
ESTABLISHED, CLOSE_WAIT = 1, 8

MakeNamespace = Callable[[str], Namespace]


def tcp_info(sock: socket.socket) -> dict[str, int]:
    """The fields of TCP_INFO that the tests look at."""
    raw = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    (segment,) = struct.unpack_from("<I", raw, 16)
    return {"state": raw[0], "options": raw[5] & 7, "wscales": raw[6], "segment": segment}


def numbers(sock: socket.socket) -> dict[str, int | str | bool]:
    """What a live socket would export; it goes on afterwards."""
    state = tcp_repair.describe(tcp_repair.export_state(sock.fileno()))
    tcp_repair.resume(sock.fileno(), probe=False)
    return state


def pattern(length: int, start: int = 0) -> bytes:
    """A stream in which octets tell their place (up to a period of 2**18)."""
    first, last = start // 4, (start + length) // 4 + 1
    words = struct.pack(f">{last - first}I", *(i * 2654435761 % 2**32 for i in range(first, last)))
    return words[start % 4 : start % 4 + length]


def until(condition: Callable[[], object], seconds: float = 3.0) -> None:
    """Wait for something that happens in the kernel."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)


def receive(sock: socket.socket, length: int) -> bytes:
    """Exactly ``length`` octets, fewer only at the end of the stream."""
    parts = bytearray()
    while len(parts) < length and (part := sock.recv(min(1 << 18, length - len(parts)))):
        parts += part
    return bytes(parts)


def settle(client: socket.socket) -> None:
    """Wait until the client has every acknowledgement, so that it will not send on its own.

    On one host nothing locks the flow: a segment between closing and importing is answered with a
    reset by the kernel.
    """
    until(lambda: not struct.unpack("i", fcntl.ioctl(client, SIOCOUTQ, bytes(4)))[0])


def listen(namespace: Namespace, address: str, port: int = 80) -> socket.socket:
    """A listener; ``::`` also takes IPv4 connections."""
    sock = namespace.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if address == "::":
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind((address, port))
    sock.listen()
    sock.settimeout(3)
    return sock


def connect(
    namespace: Namespace, address: str, port: int = 80, rcvbuf: int | None = None
) -> socket.socket:
    """A client's connection, with a time limit on everything."""
    sock = namespace.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    if rcvbuf is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
    sock.settimeout(8)
    sock.connect((address, port))
    return sock


class Sniffer:
    """The TCP segments that cross a namespace's devices, as (flags, payload length, outgoing)."""

    RST = 0x04

    def __init__(self, namespace: Namespace) -> None:
        self._sock = namespace.run_inside(
            lambda: socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
        )
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self._sock.setblocking(False)

    def segments(self) -> list[tuple[int, int, bool]]:
        """What came since the last call."""
        found = []
        while True:
            try:
                packet, address = self._sock.recvfrom(128)
            except BlockingIOError:
                return found
            version = packet[0] >> 4
            offset = (packet[0] & 15) * 4 if version == 4 else 40
            protocol = packet[9] if version == 4 else packet[6]
            if protocol != socket.IPPROTO_TCP:
                continue
            total = (
                struct.unpack_from("!H", packet, 2)[0]
                if version == 4
                else 40 + struct.unpack_from("!H", packet, 4)[0]
            )
            header = (packet[offset + 12] >> 4) * 4
            found.append(
                (packet[offset + 13], total - offset - header, address[2] == socket.PACKET_OUTGOING)
            )

    def close(self) -> None:
        self._sock.close()


class Bed:
    """client -- router -- (server a, server b); the service address is on the loopback of both.

    The router's route decides who has it: the hand-over of an address without any rewriting.
    """

    def __init__(self, make_namespace: MakeNamespace) -> None:
        self.client = make_namespace("client")
        self.router = make_namespace("router")
        self.servers = [make_namespace("a"), make_namespace("b")]
        self._route = self.router.route()
        self._locked = False
        for host in (self.client, self.router, *self.servers):
            host.sysctl("ipv6/conf/default/accept_dad", 0)  # link-local addresses usable at once
        for number, host in enumerate([self.client, *self.servers]):
            join(self.router, f"to{number}", host, "up")
            for four, six in ((f"10.98.{number}", f"fd98:{number}::"),):
                self.router.add_address(f"to{number}", f"{four}.1/24")
                self.router.add_address(f"to{number}", f"{six}1/64")
                host.add_address("up", f"{four}.2/24")
                host.add_address("up", f"{six}2/64")
                host.add_route("default", f"{four}.1")
                host.add_route("default", f"{six}1")
        for server in self.servers:
            for version, address in ADDRESSES.items():
                server.add_address("lo", f"{address}/{PREFIX[version]}")
        self.router.sysctl("ipv4/ip_forward", 1)
        self.router.sysctl("ipv6/conf/all/forwarding", 1)
        self.point_at(0)

    def close(self) -> None:
        self._route.close()

    def _set(self, version: int, **target: object) -> None:
        destination = f"{ADDRESSES[version]}/{PREFIX[version]}"
        family = FAMILY[version]
        with contextlib.suppress(Exception):
            self._route.route("del", family=family, dst=destination)
        self._route.route("add", family=family, dst=destination, **target)

    def _silence(self, command: str) -> None:
        for version, address in ADDRESSES.items():
            self._route.rule(
                command, family=FAMILY[version], src=address, priority=1, action="blackhole"
            )

    def lock(self) -> None:
        """Drop what the two sides say to each other (and let what is under way arrive).

        Like the switch, also what the servers say: a frozen socket goes on sending what it has
        queued, for its pacing timer runs. Were the client to hear that, it would acknowledge more
        than the next owner has sent, who must not believe it: both would stand still for good.
        """
        for version in ADDRESSES:
            self._set(version, type="blackhole")
        self._silence("add")
        self._locked = True
        time.sleep(0.005)

    def point_at(self, server: int) -> None:
        """Give the service address to one of the servers, and let it speak."""
        self._set(4, gateway=f"10.98.{server + 1}.2")
        self._set(6, gateway=f"fd98:{server + 1}::2")
        if self._locked:
            self._silence("del")
            self._locked = False

    def hand_over(self, sock: socket.socket, version: int, to: int) -> socket.socket:
        """Move a server's connection to the other one and return it there."""
        port = sock.getsockname()[1]
        self.lock()
        state = tcp_repair.export_state(sock.fileno())
        imported = self.servers[to].run_inside(
            lambda: tcp_repair.import_state(state, ADDRESSES[version], port, alternatives=0)
        )
        tcp_repair.close_quietly(sock.detach())
        self.point_at(to)
        return socket.socket(fileno=self.servers[to].run_inside(imported.activate))


@contextlib.contextmanager
def bed(make_namespace: MakeNamespace) -> Iterator[Bed]:
    """A bed, closed at the end."""
    made = Bed(make_namespace)
    try:
        yield made
    finally:
        made.close()


def pair(
    client: Namespace, server: Namespace, address: str, *, wildcard: str | None = None
) -> tuple[socket.socket, socket.socket]:
    """A connection: the client's end and the server's."""
    with listen(server, wildcard or address) as listener:
        ours = connect(client, address)
        theirs, _ = listener.accept()
    theirs.settimeout(3)
    return ours, theirs


def rebuild(
    namespace: Namespace, sock: socket.socket, *, probe: bool | None = None
) -> socket.socket:
    """Export, close quietly and import in the same place."""
    state = tcp_repair.export_state(sock.fileno())
    told = tcp_repair.describe(state)
    tcp_repair.close_quietly(sock.detach())
    address, port = str(told["local"]), int(told["local_port"])

    def build() -> int:
        return tcp_repair.import_state(state, address, port, alternatives=0).activate(probe=probe)

    new = socket.socket(fileno=namespace.run_inside(build))
    new.settimeout(3)
    return new
