"""Frames between nodes: what is sent arrives, and nothing else is believed."""

from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism.errors import HandoffError
from prism.handoff import wire
from prism.handoff.wire import (
    Decoder,
    Fault,
    Hello,
    Offer,
    Ping,
    Pong,
    Reason,
    Refused,
    Report,
    Sealer,
    State,
    Taken,
    WireError,
)

KEY = bytes(range(32))
numbers = st.integers(0, 2**64 - 1)
blobs = st.binary(max_size=3000)
offers = st.builds(
    Offer,
    flow=st.binary(min_size=36, max_size=36),
    gen=numbers,
    tcp=blobs,
    tls=blobs,
    pending=blobs,
    hops=st.integers(0, 255),
    arrived_ns=numbers,
    sent_ns=numbers,
    id=numbers,
)
texts = st.text(max_size=40)
messages = st.one_of(
    offers,
    st.builds(Taken, numbers),
    st.builds(Refused, st.sampled_from(Reason), texts, numbers),
    st.builds(Ping, numbers),
    st.builds(Pong, numbers),
    st.builds(Report, st.binary(max_size=wire.MAX_REPORT)),
    st.builds(State, st.booleans(), st.integers(0, 2**32 - 1)),
)
hellos = st.builds(
    Hello,
    st.text(max_size=16),
    st.text(max_size=16),
    st.binary(min_size=16, max_size=16),
    st.binary(min_size=16, max_size=16),
)


def seal(sealer: Sealer, message: object) -> bytes:
    match message:
        case Offer():
            return sealer.offer(message, message.id)
        case Taken(number):
            return sealer.taken(number)
        case Refused(reason, text, number):
            return sealer.refused(number, reason, text)
        case Ping(number):
            return sealer.ping(number)
        case Pong(number):
            return sealer.pong(number)
        case Report(data):
            return sealer.report(data)
        case State():
            return sealer.state(message)
        case Hello():
            return sealer.hello(message)
    raise AssertionError(message)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(at)]


def read(decoder: Decoder, parts: list[bytes]) -> list[object]:
    found = []
    for part in parts:
        decoder.push(part)
        while (message := decoder.pop()) is not None:
            found.append(message)
    return found


@given(st.lists(messages, max_size=6), st.lists(st.integers(0, 10**6), max_size=12))
def test_what_is_sent_arrives_however_it_is_split(sent, cuts):
    sealer = Sealer(KEY)
    data = b"".join(seal(sealer, message) for message in sent)
    assert read(Decoder(KEY, wire.MAX_BODY), pieces(data, cuts)) == sent


@given(st.lists(messages, min_size=1, max_size=3))
def test_octet_by_octet(sent):
    sealer = Sealer(KEY)
    data = b"".join(seal(sealer, message) for message in sent)
    assert read(Decoder(KEY, wire.MAX_BODY), [data[n : n + 1] for n in range(len(data))]) == sent


@given(hellos)
def test_hello(hello):
    assert read(Decoder(KEY), [Sealer(KEY).hello(hello)]) == [hello]


@given(messages, numbers, st.integers(1, 255))
def test_one_wrong_octet_is_noticed(message, where, change):
    data = bytearray(seal(Sealer(KEY), message))
    where %= len(data)
    data[where] ^= change
    decoder = Decoder(KEY, wire.MAX_BODY)
    decoder.push(bytes(data))
    try:
        assert decoder.pop() is None  # a length that grew: the rest will never fit
        assert where < 4
    except WireError as error:
        assert error.fault in (Fault.MALFORMED, Fault.BAD_MAC)


@given(st.lists(st.binary(max_size=200), max_size=10))
def test_any_octets_give_an_error_or_nothing(parts):
    decoder = Decoder(KEY, wire.MAX_BODY)
    try:
        assert read(decoder, parts) == []
    except WireError as error:
        assert error.fault in (Fault.MALFORMED, Fault.BAD_MAC)


@given(st.binary(max_size=300), st.integers(0, 255))
def test_a_signed_body_that_makes_no_sense_is_malformed(body, kind):
    data = Sealer(KEY)._seal(kind, body)
    decoder = Decoder(KEY, wire.MAX_BODY)
    decoder.push(data)
    try:
        message = decoder.pop()
    except WireError as error:
        assert error.fault is Fault.MALFORMED
    else:
        assert message is not None
        again = seal(Sealer(KEY), message)
        # A reason of a later version becomes OTHER; all else says the same again.
        assert again == data or getattr(message, "reason", None) is Reason.OTHER or kind == 2


