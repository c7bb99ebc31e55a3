"""Certificates from the command line: made once, renewed on demand, shown; mistakes named."""

from __future__ import annotations

import datetime
import ipaddress
import os
import ssl
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from channel_bed import issue_in_the_past
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from prism.cli import main
from prism.errors import ConfigError
from prism.tls import pki

Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """``prism-proxy pki ...``; the output, or what is told on stderr where it fails."""

    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["pki", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert (ended.value.code == 0) == (err == ""), err
        assert ended.value.code in (0, 2)
        return out + err

    return run


def certificate(path: Path) -> x509.Certificate:
    (found,) = pki.certificates_in(path)
    return found


def extension(found: x509.Certificate, kind: type[x509.ExtensionType]) -> Any:
    return found.extensions.get_extension_for_class(kind).value


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_ca_is_what_it_should_be(tmp_path: Path, run: Run) -> None:
    directory = tmp_path / "deep/pki"
    assert "made" in run("init", directory)
    found = certificate(directory / "ca.pem")
    assert isinstance(found.public_key(), ec.EllipticCurvePublicKey)
    assert found.public_key().curve.name == "secp256r1"
    assert extension(found, x509.BasicConstraints) == x509.BasicConstraints(True, 0)
    usage = extension(found, x509.KeyUsage)
    assert (usage.key_cert_sign, usage.digital_signature) == (True, False)
    life = found.not_valid_after_utc - found.not_valid_before_utc
    assert datetime.timedelta(3650) <= life < datetime.timedelta(3651)
    assert pki.issued_by(found, found)
    assert (mode(directory), mode(directory / "ca.key")) == (0o700, 0o600)
    assert sorted(path.name for path in directory.iterdir()) == ["ca.key", "ca.pem"]


def test_a_node_s_certificate_says_what_it_should(tmp_path: Path, run: Run) -> None:
    run("init", tmp_path)
    run("issue", tmp_path, "be1", "--address", "10.77.101.2", "--address", "fd77:101::2")
    found = certificate(tmp_path / "be1.pem")
    names = extension(found, x509.SubjectAlternativeName)
    assert names.get_values_for_type(x509.DNSName) == ["be1"]
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["prism://node/be1"]
    assert names.get_values_for_type(x509.IPAddress) == [
        ipaddress.ip_address("10.77.101.2"),
        ipaddress.ip_address("fd77:101::2"),
    ]
    assert pki.node_names(found) == ["be1"]
    assert set(extension(found, x509.ExtendedKeyUsage)) == {
        ExtendedKeyUsageOID.SERVER_AUTH,
        ExtendedKeyUsageOID.CLIENT_AUTH,
    }
    assert not extension(found, x509.BasicConstraints).ca
    assert pki.issued_by(found, certificate(tmp_path / "ca.pem"))
    assert mode(tmp_path / "be1.key") == 0o600
    assert found.public_key() == pki.read_key(tmp_path / "be1.key").public_key()


def test_a_service_s_certificate_speaks_for_no_node(tmp_path: Path, run: Run) -> None:
    run("init", tmp_path)
    run("issue", tmp_path, "web", "--server", "--dns", "prism.lab", "--address", "10.77.0.80")
    found = certificate(tmp_path / "web.pem")
    assert pki.node_names(found) == []
    assert list(extension(found, x509.ExtendedKeyUsage)) == [ExtendedKeyUsageOID.SERVER_AUTH]
    names = extension(found, x509.SubjectAlternativeName)
    assert names.get_values_for_type(x509.DNSName) == ["prism.lab"]
    assert "needs a DNS name or an address" in run("issue", tmp_path, "other", "--server")


def test_openssl_accepts_them_strictly(tmp_path: Path) -> None:
    pki.init(tmp_path)
    pki.issue(tmp_path, pki.Request("web", True, ("prism.lab",), ("10.77.0.80",)))
    client = ssl.create_default_context(cafile=tmp_path / "ca.pem")
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "web.pem", tmp_path / "web.key")
    for name in ("prism.lab", "10.77.0.80"):
        one, two = ssl.MemoryBIO(), ssl.MemoryBIO()
        asking = client.wrap_bio(one, two, server_hostname=name)
        telling = server.wrap_bio(two, one, server_side=True)
        for end in (asking, telling, asking, telling):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue


def test_doing_it_again_changes_nothing(tmp_path: Path, run: Run) -> None:
    run("init", tmp_path)
    run("issue", tmp_path, "be1", "--address", "10.0.0.1")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert "left as they are" in run("init", tmp_path)
    assert "left as they are" in run("issue", tmp_path, "be1", "--address", "10.0.0.1")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_force_replaces(tmp_path: Path, run: Run) -> None:
    run("init", tmp_path)
    run("issue", tmp_path, "be1")
    first = certificate(tmp_path / "be1.pem").serial_number
    run("issue", tmp_path, "be1", "--force", "--days", "3")
    renewed = certificate(tmp_path / "be1.pem")
    assert renewed.serial_number != first
    assert renewed.not_valid_after_utc - pki._now() < datetime.timedelta(3)
    run("init", tmp_path, "--force")
    assert not pki.issued_by(renewed, certificate(tmp_path / "ca.pem"))
    assert "was issued by another CA; replace: --force" in run("issue", tmp_path, "be1")
    run("issue", tmp_path, "be1", "--force")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "be1.key", "be1.pem", "ca.key", "ca.pem",
    ]  # fmt: skip


