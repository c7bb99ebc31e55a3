"""The TUN device by which a switch's held packets come to its agent and go back (tun.rst)."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from pathlib import Path
from typing import Final

from prism.errors import SwitchError

__all__ = ["Tun"]

_TUNSETIFF: Final = 0x400454CA  # linux/if_tun.h
_IFF_TUN: Final = 0x0001
_IFF_NO_PI: Final = 0x1000
_SIOCGIFFLAGS: Final = 0x8913  # linux/sockios.h
_SIOCSIFFLAGS: Final = 0x8914
_SIOCSIFTXQLEN: Final = 0x8943
_SIOCSIFMTU: Final = 0x8922
_IFF_UP: Final = 0x1
_MAX_PACKET: Final = 65535
_PROC: Final = Path("/proc/sys/net")


class Tun:
    """A TUN device in the network namespace of the thread that makes it; gone when closed.

    Attributes:
        name: its name.
        index: its interface index.
        fd: for the event loop; non-blocking.
        write_errors: packets that the kernel did not take back.
    """

    def __init__(self, name: str = "prism-hold", *, queue: int = 10000, mtu: int = 9216) -> None:
        """Make the device and bring it up.

        Reverse-path filtering is off on it, or loose where the namespace's own setting is
        strict: held packets come in by it that came in by another device before. It has no
        address and sends no router solicitations.

        Args:
            name: its name, at most 15 octets.
            queue: packets that may wait for the agent.
            mtu: its MTU; more than any of the switch's ports has.

        Raises:
            SwitchError: no privilege (CAP_NET_ADMIN), no /dev/net/tun, or the name is taken.
        """
        self.name = name
        self.write_errors = 0
        self.fd = -1
        try:
            self.fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            request = struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI)
            fcntl.ioctl(self.fd, _TUNSETIFF, request)
            self._configure(queue, mtu)
            self.index = socket.if_nametoindex(name)
        except OSError as error:
            self.close()
            hint = {
                errno.EBUSY: ": another agent has it",
                errno.ENOENT: ": is the tun module there?",
                errno.EPERM: ": it needs CAP_NET_ADMIN",
            }.get(error.errno or 0, "")
            raise SwitchError(f"cannot make the TUN device {name}: {error}{hint}") from error

    def _configure(self, queue: int, mtu: int) -> None:
        ipv4, ipv6 = _PROC / "ipv4/conf", _PROC / "ipv6/conf"
        strict = int((ipv4 / "all/rp_filter").read_text()) == 1
        (ipv4 / self.name / "rp_filter").write_text("2" if strict else "0")
        if (ipv6 / self.name).is_dir():  # else the kernel has no IPv6
            (ipv6 / self.name / "addr_gen_mode").write_text("1")  # no link-local address
            (ipv6 / self.name / "router_solicitations").write_text("0")
            (ipv6 / self.name / "accept_ra").write_text("0")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            named = self.name.encode()
            fcntl.ioctl(sock, _SIOCSIFTXQLEN, struct.pack("16si20x", named, queue))
            fcntl.ioctl(sock, _SIOCSIFMTU, struct.pack("16si20x", named, mtu))
            answer = fcntl.ioctl(sock, _SIOCGIFFLAGS, struct.pack("16sH22x", named, 0))
            flags = struct.unpack_from("H", answer, 16)[0] | _IFF_UP
            fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sH22x", named, flags))

    def read(self) -> bytes | None:
        """The next packet; ``None`` when there is none.

        Raises:
            OSError: the device is gone.
        """
        try:
            return os.read(self.fd, _MAX_PACKET)
        except BlockingIOError:
            return None

    def write(self, packet: bytes) -> bool:
        """Put a packet into the switch, as if it came in by this device; whether it was taken."""
        try:
            os.write(self.fd, packet)
        except OSError:  # no memory, or no longer a packet the kernel accepts
            self.write_errors += 1
            return False
        return True

    def close(self) -> None:
        """Remove the device. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
