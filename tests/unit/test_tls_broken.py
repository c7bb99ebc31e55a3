"""What the TLS record layer refuses: broken records, messages out of place, damaged states."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openssl_peer import aes_128_gcm, records
from tls_pairs import (
    ALL_SUITES,
    BAD_MAC,
    CLIENT_RANDOM,
    DECODE,
    ILLEGAL,
    INTERNAL,
    MASTER,
    OVERFLOW,
    SECRETS,
    SERVER_RANDOM,
    SUITES_1_2,
    SUITES_1_3,
    UNEXPECTED,
    VERSION,
    alert_of,
    make,
    pair,
)

from prism._ext import tls_record
from prism._ext.tls_record import STATE_SIZE, Tls, TlsError

# --- Broken records ------------------------------------------------------------------------------


def craft_1_3(inner: bytes, seq: int = 0) -> bytes:
    """A record of the client in TLS_AES_128_GCM_SHA256 with any inner plaintext."""
    secret = SECRETS[0][:32]
    key = tls_record.expand_label("sha256", secret, "key", 16)
    iv = int.from_bytes(tls_record.expand_label("sha256", secret, "iv", 12), "big")
    header = b"\x17\x03\x03" + (len(inner) + 16).to_bytes(2, "big")
    return header + aes_128_gcm(key, (iv ^ seq).to_bytes(12, "big"), header, inner)


def craft_1_2(plain: bytes, kind: int = 23, seq: int = 0) -> bytes:
    """A record of the client in TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256 with a nonce of its own."""
    block = tls_record.prf("sha256", MASTER, "key expansion", SERVER_RANDOM + CLIENT_RANDOM, 40)
    nonce = b"any nonc"
    head = bytes([kind, 3, 3])
    aad = seq.to_bytes(8, "big") + head + len(plain).to_bytes(2, "big")
    body = nonce + aes_128_gcm(block[:16], block[32:36] + nonce, aad, plain)
    return head + len(body).to_bytes(2, "big") + body


def refused(suite: int, stream: bytes) -> int | None:
    """The alert for ``stream`` sent to a server; checks that nothing was changed."""
    server = make(suite, True)
    before = server.state()
    opened = server.open(stream)
    assert (opened.records, opened.data) == (0, b"")
    assert server.state() == before
    return alert_of(opened)


def test_crafted_records_are_good() -> None:
    assert make(0x1301, True).open(craft_1_3(b"data\x17")).data == b"data"
    assert make(0x1301, True).open(craft_1_3(b"data\x17" + bytes(99))).data == b"data"
    assert make(0xC02B, True).open(craft_1_2(b"data")).data == b"data"
    full = b"x" * 16384
    assert make(0x1301, True).open(craft_1_3(full + b"\x17")).data == full
    assert make(0xC02B, True).open(craft_1_2(full)).data == full


@pytest.mark.parametrize(
    ("inner", "alert"),
    [
        (b"", UNEXPECTED),  # not even a type
        (bytes(50), UNEXPECTED),  # zeros alone
        (b"x" * 16385 + b"\x17", OVERFLOW),
        (b"x" * 16384 + b"\x17\0", OVERFLOW),  # padded too far
        (b"x\x14", UNEXPECTED),  # change_cipher_spec
        (b"x\x18", UNEXPECTED),  # heartbeat
        (b"\x15", UNEXPECTED),  # an empty alert
        (b"\x01\x15", DECODE),
        (b"\x01\x00\x00\x15", DECODE),
        (b"\x03\x00\x15", ILLEGAL),
        (b"\x16", UNEXPECTED),  # an empty handshake record
        (b"\x18\0\0\1\0x\x16", UNEXPECTED),  # something behind a KeyUpdate
        (b"\x18\0\0\1\2\x16", ILLEGAL),
        (b"\x18\0\0\2\0\0\x16", DECODE),
        (b"\x18\0\0\0\x16", DECODE),
        (b"\x04\0\0\5" + bytes(4) + b"\1\x16", UNEXPECTED),  # a client with a session ticket
        (b"\x01\0\0\x20" + bytes(31) + b"\1\x16", UNEXPECTED),  # a ClientHello
        (b"\x0d\0\0\x03\0\0\1\x16", UNEXPECTED),  # a CertificateRequest
    ],
)
def test_what_tls_1_3_forbids(inner: bytes, alert: int) -> None:
    assert refused(0x1301, craft_1_3(inner)) == alert


@pytest.mark.parametrize(
    ("plain", "kind", "alert"),
    [
        (b"x" * 16385, 23, OVERFLOW),
        (b"\1", 20, UNEXPECTED),
        (b"x", 24, UNEXPECTED),
        (b"", 21, DECODE),
        (b"\2", 21, DECODE),
        (b"\0\0", 21, ILLEGAL),
        (b"", 22, UNEXPECTED),
        (b"\0\0\0\0", 22, UNEXPECTED),  # a HelloRequest from a client
        (b"\1\0\0\0", 22, DECODE),
        (b"\1\xff\xff\xff", 22, DECODE),
        (b"\x14\0\0\x0c" + bytes(12), 22, UNEXPECTED),  # Finished
    ],
)
def test_what_tls_1_2_forbids(plain: bytes, kind: int, alert: int) -> None:
    assert refused(0xC02B, craft_1_2(plain, kind)) == alert


@pytest.mark.parametrize("suite", ALL_SUITES)
def test_records_that_are_not_sealed(suite: int) -> None:
    most = 16384 + (256 if suite in SUITES_1_3 else 2048)
    assert refused(suite, b"\x17\x03\x03" + (most + 1).to_bytes(2, "big")) == OVERFLOW
    assert refused(suite, b"\x17\x03\x03" + most.to_bytes(2, "big")) is None
    assert refused(suite, b"\x17\x03\x03\0\x0f" + bytes(15)) == BAD_MAC
    assert refused(suite, b"\x17\x03\x03\0\x40" + bytes(64)) == BAD_MAC
    assert refused(suite, b"\x17\x03\x01\0\x40" + bytes(64)) == VERSION
    assert refused(suite, b"\x14\x03\x03\0\x01\x01") == UNEXPECTED
    assert refused(suite, b"GET / HTTP/1.1\r\n") == UNEXPECTED
    plain_alert = UNEXPECTED if suite in SUITES_1_3 else BAD_MAC
    assert refused(suite, b"\x15\x03\x03\0\x02\x02\x28") == plain_alert


@pytest.mark.parametrize("suite", ALL_SUITES)
def test_every_flipped_bit_is_seen(suite: int) -> None:
    _, client = pair(suite)
    record = client.seal(b"some data")
    for bit in range(8 * len(record)):
        damaged = bytearray(record)
        damaged[bit // 8] ^= 1 << bit % 8
        server = make(suite, True)
        opened = server.open(damaged)
        assert opened.data == b""
        assert opened.records == 0
        # A longer length is a record that is not there yet; anything else is refused at once.
        assert opened.error is not None or opened.wanted > len(record)


@pytest.mark.parametrize("suite", ALL_SUITES)
def test_the_order_is_kept(suite: int) -> None:
    _, client = pair(suite)
    first, second = client.seal(b"1"), client.seal(b"2")
    assert refused(suite, second) == BAD_MAC
    server = make(suite, True)
    opened = server.open(first + first)
    assert (opened.data, opened.records, alert_of(opened)) == (b"1", 1, BAD_MAC)
    assert server.read_seq == 1
    assert server.open(second).data == b"2"


def test_what_is_good_counts_whatever_follows() -> None:
    server, client = pair(0x1302)
    stream = client.seal(b"good") + b"\x16\x03\x03\0\0"
    opened = server.peek(stream)
    assert (opened.data, opened.consumed, alert_of(opened)) == (
        b"good",
        len(stream) - 5,
        UNEXPECTED,
    )
    assert isinstance(opened.error, TlsError)
    assert "alert 10" in str(opened.error)
    server.commit(opened)
    assert alert_of(server.peek(stream[opened.consumed :])) == UNEXPECTED


# --- Alerts and messages -------------------------------------------------------------------------


@pytest.mark.parametrize("suite", ALL_SUITES)
def test_nothing_counts_after_close_notify(suite: int) -> None:
    server, client = pair(suite)
    stream = client.seal(b"x") + client.close_notify()
    opened = server.peek(stream + b"anything")
    assert (opened.data, opened.consumed, opened.closed) == (b"x", len(stream), True)
    assert opened.alert == 0 and opened.wanted == 0 and opened.error is None
    assert not server.read_closed
    server.commit(opened)
    for tls in (server, Tls.from_state(server.state())):
        assert tls.read_closed
        after = tls.peek(b"anything")
        assert (after.closed, after.alert, after.consumed, after.error) == (True, 0, 0, None)


def test_which_alerts_are_fatal() -> None:
    for suite, level, description, closes in [
        (0x1301, 1, 40, True),  # TLS 1.3 ignores the level
        (0x1301, 1, 90, False),  # user_canceled
        (0x1301, 2, 0, True),
        (0xC02B, 1, 100, False),
        (0xC02B, 2, 100, True),
        (0xC02B, 1, 0, True),
    ]:
        server, client = pair(suite)
        opened = server.open(client.seal(bytes([level, description]), 21))
        assert opened.closed == closes
        assert opened.alert == (description if closes else None)


@pytest.mark.parametrize("cuts", [(1,), (2, 3), (4,), (1, 2, 3, 4)])
def test_messages_in_pieces(cuts: tuple[int, ...]) -> None:
    server, client = pair(0x1301)
    message = b"\x18\0\0\1\1"
    parts = [message[a:b] for a, b in zip((0, *cuts), (*cuts, 5), strict=True)]
    for part in parts[:-1]:
        opened = server.open(client.seal(part, 22))
        assert opened.error is None
        server = Tls.from_state(server.state())  # in the middle of a message
    interrupted = Tls.from_state(client.state()).seal(b"x")
    assert alert_of(server.peek(interrupted)) == UNEXPECTED
    opened = server.open(client.seal(parts[-1], 22))
    assert opened.error is None
    assert server.owes and server.read_seq == 0


@pytest.mark.parametrize("kind", range(0, 256, 3))
def test_a_state_inside_any_message(kind: int) -> None:
    """What was taken can be handed on, and is refused afterwards, if it has to be."""
    server, client = pair(0x1301)
    assert server.open(client.seal(bytes([kind, 0, 0]), 22)).error is None
    server = Tls.from_state(server.state())
    opened = server.open(client.seal(b"\1\0", 22))
    assert alert_of(opened) == (None if kind == 24 else UNEXPECTED)


def test_tickets_reach_a_client() -> None:
    server, client = pair(0x1303)
    ticket = b"\x04\0\x40\0" + bytes(0x4000)
    stream = server.seal(ticket + ticket, 22) + server.seal(b"data")
    assert client.open(stream).data == b"data"
    huge = b"\x04\2\x10\0"
    assert alert_of(client.peek(server.seal(huge, 22))) == DECODE


def test_renegotiation_in_tls_1_2() -> None:
    server, client = pair(0xC02B)
    hello = b"\1\0\x50\0" + bytes(0x5000)
    assert server.open(client.seal(hello, 22) + client.seal(b"data")).data == b"data"
    assert server.owes
    answer = client.open(server.seal(b""))
    assert [kind for kind, _, _ in answer.ends] == [21]
    client.open(server.seal(b"\0\0\0\0", 22))
    assert client.owes
    assert alert_of(client.peek(server.seal(b"\0\0\0\1\0", 22))) == DECODE


@pytest.mark.parametrize("suite", ALL_SUITES)
def test_idle_records_are_bounded(suite: int) -> None:
    """Also over a change of process: 32 records without data are enough."""
    server, client = pair(suite)
    for i in range(32):
        warning = bytes([1, 90])
        assert server.open(client.seal(warning, 21)).error is None
        if i % 10 == 0:
            server = Tls.from_state(server.state())
    assert alert_of(server.peek(client.seal(warning, 21))) == UNEXPECTED
    server, client = pair(suite)
    for _ in range(3):
        for _ in range(32):
            assert server.open(client.seal(warning, 21)).error is None
        assert server.open(client.seal(b"data")).error is None


def test_empty_records_and_updates_are_bounded_too() -> None:
    server = make(0x1301, True)
    stream = b"".join(craft_1_3(b"\x17", seq) for seq in range(40))
    opened = server.open(stream)
    assert (opened.records, alert_of(opened)) == (32, UNEXPECTED)
    server, client = pair(0x1301)
    opened = server.open(b"".join(client.key_update(True) for _ in range(40)))
    assert (opened.records, alert_of(opened)) == (32, UNEXPECTED)
    assert len(records(server.seal(b"x"))) == 2  # all of them are answered by one


# --- States --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", ALL_SUITES)
def test_a_state_tells_everything(suite: int) -> None:
    server, client = pair(suite)
    server.open(client.seal(b"x" * 40_000))
    server.seal(b"y" * 20_000)
    state = server.state()
    assert len(state) == STATE_SIZE == 224
    twin = Tls.from_state(bytearray(state))
    assert twin.state() == state
    assert (twin.version, twin.suite, twin.is_server) == (server.version, suite, True)
    assert (twin.read_seq, twin.write_seq) == (3, 2)
    assert twin.seal(b"same") == server.seal(b"same")
    record = client.seal(b"in")
    assert twin.open(record).data == server.open(record).data == b"in"


@pytest.mark.parametrize("suite", ALL_SUITES)
def test_broken_states_are_refused(suite: int) -> None:
    state = make(suite, True).state()
    for length in range(STATE_SIZE):
        with pytest.raises(TlsError):
            Tls.from_state(state[:length])
    broken = {
        0: b"X",
        4: b"\2",
        5: b"\x40",
        6: b"\0\x2f",
        8: b"\0\x20",
        10: b"\x21",
        11: b"\5",
        12: b"\1",
        16: b"\0\0\0\1",
        20: b"\1",
        21: b"\1",
    }
    for at, octets in broken.items():
        with pytest.raises(TlsError) as caught:
            Tls.from_state(state[:at] + octets + state[at + len(octets) :])
        assert caught.value.alert == INTERNAL
    for flag in (8, 0x20) if suite in SUITES_1_2 else (0x10,):  # what its version does not have
        with pytest.raises(TlsError, match="version"):
            Tls.from_state(state[:5] + bytes([state[5] | flag]) + state[6:])
    inside = b"\4" + (b"\1" if suite in SUITES_1_2 else b"\x18") + b"\0\0\1" + b"\0\0\0\1"
    Tls.from_state(state[:11] + inside + state[20:])
    for at, value in ((12, 4), (13, 0xFF), (19, 2)):  # its type, length and what is left of it
        wrong = bytearray(state[:11] + inside + state[20:])
        wrong[at] = value
        with pytest.raises(TlsError, match="inside a handshake message"):
            Tls.from_state(wrong)
    with pytest.raises(TlsError, match="too long"):
        Tls.from_state(state + b"\0")
    with pytest.raises(TlsError, match="without keys"):
        Tls.from_state(state[:40] + bytes(184))


@settings(max_examples=400, deadline=None)
@given(
    suite=st.sampled_from(ALL_SUITES),
    edits=st.lists(st.tuples(st.integers(0, 223), st.integers(0, 255)), min_size=1, max_size=6),
    stream=st.binary(max_size=200),
)
def test_any_state_is_refused_or_usable(
    suite: int, edits: list[tuple[int, int]], stream: bytes
) -> None:
    state = bytearray(make(suite, True).state())
    for at, value in edits:
        state[at] = value
    try:
        tls = Tls.from_state(state)
    except TlsError:
        return
    assert tls.state() == state
    try:
        assert tls.sealed_size(100) == len(tls.seal(b"x" * 100))
        tls.open(b"\x17\x03\x03\x00\x20" + stream)
        tls.open(stream)
        tls.close_notify()
    except TlsError:
        pass


@settings(max_examples=400, deadline=None)
@given(suite=st.sampled_from(ALL_SUITES), seed=st.integers(0, 2**32))
def test_damaged_streams_never_give_wrong_data(suite: int, seed: int) -> None:
    rng = random.Random(seed)
    server, client = pair(suite)
    plain = rng.randbytes(3000)
    stream = bytearray()
    for i in range(0, 3000, 1000):
        stream += client.seal(plain[i : i + 1000])
        if suite in SUITES_1_3:
            stream += client.key_update()
    for _ in range(rng.randint(1, 4)):
        kind, at = rng.randrange(3), rng.randrange(len(stream))
        if kind == 0:
            stream[at] = rng.randrange(256)
        elif kind == 1:
            del stream[at : at + rng.randint(1, 40)]
        else:
            stream[at:at] = rng.randbytes(rng.randint(1, 40))
    opened = server.open(stream)
    assert plain.startswith(opened.data)
