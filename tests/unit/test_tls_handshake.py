"""Handshakes with OpenSSL's, curl's and Python's clients, and with clients that misbehave."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from tls_world import HandClient, Pki, Serving, client_context

Serve = Callable[..., Awaitable[Serving]]

OLD = {
    "AES-128-GCM": "ECDHE-{}-AES128-GCM-SHA256",
    "AES-256-GCM": "ECDHE-{}-AES256-GCM-SHA384",
    "CHACHA20-POLY1305": "ECDHE-{}-CHACHA20-POLY1305",
}
NEW = {
    "AES-128-GCM": "TLS_AES_128_GCM_SHA256",
    "AES-256-GCM": "TLS_AES_256_GCM_SHA384",
    "CHACHA20-POLY1305": "TLS_CHACHA20_POLY1305_SHA256",
}
SIGNATURES = {"ECDSA": "ecdsa_secp256r1_sha256", "RSA": "rsa_pss_rsae_sha256"}


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def both(pki: Pki) -> list[dict[str, str]]:
    return [pki.issue("ec", "a.test"), pki.issue("rsa", "a.test", kind="RSA")]


@pytest.fixture
async def serve(both: list[dict[str, str]]) -> AsyncIterator[Serve]:
    made: list[Serving] = []

    async def start(**config: Any) -> Serving:
        made.append(Serving({"certificates": both, **config}))
        return await made[-1].__aenter__()

    yield start
    for each in made:
        await each.__aexit__()


# -- versions, suites, keys ----------------------------------------------------------------


@pytest.mark.parametrize("suite", NEW)
@pytest.mark.parametrize("key", SIGNATURES)
async def test_every_version_suite_and_key_with_openssl(serve: Serve, suite: str, key: str) -> None:
    server = await serve()
    new = await server.s_client("-tls1_3", "-ciphersuites", NEW[suite], "-sigalgs", SIGNATURES[key])
    assert f"TLSv1.3 {NEW[suite]}" in new
    assert f"Peer signature type: {'RSA-PSS' if key == 'RSA' else 'ECDSA'}" in new
    old = await server.s_client("-tls1_2", "-cipher", OLD[suite].format(key))
    assert f"TLSv1.2 {OLD[suite].format(key)}" in old
    assert server.server.handshakes.snapshot() == {
        f"TLSv1.3 {NEW[suite]} False": 1,
        f"TLSv1.2 {OLD[suite].format(key)} False": 1,
    }


@pytest.mark.parametrize("version", ["1.2", "1.3"])
async def test_curl(serve: Serve, pki: Pki, version: str) -> None:
    server = await serve()
    told = await server.run(
        *("curl", "-sv", "--cacert", str(pki.file), "--resolve", f"a.test:{server.port}:127.0.0.1"),
        *(f"--tlsv{version}", "--tls-max", version, f"https://a.test:{server.port}/"),
    )
    assert f"TLSv{version}" in told
    assert "a.test" in told
    assert server.last.alpn == "http/1.1"
    assert server.last.server_name == "a.test"


async def test_the_server_s_order_of_suites_counts(serve: Serve) -> None:
    server = await serve(suites=["CHACHA20-POLY1305", "AES-256-GCM"])
    for version, name in (("1.3", NEW["CHACHA20-POLY1305"]), ("1.2", "CHACHA20-POLY1305")):
        assert name in (await server.get(client_context(None, version))).suite
    refused = await server.s_client("-tls1_3", "-ciphersuites", NEW["AES-128-GCM"])
    assert "handshake failure" in refused
    assert server.server.failures.snapshot() == {"no shared cipher": 1}


@pytest.mark.parametrize(
    "arguments",
    [
        ("-tls1_1", "-cipher", "ALL:@SECLEVEL=0"),
        ("-tls1_2", "-cipher", "ECDHE-RSA-AES128-SHA256:ECDHE-ECDSA-AES128-SHA"),
        ("-tls1_2", "-cipher", "AES128-GCM-SHA256"),
        ("-tls1_2", "-cipher", "DHE-RSA-AES128-GCM-SHA256"),
    ],
)
async def test_what_is_too_old_is_refused(serve: Serve, arguments: tuple[str, ...]) -> None:
    server = await serve()
    told = await server.s_client(*arguments)
    assert "alert handshake failure" in told or "alert protocol version" in told
    assert server.ended == [None]


async def test_the_oldest_version_can_be_1_3(serve: Serve) -> None:
    server = await serve(min_version="1.3")
    assert "alert protocol version" in await server.s_client("-tls1_2")
    assert "TLSv1.3" in await server.s_client("-tls1_3")


async def test_a_client_that_has_to_try_again_with_another_group(serve: Serve) -> None:
    server = await serve()
    told = await server.s_client("-tls1_3", "-groups", "ffdhe6144:P-256", "-msg")
    assert told.count("ServerHello") >= 2
    assert "TLSv1.3 TLS_" in told


async def test_a_client_with_small_records_gets_small_records(serve: Serve) -> None:
    server = await serve()
    server.answer_size = 5000
    for version in ("-tls1_3", "-tls1_2"):
        told = await server.s_client(version, "-maxfraglen", "1024")
        assert server.fragments[-1] == 1024
        assert "." * 5000 in told


# -- ALPN ----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.2", "1.3"])
async def test_alpn(serve: Serve, version: str) -> None:
    server = await serve()
    for offered, chosen in (
        (["h2", "http/1.1"], "http/1.1"),
        (["http/1.0", "http/1.1"], "http/1.1"),
        (["http/1.0"], "http/1.0"),
        ([], None),
    ):
        got = await server.get(client_context(None, version, alpn=offered))
        assert got.alpn == chosen
        assert server.last.alpn == (chosen or "")
    with pytest.raises(ssl.SSLError, match=r"(?i)no.application.protocol"):
        await server.get(client_context(None, version, alpn=["h2", "spdy/3"]))
    assert server.server.failures.snapshot() == {"no application protocol": 1}


# -- what is left in the socket ------------------------------------------------------------


@pytest.mark.parametrize("behind", [b"", b"x", b"GET / HTTP/1.1\r\n\r\n" * 2000])
async def test_what_follows_the_finished_stays_in_the_queue(serve: Serve, behind: bytes) -> None:
    server = await serve()
    server.answering = False
    client = HandClient(server.port, client_context(None))
    await client.send(client.step())
    finished = await client.receive_flight()
    sealed = client.seal(behind) if behind else b""
    await client.send(finished + sealed)
    await server.until(1)
    assert await waiting(server, len(sealed)) == sealed
    assert server.last.tls.open(sealed).data == behind
    assert (server.last.tls.write_seq, server.last.resumed) == (2, False)
    client.sock.close()


@pytest.mark.parametrize("version", ["1.2", "1.3"])
async def test_what_follows_the_finished_of_a_resumption_stays(serve: Serve, version: str) -> None:
    server = await serve()
    context = client_context(None, version)
    session = (await server.get(context)).session
    server.answering = False
    client = HandClient(server.port, context, session)
    await client.send(client.step())
    finished = await client.receive_flight()
    sealed = client.seal(b"early bird")
    await client.send(finished + sealed)
    await server.until(2)
    assert await waiting(server, len(sealed)) == sealed
    assert server.last.resumed
    assert server.last.tls.open(sealed).data == b"early bird"
    server.sockets[0].send(server.last.tls.seal(b"worm"))
    async with asyncio.timeout(5):
        while True:
            try:
                assert client.read() == b"worm"
                break
            except ssl.SSLWantReadError:
                await client.receive()
    client.sock.close()


async def waiting(server: Serving, octets: int) -> bytes:
    """What is in the queue of the last connection, when as much as that is there."""
    sock = server.sockets[-1]
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1
    async with asyncio.timeout(5):
        while True:
            try:
                data = sock.recv(1 << 20, socket.MSG_PEEK)
            except BlockingIOError:
                data = b""
            if len(data) >= octets:
                return data
            await asyncio.sleep(0.005)


async def test_a_false_start_waits_in_the_queue(serve: Serve) -> None:
    """Data that a TLS 1.2 client sends before it has the server's Finished (RFC 7918)."""
    server = await serve()
    server.answering = False
    client = HandClient(server.port, client_context(None, "1.2"))
    await client.send(client.step())
    flight = await client.receive_flight()
    await client.send(flight + b"\x17\x03\x03\x00\x05whole" + b"\x17\x03\x03\x00\x09par")
    await server.until(1)
    assert len(await waiting(server, 18)) == 18
    client.sock.close()


