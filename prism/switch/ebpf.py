"""The switch in the kernel: loads the classifier, attaches it, reads and changes its table.

The data plane works without this process: tables and programs are pinned in a bpffs, and filters
stay on their interfaces. A process that starts *adopts* the tables it finds. What it changes in
the table it changes through the classifier's own code, so that a compare-and-swap by the agent
and one by a node exclude each other.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Final, NamedTuple

from prism._ext.bpf import BpfError, Map, SwitchObject
from prism.errors import SwitchError
from prism.flow import Endpoint, pack_address
from prism.switch import attach as _attach
from prism.switch.base import Event, Node, Rule
from prism.switch.control import KEY_SIZE, NO_FLOW, Op, Status, packed_address
from prism.switch.records import (
    COUNTERS,
    RuleCounters,
    event_from,
    node_from,
    rule_counters_from,
    rule_from,
)

__all__ = ["DEFAULT_PIN_DIR", "MAX_RULES", "EbpfSwitch", "Settings"]

DEFAULT_PIN_DIR: Final = Path("/sys/fs/bpf/prism")
MAX_RULES: Final = 1_000_000

_BPF_FS_MAGIC: Final = 0xCAFE4A11  # linux/magic.h
_ZERO: Final = bytes(4)  # the only key of a one-element array
_CONFIG: Final = struct.Struct("=IIQQQ16s16s2sHI")  # struct prism_config
_MESSAGE: Final = struct.Struct("!IBBBBQQ36sH6sI16sQQQQ")  # struct prism_msg
_FRAME: Final = bytes(14)  # an empty Ethernet header
_MAGIC: Final = 0x5052534D
_LOCKED: Final = 0x01
_SHOT: Final = 2  # TC_ACT_SHOT
_SYN_PASS_NS: Final = 1_000_000_000
_NO_ADDRESS: Final = bytes(16)
_BUSY_TRIES: Final = 8


class Settings(NamedTuple):
    """What the data plane is told.

    Attributes:
        key: the cluster key, 16 octets.
        control: the addresses control datagrams are sent to, one port; at most one IPv4 and one
            IPv6 address.
        hold_ifindex: interface index of the TUN device that takes held packets; 0: locked flows'
            packets are dropped.
        lease_max: the longest lease granted, seconds.
    """

    key: bytes
    control: tuple[Endpoint, ...]
    hold_ifindex: int = 0
    lease_max: float = 60.0


def _filesystem(path: Path) -> int:
    """The magic number of the file system that ``path`` is on (statfs(2))."""
    buffer = ctypes.create_string_buffer(256)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.statfs(os.fsencode(path), buffer) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    return int(ctypes.c_long.from_buffer(buffer).value) & 0xFFFFFFFF


def _prepare_pin_dir(directory: Path) -> None:
    parent = directory
    while not parent.exists():
        parent = parent.parent
    if _filesystem(parent) != _BPF_FS_MAGIC:
        raise SwitchError(
            f"{directory} is not on a BPF file system, so the switch's tables cannot outlive it: "
            f"mount one with 'mount -t bpf bpf {directory.parent}', or name a directory on one"
        )
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)


def _encode_config(version: int, incarnation: int, settings: Settings) -> bytes:
    """``struct prism_config``.

    Raises:
        SwitchError: the settings contradict themselves.
    """
    if len(settings.key) != KEY_SIZE:
        raise SwitchError(f"the cluster key has {KEY_SIZE} octets, not {len(settings.key)}")
    ports = {endpoint.port for endpoint in settings.control}
    v4 = [endpoint.host for endpoint in settings.control if ":" not in endpoint.host]
    v6 = [endpoint.host for endpoint in settings.control if ":" in endpoint.host]
    if len(ports) > 1 or len(v4) > 1 or len(v6) > 1:
        raise SwitchError(
            "the switch has one control port, and at most one IPv4 and one IPv6 control address"
        )
    port = ports.pop() if ports else 0
    k0, k1 = struct.unpack("<QQ", settings.key)
    return _CONFIG.pack(
        version,
        settings.hold_ifindex,
        incarnation,
        k0,
        k1,
        pack_address(v4[0]) if v4 else _NO_ADDRESS,
        pack_address(v6[0]) if v6 else _NO_ADDRESS,
        port.to_bytes(2, "big"),
        0,
        round(settings.lease_max * 1000),
    )


class EbpfSwitch:
    """The kernel's rule table and the classifier over it; a ``PacketStore``.

    Needs CAP_BPF and CAP_NET_ADMIN. May be used from several threads.

    Args:
        pin_dir: directory on a bpffs where tables and programs are pinned; made if missing.
        max_rules: size of new tables; adopted ones keep theirs.
        max_nodes: how many nodes may be known at once.
        fresh: throw away what is pinned there, with all rules.
        object_path: another compiled classifier than the packaged one.

    Attributes:
        adopted: whether the tables were there before.

    Raises:
        SwitchError: ``pin_dir`` is on no bpffs, holds tables of another version, or the kernel
            does not load the classifier.
    """

    def __init__(
        self,
        pin_dir: Path = DEFAULT_PIN_DIR,
        *,
        max_rules: int = MAX_RULES,
        max_nodes: int = 4096,
        fresh: bool = False,
        object_path: Path | None = None,
    ) -> None:
        self.pin_dir = pin_dir
        _prepare_pin_dir(pin_dir)
        packaged = resources.files("prism._ext") / "bpf" / "prism_switch.bpf.o"
        with resources.as_file(packaged) as found:
            self._object = self._load(object_path or found, max_rules, max_nodes, fresh)
        self.adopted = self._object.adopted
        self._rules = self._map("rules")
        self._nodes = self._map("nodes")
        self._config = self._map("config")
        self._agent = self._map("agent")
        self._syn_pass = self._map("syn_pass")
        self._agent_program = self._object.program_fd("prism_agent")

    def _load(self, path: Path, max_rules: int, max_nodes: int, fresh: bool) -> SwitchObject:
        try:
            return SwitchObject(
                path, self.pin_dir, max_rules=max_rules, max_nodes=max_nodes, fresh=fresh
            )
        except BpfError as error:
            if error.errno == errno.EPROTO:
                raise SwitchError(
                    f"{self.pin_dir} holds the tables of another version of Prism: remove that "
                    "directory, or load with fresh=True; the connections in them are lost"
                ) from None
            raise SwitchError(f"cannot load the classifier: {error.strerror}") from None

    def _map(self, name: str) -> Map:
        return self._object.map(name)

    def close(self) -> None:
        """Let go; the data plane stays as it is. Idempotent."""
        self._object.close()

    def unpin(self) -> None:
        """Remove the pins: once the classifier is detached too, the tables are gone."""
        for path in self.pin_dir.iterdir():
            path.unlink()
        self.pin_dir.rmdir()

    # ---- ports ----

    def attach(self, interfaces: Iterable[str], *, namespace: str | None = None) -> None:
        """Classify what arrives at these interfaces, in place of an earlier classifier of ours.

        Args:
            interfaces: names; TUN devices get the classifier without Ethernet.
            namespace: name of the network namespace they are in, by default the caller's.

        Raises:
            SwitchError: no such interface, or the kernel refuses.
        """
        for interface in interfaces:
            ethernet = _attach.has_ethernet(interface, namespace)
            program = "prism_switch" if ethernet else "prism_switch_l3"
            _attach.install(self._object.program_fd(program), program, interface, namespace)

    def detach(self, interfaces: Iterable[str], *, namespace: str | None = None) -> None:
        """Take the classifier off these interfaces; gone already is fine.

        Raises:
            SwitchError: the kernel refuses.
        """
        for interface in interfaces:
            _attach.uninstall(interface, namespace)

    # ---- settings ----

    def configure(self, settings: Settings) -> None:
        """Tell the data plane its key, addresses and where held packets go.

        Raises:
            SwitchError: the settings contradict themselves.
        """
        now = self._config.get(_ZERO) or bytes(_CONFIG.size)
        version, _, incarnation, *_ = _CONFIG.unpack(now)
        self._config.put(_ZERO, _encode_config(version, incarnation, settings))

    @property
    def incarnation(self) -> int:
        """The random number that the tables got when they were made."""
        return int(_CONFIG.unpack(self._config.get(_ZERO) or bytes(_CONFIG.size))[2])

    def heartbeat(self) -> None:
        """Tell the data plane that somebody holds packets and answers asks.

        To be called several times a second: after one second without, packets of locked flows
        and SYNs on flows with a rule are dropped instead.
        """
        self._agent.put(_ZERO, time.monotonic_ns().to_bytes(8, sys.byteorder))

    def stop_holding(self) -> None:
        """The opposite: nobody holds packets from now on."""
        self._agent.put(_ZERO, bytes(8))

    # ---- rules ----

    @property
    def max_rules(self) -> int:
        """How many rules the table takes."""
        return self._rules.max_entries

    @property
    def rule_count(self) -> int:
        """How many rules there are now: those made less those deleted."""
        counters = self.counters()
        return counters["added"] - counters["deleted"]

    def rules(self) -> Iterator[Rule]:
        """All rules, read in batches; those that come or go meanwhile may be missing."""
        return (rule_from(value) for value in self._values(self._rules))

    def rule_counters(self) -> Iterator[tuple[bytes, RuleCounters]]:
        """The packed flow and the counters of every rule."""
        return ((value[8:44], rule_counters_from(value)) for value in self._values(self._rules))

    def _values(self, source: Map) -> Iterator[bytes]:
        cursor: bytes | None = None
        while True:
            entries, cursor = source.batch(cursor)
            for _, value in entries:
                yield value
            if cursor is None:
                return

    def get(self, flow: bytes) -> Rule | None:
        """The rule of a packed flow."""
        value = self._rules.get(flow)
        return None if value is None else rule_from(value)

    def get_counters(self, flow: bytes) -> RuleCounters | None:
        """The counters of a packed flow's rule."""
        value = self._rules.get(flow)
        return None if value is None else rule_counters_from(value)

    def delete(self, flow: bytes, gen: int) -> bool:
        """Delete a rule if it still has this generation; whether it was deleted.

        Held packets are reported as an event, as for any deletion.
        """
        return self._operate(Op.DELETE, flow, gen=gen) == Status.OK

    def lock(self, flow: bytes, gen: int) -> bool:
        """Lock a rule if it still has this generation, whoever owns it; whether it was."""
        return self._operate(Op.LOCK, flow, gen=gen) == Status.OK

    def unlock(self, flow: bytes, gen: int) -> bool:
        """Unlock a rule if it still has this generation, whoever owns it; whether it was."""
        return self._operate(Op.UNLOCK, flow, gen=gen) == Status.OK

    def add(self, rule: Rule) -> Status:
        """Make a rule; its generation, where it has none, is the switch's choice.

        Returns:
            ``OK``, ``EXISTS``, ``FULL`` or ``INVALID``.
        """
        return self._operate(
            Op.ADD,
            rule.flow,
            gen=rule.gen,
            owner=rule.owner,
            endpoint=rule.owner_endpoint,
            mac=rule.owner_mac,
            locked=rule.locked,
            cookie=rule.cookie,
        )

    def chown(self, gen: int, rule: Rule) -> Status:
        """Give the rule of a flow another owner, state and generation, if it still has ``gen``.

        Its cookie stays.

        Returns:
            ``OK``, ``NOENT``, ``STALE``, ``EXISTS``, ``FULL`` or ``INVALID``.
        """
        return self._operate(
            Op.CHOWN,
            rule.flow,
            gen=gen,
            owner=rule.owner,
            endpoint=rule.owner_endpoint,
            mac=rule.owner_mac,
            locked=rule.locked,
            cookie=rule.gen,
        )

    def _operate(
        self,
        op: Op,
        flow: bytes,
        *,
        node: int = 0,
        gen: int = 0,
        owner: int = 0,
        endpoint: Endpoint | None = None,
        mac: bytes = bytes(6),
        locked: bool = False,
        cookie: int = 0,
    ) -> Status:
        """Run one operation as the agent, through the classifier's code."""
        address = packed_address(endpoint.host) if endpoint else _NO_ADDRESS
        port = endpoint.port if endpoint else 0
        flags = _LOCKED if locked else 0
        request = _FRAME + _MESSAGE.pack(
            _MAGIC, 1, op, 0, flags, node, 0, flow, port, mac, 0, address, owner, gen, cookie, 0
        )
        for _ in range(_BUSY_TRIES):  # the rule is just being deleted on another CPU
            verdict, reply = self._object.run(self._agent_program, request)
            if verdict != _SHOT:
                return Status(reply[len(_FRAME) + 6])
        raise SwitchError("the switch's table does not answer")

    def pass_syn(self, flow: bytes) -> None:
        """Let the next bare SYN of this flow, within a second, through to the owner."""
        until = time.monotonic_ns() + _SYN_PASS_NS
        self._syn_pass.put(flow, until.to_bytes(8, sys.byteorder))

    # ---- nodes ----

    def nodes(self) -> Sequence[Node]:
        """All nodes that ever said HELLO and are not forgotten."""
        now = time.monotonic_ns()
        found: list[Node] = []
        cursor: bytes | None = None
        while True:
            entries, cursor = self._nodes.batch(cursor)
            found += [node_from(key, value, now) for key, value in entries]
            if cursor is None:
                return found

    def end_lease(self, node: int) -> bool:
        """Take a node for dead: what it asks is ``DENIED`` until its next HELLO.

        Its sequence numbers stay used, so nothing that it sent before can be played again.

        Returns:
            ``False`` if the lease is running (renewed meanwhile), or the node is not known.
        """
        return self._operate(Op.HELLO, NO_FLOW, node=node) == Status.OK

    def forget_node(self, node: int) -> bool:
        """Forget a node and its used sequence numbers; whether it was known."""
        return self._nodes.remove(node.to_bytes(8, sys.byteorder))

    # ---- counters and events ----

    def counters(self) -> dict[str, int]:
        """The data plane's counters by name, see ``enum prism_stat``; they only grow."""
        return dict(zip(COUNTERS, self._object.stats(), strict=True))

    @property
    def events_fd(self) -> int:
        """Readable (epoll) when there are events."""
        return self._object.events_fd

    def read_events(self) -> Iterator[Event]:
        """The events that are there (at most 256); does not wait."""
        return (event_from(data) for data in self._object.events())
