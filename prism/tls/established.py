"""What a handshake leads to, and how it is read off OpenSSL's connection."""

from __future__ import annotations

import datetime
import re
import struct
from binascii import unhexlify
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from OpenSSL import SSL

from prism._ext.tls_record import MAX_FRAGMENT, Tls
from prism.tls.context import SUITES
from prism.tls.openssl import protocol, server_random, was_resumed

__all__ = [
    "ClientIdentity",
    "Established",
    "Unusable",
    "establish",
    "fragment_limit",
    "limit_tickets",
]

_HEADER: Final = struct.Struct("!BHH")  # content type, version, length
_EXTENSION: Final = struct.Struct("!HH")  # type, length
_APPLICATION_DATA: Final = 23
_A_TICKET: Final = b"\x17"  # how its record starts: as all that is encrypted with TLS 1.3
_CERTIFICATE_EXPIRED: Final = 45  # RFC 8446, section 6
_FRAGMENT_LIMIT: Final = re.compile(rb"\x00\x01\x00\x01[\x01-\x04]")  # the extension
_VERSIONS: Final[dict[int, str]] = {
    SSL.TLS1_3_VERSION: "TLSv1.3",
    SSL.TLS1_2_VERSION: "TLSv1.2",
}
_NAME_KINDS: Final[tuple[tuple[str, Any], ...]] = (
    ("DNS", x509.DNSName),
    ("URI", x509.UniformResourceIdentifier),
    ("email", x509.RFC822Name),
    ("IP", x509.IPAddress),
)


class ClientIdentity(NamedTuple):
    """Who a client has proved to be.

    Attributes:
        subject: the certificate's subject (RFC 4514).
        names: its alternative names, such as ``DNS:a.example`` or ``URI:spiffe://x/y``.
        fingerprint: SHA-256 of the certificate, in hexadecimal.
    """

    subject: str
    names: tuple[str, ...]
    fingerprint: str


class Established(NamedTuple):
    """What a handshake has led to.

    Attributes:
        tls: the record layer, ready to open the first record in the socket's queue.
        server_name: what the client asked for, in lower case; empty: nothing.
        alpn: the protocol agreed on; empty: the client offered none.
        version: ``TLSv1.3`` or ``TLSv1.2``.
        suite: OpenSSL's name of the cipher suite.
        resumed: the client came with a ticket.
        client_identity: only of a verified certificate.
    """

    tls: Tls
    server_name: str
    alpn: str
    version: str
    suite: str
    resumed: bool
    client_identity: ClientIdentity | None


class Unusable(Exception):
    """A finished handshake that is of no use.

    Args:
        why: a short, fixed text.
        last_words: what to send to the client, sealed.
    """

    def __init__(self, why: str, last_words: bytes = b"") -> None:
        super().__init__(why)
        self.last_words = last_words


def establish(
    connection: SSL.Connection,
    secrets: Sequence[bytes],
    write_seq: int,
    max_fragment: int,
) -> Established:
    """Everything of a finished handshake.

    Args:
        connection: OpenSSL's, done with its handshake.
        secrets: what :func:`prism.tls.openssl.shake` told.
        write_seq: session tickets sent, with TLS 1.3; not looked at with TLS 1.2.
        max_fragment: see :func:`fragment_limit`.

    Raises:
        Unusable: secrets are missing, or the client came with the ticket of a certificate that
            has ended since.
    """
    suite = connection.get_cipher_name() or ""
    version = connection.get_protocol_version()
    try:
        tls = _records(
            connection,
            version,
            SUITES[suite],
            secrets,
            write_seq=write_seq,
            max_fragment=max_fragment,
        )
    except (KeyError, ValueError):
        raise Unusable("no usable secrets") from None
    resumed = was_resumed(connection)
    certificate = _client_certificate(connection)
    if certificate is not None and resumed and _has_ended(certificate):
        raise Unusable("client certificate expired", tls.alert(_CERTIFICATE_EXPIRED))
    name = (connection.get_servername() or b"").decode("ascii", "replace")
    return Established(
        tls=tls,
        server_name=name.lower(),
        alpn=protocol(connection).decode("ascii"),
        version=_VERSIONS[version],
        suite=suite,
        resumed=resumed,
        client_identity=None if certificate is None else _identity(certificate),
    )