# -- odd and bad clients -------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.2", "1.3"])
async def test_a_client_that_sends_octet_by_octet(serve: Serve, version: str) -> None:
    server = await serve()
    server.answering = False
    client = HandClient(server.port, client_context(None, version))
    for is_hello in (True, False):
        flight = client.step() if is_hello else await client.receive_flight()
        for at in range(len(flight)):
            await client.send(flight[at : at + 1])
            await asyncio.sleep(0)
    await server.until(1)
    assert server.last.version == f"TLSv{version}"
    assert await waiting(server, 0) == b""
    client.sock.close()


async def test_octets_of_a_record_do_not_wake_the_server(serve: Serve) -> None:
    server = await serve()
    client = HandClient(server.port, client_context(None))
    flight = client.step()
    await client.send(flight[:100])
    await asyncio.sleep(0.05)
    (handshake,) = server.server._pending
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1

    asyncio.get_running_loop().add_reader(handshake.sock.fileno(), count)
    for at in range(100, len(flight) - 1):
        await client.send(flight[at : at + 1])
    await asyncio.sleep(0.05)
    assert calls == 0
    await client.send(flight[-1:])
    await asyncio.sleep(0.05)
    assert calls > 0
    client.sock.close()


async def test_a_hello_in_many_records(serve: Serve) -> None:
    server = await serve()
    client = HandClient(server.port, client_context(None))
    hello = client.step()[5:]
    pieces = [hello[at : at + 7] for at in range(0, len(hello), 7)]
    await client.send(b"".join(b"\x16\x03\x01" + len(p).to_bytes(2) + p for p in pieces))
    await client.send(await client.receive_flight())
    await server.until(1)
    assert server.last.version == "TLSv1.3"
    client.sock.close()


