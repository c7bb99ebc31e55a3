"""Network namespaces, veth pairs and programs inside them (namespaces(7), veth(4))."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pyroute2 import IPRoute, netns

from prism.errors import PrismError

__all__ = ["Namespace", "join"]

T = TypeVar("T")
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def _setns(descriptor: int) -> None:
    if _libc.setns(descriptor, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot enter a network namespace: {os.strerror(number)}")


class Namespace:
    """A named network namespace (``/run/netns/NAME``).

    Only the network is separate: mounts are shared, so a bpffs stays visible inside.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = Path("/run/netns") / name

    @classmethod
    def create(cls, name: str) -> Namespace:
        """Make the namespace and bring its loopback up.

        Raises:
            PrismError: it exists already, or the privilege (CAP_SYS_ADMIN) is missing.
        """
        try:
            netns.create(name)
        except FileExistsError:
            raise PrismError(
                f"network namespace {name} exists already; remove it with 'ip netns del {name}'"
            ) from None
        except PermissionError:
            raise PrismError("making network namespaces needs root (CAP_SYS_ADMIN)") from None
        namespace = cls(name)
        with namespace.route() as route:
            route.link("set", index=1, state="up")
        return namespace

    def remove(self) -> None:
        """Remove it; gone already is fine."""
        with contextlib.suppress(FileNotFoundError):
            netns.remove(self.name)

    @property
    def exists(self) -> bool:
        """Whether the namespace is there."""
        return self.path.exists()

    def route(self) -> IPRoute:
        """A netlink socket inside it; close it after use (it is a context manager).

        Raises:
            PrismError: no such namespace.
        """
        return self.run_inside(IPRoute)  # which starts a process for it when told the name

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Run the calling *thread* inside it; sockets made there stay there.

        Raises:
            PrismError: no such namespace.
        """
        try:
            inside = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise PrismError(f"no network namespace {self.name}") from None
        outside = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _setns(inside)
            try:
                yield
            finally:
                _setns(outside)
        finally:
            os.close(inside)
            os.close(outside)

    def run_inside(self, call: Callable[[], T]) -> T:
        """Call a function with the calling thread inside."""
        with self.entered():
            return call()

    def socket(self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """A new socket that belongs to this namespace."""
        return self.run_inside(lambda: socket.socket(family, kind))

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The argument vector that runs ``arguments`` inside (one exec, so the same pid)."""
        return ["nsenter", f"--net={self.path}", *arguments]

    def popen(self, arguments: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a program inside; ``options`` as for :class:`subprocess.Popen`."""
        return subprocess.Popen(self.command(arguments), **options)

    def run(self, arguments: Sequence[str], **options: Any) -> subprocess.CompletedProcess[Any]:
        """Run a program inside to its end; ``options`` as for :func:`subprocess.run`."""
        return subprocess.run(self.command(arguments), check=False, **options)

    def sysctl(self, key: str, value: str | int) -> None:
        """Set a per-namespace network setting, ``key`` as below ``/proc/sys/net``."""
        self.run_inside(lambda: (Path("/proc/sys/net") / key).write_text(f"{value}\n"))

    def add_address(self, device: str, address: str) -> None:
        """Give ``device`` an address in prefix notation (``10.1.2.3/24``, ``fd00::1/64``)."""
        host, _, length = address.partition("/")
        with self.route() as route:
            extra = {"flags": 0x02} if ":" in host else {}  # IFA_F_NODAD: usable at once
            route.addr(
                "add",
                index=_index(route, device),
                address=host,
                prefixlen=int(length),
                **extra,
            )

    def add_route(self, destination: str, gateway: str) -> None:
        """A route via ``gateway``; ``destination`` in prefix notation or ``default``."""
        with self.route() as route:
            target = {} if destination == "default" else {"dst": destination}
            if not target and ":" in gateway:
                target = {"dst": "::/0"}
            route.route("add", gateway=gateway, **target)

    def link_index(self, device: str) -> int:
        """The interface index of ``device`` inside."""
        with self.route() as route:
            return _index(route, device)


def _index(route: IPRoute, device: str) -> int:
    found = route.link_lookup(ifname=device)
    if not found:
        raise PrismError(f"no network device {device}")
    return int(found[0])


def join(left: Namespace, left_device: str, right: Namespace, right_device: str) -> None:
    """Join two namespaces by a veth pair, both ends up.

    The devices are made inside, so the host's own namespace never sees them.
    """
    with left.route() as route:
        route.link(
            "add",
            ifname=left_device,
            kind="veth",
            peer={"ifname": right_device, "net_ns_fd": str(right.path)},
        )
        route.link("set", index=_index(route, left_device), state="up")
    with right.route() as route:
        route.link("set", index=_index(route, right_device), state="up")
