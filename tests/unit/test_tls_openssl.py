"""The record layer takes one side of a connection over from OpenSSL, which stays the other."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import openssl_peer
import pytest
from openssl_peer import TLS1_2, TLS1_3, Failed, Peer, connect, make_certificate, records

from prism._ext.tls_record import Tls

SUITES = [
    (TLS1_3, "TLS_AES_128_GCM_SHA256", 0x1301),
    (TLS1_3, "TLS_AES_256_GCM_SHA384", 0x1302),
    (TLS1_3, "TLS_CHACHA20_POLY1305_SHA256", 0x1303),
    (TLS1_2, "ECDHE-ECDSA-AES128-GCM-SHA256", 0xC02B),
    (TLS1_2, "ECDHE-ECDSA-AES256-GCM-SHA384", 0xC02C),
    (TLS1_2, "ECDHE-RSA-AES128-GCM-SHA256", 0xC02F),
    (TLS1_2, "ECDHE-RSA-AES256-GCM-SHA384", 0xC030),
    (TLS1_2, "ECDHE-RSA-CHACHA20-POLY1305", 0xCCA8),
    (TLS1_2, "ECDHE-ECDSA-CHACHA20-POLY1305", 0xCCA9),
]
ONLY_1_3 = SUITES[:3]
ONLY_1_2 = SUITES[3:]

DATA = random.Random(7).randbytes(100_000)

Pair = tuple[Tls, Peer]
Take = Callable[..., Pair]


def of_log(peer: Peer, version: int, is_server: bool, read_seq: int, write_seq: int) -> Tls:
    """What the side that did the handshake knows, as one that hands it on would use it."""
    log = peer.log
    if version == TLS1_3:
        client, server = log["CLIENT_TRAFFIC_SECRET_0"], log["SERVER_TRAFFIC_SECRET_0"]
        return Tls.from_traffic_secrets(
            peer.suite, client, server, is_server=is_server, read_seq=read_seq, write_seq=write_seq
        )
    return Tls.from_master_secret(
        peer.suite,
        log["CLIENT_RANDOM"],
        *peer.randoms,
        is_server=is_server,
        read_seq=read_seq,
        write_seq=write_seq,
    )


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("certificates")
    return {name: make_certificate(path, name) for name in ("rsa", "ec")}


@pytest.fixture
def take_server(certificates: dict[str, Path]) -> Take:
    """Handshake, then our record layer instead of the server; the client is OpenSSL's."""

    def take(version: int, cipher: str, *, tickets: int = 2, **options: int) -> Pair:
        certificate = certificates["ec" if "ECDSA" in cipher else "rsa"]
        client = Peer(version, cipher, **options)
        server = Peer(version, cipher, certificate, tickets=tickets)
        last, sealed = connect(client, server)
        client.read(last)
        if version == TLS1_3:
            assert sealed == tickets
        return of_log(server, version, True, 0 if version == TLS1_3 else 1, sealed), client

    return take


@pytest.fixture
def take_client(certificates: dict[str, Path]) -> Callable[..., tuple[Tls, Peer, bytes]]:
    """The other way round; with what the server has sent last in TLS 1.3: its tickets."""

    def take(version: int, cipher: str, **options: int) -> tuple[Tls, Peer, bytes]:
        certificate = certificates["ec" if "ECDSA" in cipher else "rsa"]
        client, server = Peer(version, cipher), Peer(version, cipher, certificate, **options)
        last, sealed = connect(client, server)
        is_1_3 = version == TLS1_3
        tls = of_log(client, version, False, 0 if is_1_3 else sealed, 0 if is_1_3 else 1)
        return tls, server, last

    return take


def moved(tls: Tls) -> Tls:
    """The connection in another process."""
    state = tls.state()
    tls.wipe()
    return Tls.from_state(state)


@pytest.mark.parametrize(("version", "cipher", "number"), SUITES)
def test_our_server_serves_a_client(
    take_server: Take, version: int, cipher: str, number: int
) -> None:
    tls, client = take_server(version, cipher)
    assert (tls.version, tls.suite) == (version, number)
    for size in (1, 16384, 16385, 100_000):
        opened = tls.open(client.write(DATA[:size]))
        assert opened.error is None
        assert opened.data == DATA[:size]
        assert client.read(tls.seal(DATA[:size])) == DATA[:size]
        tls = moved(tls)
    opened = tls.open(client.shutdown())
    assert opened.closed and opened.alert == 0 and tls.read_closed
    assert client.read(tls.close_notify()) is None


@pytest.mark.parametrize(("version", "cipher", "number"), SUITES)
def test_our_client_asks_a_server(
    take_client: Callable[..., tuple[Tls, Peer, bytes]], version: int, cipher: str, number: int
) -> None:
    tls, server, tickets = take_client(version, cipher)
    opened = tls.open(tickets)
    assert opened.error is None
    assert [kind for kind, _, _ in opened.ends] == ([22, 22] if version == TLS1_3 else [])
    assert server.read(tls.seal(DATA)) == DATA
    tls = moved(tls)
    assert tls.open(server.write(DATA)).data == DATA
    assert server.read(tls.close_notify()) is None


