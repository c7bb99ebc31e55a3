"""What a handshake told of the client, in octets that travel with the connection.

Policies ask for it on whichever node has the connection, long after the handshake.
"""

from __future__ import annotations

import json
from typing import NamedTuple

__all__ = ["NO_PEER", "Peer", "pack_peer", "unpack_peer"]

_LIMIT = 8192  # octets; a certificate with more names than fit keeps the first ones


class Peer(NamedTuple):
    """The client's side of a TLS session.

    Attributes:
        server_name: the name the client asked for (SNI, RFC 6066), in lower case; may be empty.
        subject: its verified certificate's subject (RFC 4514); empty without one.
        names: that certificate's alternative names, such as ``DNS:a.example``.
        fingerprint: that certificate's SHA-256, in hexadecimal; empty without one.
    """

    server_name: str = ""
    subject: str = ""
    names: tuple[str, ...] = ()
    fingerprint: str = ""


NO_PEER = Peer()


def pack_peer(peer: Peer) -> bytes:
    """The octets that travel; none where there is nothing to tell."""
    if peer == NO_PEER:
        return b""
    names = list(peer.names)
    while True:
        packed = json.dumps((*peer[:2], names, peer.fingerprint)).encode()
        if len(packed) <= _LIMIT or not names:
            return packed if len(packed) <= _LIMIT else b""
        del names[len(names) // 2 :]


def unpack_peer(facts: bytes) -> Peer:
    """The inverse of :func:`pack_peer`; what cannot be read is nobody."""
    if not facts:
        return NO_PEER
    try:
        server_name, subject, names, fingerprint = json.loads(facts)
        return Peer(str(server_name), str(subject), tuple(map(str, names)), str(fingerprint))
    except (ValueError, TypeError):
        return NO_PEER
