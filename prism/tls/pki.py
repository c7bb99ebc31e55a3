"""The cluster's certificates: a CA, one certificate for each node, and those of services.

A directory has ``ca.pem`` and ``ca.key``, and ``NAME.pem`` and ``NAME.key`` for each certificate
issued there. All keys are ECDSA P-256, not encrypted, mode 0600. A node's certificate carries its
name as the URI ``prism://node/NAME``: that, not the DNS name, is what the handoff channel looks
at, so a service's certificate can never speak for a node, whatever name it has.

RFC 5280 says what the fields mean.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from prism.errors import ConfigError

__all__ = [
    "CA_DAYS",
    "LEAF_DAYS",
    "NODE_URI",
    "Issued",
    "Request",
    "certificates_in",
    "describe",
    "init",
    "issue",
    "issued_by",
    "node_names",
    "read_key",
]

CA_DAYS = 3650
LEAF_DAYS = 365
NODE_URI = "prism://node/"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_SKEW = datetime.timedelta(minutes=5)  # a node whose clock is behind accepts a new certificate
_DAY = datetime.timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Request:
    """What a certificate is asked to say.

    Attributes:
        name: node name, or of a service the common name and the files' name.
        server: for a service (HTTPS) instead of a node.
        dns: DNS names; a node's own name is always among its own.
        addresses: IP addresses.
        days: validity; cut at the CA's end.
    """

    name: str
    server: bool = False
    dns: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    days: int = LEAF_DAYS

    def alternative_names(self) -> list[x509.GeneralName]:
        """The certificate's names.

        Raises:
            ConfigError: one cannot be used.
        """
        if not _NAME.fullmatch(self.name) or self.name == "ca":
            raise ConfigError(
                f"name {self.name!r}: 1 to 63 letters, digits, '.', '_' and '-', and not 'ca'"
            )
        dns = self.dns if self.server else (self.name, *self.dns)
        try:
            names: list[x509.GeneralName] = [x509.DNSName(name) for name in dict.fromkeys(dns)]
            addresses = dict.fromkeys(map(ipaddress.ip_address, self.addresses))
        except ValueError as error:
            raise ConfigError(f"{self.name}: {error}") from None
        names += [x509.IPAddress(address) for address in addresses]
        if not self.server:
            names.append(x509.UniformResourceIdentifier(NODE_URI + self.name))
        if not names:
            raise ConfigError(f"{self.name}: a service needs a DNS name or an address")
        return names


@dataclass(frozen=True, slots=True)
class Issued:
    """The files of a certificate; ``fresh`` is false where those there were good already."""

    certificate: Path
    key: Path
    not_after: datetime.datetime
    fresh: bool


def init(directory: Path, *, days: int = CA_DAYS, force: bool = False) -> Issued:
    """Make a cluster CA; a good one that is there already is left alone.

    Args:
        directory: made, with mode 0700, where it is missing.
        days: validity.
        force: replace what is there; every certificate issued by it has to be issued anew.

    Raises:
        ConfigError: what is there is no usable CA, or files cannot be written.
    """
    certificate_path, key_path = directory / "ca.pem", directory / "ca.key"
    if not force and (certificate_path.exists() or key_path.exists()):
        try:
            certificate, _ = _read_ca(directory)
        except ConfigError as error:
            raise ConfigError(f"{error}; or replace the CA with --force") from None
        return Issued(certificate_path, key_path, certificate.not_valid_after_utc, False)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Prism"),
            x509.NameAttribute(NameOID.COMMON_NAME, f"Prism CA {os.urandom(4).hex()}"),
        ]
    )
    certificate = (
        _builder(name, name, key.public_key(), key.public_key(), _now() + days * _DAY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make {directory}: {error.strerror}") from None
    _write(certificate_path, key_path, certificate, key)
    return Issued(certificate_path, key_path, certificate.not_valid_after_utc, True)


def issue(directory: Path, request: Request, *, force: bool = False) -> Issued:
    """Issue a certificate, signed by the CA in ``directory``.

    One that is there already, is good, and says the same is left alone.

    Raises:
        ConfigError: no usable CA, a name that cannot be used, or a certificate that is there
            already, says something else or is of no use any more (and not ``force``).
    """
    names = request.alternative_names()
    authority, authority_key = _read_ca(directory)
    certificate_path, key_path = (directory / f"{request.name}{end}" for end in (".pem", ".key"))
    if not force and (certificate_path.exists() or key_path.exists()):
        why = _why_not(certificate_path, key_path, authority, names, server=request.server)
        if why:
            raise ConfigError(f"{certificate_path} is there already and {why}; replace: --force")
        (present,) = certificates_in(certificate_path)
        return Issued(certificate_path, key_path, present.not_valid_after_utc, False)
    key = ec.generate_private_key(ec.SECP256R1())
    usages = [ExtendedKeyUsageOID.SERVER_AUTH]
    if not request.server:
        usages.append(ExtendedKeyUsageOID.CLIENT_AUTH)
    end = min(_now() + request.days * _DAY, authority.not_valid_after_utc)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, request.name)])
    certificate = (
        _builder(subject, authority.subject, key.public_key(), authority_key.public_key(), end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    _write(certificate_path, key_path, certificate, key)
    return Issued(certificate_path, key_path, certificate.not_valid_after_utc, True)


def certificates_in(path: Path) -> list[x509.Certificate]:
    """The certificates of a PEM file, at least one.

    Raises:
        ConfigError: the file cannot be read, or has none.
    """
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise ConfigError(f"{path} has no certificate (PEM)") from None


def node_names(certificate: x509.Certificate) -> list[str]:
    """The nodes a certificate speaks for: one, or none if it is not a node's."""
    uris = [uri for uri in _names(certificate) if isinstance(uri, x509.UniformResourceIdentifier)]
    return [uri.value[len(NODE_URI) :] for uri in uris if uri.value.startswith(NODE_URI)]


def issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether ``authority`` has signed ``certificate``."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def describe(path: Path) -> list[str]:
    """What a certificate file, or all in a directory, says: lines for people.

    Raises:
        ConfigError: it cannot be read, or there is no certificate.
    """
    files = sorted(path.glob("*.pem")) if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"no *.pem in {path}; make a CA with: prism-proxy pki init {path}")
    lines = []
    for file in files:
        for certificate in certificates_in(file):
            lines += [str(file), *(f"  {line}" for line in _describe(certificate))]
        key = file.with_suffix(".key")
        if key.exists():
            lines.append(f"  key          {_describe_key(key, certificates_in(file)[0])}")
    return lines


def _describe(certificate: x509.Certificate) -> list[str]:
    left = certificate.not_valid_after_utc - _now()
    state = f"{left.days} days left" if left.total_seconds() > 0 else "EXPIRED"
    if certificate.not_valid_before_utc > _now():
        state = "NOT YET VALID"
    nodes = node_names(certificate)
    kind = "CA" if _is_ca(certificate) else f"node {nodes[0]}" if nodes else "service"
    names = ", ".join(
        f"{type(name).__name__.removesuffix('Name').removesuffix('Address')}:{name.value}"
        if not isinstance(name, x509.UniformResourceIdentifier)
        else f"URI:{name.value}"
        for name in _names(certificate)
    )
    return [
        f"kind         {kind}",
        f"subject      {certificate.subject.rfc4514_string()}",
        f"issuer       {certificate.issuer.rfc4514_string()}",
        f"names        {names or 'none'}",
        f"valid        {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} to "
        f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC ({state})",
        f"fingerprint  sha256:{certificate.fingerprint(hashes.SHA256()).hex()}",
    ]


def _describe_key(path: Path, certificate: x509.Certificate) -> str:
    try:
        key = read_key(path)
    except ConfigError as error:
        return f"UNUSABLE: {error}"
    return "good" if key.public_key() == certificate.public_key() else f"{path} DOES NOT MATCH"


def _is_ca(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _names(certificate: x509.Certificate) -> list[x509.GeneralName]:
    kind = x509.SubjectAlternativeName
    try:
        return list(certificate.extensions.get_extension_for_class(kind).value)
    except x509.ExtensionNotFound:
        return []


def _read_ca(directory: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    path, key_path = directory / "ca.pem", directory / "ca.key"
    if not path.exists() and not key_path.exists():
        raise ConfigError(f"no CA in {directory}; make one with: prism-proxy pki init {directory}")
    certificate, key = certificates_in(path)[0], read_key(key_path)
    if not _is_ca(certificate):
        raise ConfigError(f"{path} is not a CA's certificate")
    if certificate.public_key() != key.public_key():
        raise ConfigError(f"{key_path} is not the key of {path}: restore the one that is")
    if certificate.not_valid_after_utc <= _now():
        raise ConfigError(f"the CA in {path} expired on {certificate.not_valid_after_utc:%Y-%m-%d}")
    return certificate, key


def read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A private key, from a file that nobody else can read.

    Raises:
        ConfigError: there is none, or others can read it.
    """
    try:
        mode = path.stat().st_mode & 0o777
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    if mode & 0o077:
        raise ConfigError(f"{path} is open to others (mode {mode:o}): chmod 600 {path}")
    try:
        key = serialization.load_pem_private_key(data, None)
    except (ValueError, TypeError):
        raise ConfigError(f"{path} has no private key (PEM, without a passphrase)") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} has a key of another kind than ECDSA")
    return key


def _why_not(
    path: Path,
    key_path: Path,
    authority: x509.Certificate,
    names: list[x509.GeneralName],
    *,
    server: bool,
) -> str:
    """Why the certificate that is there cannot stand for the one asked for; empty: it can."""
    try:
        certificate, key = certificates_in(path)[0], read_key(key_path)
    except ConfigError as error:
        return f"cannot be used ({error})"
    if certificate.public_key() != key.public_key():
        return f"{key_path} is not its key"
    if not issued_by(certificate, authority):
        return "was issued by another CA"
    if certificate.not_valid_after_utc <= _now():
        return f"expired on {certificate.not_valid_after_utc:%Y-%m-%d}"
    if set(_names(certificate)) != set(names) or bool(node_names(certificate)) == server:
        return "has other names"
    return ""


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    end: datetime.datetime,
) -> x509.CertificateBuilder:
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - _SKEW)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(identifier, critical=False)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _write(
    certificate_path: Path,
    key_path: Path,
    certificate: x509.Certificate,
    key: ec.EllipticCurvePrivateKey,
) -> None:
    """Put both files in place, each in one step; whoever reads between the two sees a mismatch."""
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    public = certificate.public_bytes(serialization.Encoding.PEM)
    try:
        for path, data, mode in ((key_path, secret, 0o600), (certificate_path, public, 0o644)):
            fresh = path.with_name(f".{path.name}.{os.getpid()}")
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(descriptor)
            fresh.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write to {key_path.parent}: {error.strerror}") from None
