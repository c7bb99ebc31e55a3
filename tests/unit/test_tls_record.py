"""Keys, records, peeking, sealing and limits of the TLS record layer, with known vectors."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import hmac
import os
import random
import struct
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openssl_peer import records
from tls_pairs import (
    ALL_SUITES,
    CLIENT_RANDOM,
    INTERNAL,
    MASTER,
    SECRETS,
    SERVER_RANDOM,
    SHA384,
    SUITES_1_2,
    SUITES_1_3,
    alert_of,
    make,
    pair,
)

from prism._ext import tls_record
from prism._ext.tls_record import RX, TX, Opened, Tls, TlsError


def unhex(text: str) -> bytes:
    return bytes.fromhex(text)


# --- Vectors -------------------------------------------------------------------------------------


def test_hkdf_expand_of_rfc_5869() -> None:
    prk = unhex("077709362c2e32df0ddc3f0dc47bba6390b6c73bb50f9c3122ec844ad7c2b3e5")
    okm = "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    assert tls_record.hkdf_expand("sha256", prk, unhex("f0f1f2f3f4f5f6f7f8f9"), 42) == unhex(okm)


class Rfc8448:
    """RFC 8448, section 3: simple 1-RTT handshake (TLS_AES_128_GCM_SHA256)."""

    CLIENT_SECRET = unhex("9e40646ce79a7f9dc05af8889bce6552875afa0b06df0087f792ebb7c17504a5")
    SERVER_SECRET = unhex("a11af9f05531f856ad47116b45a950328204b4f44bfb6b3a4b4f1f3fcb631643")
    CLIENT_KEY = unhex("17422dda596ed5d9acd890e3c63f5051")
    CLIENT_IV = unhex("5b78923dee08579033e523d9")
    SERVER_KEY = unhex("9f02283b6c9c07efc26bb9f2ac92e356")
    SERVER_IV = unhex("cf782b88dd83549aadf1e984")
    DATA = bytes(range(50))
    CLIENT_DATA = unhex(
        "1703030043a23f7054b62c94d0affafe8228ba55cbefacea42f914aa66bcab3f2b9819a8a5b46b395bd54a9a"
        "20441e2b62974e1f5a6292a2977014bd1e3deae63aeebb21694915e4"
    )
    SERVER_DATA = unhex(
        "17030300432e937e11ef4ac740e538ad36005fc4a46932fc3225d05f82aa1b36e30efaf97d90e6dffc602dcb"
        "501a59a8fcc49c4bf2e5f0a21c0047c2abf332540dd032e167c2955d"
    )
    CLIENT_CLOSE = unhex("1703030013c9872760655666b74d7ff1153efd6db6d0b0e3")
    SERVER_CLOSE = unhex("1703030013b58fd67166ebf599d24720cfbe7efa7a8864a9")


def test_the_trace_of_rfc_8448() -> None:
    v = Rfc8448
    for secret, key, iv in (
        (v.CLIENT_SECRET, v.CLIENT_KEY, v.CLIENT_IV),
        (v.SERVER_SECRET, v.SERVER_KEY, v.SERVER_IV),
    ):
        assert tls_record.expand_label("sha256", secret, "key", 16) == key
        assert tls_record.expand_label("sha256", secret, "iv", 12) == iv
    # The server's session ticket was its record 0.
    secrets = v.CLIENT_SECRET, v.SERVER_SECRET
    server = Tls.from_traffic_secrets(0x1301, *secrets, is_server=True, write_seq=1)
    client = Tls.from_traffic_secrets(0x1301, *secrets, is_server=False, read_seq=1)
    assert client.seal(v.DATA) == v.CLIENT_DATA
    assert server.open(v.CLIENT_DATA).data == v.DATA
    assert server.seal(v.DATA) == v.SERVER_DATA
    assert client.open(v.SERVER_DATA).data == v.DATA
    assert client.close_notify() == v.CLIENT_CLOSE
    assert server.open(v.CLIENT_CLOSE).alert == 0
    assert server.close_notify() == v.SERVER_CLOSE
    assert client.open(v.SERVER_CLOSE).closed


def test_the_prf_of_tls_1_2() -> None:
    """The vectors that were published for P_SHA256 and P_SHA384 on the IETF's list."""
    secret, seed = "9bbe436ba940f017b17652849a71db35", "a0ba9f936cda311827a6f796ffd5198c"
    assert tls_record.prf("sha256", unhex(secret), "test label", unhex(seed), 100) == unhex(
        "e3f229ba727be17b8d122620557cd453c2aab21d07c3d495329b52d4e61edb5a6b301791e90d35c9c9a46b4e"
        "14baf9af0fa022f7077def17abfd3797c0564bab4fbc91666e9def9b97fce34f796789baa48082d122ee42c5"
        "a72e5a5110fff70187347b66"
    )
    secret, seed = "b80b733d6ceefcdc71566ea48e5567df", "cd665cf6a8447dd6ff8b27555edb7465"
    assert tls_record.prf("sha384", unhex(secret), "test label", unhex(seed), 148) == unhex(
        "7b0c18e9ced410ed1804f2cfa34a336a1c14dffb4900bb5fd7942107e81c83cde9ca0faa60be9fe34f82b123"
        "3c9146a0e534cb400fed2700884f9dc236f80edd8bfa961144c9e8d792eca722a7b32fc3d416d473ebc2c5fd"
        "4abfdad05d9184259b5bf8cd4d90fa0d31e2dec479e4f1a26066f2eea9a69236a3e52655c9e9aee691c8f3a2"
        "6854308d5eaa3be85e0990703d73e56f"
    )