def _other_key(directory: Path, name: str) -> None:
    key = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (directory / f"{name}.key").write_bytes(key)


def _rsa_key(directory: Path) -> None:
    key = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (directory / "ca.key").write_bytes(key)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "be1.pem").unlink(), "be1.pem is there already and cannot be used"),
        (lambda d: (d / "be1.key").chmod(0o644), "chmod 600"),
        (lambda d: _other_key(d, "be1"), "be1.key is not its key"),
        (lambda d: issue_in_the_past(d, "be1", until=-5), "expired on"),
        (lambda d: pki.issue(d, pki.Request("be1", dns=("x",)), force=True), "has other names"),
        (lambda d: (d / "ca.key").chmod(0o604), "open to others (mode 604): chmod 600"),
        (lambda d: (d / "ca.key").unlink(), "cannot read"),
        (lambda d: (d / "ca.key").write_text("x"), "no private key"),
        (_rsa_key, "another kind than ECDSA"),
        (lambda d: _other_key(d, "ca"), "is not the key of"),
        (lambda d: (d / "be1.pem").replace(d / "ca.pem"), "is not a CA's certificate"),
        (lambda d: [(d / f"ca.{end}").unlink() for end in ("pem", "key")], "make one with: prism-"),
    ],
)
def test_what_cannot_be_used_is_refused_and_named(
    tmp_path: Path, run: Run, spoil: Callable[[Path], object], message: str
) -> None:
    run("init", tmp_path)
    run("issue", tmp_path, "be1")
    spoil(tmp_path)
    assert message in run("issue", tmp_path, "be1")


def test_half_a_ca_is_not_overwritten(tmp_path: Path, run: Run) -> None:
    run("init", tmp_path)
    (tmp_path / "ca.pem").unlink()
    assert "or replace the CA with --force" in run("init", tmp_path)


def test_an_expired_ca_signs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pki.init(tmp_path, days=30)
    issued = pki.issue(tmp_path, pki.Request("be1", days=300))
    assert issued.not_after == certificate(tmp_path / "ca.pem").not_valid_after_utc
    later = pki._now() + datetime.timedelta(days=31)
    monkeypatch.setattr(pki, "_now", lambda: later)
    with pytest.raises(ConfigError, match="expired on"):
        pki.issue(tmp_path, pki.Request("be2"))
    with pytest.raises(ConfigError, match=r"expired on .*--force"):
        pki.init(tmp_path)
    assert any("EXPIRED" in line for line in pki.describe(tmp_path))


@pytest.mark.parametrize("name", ["", "ca", "a/b", "../x", "-x", "n" * 64, "be1/0", "a\nb"])
def test_names_that_cannot_be(tmp_path: Path, name: str) -> None:
    pki.init(tmp_path)
    with pytest.raises(ConfigError, match="1 to 63 letters"):
        pki.issue(tmp_path, pki.Request(name))
    with pytest.raises(ConfigError, match="be1: "):
        pki.issue(tmp_path, pki.Request("be1", addresses=("10.0.0.256",)))


def test_show_tells_all(tmp_path: Path, run: Run) -> None:
    run("init", tmp_path)
    run("issue", tmp_path, "be1", "--address", "10.0.0.1")
    run("issue", tmp_path, "web", "--server", "--dns", "prism.lab")
    (tmp_path / "web.key").chmod(0o640)
    text = run("show", tmp_path)
    found = certificate(tmp_path / "be1.pem")
    assert found.fingerprint(hashes.SHA256()).hex() in text
    assert "names        DNS:be1, IP:10.0.0.1, URI:prism://node/be1" in text
    assert "kind         node be1" in text
    assert "kind         CA" in text
    assert "364 days left" in text
    assert "chmod 600" in text
    alone = run("show", tmp_path / "be1.pem")
    assert "key          good" in alone
    assert "kind         CA" not in alone
    _other_key(tmp_path, "be1")
    assert "DOES NOT MATCH" in run("show", tmp_path / "be1.pem")
    assert "cannot read" in run("show", tmp_path / "none.pem")
    assert "no certificate" in run("show", tmp_path / "be1.key")
    assert "PRIVATE" not in text


def test_show_of_an_empty_directory(tmp_path: Path, run: Run) -> None:
    assert "make a CA with: prism-proxy pki init" in run("show", tmp_path)


def test_a_key_is_never_open_to_others_not_even_for_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []
    replace = Path.replace

    def spy(self: Path, target: Path) -> Path:
        modes.append(mode(self))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", spy)
    before = os.umask(0)
    try:
        pki.init(tmp_path / "pki")
    finally:
        os.umask(before)
    assert modes == [0o600, 0o644]
    assert mode(tmp_path / "pki") == 0o700


def test_a_directory_that_cannot_be_written(tmp_path: Path, run: Run) -> None:
    (tmp_path / "file").touch()
    assert "cannot make" in run("init", tmp_path / "file/pki")
