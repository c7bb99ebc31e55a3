"""The hardware address of the device that has an IP address, in the caller's namespace."""

from __future__ import annotations

import fcntl
import socket
import struct
from pathlib import Path

from prism.flow import pack_address

__all__ = ["hardware_address"]

_SIOCGIFADDR = 0x8915  # linux/sockios.h
_SIOCGIFHWADDR = 0x8927
_ARPHRD_ETHER = 1


def _ioctl(sock: socket.socket, request: int, device: str) -> bytes:
    """``struct ifreq`` (netdevice(7)) after a request about ``device``."""
    return fcntl.ioctl(sock, request, struct.pack("16s24x", device.encode()))


def _device_of(sock: socket.socket, host: str) -> str | None:
    if ":" in host:
        wanted = pack_address(host).hex()
        for line in Path("/proc/thread-self/net/if_inet6").read_text().splitlines():
            fields = line.split()
            if fields[0] == wanted:
                return fields[5]
        return None
    packed = socket.inet_aton(host)
    for _, device in socket.if_nameindex():
        try:
            answer = _ioctl(sock, _SIOCGIFADDR, device)
        except OSError:  # a device without an IPv4 address
            continue
        if answer[20:24] == packed:
            return device
    return None


def hardware_address(host: str) -> bytes | None:
    """The MAC address, 6 octets, of the device that has the address ``host``.

    ``None`` when no device has it as its first address, or the device has no Ethernet address.

    Raises:
        ProtocolError: ``host`` is no IP address.
        OSError: the kernel could not be asked.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        device = _device_of(sock, host)
        if device is None:
            return None
        answer = _ioctl(sock, _SIOCGIFHWADDR, device)
    kind = int.from_bytes(answer[16:18], "little" if struct.pack("=H", 1)[0] else "big")
    return answer[18:24] if kind == _ARPHRD_ETHER else None
