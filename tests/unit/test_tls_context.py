"""Certificates by name, tickets, client certificates, and files that change."""

from __future__ import annotations

import asyncio
import gc
import logging
import multiprocessing
import ssl
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from tls_world import HandClient, Pki, Serving, client_context, get

from prism.config import parse
from prism.config_tls import TlsConfig
from prism.errors import ConfigError
from prism.tls.certificates import Names, load_credential
from prism.tls.context import TlsContexts

CLUSTER = '[cluster]\nkey = "00112233445566778899aabbccddeeff"\ncontrol = "10.0.0.1:4760"\n'


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


def subject(der: bytes | None) -> str:
    assert der is not None
    return x509.load_der_x509_certificate(der).subject.rfc4514_string().removeprefix("CN=")


# -- the section of the configuration ------------------------------------------------------


def test_a_section_with_defaults(tmp_path: Path) -> None:
    text = '[tls]\nlisten = ["10.0.0.9:443"]\n[[tls.certificates]]\ncertificate = "c"\nkey = "/k"\n'
    config = parse(CLUSTER + text, base=tmp_path)
    assert config.tls is not None
    assert config.tls.certificates[0].certificate == tmp_path / "c"
    assert config.tls.certificates[0].key == Path("/k")
    assert (config.tls.min_version, config.tls.tickets, config.tls.offload) == ("1.2", 2, "auto")
    assert [str(each) for each in config.listen] == ["10.0.0.9:443"]
    assert config.tls_listen == config.listen
    assert parse(CLUSTER).tls_listen == ()


def test_a_section_of_a_backend_needs_no_certificates() -> None:
    config = parse(CLUSTER + '[tls]\noffload = "kernel"\n')
    assert config.tls is not None
    assert (config.tls.offload, config.tls.certificates) == ("kernel", ())
    assert config.tls_listen == ()


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('client_auth = "require"', "needs client_ca"),
        ('suites = ["AES-128-GCM", "AES-128-GCM"]', "twice"),
        ("suites = []", "tls.suites: "),
        ('suites = ["AES-128-CBC"]', "'CHACHA20-POLY1305'"),
        ('min_version = "1.1"', "'1.2'"),
        ("tickets = 3", "tls.tickets: "),
        ("handshake_timeout = 0", "tls.handshake_timeout: "),
        ('listen = ["10.0.0.9:443"]\ncertificates = []', "listen needs certificates: add"),
        ('offload = "always"', "'auto', 'kernel' or 'user'"),
        ('certificates = [{ certificate = "a" }]', "tls.certificates[0].key: is missing"),
        ('certificates = [{ certificate = "a", key = "b", pin = 1 }]', "known here: certificate"),
    ],
)
def test_a_section_that_cannot_be_used(line: str, problem: str) -> None:
    good = "" if "certificates" in line else 'certificates = [{ certificate = "a", key = "b" }]\n'
    with pytest.raises(ConfigError) as caught:
        parse(f"{CLUSTER}[tls]\n{good}{line}\n", source="x.toml")
    assert str(caught.value).startswith("x.toml:")
    assert problem in str(caught.value)


# -- files ---------------------------------------------------------------------------------


