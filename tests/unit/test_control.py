"""The control datagram: layout, signature, replay window."""

from __future__ import annotations

import re
import socket
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism._ext import control as native
from prism.errors import ProtocolError
from prism.flow import Endpoint, Flow, pack_address, unpack_address
from prism.switch.control import (
    NO_FLOW,
    Flags,
    Message,
    Op,
    ReplayWindow,
    Status,
    decode,
    decode_all,
    encode,
    format_mac,
    node_id,
    parse_mac,
)

KEY = bytes(range(16))
FLOW = Flow(Endpoint("192.0.2.7", 40000), Endpoint("198.51.100.1", 443)).pack()
ABI = Path(__file__).parents[2] / "prism/_ext/bpf/prism_abi.h"

# SipHash-2-4's published vectors: key 00..0f, messages of 0, 1, 2, ... octets 00, 01, 02, ...
# as little-endian octets (vectors_sip64 of the reference implementation).
VECTORS = [
    "310e0edd47db6f72", "fd67dc93c539f874", "5a4fa9d909806c0d", "2d7efbd796666785",
    "b7877127e09427cf", "8da699cd64557618", "cee3fe586e46c9cb", "37d1018bf50002ab",
    "6224939a79f5f593", "b0e4a90bdf82009e", "f3b9dd94c5bb5d7a", "a7ad6b22462fb3f4",
    "fbe50e86bc8f1e75", "903d84c02756ea14", "eef27a8e90ca23f7", "e545be4961ca29a1",
]  # fmt: skip


