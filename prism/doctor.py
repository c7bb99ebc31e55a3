"""Tries out, item by item, what Prism needs of a machine.

Every check really does the thing: it hands a connection over on the loopback of a throwaway
network namespace, loads the classifier, makes a TUN device. The machine is left as it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import platform
import resource
import select
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from prism.flow import Endpoint

__all__ = ["CHECKS", "Check", "Finding", "Missing", "examine"]

_CLONE_NEWNET: Final = 0x40000000
_MNT_DETACH: Final = 2
_NETLINK_SOCK_DIAG: Final = 4
_SKNLGRP_INET_TCP_DESTROY: Final = 1
_CAPABILITIES: Final = {"NET_ADMIN": 12, "NET_RAW": 13, "SYS_ADMIN": 21, "BPF": 39}
_DESCRIPTORS: Final = 65536
_KERNEL: Final = (5, 15)
_PATIENCE: Final = 2.0
_libc = ctypes.CDLL(None, use_errno=True)


class Missing(Exception):
    """What a check looks for is not there; the message says what happened."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing to try.

    Attributes:
        name: what it is.
        probe: tries it inside a throwaway network namespace; returns a detail, raises
            :class:`Missing` or anything else if it is not there.
        roles: who needs it.
        cost: what its lack costs.
        remedy: how to mend it.
        required: whether Prism is of no use without it.
    """

    name: str
    probe: Callable[[], str]
    roles: str
    cost: str
    remedy: str
    required: bool = True


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of a check; ``cost`` and ``remedy`` are empty where all is well."""

    name: str
    ok: bool
    required: bool
    roles: str
    detail: str
    cost: str
    remedy: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def examine(checks: Sequence[Check] | None = None) -> list[Finding]:
    """Run the checks, each in a thread with a namespace of its own where that is allowed."""
    return [_try(check) for check in (CHECKS if checks is None else checks)]


def _try(check: Check) -> Finding:
    outcome: list[tuple[bool, str]] = []

    def run() -> None:
        # Without the privilege the probe runs in the real namespace, and only reads or fails.
        _libc.unshare(_CLONE_NEWNET)
        try:
            outcome.append((True, check.probe()))
        except Exception as error:
            outcome.append((False, str(error) or type(error).__name__))

    thread = threading.Thread(target=run, name=f"doctor-{check.name}", daemon=True)
    thread.start()
    thread.join(4 * _PATIENCE)
    ok, detail = outcome[0] if outcome else (False, "did not come to an end")
    cost, remedy = ("", "") if ok else (check.cost, check.remedy)
    return Finding(check.name, ok, check.required, check.roles, detail, cost, remedy)


# -- probes ---------------------------------------------------------------------------------------


def _kernel() -> str:
    release = platform.release()
    numbers = tuple(int(part) for part in release.split("-")[0].split(".")[:2])
    if numbers < _KERNEL:
        raise Missing(f"{release} is older than {'.'.join(map(str, _KERNEL))}")
    return release


def _capability(name: str) -> Callable[[], str]:
    def probe() -> str:
        for line in Path("/proc/thread-self/status").read_text().splitlines():
            if line.startswith("CapEff:") and int(line.split()[1], 16) >> _CAPABILITIES[name] & 1:
                return "effective"
        raise Missing("not effective in this process")

    return probe


def _own_namespace() -> None:
    """Refuse to go on in the machine's own network namespace."""
    if os.stat("/proc/thread-self/ns/net").st_ino == os.stat("/proc/self/ns/net").st_ino:  # noqa: PTH116
        raise Missing("no network namespace of its own to try it in")


def _namespace() -> str:
    _own_namespace()
    return "made and entered"


@contextlib.contextmanager
def _connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A TCP connection on the throwaway namespace's loopback: (client, server)."""
    _own_namespace()
    from pyroute2 import IPRoute  # noqa: PLC0415

    with IPRoute() as route:
        route.link("set", index=1, state="up")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        client = socket.create_connection(listener.getsockname(), _PATIENCE)
        server, _ = listener.accept()
    with client, server:
        server.settimeout(_PATIENCE)
        yield client, server


def _tcp_repair() -> str:
    from prism._ext import tcp_repair  # noqa: PLC0415

    with _connection() as (client, server):
        client.sendall(b"before ")
        address, port = server.getsockname()
        state = tcp_repair.export_state(server.fileno())
        tcp_repair.close_quietly(server.detach())
        imported = tcp_repair.import_state(state, address, port)
        with socket.socket(fileno=imported.activate()) as revived:
            revived.setblocking(True)
            revived.settimeout(_PATIENCE)
            client.sendall(b"after")
            received = b""
            while len(received) < len(b"before after"):
                received += revived.recv(64)
            revived.sendall(received)
            if client.recv(64) != b"before after":
                raise Missing("the restored connection lost octets")
    return "a connection was exported, closed, imported and went on"


