"""Certificates: read from files, checked, and chosen by the name a client asks for.

A name is served by the certificates that have it among their subject alternative names, at most
one for each kind of key; OpenSSL then takes the one whose signature the client understands.
"""

from __future__ import annotations

import datetime
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from prism.errors import ConfigError

__all__ = ["Credential", "Names", "load_credential", "read_certificates"]

log = logging.getLogger(__name__)

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey
MAX_FILE = 1 << 20  # octets; a longer file is no certificate
_MIN_RSA = 2048  # bits; OpenSSL's security level refuses less
_OTHERS = 0o027  # who must not: write for the group, anything for others


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Credential:
    """A certificate with its issuers' and its key.

    Attributes:
        kind: of the key: ``EC``, ``RSA`` or ``Ed25519``.
        chain: PEM text of the certificate and its issuers'.
        exact: names in lower case.
        suffixes: what follows the asterisk and dot of wildcard names (``*.example.com``).
    """

    path: Path
    kind: str
    chain: bytes
    leaf: x509.Certificate
    key: PrivateKey
    exact: frozenset[str]
    suffixes: frozenset[str]

    def covers(self, other: Credential) -> bool:
        """Whether it is good for all names of another one."""
        return all(map(self.matches, other.exact)) and self.suffixes >= other.suffixes

    def matches(self, name: str) -> bool:
        """Whether it is good for a host's name."""
        return name in self.exact or name.partition(".")[2] in self.suffixes


class Names:
    """Which credentials serve which name: an exact name goes before a wildcard (RFC 9525, 6.3).

    Args:
        credentials: those of the configuration, in its order; the first is the default.
    """

    def __init__(self, credentials: Sequence[Credential]) -> None:
        first = credentials[0]
        self.default = _one_of_each_kind((first, *(c for c in credentials[1:] if c.covers(first))))
        self._suffixes = {
            suffix: _one_of_each_kind(c for c in credentials if suffix in c.suffixes)
            for suffix in {suffix for c in credentials for suffix in c.suffixes}
        }
        self._exact = {
            name: _one_of_each_kind(
                (*(c for c in credentials if name in c.exact), *self._wild(name))
            )
            for name in {name for c in credentials for name in c.exact}
        }

    def _wild(self, name: str) -> tuple[Credential, ...]:
        return self._suffixes.get(name.partition(".")[2], ())

    def choose(self, name: str) -> tuple[Credential, ...]:
        """The credentials for a name in lower case; the default ones for an unknown name."""
        return self._exact.get(name) or self._wild(name) or self.default

    def choices(self) -> Iterable[tuple[Credential, ...]]:
        """Everything that :meth:`choose` may return."""
        return (self.default, *self._exact.values(), *self._suffixes.values())


def _one_of_each_kind(credentials: Iterable[Credential]) -> tuple[Credential, ...]:
    chosen: dict[str, Credential] = {}
    for each in credentials:
        chosen.setdefault(each.kind, each)
    return tuple(chosen.values())


def load_credential(certificate: Path, key: Path) -> Credential:
    """Read a certificate and its key, and see whether they are of use.

    Raises:
        ConfigError: they are not; the message names the file and the remedy.
    """
    chain, certificates = read_certificates(certificate)
    leaf = certificates[0]
    private = _load_key(key)
    if private.public_key() != leaf.public_key():
        raise ConfigError(f"{key}: is not the key of {certificate}: give the two that belong")
    _look_at_dates(certificate, leaf)
    names = [name.lower() for name in _dns_names(certificate, leaf)]
    return Credential(
        path=certificate,
        kind=_kind(key, private),
        chain=chain,
        leaf=leaf,
        key=private,
        exact=frozenset(name for name in names if "*" not in name),
        suffixes=frozenset(
            name[2:] for name in names if name.startswith("*.") and "*" not in name[1:]
        ),
    )


def read_certificates(path: Path) -> tuple[bytes, list[x509.Certificate]]:
    """A PEM file's certificates: as text without anything else, and read.

    Raises:
        ConfigError: there is none.
    """
    data = _read(path)
    try:
        certificates = x509.load_pem_x509_certificates(data)
    except ValueError as error:
        raise ConfigError(
            f"{path}: holds no certificate that can be read ({error}); a PEM file is wanted"
        ) from None
    return data, certificates


def _load_key(path: Path) -> PrivateKey:
    data = _read(path, secret=True)
    try:
        key = load_pem_private_key(data, None)
    except TypeError:
        raise ConfigError(
            f"{path}: the key is encrypted; decrypt it: openssl pkey -in FILE -out NEWFILE"
        ) from None
    except ValueError:
        # The error's own text is left out: nothing of a key file belongs into a log.
        raise ConfigError(f"{path}: holds no private key in PEM form") from None
    if not isinstance(key, PrivateKey):
        raise ConfigError(f"{path}: a key for ECDSA, RSA or Ed25519 is wanted")
    return key


def _kind(path: Path, key: PrivateKey) -> str:
    if isinstance(key, rsa.RSAPrivateKey):
        if key.key_size < _MIN_RSA:
            raise ConfigError(
                f"{path}: an RSA key of {key.key_size} bits is too short; make one of {_MIN_RSA}"
            )
        return "RSA"
    return "EC" if isinstance(key, ec.EllipticCurvePrivateKey) else "Ed25519"


def _read(path: Path, *, secret: bool = False) -> bytes:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            data = file.read(MAX_FILE + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if secret and mode & _OTHERS:
        raise ConfigError(f"{path}: is open to others (mode {mode:o}): chmod 600 {path}")
    if len(data) > MAX_FILE:
        raise ConfigError(f"{path}: is longer than {MAX_FILE} octets; a PEM file is wanted")
    return data


def _look_at_dates(path: Path, leaf: x509.Certificate) -> None:
    """Warn only: a certificate out of date is no reason not to serve the others."""
    now = datetime.datetime.now(datetime.UTC)
    if now > leaf.not_valid_after_utc:
        log.warning("%s: the certificate ended on %s; renew it", path, leaf.not_valid_after_utc)
    elif now < leaf.not_valid_before_utc:
        log.warning("%s: the certificate starts on %s", path, leaf.not_valid_before_utc)


def _dns_names(path: Path, leaf: x509.Certificate) -> list[str]:
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    except ValueError as error:
        raise ConfigError(f"{path}: an extension cannot be read: {error}") from None
    return names.value.get_values_for_type(x509.DNSName)
