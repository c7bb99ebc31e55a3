"""Pairs of record layers with known secrets, for the tests of the record layer."""

from __future__ import annotations

from prism._ext.tls_record import Opened, Tls

ALL_SUITES = [0x1301, 0x1302, 0x1303, 0xC02B, 0xC02C, 0xC02F, 0xC030, 0xCCA8, 0xCCA9]
SUITES_1_3, SUITES_1_2 = ALL_SUITES[:3], ALL_SUITES[3:]
SHA384 = (0x1302, 0xC02C, 0xC030)
UNEXPECTED, BAD_MAC, OVERFLOW, ILLEGAL, DECODE, VERSION, INTERNAL = 10, 20, 22, 47, 50, 70, 80

SECRETS = bytes(range(1, 49)), bytes(range(101, 149))  # the client's, the server's
MASTER, CLIENT_RANDOM, SERVER_RANDOM = bytes(range(48)), b"c" * 32, b"s" * 32


def make(suite: int, is_server: bool, read_seq: int = 0, write_seq: int = 0) -> Tls:
    if suite in SUITES_1_3:
        size = 48 if suite in SHA384 else 32
        client, server = (secret[:size] for secret in SECRETS)
        return Tls.from_traffic_secrets(
            suite, client, server, is_server=is_server, read_seq=read_seq, write_seq=write_seq
        )
    return Tls.from_master_secret(
        suite,
        MASTER,
        CLIENT_RANDOM,
        SERVER_RANDOM,
        is_server=is_server,
        read_seq=read_seq,
        write_seq=write_seq,
    )


def pair(suite: int) -> tuple[Tls, Tls]:
    """Server and client."""
    return make(suite, True), make(suite, False)


def alert_of(opened: Opened) -> int | None:
    return opened.error.alert if opened.error is not None else None