def _records(
    connection: SSL.Connection,
    version: int,
    suite: int,
    secrets: Sequence[bytes],
    *,
    write_seq: int,
    max_fragment: int,
) -> Tls:
    told = {label: (random, secret) for label, random, secret in map(bytes.split, secrets)}
    if version == SSL.TLS1_3_VERSION:
        return Tls.from_traffic_secrets(
            suite,
            unhexlify(told[b"CLIENT_TRAFFIC_SECRET_0"][1]),
            unhexlify(told[b"SERVER_TRAFFIC_SECRET_0"][1]),
            is_server=True,
            write_seq=write_seq,
            max_fragment=max_fragment,
        )
    random, master = told[b"CLIENT_RANDOM"]
    return Tls.from_master_secret(
        suite,
        unhexlify(master),
        unhexlify(random),
        server_random(connection),
        is_server=True,
        max_fragment=max_fragment,
    )


def limit_tickets(out: bytes, most: int) -> tuple[bytes, int]:
    """Of what OpenSSL put out last, what is to be sent, and how many tickets of TLS 1.3 it has.

    These are the first records under the application keys. Those that are left out have used a
    nonce each, but nobody ever sees them. With TLS 1.2 all is sent: its ticket is no such record.
    """
    at = count = 0
    if out[:1] != _A_TICKET:
        return out, 0
    while at < len(out):
        kind, _, length = _HEADER.unpack_from(out, at)
        if kind == _APPLICATION_DATA:
            if count == most:
                break
            count += 1
        at += _HEADER.size + length
    return out[:at], count


def fragment_limit(hello: bytes) -> int:
    """The most plaintext in a record that a client asks for (RFC 6066, section 4), in octets.

    OpenSSL grants it always, and does not tell. Only a ClientHello in one record is looked at.

    Args:
        hello: the ClientHello with its record's header.
    """
    if _FRAGMENT_LIMIT.search(hello) is None:  # rarely there, or anything that looks like it
        return MAX_FRAGMENT
    try:
        at = _HEADER.size + 4 + 2 + 32  # two headers, version, random
        at += 1 + hello[at]  # session
        at += 2 + int.from_bytes(hello[at : at + 2])  # suites
        at += 1 + hello[at] + 2  # compression; length of the extensions
        while at + 4 < len(hello):
            kind, length = _EXTENSION.unpack_from(hello, at)
            if kind == 1 and length == 1:
                return {1: 512, 2: 1024, 3: 2048, 4: 4096}.get(hello[at + 4], MAX_FRAGMENT)
            at += 4 + length
    except (IndexError, struct.error):
        pass  # OpenSSL has judged the hello; what cannot be read here asks for nothing
    return MAX_FRAGMENT


def _client_certificate(connection: SSL.Connection) -> x509.Certificate | None:
    """The client's certificate; there is none here that OpenSSL did not verify."""
    if connection.get_verify_mode() == SSL.VERIFY_NONE:
        return None
    return connection.get_peer_certificate(as_cryptography=True)


def _has_ended(certificate: x509.Certificate) -> bool:
    """Whether it is out of date: nobody looks at it again when a session is resumed."""
    return certificate.not_valid_after_utc < datetime.datetime.now(datetime.UTC)


def _identity(certificate: x509.Certificate) -> ClientIdentity:
    return ClientIdentity(
        certificate.subject.rfc4514_string(),
        tuple(_alternative_names(certificate)),
        certificate.fingerprint(hashes.SHA256()).hex(),
    )


def _alternative_names(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return []
    return [
        f"{label}:{each}" for label, kind in _NAME_KINDS for each in names.get_values_for_type(kind)
    ]
