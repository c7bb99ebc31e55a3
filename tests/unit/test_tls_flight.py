"""Which records of a handshake are fed together."""

from __future__ import annotations

import pytest

from prism._ext.tls_record import MAX_FRAGMENT, flight

MOST = MAX_FRAGMENT + 256  # octets of ciphertext in a record (RFC 8446, 5.2)


def record(kind: int, length: int = 1) -> bytes:
    return bytes((kind, 3, 3)) + length.to_bytes(2) + bytes(length)


HELLO, HANDSHAKE, CCS = record(22, 40), record(22, 30), record(20)
FINISHED, DATA = record(23, 53), record(23, 100)


@pytest.mark.parametrize(
    ("begun", "records", "pieces"),
    [
        (False, [HELLO], [1]),
        (False, [HELLO, CCS, FINISHED], [1, 2]),  # the hello is read alone
        (True, [CCS, FINISHED], [2]),  # TLS 1.3
        (True, [CCS, FINISHED, DATA], [2, 1]),
        (True, [HANDSHAKE, CCS, HANDSHAKE], [3]),  # TLS 1.2
        (True, [HANDSHAKE, CCS, HANDSHAKE, DATA, DATA], [3, 1, 1]),
        (True, [HANDSHAKE, HANDSHAKE, CCS, HANDSHAKE], [1, 3]),  # with a certificate
        (True, [HANDSHAKE, CCS], []),
        (True, [CCS, CCS, CCS, FINISHED], [2, 2]),  # what is wrong is not put off for ever
        (True, [HANDSHAKE, CCS, CCS, HANDSHAKE], [3, 1]),
        (True, [], []),
    ],
)
def test_what_is_fed_together(begun: bool, records: list[bytes], pieces: list[int]) -> None:
    data = b"".join(records)
    ends, wanted, bad = flight(data, begun)
    at, expected = 0, []
    for piece in pieces:
        expected.append(sum(map(len, records[: at + piece])))
        at += piece
    assert ends == expected
    assert wanted == len(data) + 5
    assert bad == -1


@pytest.mark.parametrize("begun", [False, True])
def test_an_incomplete_record_says_how_much_it_wants(begun: bool) -> None:
    for cut in range(1, len(HELLO)):
        ends, wanted, bad = flight(HANDSHAKE + HELLO[:cut], begun)
        assert ends == [len(HANDSHAKE)]
        assert wanted == len(HANDSHAKE) + (5 if cut < 5 else len(HELLO))
        assert bad == -1


@pytest.mark.parametrize(
    "header",
    [
        b"\x13\x03\x03\x00\x01",
        b"\x18\x03\x03\x00\x01",
        b"\x16\x02\x03\x00\x01",
        b"\x16\x04\x03\x00\x01",
        b"\x16\x03\x03" + (MOST + 1).to_bytes(2),
    ],
)
def test_a_header_that_cannot_be_one(header: bytes) -> None:
    assert flight(header, False) == ([], 5, 0)
    ends, _, bad = flight(HANDSHAKE + CCS + header, True)
    assert (ends, bad) == ([], len(HANDSHAKE + CCS))
    assert flight(record(22, MOST), True) == ([MOST + 5], MOST + 10, -1)
