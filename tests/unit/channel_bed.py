"""Certificates for tests of the handoff channel: one CA and some nodes, made once."""

from __future__ import annotations

import atexit
import datetime
import functools
import shutil
import tempfile
from pathlib import Path
from unittest import mock

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from prism.tls import pki
from prism.tls.identity import Identity, IdentityFiles


@functools.cache
def pki_directory() -> Path:
    """A CA with certificates of fe1, be1 and be2."""
    directory = Path(tempfile.mkdtemp(prefix="prism-test-pki-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    pki.init(directory)
    for node in ("fe1", "be1", "be2"):
        pki.issue(directory, pki.Request(node))
    return directory


def files_of(node: str, directory: Path | None = None) -> IdentityFiles:
    """A node's files in a directory."""
    directory = directory or pki_directory()
    return IdentityFiles(directory / "ca.pem", directory / f"{node}.pem", directory / f"{node}.key")


def identity_of(node: str, directory: Path | None = None) -> Identity:
    """A node's identity, from that directory."""
    return Identity(node, files_of(node, directory))


def authority(directory: Path) -> Path:
    """A directory of one's own with the CA of :func:`pki_directory`."""
    directory.mkdir(exist_ok=True)
    for name in ("ca.pem", "ca.key"):
        shutil.copy(pki_directory() / name, directory / name)
    return directory


def subordinate(directory: Path, root: Path) -> Path:
    """A CA in ``directory`` that the one in ``root`` has signed; the root itself is not there."""
    pki.init(directory)
    signer, key = pki.certificates_in(root / "ca.pem")[0], pki.read_key(directory / "ca.key")
    signer_key = pki.read_key(root / "ca.key")
    certificate = (
        pki._builder(
            pki.certificates_in(directory / "ca.pem")[0].subject,
            signer.subject,
            key.public_key(),
            signer_key.public_key(),
            signer.not_valid_after_utc,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(pki._usage(signs=True), critical=True)
        .sign(signer_key, hashes.SHA256())
    )
    (directory / "ca.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return directory


def issue_in_the_past(directory: Path, node: str, *, until: float) -> None:
    """A certificate issued a day ago that ends ``until`` seconds from now (may be negative)."""
    now = datetime.datetime.now(datetime.UTC)
    begin = now - datetime.timedelta(days=1)
    left = now + datetime.timedelta(seconds=until) - begin
    with mock.patch.object(pki, "_now", lambda: begin), mock.patch.object(pki, "_DAY", left):
        pki.issue(directory, pki.Request(node, days=1), force=True)
