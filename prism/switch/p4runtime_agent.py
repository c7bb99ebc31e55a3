"""The agent of a switch that is programmed over P4Runtime.

Nodes send it the same datagrams as ever; it answers them when the switch has the entries. Of
several agents the primary alone listens on the control address: another one takes that over, with
the rules that it finds in the switch, when the primary is gone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, Final

from prism.config import Config, SwitchConfig
from prism.errors import SwitchError
from prism.flow import pack_address
from prism.switch.asking import Asker
from prism.switch.base import Node, Rule
from prism.switch.hold import parse_segment
from prism.switch.p4runtime import P4Driver
from prism.switch.p4runtime_pipeline import load
from prism.switch.p4runtime_session import SessionSettings
from prism.switch.p4runtime_tls import tls_files
from prism.switch.p4service_agent import frame, packet
from prism.switch.provoke import Provoker, checksum
from prism.switch.server import SwitchServer
from prism.switch.table import RuleTable

__all__ = ["P4Agent"]

_log = logging.getLogger(__name__)
_BIND_PAUSE: Final = 0.05
_GRACE: Final = 3.0


class P4Agent:
    """One agent; works in the network namespace of the process.

    Args:
        config: the whole configuration.
        switch: its ``[switch]`` section.
    """

    def __init__(self, config: Config, switch: SwitchConfig) -> None:
        self._control = config.cluster.control
        self._key = config.cluster.control_key()
        self._grace = max(_GRACE, 2 * config.cluster.lease)
        self._max_rules = switch.max_rules
        self.table = self._table()
        self.server: SwitchServer | None = None
        self.driver = P4Driver(
            SessionSettings(
                address=switch.p4runtime_address,
                device_id=switch.p4runtime_device,
                election_id=(switch.p4runtime_priority, 1),
                timeout=switch.p4runtime_timeout,
                tls=tls_files(switch),
            ),
            load(switch.p4info, switch.p4_device_config),
            adopt=self._adopt,
            stand_by=self._stand_by,
            on_packet=self._on_packet,
            incarnation=lambda: self.table.incarnation,
        )
        self._provoker: Provoker
        self._asker = Asker(self, self._find, self._ask, self._inject)  # type: ignore[arg-type]
        self._passing: dict[bytes, Rule] = {}
        self._wanted = False
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._first = asyncio.Event()

    def _table(self) -> RuleTable:
        # Generations by the wall clock: an agent on another host goes on from there.
        return RuleTable(max_rules=self._max_rules, gen_clock=time.time_ns)

    async def start(self) -> None:
        """Connect to the switch, and begin; waits until it is known who is the primary.

        Raises:
            SwitchError: CAP_NET_RAW is missing.
        """
        self._provoker = Provoker()
        self._tasks = [
            asyncio.create_task(self.driver.run()),
            asyncio.create_task(self._serve()),
        ]
        await self._first.wait()

    async def stop(self) -> None:
        """Stop; the switch keeps its entries. Idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        self._asker.close()
        self._provoker.close()

    # Primary or backup

    def _adopt(self, rules: Sequence[Rule] | None, incarnation: int) -> Iterable[Rule]:
        if rules is not None:
            self.table.adopt(rules, incarnation)
        self._wanted = True
        self._changed.set()
        if self.server is not None:
            self.server.suspended = False
        return self.table.rules()

    def _stand_by(self, other: bool) -> None:
        if self.server is not None:
            self.server.suspended = True
        if other:
            self._wanted = False
            self._changed.set()
            self._first.set()

    async def _serve(self) -> None:
        """Listen on the control address while this is the primary."""
        try:
            while True:
                await self._changed.wait()
                self._changed.clear()
                if not self._wanted:
                    await self._close_server()
                elif self.server is None:
                    await self._open_server()
        finally:
            await self._close_server()

    async def _open_server(self) -> None:
        told = False
        while self._wanted:
            server = SwitchServer(
                self._control,
                self._key,
                table=self.table,
                driver=self.driver,
                on_reply=self._asker.on_reply,
                on_expired=self._provoker.insist,
            )
            try:
                await server.start()
            except SwitchError as error:
                if not told:
                    _log.warning("%s; trying again", error)
                told = True
                await asyncio.sleep(_BIND_PAUSE)
                continue
            server.suspended = not self.driver.ready
            server.strangers_die_at = asyncio.get_running_loop().time() + self._grace
            self.server = server
            _log.info("answering nodes on %s, %d rules", self._control, len(self.table))
            self._first.set()
            # The driver may have got ready between the two lines above.
            server.suspended = False if self.driver.ready else server.suspended
            return

    async def _close_server(self) -> None:
        server, self.server = self.server, None
        if server is not None:
            await server.close()
        if not self._wanted:
            self.table = self._table() if server is None else self.table

    # SYNs

    def _on_packet(self, data: bytes) -> None:
        inside = packet(data)
        segment = None if inside is None else parse_segment(inside)
        if inside is None or segment is None or not segment.is_bare_syn:
            return
        rule = self.table.get(segment.flow)
        if rule is None:
            self.driver.send_packet(frame(inside))
        else:
            self._asker.ask(rule, inside, trust_leases=False)

    def _find(self, node: int) -> Node | None:
        return next((found for found in self.table.nodes() if found.id == node), None)

    def _ask(self, message: Any, endpoint: Any) -> None:
        if self.server is not None:
            self.server.send(message, endpoint)

    def delete(self, flow: bytes, gen: int) -> bool:
        """For the asker: the owner is gone."""
        return self.server is not None and self.server.discard(flow, gen)

    def pass_syn(self, flow: bytes) -> None:
        """For the asker: the owner is alive, the SYN is for it."""
        rule = self.table.get(flow)
        if rule is not None:
            self._passing[flow] = rule

    def _inject(self, inside: bytes) -> None:
        segment = parse_segment(inside)
        if segment is None or self.server is None:
            return
        rule = self._passing.pop(segment.flow, None)
        out = frame(inside if rule is None else redirected(inside, rule))
        self.server.when_idle(segment.flow, lambda: self.driver.send_packet(out))

    # Status

    def status(self) -> dict[str, Any]:
        """What ``prism-proxy status`` shows."""
        server = asdict(self.server.counters) if self.server is not None else {}
        rules = len(self.table)
        return {
            "name": "switch",
            "role": "switch",
            "pid": os.getpid(),
            "standing": "primary" if self.driver.ready else "backup",
            "rules": rules,
            "nodes": {
                f"{node.id:016x}": {"address": str(node.endpoint), "alive": node.alive}
                for node in self.table.nodes()
            },
            "counters": {
                "rules": rules,
                **server,
                "p4runtime": asdict(self.driver.counters),
                "ask": asdict(self._asker.counters),
                "provoked": self._provoker.sent,
            },
        }