@pytest.mark.parametrize("suite", SUITES_1_2)
def test_the_key_block_of_tls_1_2(suite: int) -> None:
    """RFC 5246, 6.3, reckoned with hmac and read off the kernel's structs."""
    hash_name = "sha384" if suite in SHA384 else "sha256"
    key_len = 16 if suite in (0xC02B, 0xC02F) else 32
    iv_len = 12 if suite in (0xCCA8, 0xCCA9) else 4
    seed = b"key expansion" + SERVER_RANDOM + CLIENT_RANDOM
    block, a = b"", seed
    while len(block) < 2 * (key_len + iv_len):
        a = hmac.digest(MASTER, a, hash_name)
        block += hmac.digest(MASTER, a + seed, hash_name)
    keys = block[:key_len], block[key_len : 2 * key_len]
    rest = block[2 * key_len :]
    ivs = rest[:iv_len], rest[iv_len : 2 * iv_len]
    for is_server in (True, False):
        tls = make(suite, is_server, 5, 9)
        for direction, seq in ((RX, 5), (TX, 9)):
            whose = int((direction == TX) == is_server)  # 0: of what the client sends
            info = tls.crypto_info(direction)
            count = seq.to_bytes(8, "big")
            if iv_len == 12:
                assert info[4:] == ivs[whose] + keys[whose] + count
            else:
                assert info[4:] == count + keys[whose] + ivs[whose] + count


# --- The kernel's structs ------------------------------------------------------------------------

KERNEL = {  # linux/tls.h: cipher type, then the lengths of iv, key, salt, rec_seq
    "AES_GCM_128": (51, 8, 16, 4, 8),
    "AES_GCM_256": (52, 8, 32, 4, 8),
    "CHACHA20_POLY1305": (54, 12, 32, 0, 8),
}


@pytest.mark.parametrize(
    ("suite", "name"),
    [(0x1301, "AES_GCM_128"), (0x1302, "AES_GCM_256"), (0x1303, "CHACHA20_POLY1305")],
)
def test_the_kernel_gets_the_same_keys(suite: int, name: str) -> None:
    header = Path("/usr/include/linux/tls.h").read_text()
    for field, value in zip(
        ("", "_IV_SIZE", "_KEY_SIZE", "_SALT_SIZE", "_REC_SEQ_SIZE"), KERNEL[name], strict=True
    ):
        (line,) = [
            x for x in header.splitlines() if x.split()[1:2] == [f"TLS_CIPHER_{name}{field}"]
        ]
        assert int(line.split()[2]) == value
    cipher, iv_len, key_len, salt_len, _ = KERNEL[name]
    hash_name = "sha384" if suite in SHA384 else "sha256"
    secret = SECRETS[1][: 48 if suite in SHA384 else 32]
    key = tls_record.expand_label(hash_name, secret, "key", key_len)
    nonce = tls_record.expand_label(hash_name, secret, "iv", 12)
    info = make(suite, True, write_seq=258).crypto_info(TX)
    assert struct.unpack("=HH", info[:4]) == (0x0304, cipher)
    assert info[4 : 4 + iv_len] == nonce[salt_len:]
    assert info[4 + iv_len :] == key + nonce[:salt_len] + (258).to_bytes(8, "big")


