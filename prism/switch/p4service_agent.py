"""The agent of a soft switch that is programmed over P4Runtime instead of by the nodes.

It holds packets as ever. Bare SYNs on flows with a rule go to the primary controller as PacketIn,
in an Ethernet frame with empty addresses; a PacketOut takes the ordinary way through the switch.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from prism.switch.agent import Agent, AgentSettings
from prism.switch.base import Rule
from prism.switch.p4runtime_pipeline import load
from prism.switch.p4runtime_tls import NO_TLS, TlsFiles
from prism.switch.p4service import P4Service
from prism.switch.p4service_table import EntryTable

__all__ = ["ServedAgent", "frame", "packet"]

_ETHERTYPES: Final = {4: b"\x08\x00", 6: b"\x86\xdd"}


def frame(packet: bytes) -> bytes:
    """An IP packet in an Ethernet frame without addresses."""
    return bytes(12) + _ETHERTYPES[packet[0] >> 4] + packet


def packet(data: bytes) -> bytes | None:
    """The IP packet of an Ethernet frame, tagged or not; ``None``: there is none."""
    at = 18 if data[12:14] in (b"\x81\x00", b"\x88\xa8") else 14
    inside = data[at:]
    if len(inside) < 20 or _ETHERTYPES.get(inside[0] >> 4) != data[at - 2 : at]:
        return None
    return inside


class ServedAgent(Agent):
    """An agent that serves P4Runtime over its table.

    Args:
        settings: without control addresses.
        address: ``HOST:PORT`` to listen on.
        device_id: the switch's number.
        tls: files for TLS; in the clear without a certificate.
    """

    answers_nodes = False

    def __init__(
        self,
        settings: AgentSettings,
        address: str,
        device_id: int = 1,
        tls: TlsFiles = NO_TLS,
    ) -> None:
        super().__init__(settings)
        self._address = address
        self._device_id = device_id
        self._tls = tls
        self.service: P4Service

    async def start(self) -> None:
        """See ``Agent``; begins to serve last."""
        await super().start()
        try:
            self.service = P4Service(
                EntryTable(self.store, load()),
                self._address,
                device_id=self._device_id,
                on_packet_out=self._on_packet_out,
                tls=self._tls,
            )
            self.service.start()
        except BaseException:
            await super().stop()
            raise

    async def stop(self) -> None:
        """See ``Agent``."""
        await asyncio.to_thread(self.service.close)
        await super().stop()

    def _on_packet_out(self, payload: bytes) -> None:
        inside = packet(payload)
        if inside is not None:
            self._loop.call_soon_threadsafe(self._tun.write, inside)

    def _on_syn(self, rule: Rule, packet: bytes) -> None:
        self.service.packet_in(frame(packet))

    def status(self) -> dict[str, Any]:
        """See ``Agent``."""
        return super().status() | {"p4runtime": {"port": self.service.port}}