@pytest.mark.parametrize(
    ("data", "why", "alert"),
    [
        (b"\x16\x03\x01\xff\xff" + bytes(40), "record too long", 22),
        (b"\x16\x03\x01\x41\x01" + bytes(40), "record too long", 22),
        (bytes(range(128, 228)), "not TLS", None),
        (b"\x17\x03\x03\x00\x10" + bytes(16), "not TLS", None),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "not TLS", None),
        (b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\xff", None, 47),
        (b"\x16\x03\x01\x00\x04\x14\x00\x00\x00", None, 10),
    ],
)
async def test_garbage(serve: Serve, data: bytes, why: str | None, alert: int | None) -> None:
    server = await serve()
    client = HandClient(server.port, client_context(None))
    await client.send(data)
    answer = await client.end()
    assert server.ended == [None]
    assert why is None or server.server.failures.snapshot() == {why: 1}
    if alert is not None:
        assert answer[0] == 21
        assert answer[5:] == bytes((2, alert))


async def test_a_record_that_is_too_long_after_the_hello(serve: Serve) -> None:
    server = await serve()
    client = HandClient(server.port, client_context(None))
    await client.send(client.step())
    await client.receive_flight()
    await client.send(b"\x17\x03\x03\x50\x00" + bytes(100))
    with pytest.raises(ssl.SSLError, match=r"(?i)record.overflow"):
        await client.end()
        client.read()
    assert server.server.failures.snapshot() == {"record too long": 1}