@pytest.mark.parametrize("suite", ALL_SUITES)
def test_the_sequence_comes_back_from_the_kernel(suite: int) -> None:
    tls, kernel = make(suite, True, 3, 4), make(suite, True, 1003, 2004)
    for direction in (TX, RX):
        tls.sync(direction, kernel.crypto_info(direction))
    assert (tls.read_seq, tls.write_seq) == (1003, 2004)
    for direction in (TX, RX):
        with pytest.raises(TlsError, match="behind"):
            tls.sync(direction, make(suite, True, 3, 4).crypto_info(direction))
        with pytest.raises(TlsError, match="another key"):
            tls.sync(direction, make(suite, False, 5000, 5000).crypto_info(direction))
        with pytest.raises(TlsError, match="length"):
            tls.sync(direction, kernel.crypto_info(direction)[:-1])
    with pytest.raises(ValueError):
        tls.crypto_info(3)
    with pytest.raises(ValueError):
        tls.sync(0, b"")


def test_what_the_kernel_read_makes_opened_records_stale() -> None:
    server, client = pair(0x1301)
    opened = server.peek(client.seal(b"x"))
    server.sync(RX, make(0x1301, True, 5, 0).crypto_info(RX))
    with pytest.raises(ValueError, match="do not follow"):
        server.commit(opened)
    assert server.read_seq == 5


# --- Peeking and committing ----------------------------------------------------------------------


@pytest.mark.parametrize("suite", ALL_SUITES)
def test_peeking_changes_nothing(suite: int) -> None:
    server, client = pair(suite)
    stream = client.seal(b"a" * 40_000) + client.seal(b"bc")
    before = server.state()
    opened = server.peek(stream + b"\x17\x03")
    assert server.state() == before
    assert opened.data == b"a" * 40_000 + b"bc"
    assert (opened.records, opened.consumed, opened.wanted) == (4, len(stream), 5)
    assert not opened.closed and opened.alert is None and opened.error is None
    assert [end for _, end, _ in opened.ends] == [16384, 32768, 40_000, 40_002]
    assert opened.ends[-1][2] == len(stream)

    sizes = [len(record) for record in records(stream)]
    assert opened.cut(0) == (0, 0, 0)
    assert opened.cut(1) == (1, sizes[0], 16384)
    assert opened.cut(16384) == (1, sizes[0], 16384)
    assert opened.cut(16385) == (2, sum(sizes[:2]), 32768)
    assert opened.cut(40_002) == (4, len(stream), 40_002)
    for wrong in (-1, 40_003):
        with pytest.raises(ValueError):
            opened.cut(wrong)

    assert server.commit(opened, 0) == 0
    assert server.commit(opened, 1) == sizes[0]
    assert server.read_seq == 1
    assert server.commit(opened, 1) == 0
    assert server.peek(stream[sizes[0] :]).data == opened.data[16384:]
    assert server.commit(opened) == sum(sizes[1:])
    assert server.read_seq == 4
    for wrong in (-1, 5):
        with pytest.raises(ValueError):
            server.commit(opened, wrong)


def test_peeking_goes_on_where_it_was() -> None:
    server, client = pair(0x1301)
    first = client.seal(b"1") + client.key_update()
    second = client.seal(b"2") + client.key_update(True) + client.seal(b"3")
    one = server.peek(first)
    two = server.peek(second, one)
    three = server.peek(client.seal(b"4"), two)
    assert (one.data, two.data, three.data) == (b"1", b"23", b"4")
    for late in (two, three):
        with pytest.raises(ValueError, match="do not follow"):
            server.commit(late)
    server.commit(one)
    server.commit(two)
    with pytest.raises(ValueError, match="committed already"):
        server.peek(second, one)
    with pytest.raises(ValueError, match="do not follow"):
        server.commit(one)
    assert server.owes
    server.commit(three)
    assert server.open(client.seal(b"5")).data == b"5"