@pytest.mark.parametrize("tickets", [0, 1, 2, 5])
def test_tickets_are_counted(take_server: Take, tickets: int) -> None:
    tls, client = take_server(*ONLY_1_3[0][:2], tickets=tickets)
    assert tls.write_seq == tickets
    assert client.read(tls.seal(b"here")) == b"here"


@pytest.mark.parametrize(("version", "cipher", "number"), ONLY_1_3)
def test_the_client_updates_its_key(
    take_server: Take, version: int, cipher: str, number: int
) -> None:
    tls, client = take_server(version, cipher)
    stream = client.write(b"before")
    for kind in (openssl_peer.KEY_UPDATE_NOT_REQUESTED, openssl_peer.KEY_UPDATE_REQUESTED):
        client.key_update(kind)
        stream += client.write(b"|after %d" % kind)
    at = tls.read_seq
    opened = tls.peek(stream)
    assert opened.data == b"before|after 0|after 1"
    assert [kind for kind, _, _ in opened.ends] == [23, 22, 23, 22, 23]
    assert (tls.read_seq, tls.owes) == (at, False)
    # Record by record, with a change of process between any two: the next key is found again.
    for i, record in enumerate(records(stream)):
        one = tls.peek(record)
        assert tls.commit(one) == len(record)
        assert tls.owes == (i >= 3)
        tls = moved(tls)
    # The answer that it asked for comes in front of the data, once.
    answer = tls.seal(b"answer")
    assert len(records(answer)) == 2
    assert not tls.owes and tls.write_seq == 1
    assert client.read(answer) == b"answer"
    assert client.read(moved(tls).seal(b"more")) == b"more"


@pytest.mark.parametrize(("version", "cipher", "number"), ONLY_1_3)
def test_we_update_our_key(take_server: Take, version: int, cipher: str, number: int) -> None:
    tls, client = take_server(version, cipher)
    assert client.read(tls.seal(b"a") + tls.key_update() + tls.seal(b"b")) == b"ab"
    assert tls.write_seq == 1
    assert client.read(tls.key_update(True) + tls.seal(b"c")) == b"c"
    opened = tls.open(client.write(b"the client's answer"))
    assert [kind for kind, _, _ in opened.ends] == [22, 23]
    assert not tls.owes
    assert opened.data == b"the client's answer"


@pytest.mark.parametrize(("version", "cipher", "number"), ONLY_1_3)
def test_padded_records(take_server: Take, version: int, cipher: str, number: int) -> None:
    tls, client = take_server(version, cipher, padding=512)
    stream = client.write(DATA[:40_000])
    assert all(len(record) - 5 - 16 - 1 >= 511 for record in records(stream))
    assert tls.open(stream).data == DATA[:40_000]
    sealed = tls.seal(DATA[:40_000], padding=700)
    assert len(sealed) > 40_000 + 700
    assert client.read(sealed) == DATA[:40_000]


@pytest.mark.parametrize(("version", "cipher", "number"), ONLY_1_2)
def test_renegotiation_is_refused(
    take_server: Take, version: int, cipher: str, number: int
) -> None:
    tls, client = take_server(version, cipher)
    asked = client.renegotiate()
    opened = tls.open(asked)
    assert opened.error is None
    assert tls.owes
    tls = moved(tls)
    answer = tls.seal(b"not this time")
    assert records(answer)[0][0] == 21
    assert not tls.owes
    with pytest.raises(Failed) as caught:
        client.read(answer)
    assert caught.value.args == (339,)  # SSL_R_NO_RENEGOTIATION: it understood


@pytest.mark.parametrize(("version", "cipher", "number"), SUITES)
def test_small_fragments(take_server: Take, version: int, cipher: str, number: int) -> None:
    tls, client = take_server(version, cipher, fragment=512)
    stream = client.write(DATA[:20_000])
    assert len(records(stream)) == 40
    assert tls.open(stream).data == DATA[:20_000]


@pytest.mark.parametrize(("version", "cipher", "number"), SUITES)
def test_openssl_refuses_what_we_must_not_send(
    take_server: Take, version: int, cipher: str, number: int
) -> None:
    """That the wrong sequence number fails shows that the right one is checked."""
    tls, client = take_server(version, cipher)
    tls.seal(b"lost")
    with pytest.raises(Failed):
        client.read(tls.seal(b"out of order"))


@pytest.mark.parametrize(("version", "cipher", "number"), SUITES)
def test_fatal_alerts(take_server: Take, version: int, cipher: str, number: int) -> None:
    tls, client = take_server(version, cipher)
    with pytest.raises(Failed) as caught:
        client.read(tls.alert(80))
    assert caught.value.args == (1080,)  # SSL_R_TLSV1_ALERT_INTERNAL_ERROR
    assert tls.write_closed

    tls, client = take_server(version, cipher)
    with pytest.raises(Failed):  # a damaged record: the client sends an alert of its own
        sealed = tls.seal(b"x")
        client.read(sealed[:-1] + bytes([sealed[-1] ^ 1]))
    opened = tls.open(client.output())
    assert opened.closed and opened.alert == 20