def redirected(inside: bytes, rule: Rule) -> bytes:
    """A client's packet with the owner as its destination."""
    data = bytearray(inside)
    owner = pack_address(rule.owner_endpoint.host)
    if data[0] >> 4 == 4:
        start = (data[0] & 15) * 4
        data[16:20] = owner[12:]
        data[10:12] = bytes(2)
        data[10:12] = struct.pack("!H", checksum(bytes(data[:start])))
        addresses = bytes(data[12:20])
        end = int.from_bytes(data[2:4], "big")
    else:
        start = len(data) - _tcp_length(inside)
        data[24:40] = owner
        addresses = bytes(data[8:40])
        end = len(data)
    struct.pack_into("!H", data, start + 2, rule.owner_endpoint.port)
    struct.pack_into("!H", data, start + 16, 0)
    segment = bytes(data[start:end])
    pseudo = addresses + struct.pack("!HH", 6, len(segment))
    padded = segment + bytes(len(segment) % 2)
    struct.pack_into("!H", data, start + 16, checksum(pseudo + padded))
    return bytes(data[:end])


def _tcp_length(inside: bytes) -> int:
    """Octets from the TCP header of an IPv6 packet on; extension headers are passed over."""
    following, start = inside[6], 40
    while following != 6:
        following, start = (
            inside[start],
            start + (8 if following == 44 else 8 * (inside[start + 1] + 1)),
        )
    return len(inside) - start