def test_a_frame_sent_twice_is_a_replay():
    sealer = Sealer(KEY)
    first, second = sealer.taken(1), sealer.taken(2)
    decoder = Decoder(KEY)
    decoder.push(first + second + first)
    assert decoder.pop() == Taken(1)
    assert decoder.pop() == Taken(2)
    with pytest.raises(WireError, match="frame 0 where 2 was due") as caught:
        decoder.pop()
    assert caught.value.fault is Fault.REPLAY


def test_a_frame_left_out_is_noticed():
    sealer = Sealer(KEY)
    sealer.taken(1)
    decoder = Decoder(KEY)
    decoder.push(sealer.taken(2))
    with pytest.raises(WireError) as caught:
        decoder.pop()
    assert caught.value.fault is Fault.REPLAY


@pytest.mark.parametrize(
    ("length", "version", "limit"), [(2000, 1, 1024), (10, 2, 1024), (wire.MAX_BODY + 1, 1, None)]
)
def test_headers_out_of_bounds_are_refused_before_the_body_comes(length, version, limit):
    decoder = Decoder(KEY, limit or wire.MAX_BODY)
    decoder.push(struct.pack("!IBBHQ", length, version, 3, 0, 0) + bytes(16))
    with pytest.raises(WireError) as caught:
        decoder.pop()
    assert caught.value.fault is Fault.MALFORMED


def test_the_largest_offer_and_one_more():
    sealer = Sealer(KEY)
    flow = bytes(36)
    with pytest.raises(HandoffError, match="33554433 octets"):
        sealer.offer(Offer(flow, 1, bytes(wire.MAX_OFFER), b"", b"x"), 1)
    offer = Offer(flow, 1, bytes(wire.MAX_OFFER - 1), b"", b"x", id=2)
    frame = sealer.offer(offer, 2)  # counter 0: the failure has not used it up
    step = 256 << 10
    assert read(
        Decoder(KEY, wire.MAX_BODY), [frame[at : at + step] for at in range(0, len(frame), step)]
    ) == [offer]


def test_text_is_cut_between_characters():
    frame = Sealer(KEY).refused(1, Reason.OTHER, "ä" * 150 + "x")
    (message,) = read(Decoder(KEY), [frame])
    assert message == Refused(Reason.OTHER, "ä" * 100, 1)
    (odd,) = read(Decoder(KEY), [Sealer(KEY).refused(1, Reason.OTHER, "x" + "ä" * 150)])
    assert odd.text == "x" + "ä" * 99


def test_a_reason_of_a_later_version_is_other():
    (message,) = read(Decoder(KEY), [Sealer(KEY)._seal(4, struct.pack("!QB", 7, 200), b"\0")])
    assert message == Refused(Reason.OTHER, "", 7)


def test_every_session_and_direction_has_its_own_key():
    nonce = bytes(16)
    cluster = bytes(16)
    caller = Hello("a", "b", nonce)
    listener = Hello("b", "a", b"\1" * 16, nonce)
    keys = {
        *wire.hello_keys(cluster),
        *wire.session_keys(cluster, caller, listener),
        *wire.session_keys(cluster, caller, listener._replace(nonce=b"\2" * 16)),
        *wire.session_keys(cluster, caller._replace(nonce=b"\2" * 16), listener),
        *wire.session_keys(cluster, caller._replace(name="c"), listener),
        *wire.session_keys(bytes(15) + b"\1", caller, listener),
    }
    assert len(keys) == 12


def test_a_new_key_is_in_force_from_the_next_frame_on():
    decoder = Decoder(KEY)
    other = bytes(32)
    decoder.push(Sealer(KEY).ping(1) + Sealer(other).ping(2))
    assert decoder.pop() == Ping(1)
    decoder.rekey(other)
    assert decoder.pop() == Ping(2)


def test_labels():
    assert Taken().label == "taken"
    assert Refused(Reason.TOO_MANY_HOPS).label == "too-many-hops"