def test_what_is_owed_is_owed_once() -> None:
    server, client = pair(0x1301)
    opened = server.peek(client.key_update(True) + client.seal(b"x"))
    server.commit(opened, 1)
    assert len(records(server.seal(b""))) == 1
    assert not server.owes
    server.commit(opened)  # the rest alone
    assert not server.owes
    assert server.seal(b"") == b""


@settings(max_examples=60, deadline=None)
@given(suite=st.sampled_from(ALL_SUITES), seed=st.integers(0, 2**32), data=st.data())
def test_any_cut_of_the_stream_gives_the_same_data(
    suite: int, seed: int, data: st.DataObject
) -> None:
    rng = random.Random(seed)
    server, client = pair(suite)
    plain, stream = b"", b""
    for _ in range(rng.randint(1, 8)):
        if suite in SUITES_1_3 and rng.random() < 0.3:
            stream += client.key_update(rng.random() < 0.5)
        piece = rng.randbytes(rng.choice((1, 17, 500, 16384, 20_000)))
        plain += piece
        stream += client.seal(piece, padding=rng.choice((0, 0, 300)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    got, kept, start = b"", b"", 0
    for end in [*cuts, len(stream)]:
        kept += stream[start:end]
        start = end
        opened = server.peek(kept)
        assert opened.error is None
        assert opened.consumed + opened.wanted > len(kept)
        if rng.random() < 0.5:  # only a part of what is there, or nothing
            count = rng.randint(0, opened.records)
            taken = server.commit(opened, count)
            got += opened.data[: opened.ends[count - 1][1] if count else 0]
        else:
            taken = server.commit(opened)
            got += opened.data
        kept = kept[taken:]
        if rng.random() < 0.5:
            server = Tls.from_state(server.state())
    got += server.open(kept).data
    assert got == plain
    answer = server.seal(b"answer")
    assert client.open(answer).data == b"answer"


def test_how_much_is_wanted() -> None:
    server, client = pair(0x1301)
    record = client.seal(b"x" * 100)
    for have in range(len(record)):
        opened = server.peek(record[:have])
        assert (opened.records, opened.consumed, opened.data) == (0, 0, b"")
        assert opened.wanted == (5 if have < 5 else len(record))
    assert server.peek(record).wanted == 5
    assert server.peek(record + client.close_notify()).wanted == 0


# --- Sealing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", ALL_SUITES)
@pytest.mark.parametrize("size", [1, 63, 16383, 16384, 16385, 3 * 16384, 100_001])
def test_records_are_as_large_as_they_may_be(suite: int, size: int) -> None:
    server, client = pair(suite)
    plain = random.Random(size).randbytes(size)
    expected = server.sealed_size(size)
    sealed = server.seal(memoryview(plain))
    assert len(sealed) == expected
    assert len(records(sealed)) == -(-size // 16384) == server.write_seq
    assert client.open(bytearray(sealed)).data == plain
    if suite in SUITES_1_2[:4]:
        assert sealed[5:13] == bytes(8)  # the explicit nonce is the sequence number


@pytest.mark.parametrize("suite", ALL_SUITES)
def test_files(suite: int, tmp_path: Path) -> None:
    content = random.Random(3).randbytes(50_000)
    (tmp_path / "file").write_bytes(content)
    server, client = pair(suite)
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        for offset, length in ((0, 50_000), (100, 20_000), (49_999, 1), (40_000, 30_000)):
            twin = Tls.from_state(server.state())
            sealed, taken = server.seal_file(fd, offset, length)
            part = content[offset : offset + length]
            assert taken == len(part)
            assert client.open(sealed).data == part
            assert sealed == twin.seal(part)
        assert server.seal_file(fd, 50_000, 10) == (b"", 0)
        assert server.seal_file(fd, 0, 0) == (b"", 0)
    finally:
        os.close(fd)
    seq = server.write_seq
    with pytest.raises(OSError, match="could not be read") as caught:
        server.seal_file(fd, 0, 10)
    assert caught.value.errno == 9
    assert server.write_seq == seq


def test_a_file_that_cannot_be_read_still_gives_what_is_owed(tmp_path: Path) -> None:
    server, client = pair(0x1301)
    server.open(client.key_update(True))
    sealed, taken = server.seal_file(-1, 0, 100)
    assert taken == 0 and len(records(sealed)) == 1
    assert client.open(sealed).ends == [(22, 0, len(sealed))]
    with pytest.raises(OSError):
        server.seal_file(-1, 0, 100)


def test_fragments_can_be_smaller() -> None:
    tls = Tls.from_traffic_secrets(
        0x1301, SECRETS[0][:32], SECRETS[1][:32], is_server=True, max_fragment=512
    )
    assert tls.max_fragment == 512
    assert len(records(Tls.from_state(tls.state()).seal(b"x" * 5000))) == 10
    for wrong in (63, 16385):
        with pytest.raises(ValueError):
            Tls.from_traffic_secrets(
                0x1301, bytes(32), bytes(32), is_server=True, max_fragment=wrong
            )


@pytest.mark.parametrize("suite", ALL_SUITES)
def test_nothing_is_sealed_after_the_end(suite: int) -> None:
    server, client = pair(suite)
    server.alert(90, fatal=False)  # user_canceled, say: not the end
    server.seal(b"x")
    server.close_notify()
    for tls in (server, Tls.from_state(server.state())):
        for call, argument in ((tls.seal, b"x"), (tls.alert, 80), (tls.alert, 0)):
            with pytest.raises(TlsError):
                call(argument)
        assert tls.write_closed and not tls.read_closed
        assert tls.peek(client.seal(b"still read")).data in (b"still read", b"")


# --- Limits (RFC 8446, 5.5) ----------------------------------------------------------------------

SOFT, HARD = 1 << 23, 23_726_566


def at_seq(tls: Tls, read_seq: int, write_seq: int) -> Tls:
    state = tls.state()
    return Tls.from_state(state[:24] + struct.pack("!QQ", read_seq, write_seq) + state[40:])


@pytest.mark.parametrize("suite", [0x1301, 0x1302])
def test_the_key_moves_on_by_itself(suite: int) -> None:
    server, client = pair(suite)
    server, client = at_seq(server, 0, SOFT - 2), at_seq(client, SOFT - 2, 0)
    assert len(records(server.seal(b"x" * 20_000))) == 2
    client = at_seq(client, SOFT, 0)
    sealed = server.seal(b"y" * 20_000)
    assert len(sealed) == len(b"y" * 20_000) + 3 * 22 + 5
    opened = client.open(sealed)
    assert [kind for kind, _, _ in opened.ends] == [22, 23, 23]
    assert opened.data == b"y" * 20_000
    assert server.write_seq == 2


@pytest.mark.parametrize("suite", [0x1301, 0x1302])
def test_the_peer_is_asked_for_a_new_key(suite: int) -> None:
    server, client = pair(suite)
    server, client = at_seq(server, SOFT, 0), at_seq(client, 0, SOFT)
    opened = client.open(server.seal(b"x"))
    assert [kind for kind, _, _ in opened.ends] == [22, 23]
    assert client.owes
    server = Tls.from_state(server.state())
    assert len(records(server.seal(b"once only"))) == 1
    assert server.open(client.seal(b"answer")).data == b"answer"
    assert server.read_seq == 1
    assert len(records(server.seal(b"x"))) == 1
    assert len(records(at_seq(server, SOFT, 5).seal(b"x"))) == 2


@pytest.mark.parametrize("suite", [0xC02B, 0xC030])
def test_tls_1_2_ends_at_the_limit(suite: int) -> None:
    tls = at_seq(make(suite, True), 0, HARD - 17)
    tls.seal(b"the last")
    with pytest.raises(TlsError) as caught:
        tls.seal(b"one too many")
    assert caught.value.alert == INTERNAL
    assert tls.write_seq == HARD - 16
    tls.close_notify()


@pytest.mark.parametrize("suite", [0x1303, 0xCCA8])
def test_chacha20_has_no_limit_but_the_sequence_number(suite: int) -> None:
    server, client = at_seq(make(suite, True), 0, 1 << 40), at_seq(make(suite, False), 1 << 40, 0)
    assert client.open(server.seal(b"x")).data == b"x"
    assert len(records(server.seal(b"x"))) == 1
    top = 2**64 - 1
    with pytest.raises(TlsError):
        at_seq(server, 0, top).seal(b"x")
    with pytest.raises(TlsError):
        at_seq(server, 0, top).close_notify()
    record = at_seq(server, 0, top - 17).seal(b"x")
    assert at_seq(client, top - 17, 0).open(record).data == b"x"
    assert alert_of(at_seq(client, top, 0).peek(record)) == INTERNAL


# --- Keys ----------------------------------------------------------------------------------------


def memory_of(tls: Tls) -> bytes:
    return ctypes.string_at(id(tls), type(tls).__basicsize__)


@pytest.mark.parametrize("suite", ALL_SUITES)
def test_wiping(suite: int) -> None:
    tls = make(suite, True, 7, 9)
    tls.seal(b"x")
    key = tls.state()[88:104]
    secret = tls.state()[40:72]
    assert key in memory_of(tls)
    tls.wipe()
    tls.wipe()
    assert key not in memory_of(tls)
    if any(secret):
        assert secret not in memory_of(tls)
    assert repr(tls) == "<Tls wiped>"
    assert (tls.read_seq, tls.write_seq, tls.owes) == (0, 0, False)
    for call in (
        tls.state,
        tls.close_notify,
        tls.key_update,
        lambda: tls.seal(b"x"),
        lambda: tls.sealed_size(1),
        lambda: tls.seal_file(0, 0, 1),
        lambda: tls.peek(b"x"),
        lambda: tls.open(b"x"),
        lambda: tls.commit(make(suite, True).peek(b"")),
        lambda: tls.crypto_info(TX),
        lambda: tls.sync(TX, b"x"),
        lambda: tls.version,
        lambda: tls.suite,
    ):
        with pytest.raises(ValueError, match="wiped"):
            call()


def test_what_is_dropped_is_wiped() -> None:
    tls = make(0x1302, True)
    key, address, size = tls.state()[88:120], id(tls), type(tls).__basicsize__
    assert key in ctypes.string_at(address, size)
    del tls
    assert key not in ctypes.string_at(address, size)


@pytest.mark.parametrize("suite", ALL_SUITES)
def test_keys_are_not_shown(suite: int) -> None:
    import pickle

    tls = make(suite, True)
    state = tls.state()
    shown = repr(tls) + str(tls) + repr(tls.peek(b""))
    for at in range(40, 200, 4):
        if any(state[at : at + 4]):
            assert state[at : at + 4].hex() not in shown
    with pytest.raises(TypeError):
        pickle.dumps(tls)


def test_arguments_are_checked() -> None:
    good = bytes(range(32))
    for suite in (0xC02B, 0x1304, 0x1300, -1, 0x11301):
        with pytest.raises(ValueError, match="suite"):
            Tls.from_traffic_secrets(suite, good, good, is_server=True)
    for suite in (0x1301, 0xC013, 0x009C):
        with pytest.raises(ValueError, match="suite"):
            Tls.from_master_secret(suite, MASTER, good, good, is_server=True)
    for client, server in ((good[1:], good), (good, good + b"x"), (b"", good)):
        with pytest.raises(ValueError, match="octets"):
            Tls.from_traffic_secrets(0x1301, client, server, is_server=True)
    for arguments in ((MASTER[1:], good, good), (MASTER, good[1:], good), (MASTER, good, b"")):
        with pytest.raises(ValueError, match="octets"):
            Tls.from_master_secret(0xC02B, *arguments, is_server=True)
    for kind in (Tls, Opened):
        with pytest.raises(TypeError):
            kind()
    tls = make(0xC02B, True)
    with pytest.raises(ValueError, match=r"TLS 1\.3"):
        tls.key_update()
    for call in (
        lambda: tls.seal(b"x", 256),
        lambda: tls.seal(b"x", padding=-1),
        lambda: tls.alert(256),
        lambda: tls.seal_file(0, 0, -1),
        lambda: tls.sealed_size(-1),
        lambda: tls.sealed_size((1 << 30) + 1),
    ):
        with pytest.raises(ValueError):
            call()


# --- Threads and memory --------------------------------------------------------------------------


def test_sealing_releases_the_gil_and_excludes_itself() -> None:
    server, client = pair(0x1301)
    data = bytes(64 << 20)
    refusals = 0
    thread = threading.Thread(target=server.seal, args=(data,))
    thread.start()
    seen = 0
    while thread.is_alive():
        seen += 1
        try:
            server.seal(b"x")
        except RuntimeError:
            refusals += 1
            with pytest.raises(RuntimeError):
                server.state()
            with pytest.raises(RuntimeError):
                server.wipe()
            assert server.peek(b"").records == 0  # the other direction is free
        time.sleep(0.001)
    thread.join()
    assert refusals > 0
    server.state()
    assert hashlib.sha256(client.seal(b"x")).digest()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_nothing_leaks() -> None:
    server, client = pair(0x1302)
    data, bad = b"x" * 5000, b"\x17\x03\x03\0\x40" + bytes(64)

    def turn(times: int) -> None:
        nonlocal server
        for i in range(times):
            assert client.open(server.seal(data)).data == data
            if i % 10 == 0:
                opened = client.peek(server.key_update(True) + server.seal(b"x"))
                client.commit(opened)
                server.open(client.seal(b""))
                client.peek(bad)
                server = Tls.from_state(server.state())

    turn(2000)
    gc.collect()
    before = resident()
    turn(50_000)
    gc.collect()
    assert resident() - before < 2 << 20


def opened_by_kernel(tls: Tls, records: int) -> None:
    """What a kernel does: it counts records."""
    info, number = tls.crypto_info(RX), (tls.read_seq + records).to_bytes(8, "big")
    if tls.version == 0x0303 and tls.suite not in (0xCCA8, 0xCCA9):
        info = info[:4] + number + info[12:]  # the explicit nonce counts, too
    tls.sync(RX, info[:-8] + number)


@pytest.mark.parametrize("suite", SUITES_1_3, ids=hex)
def test_a_key_update_that_the_kernel_has_opened(suite: int) -> None:
    server, client = pair(suite)
    client.seal(b"x")
    client.key_update(True)
    opened_by_kernel(server, 2)
    server.note(22, bytes((24, 0, 0)))
    assert server.in_message
    assert not server.owes
    opened_by_kernel(server, 1)
    server.note(22, bytes((1, 1)))
    assert not server.in_message
    assert server.owes
    assert server.read_seq == 0
    assert server.open(client.seal(b"behind")).data == b"behind"
    assert client.open(server.seal(b"")).error is None


@pytest.mark.parametrize("suite", ALL_SUITES, ids=hex)
def test_an_alert_that_the_kernel_has_opened(suite: int) -> None:
    server, _ = pair(suite)
    opened_by_kernel(server, 1)
    server.note(21, b"\x01\x00")
    assert server.read_closed
    assert not server.write_closed


def test_what_the_kernel_has_opened_and_may_not_be() -> None:
    server, _ = pair(0x1301)
    with pytest.raises(TlsError) as caught:
        server.note(20, b"\x01")
    assert caught.value.alert == 10
    with pytest.raises(TlsError) as caught:
        server.note(22, bytes((1, 0, 0, 1, 0)))  # a ClientHello
    assert caught.value.alert == 10
    server.wipe()
    with pytest.raises(ValueError, match="wiped"):
        server.note(21, b"\x01\x00")


def test_many_messages_are_too_many_unless_there_is_data() -> None:
    server, _ = pair(0xC02B)
    for _ in range(40):
        opened_by_kernel(server, 2)
        server.note(21, bytes((1, 90)))  # user_canceled: says nothing
    with pytest.raises(TlsError) as caught:
        for _ in range(33):
            opened_by_kernel(server, 1)
            server.note(21, bytes((1, 90)))
    assert caught.value.alert == 10