async def test_more_data_than_any_handshake_has(serve: Serve) -> None:
    """A hello that OpenSSL would wait for, in so many records that nobody needs them."""
    server = await serve()
    client = HandClient(server.port, client_context(None))
    await client.send(b"\x16\x03\x01\x00\x04\x01\x01\xf0\x00")
    record = b"\x16\x03\x01\x00\x01\x03"
    with pytest.raises(ConnectionError):
        for _ in range(100):
            await client.send(record * 1000)
            await asyncio.sleep(0.005)
    assert server.server.failures.snapshot() == {"too much data": 1}
    client.sock.close()


async def test_many_changes_of_the_cipher_spec(serve: Serve) -> None:
    server = await serve()
    client = HandClient(server.port, client_context(None))
    await client.send(client.step())
    flight = await client.receive_flight()
    await client.send(b"\x14\x03\x03\x00\x01\x01" * 5000 + flight)
    await server.until(1)
    assert server.ended == [None] or server.last.version == "TLSv1.3"
    client.sock.close()


@pytest.mark.parametrize("request_line", [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"PUT /x HTTP/1.0"])
async def test_plain_http_is_told_so(serve: Serve, request_line: bytes) -> None:
    server = await serve()
    client = HandClient(server.port, client_context(None))
    await client.send(request_line)
    answer = await client.end()
    assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b"speaks HTTPS" in answer
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"Content-Length: %d" % len(body) in head
    assert server.server.failures.snapshot() == {"plain HTTP": 1}


async def test_an_alert_is_read_though_the_client_sends_on(serve: Serve) -> None:
    server = await serve()
    client = HandClient(server.port, client_context(None, alpn=["h2"]))
    await client.send(client.step() + b"\x17\x03\x03\x00\x10" + bytes(16))
    answer = await client.end()
    assert answer == b"\x15\x03\x03\x00\x02\x02\x78"  # no_application_protocol, and no reset


@pytest.mark.parametrize("octets", [0, 3, 100, None])
@pytest.mark.parametrize("reset", [False, True])
async def test_a_client_that_leaves(serve: Serve, octets: int | None, reset: bool) -> None:
    server = await serve()
    client = HandClient(server.port, client_context(None))
    await client.send(client.step()[:octets])
    await asyncio.sleep(0.05)
    if reset:
        client.sock.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")  # SO_LINGER
    client.sock.close()
    await server.until(1, seconds=1)
    assert server.ended == [None]
    assert len(server.server) == 0


async def test_a_client_that_leaves_in_the_middle_of_its_second_flight(serve: Serve) -> None:
    server = await serve()
    client = HandClient(server.port, client_context(None))
    await client.send(client.step())
    flight = await client.receive_flight()
    await client.send(flight[:20])
    await asyncio.sleep(0.05)
    client.sock.close()
    await server.until(1, seconds=1)
    assert server.server.failures.snapshot() == {"closed by the client": 1}


async def test_a_wrong_finished_is_refused(serve: Serve) -> None:
    server = await serve()
    client = HandClient(server.port, client_context(None))
    await client.send(client.step())
    flight = await client.receive_flight()
    await client.send(flight[:-1] + bytes([flight[-1] ^ 1]))
    with pytest.raises(ssl.SSLError, match=r"(?i)bad.record.mac"):
        await client.end()
        client.read()
    assert server.ended == [None]


async def test_a_flight_that_does_not_fit_into_the_socket(pki: Pki, serve: Serve) -> None:
    """The certificate message has about 60 kB, the send buffer less than 5."""
    entry = pki.issue("long", "a.test")
    chain = Path(entry["certificate"])
    chain.write_bytes(chain.read_bytes() + pki.file.read_bytes() * 150)
    server = await serve(certificates=[entry])
    server.send_buffer = 4608
    client = HandClient(server.port, client_context(None), receive_buffer=4608)
    await client.send(client.step())
    await asyncio.sleep(0.05)
    await client.send(await client.receive_flight())
    await server.until(1)
    assert server.last.version == "TLSv1.3"
    client.sock.close()
