"""The monitor module as the tests use it: straight through its device."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import socket
import struct
import subprocess
import time
from pathlib import Path
from typing import NamedTuple, Self

from prism.monitor import kmod

DEVICE = "/dev/prism_monitor"
PARAMETERS = Path("/sys/module/prism_monitor/parameters")
REFERENCES = Path("/sys/module/prism_monitor/refcnt")
COMPLAINTS = (
    "BUG",
    "UBSAN",
    "Oops",
    "WARNING",
    "Call Trace",
    "general protection",
    "refcount_t",
    "list_add corruption",
    "list_del corruption",
    "Objects remaining",
    "rcu_sched",
    "soft lockup",
    "hung task",
    "blocked for more than",
    "to become free",  # a device that something still refers to
)
_EVENT = struct.Struct("=QQQHBB2s2s16s16s")
_libc = ctypes.CDLL(None, use_errno=True)


class Event(NamedTuple):
    cookie: int
    socket: int
    when: int
    family: int
    reason: int
    flags: int
    local: tuple[str, int]
    peer: tuple[str, int]


def _decode(data: bytes) -> Event:
    cookie, sock, when, family, reason, flags, lport, pport, local, peer = _EVENT.unpack(data)
    size = 4 if family == socket.AF_INET else 16

    def end(address: bytes, port: bytes) -> tuple[str, int]:
        if reason == kmod.LOST:
            return "", 0
        return socket.inet_ntop(family, address[:size]), int.from_bytes(port, "big")

    return Event(cookie, sock, when, family, reason, flags, end(local, lport), end(peer, pport))


class Device:
    """An open descriptor of the device."""

    def __init__(self, blocking: bool = False) -> None:
        flags = os.O_RDWR | os.O_CLOEXEC | (0 if blocking else os.O_NONBLOCK)
        self.fd = os.open(DEVICE, flags)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def register(self, sock: socket.socket | int, cookie: int = 0, flags: int = 0) -> int:
        """Returns the socket's own cookie."""
        fd = sock if isinstance(sock, int) else sock.fileno()
        request = bytearray(kmod.REGISTER.pack(fd, flags, cookie, 0))
        fcntl.ioctl(self.fd, kmod.REGISTER_IOCTL, request)
        return int(kmod.REGISTER.unpack(request)[3])

    def unregister(self, socket_cookie: int) -> None:
        fcntl.ioctl(self.fd, kmod.UNREGISTER_IOCTL, struct.pack("=Q", socket_cookie))

    def registered(self, socket_cookie: int) -> bool:
        try:
            fcntl.ioctl(self.fd, kmod.CHECK_IOCTL, struct.pack("=Q", socket_cookie))
        except FileNotFoundError:
            return False
        return True

    @property
    def info(self) -> kmod.Info:
        return kmod.device_info(self.fd)

    def read(self, most: int = 64) -> list[Event]:
        """What is there now."""
        try:
            data = os.read(self.fd, most * _EVENT.size)
        except BlockingIOError:
            return []
        assert len(data) % _EVENT.size == 0
        return [_decode(data[at : at + 64]) for at in range(0, len(data), 64)]

    def wait(self, count: int = 1, seconds: float = 5.0) -> list[Event]:
        """So many events, and not one more."""
        found: list[Event] = []
        until = time.monotonic() + seconds
        while len(found) < count and (left := until - time.monotonic()) > 0:
            select.select([self.fd], [], [], left)
            found += self.read(4096)
        time.sleep(0.05)
        found += self.read(4096)
        assert len(found) == count, f"{len(found)} events, not {count}: {found[:5]}"
        return found

    def silent(self, seconds: float = 0.1) -> bool:
        """Whether there is no event, now and for some time."""
        return not select.select([self.fd], [], [], seconds)[0]

    def read_into(self, address: int, size: int) -> int:
        """read(2) into any address; raises what it fails with."""
        done = _libc.read(self.fd, ctypes.c_void_p(address), ctypes.c_size_t(size))
        if done < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return int(done)


def close_behind(peer: socket.socket, sock: socket.socket) -> None:
    """Close a connection, ``peer`` first: on a busy machine its FIN takes a while to come."""
    peer.close()
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    assert poll.poll(10_000)
    sock.close()


def release() -> tuple[int, int]:
    """The kernel's version."""
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int(minor)


def load_module() -> None:
    if not Path(DEVICE).exists():
        subprocess.run(["insmod", os.environ["PRISM_VM_MODULE"]], check=True)


def unload_module() -> None:
    """Raises CalledProcessError while it is in use."""
    subprocess.run(["rmmod", "prism_monitor"], check=True, capture_output=True, text=True)


def references() -> int:
    return int(REFERENCES.read_text())


def settled_references(wanted: int = 0, seconds: float = 5.0) -> int:
    """The module's reference count, as soon as it is the wanted one."""
    until = time.monotonic() + seconds
    while references() != wanted and time.monotonic() < until:
        time.sleep(0.05)
    return references()


class KernelLog:
    """What the kernel logs from now on (/dev/kmsg; Documentation/ABI/testing/dev-kmsg)."""

    def __init__(self) -> None:
        self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.lseek(self._fd, 0, os.SEEK_END)

    def complaints(self) -> list[str]:
        """Those that have come since the last time."""
        found = []
        while True:
            try:
                record = os.read(self._fd, 8192).decode(errors="replace")
            except BlockingIOError:
                return found
            except BrokenPipeError:  # overwritten before it was read: go on with what is left
                found.append("BUG: more messages than the kernel's log holds")
                continue
            message = record.partition(";")[2].partition("\n")[0]
            if any(word in message for word in COMPLAINTS):
                found.append(message)

    def close(self) -> None:
        os.close(self._fd)


def time_waits(port: int | None = None) -> int:
    """How many TIME_WAIT stand in this network namespace; with ``port``, towards that one.

    FIN_WAIT2 that no socket has any more is one of them: timer 3 in proc_net_tcp.rst.
    """
    total = 0
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):
            for line in Path(f"/proc/thread-self/net/{table}").read_text().splitlines()[1:]:
                _, _, peer, _, _, timer, *_ = line.split()
                if timer.startswith("03:"):
                    total += port is None or int(peer.rpartition(":")[2], 16) == port
    return total