def _rcvlowat() -> str:
    with _connection() as (client, server):
        client.sendall(b"abc")
        server.recv(16, socket.MSG_PEEK)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 4)
        poll = select.epoll()
        poll.register(server, select.EPOLLIN)
        with contextlib.closing(poll):
            if poll.poll(0.05):
                raise Missing("peeked octets wake the reader again")
            client.sendall(b"d")
            if not poll.poll(_PATIENCE):
                raise Missing("the next octet does not wake the reader")
    return "a reader that peeks sleeps until more comes"


@contextlib.contextmanager
def _bpffs() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="prism-doctor-"))
    try:
        if _libc.mount(b"bpf", os.fsencode(path), b"bpf", 0, None) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"mounting one: {os.strerror(number)}")
        try:
            yield path
        finally:
            _libc.umount2(os.fsencode(path), _MNT_DETACH)
    finally:
        path.rmdir()


def _mount_bpffs() -> str:
    with _bpffs():
        usual = Path("/sys/fs/bpf")
        found = f"; {usual} is one" if usual.is_mount() else f"; nothing is mounted at {usual}"
        return "can be mounted" + found


def _classifier() -> str:
    from prism.switch.ebpf import EbpfSwitch  # noqa: PLC0415

    with _bpffs() as path:
        switch = EbpfSwitch(path / "prism", max_rules=1024)
        switch.close()
    return "loads and passes the verifier"


def _clsact() -> str:
    from prism.switch.ebpf import EbpfSwitch  # noqa: PLC0415

    _own_namespace()
    with _bpffs() as path:
        switch = EbpfSwitch(path / "prism", max_rules=1024)
        with contextlib.closing(switch):
            switch.attach(["lo"])
            switch.detach(["lo"])
    return "the classifier was attached and detached"


def _tun() -> str:
    from prism.switch.tun import Tun  # noqa: PLC0415

    _own_namespace()
    Tun("prism-doctor").close()
    return "a TUN device was made"


def _destroy_notices() -> str:
    with (
        _connection() as (client, server),
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as notices,
    ):
        notices.bind((0, 1 << (_SKNLGRP_INET_TCP_DESTROY - 1)))
        notices.settimeout(_PATIENCE)
        client.close()
        server.close()
        notices.recv(4096)
    return "the kernel told of a connection's end"


def _kernel_tls() -> str:
    from prism.tls.kernel_probe import probe  # noqa: PLC0415

    with _connection():  # brings the loopback device up
        support = probe()
    if support.why:
        raise Missing(support.why)
    return f"seals with {', '.join(sorted(support.ciphers))}"


def _modules() -> str:
    if not Path("/proc/modules").exists():
        raise Missing("the kernel is built without loadable modules")
    if Path("/proc/sys/kernel/modules_disabled").read_text().strip() != "0":
        raise Missing("loading is disabled until the next boot")
    return "can be loaded"


def _monitor_module() -> str:
    from prism.monitor.kmod import DEVICE, KmodMonitor  # noqa: PLC0415

    if not DEVICE.exists():
        raise Missing(f"{DEVICE} is not there")

    async def watch() -> bool:
        gone = asyncio.Event()
        monitor = KmodMonitor()
        await monitor.start()
        with _connection() as (client, server):
            local, peer = map(Endpoint.from_sockaddr, (server.getsockname(), server.getpeername()))
            monitor.watch(server.fileno(), local, peer, lambda _: gone.set())
            client.close()
        try:
            await asyncio.wait_for(gone.wait(), _PATIENCE)
        except TimeoutError:
            raise Missing("it did not tell of a connection's end") from None
        finally:
            await monitor.close()
        return monitor.info.sees_time_wait

    sees = asyncio.run(watch())
    return "told of a connection's end" + ("" if sees else "; does not see that of TIME_WAIT")


def _descriptors() -> str:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < _DESCRIPTORS:
        raise Missing(f"hard limit {hard}")
    return f"hard limit {hard if hard != resource.RLIM_INFINITY else 'none'}"


def _uvloop() -> str:
    import uvloop  # noqa: PLC0415

    uvloop.new_event_loop().close()
    return version("uvloop")


def _token_bucket() -> str:
    _own_namespace()
    from pyroute2 import IPRoute  # noqa: PLC0415

    with IPRoute() as route:
        route.tc("add", "tbf", 1, handle=0x10000, rate=10**6, burst=65536, latency="50ms")
    return "the tbf queueing discipline is there"


def _p4runtime() -> str:
    from google.protobuf.internal import api_implementation  # noqa: PLC0415
    from google.protobuf.message import DecodeError  # noqa: PLC0415

    try:
        from prism.switch import p4runtime_session  # noqa: F401, PLC0415
        from prism.switch.p4runtime_pipeline import load  # noqa: PLC0415

        pipeline = load()
    except DecodeError as error:
        raise Missing(f"the packaged program cannot be read: {error}") from None
    found = ", ".join(f"{name} {version(name)}" for name in ("grpcio", "p4runtime", "protobuf"))
    slow = " (in Python, and slow)" if api_implementation.Type() == "python" else ""
    return f"{found}{slow}; the program has {len(pipeline.tables)} tables"


