"""Who a node is to its peers: its certificate and key, and the CA that it trusts.

The files are looked at whenever a connection is made; changed ones are used from then on, if they
are good. ``pki.py`` makes them.
"""

from __future__ import annotations

import datetime
import logging
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from prism.errors import ConfigError
from prism.tls import pki

if TYPE_CHECKING:
    from cryptography import x509

__all__ = ["Identity", "IdentityError", "IdentityFiles", "PeerCertificate", "peer_certificate"]

_log = logging.getLogger(__name__)
_WARN = datetime.timedelta(days=14)  # a certificate that ends sooner is worth a line in the log
_Stamp = tuple[tuple[int, int, int], ...]


class IdentityFiles(NamedTuple):
    """Where a node's certificate, its key and the CA's certificate are."""

    ca: Path
    certificate: Path
    key: Path

    def check(self, node: str) -> datetime.datetime:
        """See whether ``node`` can show itself to its peers with these; until when.

        Raises:
            IdentityError: it cannot; the message names the file and says what to do.
        """
        return _check(node, self)


class IdentityError(ConfigError):
    """A certificate or key that a node cannot use.

    Attributes:
        part: ``ca``, ``certificate`` or ``key``.
    """

    def __init__(self, part: str, text: str) -> None:
        super().__init__(text)
        self.part = part


class PeerCertificate(NamedTuple):
    """What counts of a peer's certificate, which the CA has signed.

    Attributes:
        node: the node it speaks for; empty if it is none's.
        not_after: when it ends, seconds since the epoch.
    """

    node: str
    not_after: float


def peer_certificate(tls: ssl.SSLObject) -> PeerCertificate:
    """The peer's certificate after a handshake that has demanded one."""
    found = tls.getpeercert() or {}
    names = [
        str(entry[1])[len(pki.NODE_URI) :]
        for entry in found.get("subjectAltName", ())
        if entry[0] == "URI" and str(entry[1]).startswith(pki.NODE_URI)
    ]
    end = ssl.cert_time_to_seconds(str(found["notAfter"])) if "notAfter" in found else 0
    return PeerCertificate(names[0] if len(names) == 1 else "", float(end))


class Identity:
    """A node's side of mutual TLS 1.3.

    Args:
        node: the node's name (``be1``).
        files: what it shows and whom it believes.

    Raises:
        IdentityError: the files cannot be used.
    """

    def __init__(self, node: str, files: IdentityFiles) -> None:
        self.node = node
        self.files = files
        self._stamp = self._look()
        self._rejected: _Stamp = ()
        self._server, self._client = self._contexts()

    def server_context(self) -> ssl.SSLContext:
        """For a connection that is accepted."""
        self._refresh()
        return self._server

    def client_context(self) -> ssl.SSLContext:
        """For a connection that is made."""
        self._refresh()
        return self._client

    def _refresh(self) -> None:
        """Take changed files up; while they are not good, what was read before is used."""
        stamp = self._look()
        if stamp in (self._stamp, self._rejected):
            return
        try:
            self._server, self._client = self._contexts()
        except IdentityError as error:
            self._rejected = stamp
            _log.warning("changed certificate files are not used: %s", error)
        else:
            # Files that change between the look and the reading are read once more than needed.
            self._stamp, self._rejected = stamp, ()
            _log.info("certificate of node %s has been read again", self.node)

    def _look(self) -> _Stamp:
        found = []
        for path in self.files:
            try:
                status = path.stat()
            except OSError:
                found.append((0, 0, 0))
            else:
                found.append((status.st_mtime_ns, status.st_ino, status.st_size))
        return tuple(found)

    def _contexts(self) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        end = self.files.check(self.node)
        left = end - datetime.datetime.now(datetime.UTC)
        if left < _WARN:
            _log.warning(
                "%s ends on %s: renew it with prism-proxy pki issue",
                self.files.certificate,
                f"{end:%Y-%m-%d %H:%M} UTC",
            )
        return self._context(ssl.PROTOCOL_TLS_SERVER), self._context(ssl.PROTOCOL_TLS_CLIENT)

    def _context(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.check_hostname = False  # the node's name is checked instead: peer_certificate
        context.verify_mode = ssl.CERT_REQUIRED
        # What is in the CA file is trusted, also where it is not a root, and nothing else.
        context.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
        if protocol == ssl.PROTOCOL_TLS_SERVER:
            context.num_tickets = 0  # no resumption: each connection shows its certificate
        try:
            context.load_verify_locations(self.files.ca)
            context.load_cert_chain(self.files.certificate, self.files.key)
        except (OSError, ssl.SSLError) as error:
            # They were good a moment ago, so they are just being replaced.
            raise IdentityError("certificate", f"{self.files.certificate}: {error}") from None
        return context


def _check(node: str, files: IdentityFiles) -> datetime.datetime:
    now = datetime.datetime.now(datetime.UTC)
    try:
        authorities = pki.certificates_in(files.ca)
    except ConfigError as error:
        raise IdentityError("ca", f"{error}; it is the ca.pem of prism-proxy pki init") from None
    try:
        certificate = pki.certificates_in(files.certificate)[0]
    except ConfigError as error:
        raise IdentityError(
            "certificate", f"{error}; make it with: prism-proxy pki issue DIR {node}"
        ) from None
    _check_certificate(node, files, certificate, authorities, now)
    try:
        key = pki.read_key(files.key)
    except ConfigError as error:
        raise IdentityError("key", str(error)) from None
    if key.public_key() != certificate.public_key():
        raise IdentityError(
            "key", f"{files.key} is not the key of {files.certificate}: install both of one issue"
        )
    return certificate.not_valid_after_utc


def _check_certificate(
    node: str,
    files: IdentityFiles,
    certificate: x509.Certificate,
    authorities: list[x509.Certificate],
    now: datetime.datetime,
) -> None:
    names = pki.node_names(certificate)
    remedy = f"issue one with: prism-proxy pki issue DIR {node}"
    if names != [node]:
        whose = f"of node {names[0]}" if names else "of no node"
        problem = f"{files.certificate} is the certificate {whose}, not of {node}; {remedy}"
        raise IdentityError("certificate", problem)
    signers = [each for each in authorities if pki.issued_by(certificate, each)]
    if not signers:
        problem = f"{files.certificate} was not issued by the CA in {files.ca}; {remedy}"
        raise IdentityError("certificate", problem)
    if all(each.not_valid_after_utc <= now for each in signers):
        raise IdentityError("ca", f"the CA in {files.ca} has expired; make a new one")
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if end <= now:
        problem = f"{files.certificate} expired on {end:%Y-%m-%d %H:%M} UTC; {remedy} --force"
        raise IdentityError("certificate", problem)
    if begin > now:
        problem = f"{files.certificate} is valid from {begin:%Y-%m-%d %H:%M} UTC only; {remedy}"
        raise IdentityError("certificate", f"{problem}, or set this machine's clock")