def refused(entry: dict[str, str], **config: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        TlsContexts(TlsConfig(certificates=[entry], **config))
    return str(caught.value)


def test_files_that_are_not_there_or_no_pem(pki: Pki, tmp_path: Path) -> None:
    entry = pki.issue("a", "a.test")
    (tmp_path / "x").touch(mode=0o600)
    assert "nowhere: cannot be read: No such" in refused({**entry, "certificate": "nowhere"})
    assert "nowhere: cannot be read: No such" in refused({**entry, "key": "nowhere"})
    assert "x: holds no certificate" in refused({**entry, "certificate": str(tmp_path / "x")})
    assert "x: holds no private key" in refused({**entry, "key": str(tmp_path / "x")})
    (tmp_path / "x").write_bytes(b"-----BEGIN CERTIFICATE-----\n" + bytes(1 << 20))
    assert "longer than" in refused({**entry, "certificate": str(tmp_path / "x")})
    assert "x: longer" not in refused({**entry, "key": str(tmp_path)})


@pytest.mark.parametrize("mode", [0o644, 0o640 | 0o020, 0o604, 0o601])
def test_a_key_that_is_open_to_others(pki: Pki, mode: int) -> None:
    entry = pki.issue("a", "a.test")
    Path(entry["key"]).chmod(mode)
    assert f"{entry['key']}: is open to others (mode {mode:o}): chmod 600" in refused(entry)
    Path(entry["key"]).chmod(0o640)
    TlsContexts(TlsConfig(certificates=[entry]))


def test_keys_that_cannot_be_used(pki: Pki) -> None:
    entry, other = pki.issue("a", "a.test"), pki.issue("b", "b.test")
    assert f"is not the key of {entry['certificate']}" in refused({**entry, "key": other["key"]})
    key = Path(entry["key"])
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    key.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    assert "is encrypted; decrypt it: openssl pkey" in refused(entry)
    assert "1024 bits is too short" in refused(pki.issue("c", "c.test", kind="RSA1024"))


def test_no_error_has_a_piece_of_a_key(pki: Pki) -> None:
    entry = pki.issue("a", "a.test")
    key = Path(entry["key"])
    text = key.read_text()
    for broken in (text[:-40], text.replace("PRIVATE", "PUBLIC"), text.replace("M", "N")):
        key.write_text(broken)
        message = refused(entry)
        assert not any(line in message for line in text.splitlines()[1:-1])


def test_a_bad_client_ca(pki: Pki) -> None:
    entry = pki.issue("a", "a.test")
    assert "nowhere: cannot be read" in refused(entry, client_auth="request", client_ca="nowhere")
    assert "no certificate" in refused(entry, client_auth="request", client_ca=entry["key"])


def test_dates_are_warned_about(pki: Pki, caplog: pytest.LogCaptureFixture) -> None:
    TlsContexts(TlsConfig(certificates=[pki.issue("old", "a.test", days=-1)]))
    (line,) = caplog.messages
    assert "old.pem: the certificate ended on" in line


# -- names ---------------------------------------------------------------------------------


def test_which_certificates_serve_which_name(pki: Pki) -> None:
    def load(name: str, *sans: str, kind: str = "EC") -> Any:
        entry = pki.issue(name, *sans, kind=kind)
        return load_credential(Path(entry["certificate"]), Path(entry["key"]))

    first = load("first", "A.test", "www.a.test")
    wild = load("wild", "*.a.test")
    wild_rsa = load("wild-rsa", "*.a.test", "*.b.test", kind="RSA")
    both_rsa = load("both-rsa", "a.test", "www.a.test", "c.test", kind="RSA")
    edwards = load("edwards", "c.test", "192.0.2.1", kind="Ed25519")
    names = Names([first, wild, wild_rsa, both_rsa, edwards])
    assert names.default == (first, both_rsa)
    for name, expected in {
        "a.test": (first, both_rsa),
        "www.a.test": (first, both_rsa),
        "x.a.test": (wild, wild_rsa),
        "x.b.test": (wild_rsa,),
        "c.test": (both_rsa, edwards),
        "b.test": names.default,
        "x.x.a.test": names.default,
        ".a.test": (wild, wild_rsa),
        "": names.default,
        "192.0.2.1": names.default,
        "*.a.test": (wild, wild_rsa),
    }.items():
        assert names.choose(name) == expected, name
    assert Names([wild, both_rsa]).default == (wild,)
    assert Names([first, wild_rsa]).choose("www.a.test") == (first, wild_rsa)


@pytest.mark.parametrize("version", ["1.2", "1.3"])
async def test_the_client_gets_the_certificate_for_its_name(pki: Pki, version: str) -> None:
    entries = [
        pki.issue("one", "one.test"),
        pki.issue("wild", "*.wild.test"),
        pki.issue("exact", "exact.wild.test"),
    ]
    async with Serving({"certificates": entries}) as server:
        context = client_context(pki.file, version)
        for name, expected in (
            ("one.test", "one"),
            ("x.wild.test", "wild"),
            ("X.WILD.test", "wild"),
            ("exact.wild.test", "exact"),
            ("unknown.test", "one"),
            (None, "one"),
        ):
            got = await server.get(context, name)
            assert subject(got.certificate) == expected, name
            assert server.last.server_name == (name or "").lower()


# -- tickets -------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.2", "1.3"])
async def test_tickets_outlive_a_reload(pki: Pki, version: str) -> None:
    async with Serving({"certificates": [pki.issue("one", "a.test")]}) as server:
        context = client_context(None, version)
        first = await server.get(context)
        second = await server.get(context, session=first.session)
        pki.issue("one", "a.test", subject="new")
        assert server.server.reload()
        third = await server.get(context, session=second.session)
        fourth = await server.get(context)
        assert [each.resumed for each in (first, second, third, fourth)] == [0, 1, 1, 0]
        assert [each is not None and each.resumed for each in server.ended] == [0, 1, 1, 0]
        assert subject(fourth.certificate) == "new"


@pytest.mark.parametrize("tickets", [0, 1, 2])
async def test_how_many_tickets_a_client_gets(pki: Pki, tickets: int) -> None:
    config = {"certificates": [pki.issue("one", "a.test")], "tickets": tickets}
    async with Serving(config) as server:
        told = await server.s_client("-tls1_3")
        assert told.count("Post-Handshake New Session Ticket arrived") == tickets
        assert "HTTP/1.1 200 OK" in told  # with the right sequence number
        assert server.sequences == [(0, tickets)]
        for version in ("1.3", "1.2"):
            context = client_context(None, version)
            session = (await server.get(context)).session
            assert (await server.get(context, session=session)).resumed is (tickets > 0)
        assert server.sequences[1:] == [(0, tickets), (0, min(tickets, 1)), (1, 1), (1, 1)]


def _worker(contexts: TlsContexts, config: dict[str, Any], pipe: Connection) -> None:
    async def main() -> None:
        async with Serving(config, contexts) as server:
            pipe.send(server.port)
            while (word := await asyncio.to_thread(pipe.recv)) != "stop":
                pipe.send(getattr(server.server, word)())

    asyncio.run(main())


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_workers_accept_each_other_s_tickets(pki: Pki, version: str) -> None:
    config = {"certificates": [pki.issue("one", "a.test")]}
    contexts = TlsContexts(TlsConfig(**config))
    fork = multiprocessing.get_context("fork")
    pipes, ports, workers = [], [], []
    for _ in range(2):
        ours, theirs = fork.Pipe()
        workers.append(fork.Process(target=_worker, args=(contexts, config, theirs)))
        workers[-1].start()
        pipes.append(ours)
        ports.append(ours.recv())
    try:
        context = client_context(None, version)
        first = get(ports[0], context)
        second = get(ports[1], context, session=first.session)
        pipes[0].send("reload")
        assert pipes[0].recv()
        third = get(ports[0], context, session=second.session)
        assert [each.resumed for each in (first, second, third)] == [False, True, True]
    finally:
        for pipe, worker in zip(pipes, workers, strict=True):
            pipe.send("stop")
            worker.join(5)
            if worker.is_alive():
                worker.kill()
    assert [worker.exitcode for worker in workers] == [0, 0]


# -- client certificates -------------------------------------------------------------------


def _config(pki: Pki, auth: str) -> dict[str, Any]:
    return {
        "certificates": [pki.issue("one", "a.test")],
        "client_auth": auth,
        "client_ca": str(pki.file),
    }


@pytest.mark.parametrize("version", ["1.2", "1.3"])
@pytest.mark.parametrize("auth", ["request", "require"])
async def test_a_good_client(pki: Pki, auth: str, version: str) -> None:
    mine = pki.issue("me", "me.test", "spiffe://test/me", "192.0.2.7", subject="client")
    async with Serving(_config(pki, auth)) as server:
        context = client_context(None, version, certificate=mine)
        got = await server.get(context)
        assert server.last.client_identity is not None
        assert server.last.client_identity.subject == "CN=client"
        names = server.last.client_identity.names
        assert names == ("DNS:me.test", "URI:spiffe://test/me", "IP:192.0.2.7")
        assert len(bytes.fromhex(server.last.client_identity.fingerprint)) == 32
        assert (await server.get(context, session=got.session)).resumed
        assert server.last.client_identity == server.ended[0].client_identity  # type: ignore[union-attr]


@pytest.mark.parametrize("version", ["1.2", "1.3"])
async def test_clients_without_a_good_certificate(pki: Pki, tmp_path: Path, version: str) -> None:
    others = Pki(tmp_path, "other")
    for certificate, alert, reason in (
        (None, "CERTIFICATE_REQUIRED|HANDSHAKE_FAILURE", "peer did not return a certificate"),
        (others.issue("stranger"), "UNKNOWN_CA", "certificate verify failed"),
        (pki.issue("expired", days=-1), "CERTIFICATE_EXPIRED", "certificate verify failed"),
    ):
        async with Serving(_config(pki, "require")) as server:
            context = client_context(None, version, certificate=certificate)
            with pytest.raises(ssl.SSLError, match=alert):
                await server.get(context)
            assert server.ended == [None]
            assert server.server.failures.snapshot() == {reason: 1}
        async with Serving(_config(pki, "request")) as server:
            if certificate is None:
                await server.get(context)
                assert server.last.client_identity is None
            else:
                with pytest.raises(ssl.SSLError, match=alert):
                    await server.get(context)


async def test_a_client_that_is_not_asked(pki: Pki) -> None:
    mine = pki.issue("me", "me.test")
    async with Serving({"certificates": [pki.issue("one", "a.test")]}) as server:
        await server.get(client_context(None, certificate=mine))
        assert server.last.client_identity is None


@pytest.mark.parametrize("version", ["1.2", "1.3"])
async def test_no_ticket_outlives_a_change_of_the_client_ca(
    pki: Pki, tmp_path: Path, version: str
) -> None:
    mine = pki.issue("me", "me.test")
    async with Serving(_config(pki, "require")) as server:
        context = client_context(None, version, certificate=mine)
        session = (await server.get(context)).session
        pki.file.write_bytes(Pki(tmp_path, "other").file.read_bytes())
        assert server.server.reload()
        with pytest.raises(ssl.SSLError):
            await server.get(context, session=session)
        assert server.ended[1] is None


@pytest.mark.parametrize("version", ["1.2", "1.3"])
async def test_no_ticket_outlives_the_client_s_certificate(pki: Pki, version: str) -> None:
    mine = pki.issue("me", "me.test", days=2 / 86400)
    async with Serving(_config(pki, "require")) as server:
        context = client_context(None, version, certificate=mine)
        first = await server.get(context)
        second = await server.get(context, session=first.session)
        assert second.resumed
        await asyncio.sleep(2)
        with pytest.raises(ssl.SSLError, match="CERTIFICATE_EXPIRED"):
            await server.get(context, session=second.session)
        assert server.server.failures.snapshot() == {"client certificate expired": 1}


async def test_a_handshake_that_began_before_the_client_ca_changed(
    pki: Pki, tmp_path: Path
) -> None:
    """OpenSSL calls back into the context it began with, which nothing else refers to any more."""
    async with Serving(_config(pki, "request")) as server:
        client = HandClient(server.port, client_context(None))
        hello = client.step()[5:]
        halves = hello[:100], hello[100:]
        await client.send(b"\x16\x03\x01" + len(halves[0]).to_bytes(2) + halves[0])
        await asyncio.sleep(0.05)
        pki.file.write_bytes(pki.file.read_bytes() + Pki(tmp_path, "two").file.read_bytes())
        assert server.server.reload()
        gc.collect()
        await client.send(b"\x16\x03\x01" + len(halves[1]).to_bytes(2) + halves[1])
        await client.send(await client.receive_flight())
        await server.until(1)
        assert server.last.version == "TLSv1.3"
        client.sock.close()


# -- files that change ---------------------------------------------------------------------


async def test_a_new_certificate_is_found_within_a_second_or_two(pki: Pki) -> None:
    async with Serving({"certificates": [pki.issue("one", "a.test")]}) as server:
        context = client_context(None)
        assert subject((await server.get(context)).certificate) == "one"
        pki.issue("one", "a.test", subject="new")
        async with asyncio.timeout(2.5):
            while subject((await server.get(context)).certificate) != "new":
                await asyncio.sleep(0.1)


async def test_a_broken_new_file_changes_nothing(
    pki: Pki, caplog: pytest.LogCaptureFixture
) -> None:
    entry = pki.issue("one", "a.test")
    async with Serving({"certificates": [entry]}) as server:
        context = client_context(pki.file)
        good = Path(entry["certificate"]).read_bytes()
        for broken in (b"", good[:100], None):
            if broken is None:
                Path(entry["certificate"]).unlink()
            else:
                Path(entry["certificate"]).write_bytes(broken)
            caplog.clear()
            assert not server.server.reload()
            assert caplog.records[0].levelno == logging.ERROR
            assert entry["certificate"] in caplog.text
            assert subject((await server.get(context)).certificate) == "one"
        pki.issue("one", "a.test", subject="mended")
        assert server.server.reload()
        assert subject((await server.get(context)).certificate) == "mended"


def test_a_change_is_told_once(pki: Pki) -> None:
    entry = pki.issue("one", "a.test")
    contexts = TlsContexts(TlsConfig(certificates=[entry]))
    assert not contexts.changed()
    pki.issue("one", "a.test")
    assert (contexts.changed(), contexts.changed()) == (True, False)
    Path(entry["key"]).unlink()
    assert (contexts.changed(), contexts.changed()) == (True, False)
    pki.issue("one", "a.test")
    assert contexts.changed()
    assert contexts.reload()
    assert not contexts.changed()