def _time_wait_reuse() -> str:
    value = Path("/proc/sys/net/ipv4/tcp_tw_reuse").read_text().strip()
    if value == "0":
        raise Missing("net.ipv4.tcp_tw_reuse is 0")
    return f"net.ipv4.tcp_tw_reuse is {value}"


_RUN_AS_ROOT = "run as root, or grant it: setcap, or AmbientCapabilities= in the systemd unit"

CHECKS: Final[tuple[Check, ...]] = (
    Check(
        "kernel",
        _kernel,
        "all",
        "ring buffers, batch reads or loops in the classifier are missing",
        "run Linux 5.15 or later",
    ),
    *(
        Check(f"CAP_{name}", _capability(name), roles, cost, _RUN_AS_ROOT, required)
        for name, roles, cost, required in (
            ("NET_ADMIN", "all", "no connection can be frozen, no classifier attached", True),
            ("NET_RAW", "backend", "half-closed connections are relayed", True),
            ("BPF", "switch", "the classifier cannot be loaded", True),
            ("SYS_ADMIN", "lab", "no network namespaces, no bpffs: no lab", True),
        )
    ),
    Check(
        "network namespaces",
        _namespace,
        "lab",
        "the lab and most checks below need them",
        "run as root with CONFIG_NET_NS; in a container, with --privileged",
    ),
    Check(
        "TCP_REPAIR",
        _tcp_repair,
        "frontend, backend",
        "no connection can be handed over: everything is relayed",
        "a kernel with CONFIG_CHECKPOINT_RESTORE, and CAP_NET_ADMIN",
    ),
    Check(
        "SO_RCVLOWAT",
        _rcvlowat,
        "frontend, backend",
        "an incomplete request head keeps a core busy",
        "run Linux 5.15 or later, not a sandbox that emulates it",
    ),
    Check(
        "bpffs",
        _mount_bpffs,
        "switch",
        "the rules do not outlive the agent",
        "mount -t bpf bpf /sys/fs/bpf (CAP_SYS_ADMIN, CONFIG_BPF_SYSCALL)",
    ),
    Check(
        "classifier",
        _classifier,
        "switch",
        "no switch in the kernel",
        "CAP_BPF and a kernel with CONFIG_BPF_JIT and CONFIG_DEBUG_INFO_BTF",
    ),
    Check(
        "clsact",
        _clsact,
        "switch",
        "the classifier sees no packets",
        "a kernel with CONFIG_NET_CLS_BPF and CONFIG_NET_SCH_INGRESS",
    ),
    Check(
        "TUN",
        _tun,
        "switch",
        "no agent; packets of locked flows are dropped, so uploads may stall 200 ms",
        "modprobe tun, or give the container /dev/net/tun",
    ),
    Check(
        "end-of-connection notices",
        _destroy_notices,
        "backend",
        "rules of closed connections are found by polling",
        "a kernel with CONFIG_INET_DIAG_DESTROY or CONFIG_INET_TCP_DIAG (modprobe tcp_diag)",
    ),
    Check(
        "descriptors",
        _descriptors,
        "frontend, backend",
        "fewer connections at a time",
        f"LimitNOFILE={_DESCRIPTORS} or more in the systemd unit",
        required=False,
    ),
    Check("uvloop", _uvloop, "all", "nothing starts", "pip install uvloop"),
    Check(
        "TIME_WAIT reuse",
        _time_wait_reuse,
        "frontend",
        "relaying may run out of ports under load",
        "sysctl net.ipv4.tcp_tw_reuse=2",
        required=False,
    ),
    Check(
        "link rates",
        _token_bucket,
        "lab",
        "lab up --rate fails",
        "modprobe sch_tbf",
        required=False,
    ),
    Check(
        "P4Runtime packages",
        _p4runtime,
        "switch",
        'neither switch.kind = "p4runtime" nor switch.p4runtime_listen can be used',
        "pip install 'prism-proxy[p4]'",
        required=False,
    ),
    Check(
        "kernel TLS",
        _kernel_tls,
        "backend",
        "files are copied and sealed in the process instead of sendfile, where TLS is used",
        "modprobe tls, on a kernel with CONFIG_TLS and the ciphers (gcm, chacha20poly1305)",
        required=False,
    ),
    Check(
        "monitor module",
        _monitor_module,
        "backend",
        "rules of connections that a backend closed first stay for a minute",
        "prism-proxy kmod install (docs/kernel.md)",
        required=False,
    ),
    Check(
        "loadable modules",
        _modules,
        "backend",
        "the kernel's own notices are used instead of the monitor module",
        "a kernel with CONFIG_MODULES",
        required=False,
    ),
)
