"""A client, a stream that may use kernel TLS, and its handoff through the eBPF switch."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from control_conformance import ControlNode
from switch_bed import SERVICE, SwitchBed, bpffs, host
from tcp_bed import connect, listen
from tls_pairs import pair

from prism._ext import tcp_repair
from prism._ext.tls_record import Tls
from prism.flow import Endpoint, Flow
from prism.switch.control import Op, Status
from prism.tls.offload import KernelTlsStream
from prism.tls.stream import TlsStream

SUITES = [0x1301, 0x1302, 0x1303, 0xC02B, 0xC030, 0xCCA8]
PATIENCE = 60.0


class Hosts:
    """A client, Prism's eBPF switch, and three hosts to have a connection, the first as frontend.

    The switch is told by datagrams from those hosts, as by any node. While a flow is locked it
    drops what both sides say.
    """

    OWNERS = ("fe", "be1", "be2")

    def __init__(self, pins: Path) -> None:
        self._ports = itertools.count(5000)
        self._nodes: list[ControlNode] = []
        self._moved: list[Flow] = []
        self.bed = SwitchBed(pins, max_rules=1024)
        try:
            for role in self.OWNERS:
                self._nodes.append(self.bed.node(f"{role}/0", role=role))
                self._nodes[-1].socket.settimeout(PATIENCE)
                self._nodes[-1].hello(86_400_000)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for node in self._nodes:
            node.close()
        self.bed.close()

    def forget(self) -> None:
        """Remove the rules there are: another connection may have the same port."""
        for flow in self._moved:
            if rule := self.bed.rule(flow.pack()):
                self.bed.switch.delete(flow.pack(), rule.gen)
        self._moved.clear()

    def lock(self, flow: Flow) -> int:
        """From the answer on nothing of it passes; the rule's generation."""
        rule = self.bed.rule(flow.pack())
        if rule is None:
            self._moved.append(flow)
            answer = self._nodes[0].ask(
                Op.ADD, flow, owner_endpoint=flow.service, owner_mac=bytes(6), locked=True
            )
        else:
            owner = next(node for node in self._nodes if node.id == rule.owner)
            answer = owner.ask(Op.LOCK, flow, gen=rule.gen)
        assert answer.status == Status.OK, answer
        return answer.gen

    def carry(self, flow: Flow, state: bytes, to: int, gen: int) -> int:
        """Build the socket at another host and give it the flow; its descriptor."""
        role = self.OWNERS[to]
        at = Endpoint(host(role), next(self._ports)) if to else flow.service
        space = self.bed.spaces[role]
        imported = space.run_inside(
            lambda: tcp_repair.import_state(state, at.host, at.port, alternatives=0)
        )
        answer = self._nodes[to].ask(Op.CHOWN, flow, gen=gen, owner_endpoint=at, owner_mac=bytes(6))
        assert answer.status == Status.OK, answer
        return space.run_inside(imported.activate)


@contextlib.contextmanager
def hosts_for_all() -> Iterator[Hosts]:
    """Hosts for all tests of a module: namespaces take seconds to make in the guest."""
    with bpffs() as pins, contextlib.closing(Hosts(pins)) as found:
        yield found


class Client:
    """The other side: the record layer in the process, one thread for each direction."""

    def __init__(self, sock: socket.socket, tls: Tls) -> None:
        self.sock = sock
        self.tls = tls
        self.heard = bytearray()
        self.alert: int | None = None
        self.failure: BaseException | None = None
        self._threads: list[threading.Thread] = []
        sock.settimeout(PATIENCE)

    def start(self, upload: bytes = b"") -> None:
        for target in (self._listen, lambda: self._talk(upload)):
            self._threads.append(threading.Thread(target=target, daemon=True))
            self._threads[-1].start()

    def _talk(self, upload: bytes) -> None:
        for at in range(0, len(upload), 8192):
            self.sock.sendall(self.tls.seal(upload[at : at + 8192]))

    def _listen(self) -> None:
        raw = b""
        try:
            while piece := self.sock.recv(65536):
                opened = self.tls.open(raw + piece)
                assert opened.error is None, opened.error
                raw = (raw + piece)[opened.consumed :]
                self.heard += opened.data
                self.alert = opened.alert if opened.closed else self.alert
            assert raw == b""
        except BaseException as error:
            self.failure = error

    def say(self, data: bytes) -> None:
        """Send, in records of 8 KiB."""
        self._talk(data)

    def finish(self) -> None:
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        if self.failure is not None:
            raise self.failure
        self.sock.close()


def open_pair(lab: Hosts, suite: int, rcvbuf: int = 65536) -> tuple[Client, KernelTlsStream]:
    """A client, and the stream at the frontend."""
    lab.forget()
    with listen(lab.bed.spaces["fe"], SERVICE) as listener:
        listener.settimeout(PATIENCE)
        sock = connect(lab.bed.spaces["client"], SERVICE, rcvbuf=rcvbuf)
        server, _ = listener.accept()
    tls, other = pair(suite)
    return Client(sock, other), KernelTlsStream(server, tls, Flow.of_socket(server))


def move(
    lab: Hosts, stream: KernelTlsStream, to: int, last: bytes = b""
) -> tuple[KernelTlsStream, dict[str, object]]:
    """What a handoff does, all of it; the stream there, and what was carried.

    ``last`` is sent when the client's acknowledgements do not come through any more.
    """
    gen = lab.lock(stream.flow)
    if last:
        assert stream.send(last) == len(last)
    assert stream.movable, (len(stream._out), len(stream._part), stream._broken)
    state = tcp_repair.export_state(stream.fileno())
    secrets, pending, flow = stream.export_tls(), stream.pending, stream.flow
    sock = socket.socket(fileno=lab.carry(flow, state, to, gen))
    tcp_repair.close_quietly(stream.release())
    tls, skip, facts = TlsStream.parse_tls(secrets)
    there = KernelTlsStream(sock, tls, flow, pending, skip=skip, facts=facts)
    return there, tcp_repair.describe(state)


class Server:
    """Sends a file and receives an upload at the same time."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.sent = 0
        self.got = bytearray()

    async def run(self, stream: TlsStream, sent: int, got: int) -> None:
        """Until this many octets have gone each way, and all is in the socket's queue."""
        async with asyncio.timeout(PATIENCE):
            while self.sent < sent or len(self.got) < got or not stream.movable:
                if self.sent < sent:
                    self.send(stream, sent - self.sent)
                self.receive(stream)
                await asyncio.sleep(0.002)

    def send(self, stream: TlsStream, n: int) -> None:
        try:
            self.sent += stream.send_file(self.fd, self.sent, n)
        except BlockingIOError:
            pass

    def receive(self, stream: TlsStream) -> None:
        try:
            self.got += stream.receive(65536)
        except BlockingIOError:
            pass


async def wait_movable(stream: KernelTlsStream) -> None:
    async with asyncio.timeout(PATIENCE):
        while not stream.movable:
            await asyncio.sleep(0.01)


async def heard(stream: TlsStream, n: int) -> bytes:
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                if len(data := stream.peek()) >= n:
                    return data
            except BlockingIOError:
                pass
            await asyncio.sleep(0.01)
