"""Accounts: processor time of each role's processes, and octets on each link."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from prism.lab.netns import Namespace

__all__ = ["Account", "Usage"]

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Usage:
    """What has been used between two looks.

    Attributes:
        cpu: seconds of user and system time by role (all processes of its sessions).
        machine: seconds that the machine's processors were not idle, interrupts included.
        links: octets by device of the switch, towards the node and from it.
    """

    cpu: dict[str, float] = field(default_factory=dict)
    machine: float = 0.0
    links: dict[str, tuple[int, int]] = field(default_factory=dict)

    def since(self, earlier: Usage) -> Usage:
        """The difference."""
        none = (0, 0)
        return Usage(
            {role: used - earlier.cpu.get(role, 0.0) for role, used in self.cpu.items()},
            self.machine - earlier.machine,
            {
                device: (
                    to - earlier.links.get(device, none)[0],
                    back - earlier.links.get(device, none)[1],
                )
                for device, (to, back) in self.links.items()
            },
        )


class Account:
    """Reads the kernel's counters.

    Args:
        switch: the switch's namespace, whose devices are the links.
        sessions: by role, the session ids of its processes (each was started as the leader of a
            session, so its workers are in the same one).
    """

    def __init__(self, switch: Namespace, sessions: Mapping[str, int]) -> None:
        self._switch = switch
        self._roles = {session: role for role, session in sessions.items()}

    def look(self) -> Usage:
        """The counters as they are."""
        cpu = dict.fromkeys(self._roles.values(), 0.0)
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            role = self._roles.get(int(fields[3]))
            if role is not None:
                cpu[role] += (int(fields[11]) + int(fields[12])) / _TICKS
        return Usage(cpu, _busy(), self._links())

    def _links(self) -> dict[str, tuple[int, int]]:
        text = self._switch.run_inside(lambda: Path("/proc/thread-self/net/dev").read_text())
        links = {}
        for line in text.splitlines()[2:]:
            device, _, counters = line.partition(":")
            numbers = counters.split()
            links[device.strip()] = (int(numbers[8]), int(numbers[0]))
        links.pop("lo", None)
        return links


def _busy() -> float:
    """Seconds all processors have spent on anything (proc(5), the first line of stat)."""
    numbers = [int(number) for number in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    idle = numbers[3] + numbers[4]
    return (sum(numbers) - idle) / _TICKS
