"""The PROXY protocol, version 2: how a server hears of the client before the first octet.

Source: haproxy.org, "The PROXY protocol", section 2.2.
"""

from __future__ import annotations

import socket
import struct
from typing import Final

from prism.http.origin import Origin

__all__ = ["proxy_header"]

_SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"
_LOCAL: Final = _SIGNATURE + b"\x20\0\0\0"
_TCP4: Final = b"\x21\x11"
_TCP6: Final = b"\x21\x21"


def proxy_header(origin: Origin | None) -> bytes:
    """The header for one client's connection; without a client, that of a connection of our own."""
    if origin is None:
        return _LOCAL
    client, service = origin.client, origin.service
    family = client.family
    kind = _TCP6 if family == socket.AF_INET6 else _TCP4
    addresses = socket.inet_pton(family, client.host) + socket.inet_pton(family, service.host)
    ports = struct.pack("!HH", client.port, service.port)
    return _SIGNATURE + kind + struct.pack("!H", len(addresses) + 4) + addresses + ports
