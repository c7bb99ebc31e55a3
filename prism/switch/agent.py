"""The process beside the kernel's switch: what is needed, but not urgent.

The data plane forwards, answers control datagrams and guards flows without it. The agent loads
and attaches the data plane, holds packets of locked flows, asks owners about SYNs, ends the leases
of dead nodes and answers ``LIST``. It may be killed and started again at any time: tables are
pinned, and a new agent adopts what it finds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from prism.errors import ProtocolError, SwitchError
from prism.flow import Endpoint
from prism.switch.asking import Asker
from prism.switch.base import Rule
from prism.switch.control import KEY_SIZE, Message, Op, decode, encode
from prism.switch.ebpf import DEFAULT_PIN_DIR, MAX_RULES, EbpfSwitch, Settings
from prism.switch.hold import HoldBuffer
from prism.switch.holding import Holder
from prism.switch.listing import Lister
from prism.switch.provoke import Provoker
from prism.switch.reaping import Reaper
from prism.switch.tun import Tun

__all__ = ["Agent", "AgentSettings"]

_log = logging.getLogger(__name__)
_HEARTBEAT: Final = 0.2
_PORTS_INTERVAL: Final = 1.0
_RECEIVE_BATCH: Final = 64
_MAX_DATAGRAM: Final = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSettings:
    """What an agent is told.

    Attributes:
        control: the addresses that nodes send control datagrams to; one IPv4 and one IPv6
            address at most, with the same port.
        key: the cluster key, 16 octets.
        interfaces: the switch's ports. One that is missing is attached when it appears.
        pin_dir: directory on a bpffs for the tables.
        max_rules: size of new tables.
        hold: whether packets of locked flows are held; dropped otherwise.
        hold_flow_bytes: octets held for one flow at most.
        hold_total_bytes: octets held at most.
        hold_time: seconds a packet is held at most.
        lease_max: the longest lease granted, in seconds.
        grace: seconds after the start in which no node is taken for dead.
        tun: name of the TUN device that held packets come by.
    """

    control: tuple[Endpoint, ...]
    key: bytes
    interfaces: tuple[str, ...]
    pin_dir: Path = DEFAULT_PIN_DIR
    max_rules: int = MAX_RULES
    hold: bool = True
    hold_flow_bytes: int = 262_144
    hold_total_bytes: int = 67_108_864
    hold_time: float = 1.0
    lease_max: float = 60.0
    grace: float = 1.0
    tun: str = "prism-hold"

    def __repr__(self) -> str:  # never the key
        return f"AgentSettings(control={self.control}, interfaces={self.interfaces})"


class Agent:
    """One agent; it works in the network namespace of the thread that starts it.

    Attributes:
        settings: what it was told.
        store: the kernel's table, once started.
        answers_nodes: whether nodes ask this switch, so that leases are its business.
    """

    answers_nodes = True

    def __init__(self, settings: AgentSettings) -> None:
        """Prepare an agent; nothing is touched before :meth:`start`.

        Raises:
            ValueError: the key has not 16 octets, or there is no control address.
        """
        if len(settings.key) != KEY_SIZE:
            raise ValueError(f"a cluster key has {KEY_SIZE} octets, not {len(settings.key)}")
        if not settings.control and self.answers_nodes:
            raise ValueError("the switch needs a control address")
        self.settings = settings
        self.store: EbpfSwitch
        self._buffer = HoldBuffer(
            flow_limit=settings.hold_flow_bytes, total_limit=settings.hold_total_bytes
        )
        self._attached: dict[str, int] = {}
        self._sockets: dict[socket.AddressFamily, socket.socket] = {}
        self._listings: dict[tuple[int, int], tuple[Message, Any]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._list_tasks: set[asyncio.Task[None]] = set()
        self._bad_datagrams = 0
        self._closers = contextlib.ExitStack()
        self._heartbeat_timer: asyncio.TimerHandle | None = None
        self._tun: Tun
        self._holder: Holder
        self._reaper: Reaper
        self._asker: Asker
        self._lister: Lister
        self._provoker: Provoker
        self._loop: asyncio.AbstractEventLoop

    # Life

    async def start(self) -> None:
        """Load or adopt the data plane, attach it, and begin.

        Raises:
            SwitchError: the kernel refuses, no port is there, or another agent is running.
        """
        self._loop = asyncio.get_running_loop()
        try:
            self._open()
        except BaseException:
            self._closers.close()
            raise
        self._tasks = [asyncio.create_task(self._watch_ports())]
        if self.answers_nodes:
            self._tasks.append(asyncio.create_task(self._reaper.run()))
        _log.info(
            "switch agent started, tables %s, %d rules, ports %s",
            "adopted" if self.store.adopted else "made",
            self.store.rule_count,
            ", ".join(self._attached) or "none yet",
        )

    async def stop(self) -> None:
        """Stop; the data plane goes on, without holding. Idempotent."""
        for task in (*self._tasks, *self._list_tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._list_tasks, return_exceptions=True)
        self._tasks = []
        self._closers.close()

    async def flush(self) -> None:
        """Stop, and take the data plane and every rule away.

        Raises:
            SwitchError: the classifier could not be detached.
        """
        store, ports = self.store, list(self._attached)
        try:
            store.detach(ports)
            store.unpin()
        finally:
            await self.stop()

    def _open(self) -> None:
        settings, closers = self.settings, self._closers
        # First of all: the TUN device's name is what keeps two agents apart.
        self._tun = Tun(settings.tun)
        closers.callback(self._tun.close)
        self.store = EbpfSwitch(settings.pin_dir, max_rules=settings.max_rules)
        closers.callback(self.store.close)
        self._provoker = Provoker()
        closers.callback(self._provoker.close)
        self._reaper = Reaper(self.store, self._provoker.insist, grace=settings.grace)
        self._asker = Asker(self.store, self._reaper.find, self._send, self._tun.write)
        closers.callback(self._asker.close)
        self._lister = Lister(self.store)
        self._holder = Holder(
            self.store,
            self._tun,
            self._buffer,
            self._on_syn,
            hold=settings.hold,
            hold_time=settings.hold_time,
        )
        for endpoint in settings.control:
            self._listen(endpoint)
        self._holder.start()
        closers.callback(self._holder.close)
        # The way back into the switch must be there before the first packet is held.
        self.store.attach([settings.tun])
        self.store.configure(
            Settings(settings.key, settings.control, self._tun.index, settings.lease_max)
        )
        self._attach_ports()
        if settings.interfaces and not self._attached:
            raise SwitchError(
                f"none of the ports {', '.join(settings.interfaces)} is there: check the names"
            )
        self._beat()
        closers.callback(self._stop_beating)

    def _listen(self, endpoint: Endpoint) -> None:
        sock = socket.socket(endpoint.family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._closers.callback(sock.close)
        try:
            sock.bind((endpoint.host, endpoint.port))
        except OSError as error:
            raise SwitchError(
                f"cannot listen on the control address {endpoint}: {error}; "
                "is it an address of this host, and no other agent running?"
            ) from error
        self._sockets[endpoint.family] = sock
        descriptor = sock.fileno()
        self._loop.add_reader(descriptor, self._on_datagrams, sock)
        self._closers.callback(self._loop.remove_reader, descriptor)

    # Heartbeat and ports

    def _beat(self) -> None:
        self.store.heartbeat()
        self._heartbeat_timer = self._loop.call_later(_HEARTBEAT, self._beat)

    def _stop_beating(self) -> None:
        if self._heartbeat_timer is not None:
            self._heartbeat_timer.cancel()
        self.store.stop_holding()

    async def _watch_ports(self) -> None:
        while True:
            await asyncio.sleep(_PORTS_INTERVAL)
            try:
                self._attach_ports()
            except SwitchError as error:
                _log.warning("%s; trying again", error)

    def _attach_ports(self) -> None:
        """Attach to the ports that are there and new; a name may come back as a new device."""
        there = {name: index for index, name in socket.if_nameindex()}
        for name in self.settings.interfaces:
            index = there.get(name)
            if index is None:
                self._attached.pop(name, None)
            elif self._attached.get(name) != index:
                self.store.attach([name])
                self._attached[name] = index

    # Datagrams

    def _on_datagrams(self, sock: socket.socket) -> None:
        for _ in range(_RECEIVE_BATCH):
            try:
                data, address = sock.recvfrom(_MAX_DATAGRAM)
            except BlockingIOError:
                return
            except OSError:  # an ICMP error about a QUERY: its timer deals with it
                continue
            try:
                message = decode(data, self.settings.key)
            except ProtocolError:
                self._bad_datagrams += 1
                continue
            if message.is_reply and message.op == Op.QUERY:
                self._asker.on_reply(message)
            elif message.op == Op.LIST and not message.is_reply:
                self._on_list(message, sock, address)
            else:  # the classifier answers all others; this one came round it
                self._bad_datagrams += 1

    def _send(self, message: Message, endpoint: Endpoint) -> None:
        sock = self._sockets.get(endpoint.family)
        if sock is not None:
            self._send_to(sock, [message], (endpoint.host, endpoint.port))

    def _send_to(self, sock: socket.socket, messages: Sequence[Message], address: Any) -> None:
        data = b"".join(encode(message, self.settings.key) for message in messages)
        with contextlib.suppress(OSError):  # whoever waits for it asks again
            sock.sendto(data, address)

    def _on_list(self, request: Message, sock: socket.socket, address: Any) -> None:
        if request.cookie:
            self._send_to(sock, self._lister.answer(request), address)
            return
        key = (request.node, request.owner)
        known = key in self._listings
        self._listings[key] = (request, address)  # the newest of its tries is the one answered
        if not known:
            task = asyncio.create_task(self._list(key, sock))
            self._list_tasks.add(task)
            task.add_done_callback(self._list_tasks.discard)

    async def _list(self, key: tuple[int, int], sock: socket.socket) -> None:
        try:
            flows = await asyncio.to_thread(self._lister.collect, key[1])
        finally:
            request, address = self._listings.pop(key)
        self._send_to(sock, self._lister.answer(request, flows), address)

    # SYNs

    def _on_syn(self, rule: Rule, packet: bytes) -> None:
        self._asker.ask(rule, packet, trust_leases=self._reaper.trusted)

    # Status

    def status(self) -> dict[str, Any]:
        """What ``prism-proxy status`` shows; numbers since this agent's start or, for those of
        the data plane, since the tables were made.
        """  # noqa: D205
        plane = self.store.counters()
        hold = asdict(self._buffer.counters)
        lost = plane["dropped_locked"] + self._holder.refused
        lost += sum(count for name, count in hold.items() if name.startswith("dropped_"))
        return {
            "name": "switch",
            "role": "switch",
            "pid": os.getpid(),
            "adopted": self.store.adopted,
            "ports": sorted(self._attached),
            "nodes": {
                f"{node.id:016x}": {"address": str(node.endpoint), "alive": node.alive}
                for node in self.store.nodes()
            },
            "rules": self.store.rule_count,
            "counters": {
                "rules": self.store.rule_count,
                "handoffs": plane["handoffs"],
                "held_packets": plane["held"],
                "dropped_packets": lost,
                "data_plane": plane,
                "hold": {**hold, "octets": self._buffer.size, "flows": len(self._buffer)},
                "ask": asdict(self._asker.counters),
                "leases": asdict(self._reaper.counters),
                "provoked": self._provoker.sent,
                "bad_datagrams": self._bad_datagrams,
                "missed_events": self._holder.missed,
                "strangers": self._holder.strangers,
                "write_errors": self._tun.write_errors,
            },
        }
