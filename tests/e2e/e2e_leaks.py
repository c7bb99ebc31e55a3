"""Counts what a cluster holds, so that a test can compare before and after.

Descriptors of every node's process, TCP sockets of every namespace, rules of the switch, network
namespaces, mounts and files in the stores' temporary directories.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from prism.lab.netns import Namespace

_STATES = {
    "01": "ESTABLISHED", "02": "SYN_SENT", "03": "SYN_RECV", "04": "FIN_WAIT1",
    "05": "FIN_WAIT2", "06": "TIME_WAIT", "07": "CLOSE", "08": "CLOSE_WAIT",
    "09": "LAST_ACK", "0A": "LISTEN", "0B": "CLOSING", "0C": "NEW_SYN_RECV",
}  # fmt: skip


def descriptors(pid: int) -> Counter[str]:
    """What a process has open, by kind; sockets without their inode numbers."""
    kinds: Counter[str] = Counter()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(entry.readlink())
        except OSError:
            continue
        if "/locks/" not in target:  # the store keeps these open, a fixed number of them at most
            kinds[target.partition(":[")[0]] += 1
    return kinds


def sockets(namespace: Namespace) -> Counter[str]:
    """TCP sockets of a namespace by state, from /proc/net/tcp and tcp6."""
    states: Counter[str] = Counter()
    with namespace.entered():
        for table in ("tcp", "tcp6"):
            lines = Path(f"/proc/thread-self/net/{table}").read_text().splitlines()[1:]
            states.update(_STATES[line.split()[3]] for line in lines)
    return states


def memory(pid: int) -> int:
    """Octets that only this process has (USS: private pages of smaps_rollup)."""
    total = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(("Private_Clean:", "Private_Dirty:")):
            total += int(line.split()[1]) * 1024
    return total


def temporary_files(stores: Iterable[Path]) -> list[str]:
    """Files in the stores that are no objects: uploads that were not finished."""
    found = []
    for store in stores:
        for path in store.rglob("*"):
            if path.is_file() and any(
                part.startswith((".", "tmp")) for part in path.relative_to(store).parts
            ):
                found.append(str(path))
    return found


@dataclass
class Snapshot:
    """What there is at one moment: name -> count; and how many requests had been relayed."""

    counts: dict[str, int]
    relays: int = 0

    @classmethod
    def take(
        cls,
        lab: str,
        pids: dict[str, int],
        namespaces: dict[str, Namespace],
        rules: int,
        stores: Iterable[Path],
        time_wait: bool = False,
    ) -> Snapshot:
        counts: Counter[str] = Counter()
        for node, pid in pids.items():
            for kind, number in descriptors(pid).items():
                counts[f"{node} descriptor {kind}"] = number
        for role, namespace in namespaces.items():
            for state, number in sockets(namespace).items():
                if state != "TIME_WAIT" or time_wait:
                    counts[f"{role} socket {state}"] = number
        counts["rules"] = rules
        counts["network namespaces"] = sum(
            path.name.startswith(lab) for path in Path("/run/netns").iterdir()
        )
        counts["mounts"] = Path("/proc/self/mounts").read_text().count(f"/{lab}/")
        counts["temporary files"] = len(temporary_files(stores))
        return cls(dict(counts))

    def more_than(self, before: Snapshot) -> dict[str, int]:
        """What there is more of than before; a socket of another state counts as one more."""
        return {
            name: number - before.counts.get(name, 0)
            for name, number in self.counts.items()
            if number > before.counts.get(name, 0)
        }


def settle(before: Snapshot, take: Callable[[], Snapshot], timeout: float = 5.0) -> dict[str, int]:
    """Wait until nothing is there that was not before; what is left over at the end."""
    deadline = time.monotonic() + timeout
    while True:
        left = take().more_than(before)
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)