def message(**changes: object) -> Message:
    fields: dict[str, object] = {
        "op": Op.CHOWN,
        "node": 0x1122334455667788,
        "seq": 2**63 + 5,
        "status": Status.STALE,
        "flags": Flags.LOCKED | Flags.REPLY,
        "flow": FLOW,
        "owner": 0xAABBCCDDEEFF0011,
        "owner_endpoint": Endpoint("10.0.0.9", 8080),
        "owner_mac": b"\x02\x00\x5e\x10\x20\x30",
        "gen": 123_456_789_012,
        "cookie": 2**64 - 1,
    }
    return Message(**(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("size", range(len(VECTORS)))
def test_siphash_gives_the_published_vectors(size: int) -> None:
    expected = int.from_bytes(bytes.fromhex(VECTORS[size]), "little")
    assert native.siphash24(KEY, bytes(range(size))) == expected


def test_siphash_of_long_data_depends_on_every_octet() -> None:
    data = bytearray(range(112))
    seen = {native.siphash24(KEY, bytes(data))}
    for at in range(112):
        data[at] ^= 1
        seen.add(native.siphash24(KEY, bytes(data)))
        data[at] ^= 1
    assert len(seen) == 113


@pytest.mark.parametrize("key", [b"", bytes(15), bytes(17)])
def test_a_key_of_the_wrong_size_is_refused(key: bytes) -> None:
    for call in (
        lambda: native.siphash24(key, b""),
        lambda: native.sign(key, bytearray(120)),
        lambda: native.verify(key, bytes(120)),
        lambda: encode(message(), key),
        lambda: decode(bytes(120), key),
    ):
        with pytest.raises(ValueError, match="16 octets"):
            call()


def test_sign_and_verify_agree_and_every_octet_counts() -> None:
    data = bytearray(range(120))
    native.sign(KEY, data)
    assert native.verify(KEY, bytes(data))
    assert data[112:] == native.siphash24(KEY, bytes(data[:112])).to_bytes(8, "big")
    assert not native.verify(bytes(16), bytes(data))
    for at in range(120):
        data[at] ^= 0x80
        assert not native.verify(KEY, bytes(data)), at
        data[at] ^= 0x80
    assert not native.verify(KEY, bytes(data[:119]))
    with pytest.raises(ValueError, match="120"):
        native.sign(KEY, bytearray(119))


def test_the_layout_is_that_of_the_header() -> None:
    """Offsets by an independent encoder: plain struct, after struct prism_msg."""
    original = message()
    expected = struct.pack(
        "!IBBBBQQ36sH6sI16sQQQ",
        0x5052534D,
        1,
        4,
        3,
        0x81,
        original.node,
        original.seq,
        FLOW,
        8080,
        original.owner_mac,
        0,
        bytes(10) + b"\xff\xff" + socket.inet_aton("10.0.0.9"),
        original.owner,
        original.gen,
        original.cookie,
    )
    data = encode(original, KEY)
    assert data[:112] == expected
    assert len(data) == 120


def test_the_numbers_are_those_of_the_header() -> None:
    text = ABI.read_text()

    def constants(prefix: str) -> dict[str, int]:
        pattern = rf"PRISM_{prefix}(\w+)(?: =|\t| )+ ?(0x[0-9a-f]+|\d+)"
        return {name: int(number, 0) for name, number in re.findall(pattern, text)}

    assert constants("OP_") == {op.name: op.value for op in Op}
    flags = constants("FLAG_")
    assert flags == {flag.name: flag.value for flag in Flags if flag}
    status = re.search(r"enum prism_status \{(.*?)\};", text, re.S)
    assert status is not None
    names = re.findall(r"PRISM_(\w+) = (\d+)", status[1])
    assert {name: int(number) for name, number in names} == {s.name: s.value for s in Status}


ADDRESSES = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(
    lambda address: unpack_address(pack_address(str(address)))
)
U64 = st.integers(0, 2**64 - 1)


@given(
    op=st.integers(0, 255),
    status=st.integers(0, 255),
    flags=st.integers(0, 255),
    numbers=st.tuples(U64, U64, U64, U64, U64),
    flow=st.binary(min_size=36, max_size=36),
    host=ADDRESSES,
    port=st.integers(0, 65535),
    mac=st.binary(min_size=6, max_size=6),
)
def test_decoding_is_the_inverse_of_encoding(
    op: int,
    status: int,
    flags: int,
    numbers: tuple[int, int, int, int, int],
    flow: bytes,
    host: str,
    port: int,
    mac: bytes,
) -> None:
    node, seq, owner, gen, cookie = numbers
    original = Message(
        op, node, seq, status, flags, flow, owner, Endpoint(host, port), mac, gen, cookie
    )
    assert decode(encode(original, KEY), KEY) == original


def test_known_operations_and_statuses_are_enumerated_and_others_are_numbers() -> None:
    known = decode(encode(message(), KEY), KEY)
    assert known.op is Op.CHOWN
    assert known.status is Status.STALE
    unknown = decode(encode(message(op=99, status=77), KEY), KEY)
    assert (unknown.op, unknown.status) == (99, 77)


@given(st.binary(max_size=260))
def test_what_is_not_signed_is_never_decoded(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(data, KEY)
    with pytest.raises(ProtocolError):
        decode_all(data, KEY)


@pytest.mark.parametrize("at", [0, 4], ids=["magic", "version"])
def test_another_magic_or_version_is_refused_even_when_signed(at: int) -> None:
    data = bytearray(encode(message(), KEY))
    data[at] ^= 1
    native.sign(KEY, data)
    assert native.verify(KEY, bytes(data))
    with pytest.raises(ProtocolError):
        decode(bytes(data), KEY)


def test_a_list_reply_is_several_messages_each_signed() -> None:
    messages = [message(gen=gen, op=Op.LIST) for gen in range(11)]
    data = b"".join(encode(each, KEY) for each in messages)
    assert decode_all(data, KEY) == messages
    damaged = bytearray(data)
    damaged[10 * 120 + 100] ^= 1
    for wrong in (bytes(damaged), data[:-1], b""):
        with pytest.raises(ProtocolError):
            decode_all(wrong, KEY)


@pytest.mark.parametrize(
    "changes",
    [
        {"gen": 2**64},
        {"gen": -1},
        {"op": 256},
        {"flow": bytes(35)},
        {"owner_mac": bytes(7)},
        {"owner_endpoint": Endpoint("10.0.0.9", 65536)},
        {"owner_endpoint": Endpoint("be1", 80)},
    ],
)
def test_a_field_out_of_range_is_a_protocol_error(changes: dict[str, object]) -> None:
    with pytest.raises(ProtocolError):
        encode(message(**changes), KEY)


def test_a_reply_names_the_request_and_nothing_of_a_rule() -> None:
    reply = message(flags=0, status=0).reply(Status.NOENT, gen=3)
    assert (reply.op, reply.node, reply.seq, reply.flow) == (*message()[:3], FLOW)
    assert reply.is_reply
    assert not reply.locked
    assert (reply.owner, reply.gen, reply.cookie) == (0, 3, 0)


def test_node_ids_are_stable_and_never_the_agents() -> None:
    assert node_id("be1/0") == 0x19C037AAFEC94DEA
    assert node_id("be1/0") != node_id("be1/1")
    with pytest.raises(ProtocolError):
        node_id("")


def test_mac_addresses_as_text() -> None:
    assert parse_mac("02:00:5e:10:20:30") == b"\x02\x00\x5e\x10\x20\x30"
    assert format_mac(parse_mac("02:00:5e:10:20:30")) == "02:00:5e:10:20:30"
    for wrong in ("", "02:00:5e:10:20", "02005e102030", "zz:00:5e:10:20:30"):
        with pytest.raises(ProtocolError):
            parse_mac(wrong)


def test_nothing_is_said_of_no_flow() -> None:
    assert Message(Op.HELLO, 1, 1).flow == NO_FLOW


class TestReplayWindow:
    def test_each_number_is_accepted_once(self) -> None:
        window = ReplayWindow()
        assert [window.accept(seq) for seq in (10, 11, 10, 9, 9, 11)] == [
            True, True, False, True, False, False,
        ]  # fmt: skip

    def test_what_is_older_than_64_is_refused(self) -> None:
        window = ReplayWindow()
        assert window.accept(1000)
        assert window.accept(1000 - 63)
        assert not window.accept(1000 - 64)

    @given(st.lists(st.integers(0, 200), max_size=300))
    def test_it_agrees_with_a_set(self, sequences: list[int]) -> None:
        window, used, highest = ReplayWindow(), set[int](), -1
        for seq in sequences:
            expected = seq not in used and seq > highest - 64
            assert window.accept(seq) is expected
            if expected:
                used.add(seq)
                highest = max(highest, seq)


def test_exchange_sets_other_datagrams_aside_in_their_order() -> None:
    left, right = _pair()
    request = encode(message(op=Op.GET, flags=0, status=0), KEY)
    answer = encode(message(op=Op.GET, flags=Flags.REPLY, status=0), KEY)
    earlier = [encode(message(seq=n, flags=Flags.REPLY), KEY) for n in range(3)]
    for each in (*earlier, b"x", answer, b"after"):
        right.send(each)
    got, others = native.exchange(left.fileno(), request, 0)
    assert got == answer
    assert list(others) == [*earlier, b"x"]
    assert right.recv(200) == request
    assert left.recv(200) == b"after"


def test_exchange_does_not_take_an_echo_for_an_answer() -> None:
    left, right = _pair()
    request = encode(message(op=Op.GET, flags=0, status=0), KEY)
    right.send(request)
    assert native.exchange(left.fileno(), request, 0) == (None, [request])


def test_exchange_waits_no_longer_than_told_and_leaves_the_rest() -> None:
    left, right = _pair()
    request = encode(message(flags=0), KEY)
    assert native.exchange(left.fileno(), request, 1000) == (None, ())
    for number in range(20):
        right.send(b"%d" % number)
    got, others = native.exchange(left.fileno(), request, 1000)
    assert got is None
    assert list(others) == [b"%d" % number for number in range(16)]
    assert left.recv(10) == b"16"


def test_exchange_reports_a_send_that_failed() -> None:
    left, _ = _pair()
    left.close()
    with pytest.raises(OSError, match="switch"):
        native.exchange(left.fileno() if left.fileno() >= 0 else 10**6, bytes(120), 0)


def _pair() -> tuple[socket.socket, socket.socket]:
    left = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    right = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    for sock in (left, right):
        sock.bind(("127.0.0.1", 0))
    left.connect(right.getsockname())
    right.connect(left.getsockname())
    left.setblocking(False)
    right.settimeout(2)
    return left, right
