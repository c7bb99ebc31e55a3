"""Counts what a cluster holds, so that a test can compare before and after.

Descriptors of every node's process, TCP sockets of every namespace, rules of the switch, network
namespaces, mounts and files in the stores' temporary directories. What is left over is described
one by one: a socket with its ends, its queues, who holds it, and since when.
"""

from __future__ import annotations

import ipaddress
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from prism.flow import Endpoint
from prism.lab.netns import Namespace

_STATES = {
    "01": "ESTABLISHED", "02": "SYN_SENT", "03": "SYN_RECV", "04": "FIN_WAIT1",
    "05": "FIN_WAIT2", "06": "TIME_WAIT", "07": "CLOSE", "08": "CLOSE_WAIT",
    "09": "LAST_ACK", "0A": "LISTEN", "0B": "CLOSING", "0C": "NEW_SYN_RECV",
}  # fmt: skip
_TIMERS = {0: "none", 1: "retransmission", 2: "keep-alive", 3: "TIME_WAIT", 4: "window probe"}


class Socket(NamedTuple):
    """One TCP socket of a namespace."""

    role: str
    state: str
    local: Endpoint
    peer: Endpoint
    inode: int  # 0: no process holds it
    details: str

    @property
    def name(self) -> str:
        return f"{self.role} socket {self.state}"

    @property
    def identity(self) -> tuple[str, Endpoint, Endpoint, int]:
        return self.role, self.local, self.peer, self.inode


class Descriptor(NamedTuple):
    """One descriptor of a process."""

    node: str
    fd: str
    target: str

    @property
    def name(self) -> str:
        """The kind, without the inode's number."""
        return f"{self.node} descriptor {self.target.partition(':[')[0]}"

    @property
    def inode(self) -> int:
        kind, _, number = self.target.partition(":[")
        return int(number.rstrip("]")) if kind == "socket" else 0


