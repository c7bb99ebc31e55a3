"""Addresses and flows: the names under which every part of Prism knows a connection.

A *flow* is what the client sees: its own address and port, and the service's. It stays the same
for the connection's life, whoever owns it. The packed form is the switch's key, so a lookup in a
node's table, a control datagram and a map in the kernel all use the same 36 octets.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from functools import lru_cache
from typing import NamedTuple

from prism.errors import ProtocolError

__all__ = ["FLOW_SIZE", "Endpoint", "Flow", "pack_address", "unpack_address"]

FLOW_SIZE = 36
_V4_MAPPED = bytes(10) + b"\xff\xff"
_FLOW = struct.Struct("!16s16sHH")
_new = tuple.__new__  # makes a named tuple without the call of its own constructor


@lru_cache(4096)
def pack_address(host: str) -> bytes:
    """An IP address as 16 octets, IPv4 in its IPv4-mapped form (RFC 4291, section 2.5.5.2).

    Raises:
        ProtocolError: ``host`` is not an IPv4 or IPv6 address.
    """
    try:
        if ":" in host:
            return socket.inet_pton(socket.AF_INET6, host)
        return _V4_MAPPED + socket.inet_pton(socket.AF_INET, host)
    except OSError:
        raise ProtocolError(f"{host!r} is not an IP address") from None


@lru_cache(4096)
def unpack_address(packed: bytes) -> str:
    """The text of a packed address: dotted quad for IPv4-mapped ones, RFC 5952 text otherwise.

    Raises:
        ProtocolError: ``packed`` is not 16 octets long.
    """
    if len(packed) != 16:
        raise ProtocolError(f"a packed address has 16 octets, not {len(packed)}")
    if packed.startswith(_V4_MAPPED):
        return socket.inet_ntop(socket.AF_INET, packed[12:])
    return str(ipaddress.IPv6Address(packed))


class Endpoint(NamedTuple):
    """An IP address, as canonical text, and a TCP or UDP port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def family(self) -> socket.AddressFamily:
        """``AF_INET`` or ``AF_INET6``."""
        return socket.AF_INET6 if ":" in self.host else socket.AF_INET

    @classmethod
    def from_sockaddr(cls, address: tuple[str, int] | tuple[str, int, int, int]) -> Endpoint:
        """From what ``getsockname`` or ``getpeername`` returns; IPv4-mapped becomes IPv4."""
        host = address[0].partition("%")[0]
        if host.startswith("::ffff:") and "." in host:
            host = host[7:]
        return _new(cls, (host, address[1]))


class Flow(NamedTuple):
    """A client's connection to the service, named by the two ends the client sees."""

    client: Endpoint
    service: Endpoint

    def __str__(self) -> str:
        return f"{self.client}->{self.service}"

    def pack(self) -> bytes:
        """The 36 octets of the switch's key: two addresses, then two ports, network order."""
        client, service = self.client, self.service
        return _FLOW.pack(
            pack_address(client.host), pack_address(service.host), client.port, service.port
        )

    @classmethod
    def unpack(cls, packed: bytes) -> Flow:
        """The inverse of :meth:`pack`.

        Raises:
            ProtocolError: ``packed`` is not 36 octets long.
        """
        if len(packed) != FLOW_SIZE:
            raise ProtocolError(f"a packed flow has {FLOW_SIZE} octets, not {len(packed)}")
        client, service, client_port, service_port = _FLOW.unpack(packed)
        ends = (
            _new(Endpoint, (unpack_address(client), client_port)),
            _new(Endpoint, (unpack_address(service), service_port)),
        )
        return _new(cls, ends)

    @classmethod
    def of_socket(cls, sock: socket.socket) -> Flow:
        """The flow of an accepted socket that has not been handed over yet.

        Raises:
            OSError: the socket is not connected.
        """
        return cls(
            Endpoint.from_sockaddr(sock.getpeername()), Endpoint.from_sockaddr(sock.getsockname())
        )