def descriptors(node: str, pid: int) -> list[Descriptor]:
    """What a process has open."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(entry.readlink())
        except OSError:
            continue
        if "/locks/" not in target:  # the store keeps these open, a fixed number of them at most
            found.append(Descriptor(node, entry.name, target))
    return found


def sockets(role: str, namespace: Namespace) -> list[Socket]:
    """The TCP sockets of a namespace, from /proc/net/tcp and tcp6."""
    found = []
    with namespace.entered():
        for table in ("tcp", "tcp6"):
            lines = Path(f"/proc/thread-self/net/{table}").read_text().splitlines()[1:]
            found += [_socket(role, line.split()) for line in lines]
    return found


def _socket(role: str, words: list[str]) -> Socket:
    unsent, unread = (int(part, 16) for part in words[4].split(":"))
    timer, when = (int(part, 16) for part in words[5].split(":"))
    details = f"{unsent} unacknowledged, {unread} unread, timer {_TIMERS.get(timer, timer)}"
    if timer:
        details += f" in {when / 100:.2f} s, {int(words[6], 16)} retransmissions"
    state = _STATES[words[3]]
    return Socket(role, state, _endpoint(words[1]), _endpoint(words[2]), int(words[9]), details)


def _endpoint(text: str) -> Endpoint:
    """Words of the address in the host's octet order, then the port (proc_net_tcp.rst)."""
    packed, _, port = text.partition(":")
    words = (packed[at : at + 8] for at in range(0, len(packed), 8))
    octets = b"".join(int(word, 16).to_bytes(4, sys.byteorder) for word in words)
    family = socket.AF_INET if len(octets) == 4 else socket.AF_INET6
    return Endpoint(str(ipaddress.ip_address(socket.inet_ntop(family, octets))), int(port, 16))


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
    """What there is at one moment.

    Connections that nodes keep for what they relay next are set apart: the *relays*. They are
    told by the other end's address, and there may be as many as the nodes say that they keep.

    Attributes:
        counts: name -> count.
        sockets: by the sockets' identity.
        descriptors: of all processes.
        taken: monotonic seconds.
    """

    counts: dict[str, int]
    sockets: dict[tuple[str, Endpoint, Endpoint, int], Socket] = field(default_factory=dict)
    descriptors: list[Descriptor] = field(default_factory=list)
    taken: float = 0.0

    @classmethod
    def take(
        cls,
        lab: str,
        pids: dict[str, int],
        namespaces: dict[str, Namespace],
        rules: int,
        stores: Iterable[Path],
        relay_servers: Iterable[Endpoint] = (),
        relays_kept: int = 0,
    ) -> Snapshot:
        """Count.

        Args:
            lab: the cluster's name.
            pids: process by node.
            namespaces: by role.
            rules: that the switch has.
            stores: the stores' directories.
            relay_servers: where nodes relay to.
            relays_kept: connections to these that nodes say they keep.
        """
        held = [entry for node, pid in pids.items() for entry in descriptors(node, pid)]
        there = [s for role, namespace in namespaces.items() for s in sockets(role, namespace)]
        servers = set(relay_servers)
        relays = [s for s in there if s.state == "ESTABLISHED" and {s.local, s.peer} & servers]
        counts: Counter[str] = Counter()
        kept = {s.inode for s in relays if s.inode}
        counts.update(entry.name for entry in held if entry.inode not in kept)
        apart = {s.identity for s in relays}
        counts.update(s.name for s in there if s.state != "TIME_WAIT" and s.identity not in apart)
        counts["rules"] = rules
        ends = (sum(s.peer in servers for s in relays), sum(s.local in servers for s in relays))
        counts["relay connections that no pool keeps"] = max(0, max(ends) - relays_kept)
        counts["network namespaces"] = sum(
            path.name.startswith(lab) for path in Path("/run/netns").iterdir()
        )
        counts["mounts"] = Path("/proc/self/mounts").read_text().count(f"/{lab}/")
        counts["temporary files"] = len(temporary_files(stores))
        return cls(dict(counts), {s.identity: s for s in there}, held, time.monotonic())

    def more_than(self, before: Snapshot) -> dict[str, int]:
        """What there is more of than before; a socket of another state counts as one more."""
        return {
            name: number - before.counts.get(name, 0)
            for name, number in self.counts.items()
            if number > before.counts.get(name, 0)
        }

    def describe(self, left: Iterable[str], before: Snapshot, since: dict[object, float]) -> str:
        """The sockets and descriptors that may be meant by what is left over, one a line."""
        names = set(left)
        if any("relay" in name for name in names):
            names |= {name for name in self.counts if name.endswith("socket ESTABLISHED")}
        holders: dict[int, list[str]] = {}
        for entry in self.descriptors:
            holders.setdefault(entry.inode, []).append(f"{entry.node} (fd {entry.fd})")
        lines = []
        for identity, s in self.sockets.items():
            if identity not in before.sockets and s.name in names:
                age = self.taken - since.get(identity, self.taken)
                owners = ", ".join(holders.get(s.inode, ())) if s.inode else ""
                lines.append(
                    f"{s.name}: {s.local} <-> {s.peer}, {s.details}, "
                    f"held by {owners or 'no process'}, there for {age:.1f} s or more"
                )
        known = {(entry.node, entry.fd, entry.target) for entry in before.descriptors}
        tcp = {s.inode: s for s in self.sockets.values()}
        for entry in self.descriptors:
            if entry.name in names and tuple(entry) not in known:
                s = tcp.get(entry.inode)
                what = f"TCP {s.local} <-> {s.peer} {s.state}" if s else "no TCP socket of a node's"
                lines.append(f"{entry.name}: fd {entry.fd}, {entry.target}, {what}")
        return "\n".join(lines)


def settle(
    before: Snapshot, take: Callable[[], Snapshot], timeout: float = 5.0
) -> tuple[dict[str, int], str]:
    """Wait until nothing is there that was not before; what is left over at the end, in detail."""
    deadline = time.monotonic() + timeout
    since: dict[object, float] = {}
    while True:
        now = take()
        for identity in now.sockets:
            since.setdefault(identity, now.taken)
        left = now.more_than(before)
        if not left:
            return {}, ""
        if time.monotonic() > deadline:
            return left, now.describe(left, before, since)
        time.sleep(0.05)
