"""The serialised form of a connection: every field told, every inconsistency refused."""

from __future__ import annotations

import os
import socket
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism._ext import tcp_repair

LAYOUT = struct.Struct("!4s4B16s16s3H2B14IB7s")
V4 = bytes(10) + b"\xff\xff"


def build(queues: bytes = b"r" * 40 + b"s" * 60, **changes: Any) -> bytes:
    """A valid state, with some fields changed; the fields are in the order of the layout."""
    values: dict[str, Any] = {
        "magic": b"PTCP",
        "version": 1,
        "flags": 0,
        "family": 4,
        "options": 7,
        "local": V4 + bytes([192, 0, 2, 1]),
        "peer": V4 + bytes([198, 51, 100, 7]),
        "local_port": 443,
        "peer_port": 40_000,
        "mss": 1460,
        "snd_wscale": 7,
        "rcv_wscale": 9,
        "timestamp": 0xFFFF_FFF1,
        "snd_una": 0xFFFF_FF00,
        "rcv_nxt": 20,
        "snd_wl1": 0xFFFF_FFF0,
        "snd_wnd": 60_000,
        "max_window": 64_000,
        "rcv_wnd": 50_000,
        "rcv_wup": 10,
        "recv_len": 40,
        "send_len": 60,
        "unsent_len": 20,
        "window_clamp": 65_536,
        "rcvbuf": 131_072,
        "sndbuf": 87_040,
        "buf_lock": 0,
        "reserved": bytes(7),
    }
    return LAYOUT.pack(*(values | changes).values()) + queues


def test_a_state_tells_what_it_holds() -> None:
    assert LAYOUT.size == tcp_repair.HEADER_SIZE == 112
    assert tcp_repair.describe(build()) == {
        "local": "192.0.2.1",
        "local_port": 443,
        "peer": "198.51.100.7",
        "peer_port": 40_000,
        "family": 4,
        "half_closed": False,
        "timestamps": True,
        "sack": True,
        "window_scaling": True,
        "snd_wscale": 7,
        "rcv_wscale": 9,
        "mss": 1460,
        "timestamp": 0xFFFF_FFF1,
        "snd_una": 0xFFFF_FF00,
        "rcv_nxt": 20,
        "snd_wl1": 0xFFFF_FFF0,
        "snd_wnd": 60_000,
        "max_window": 64_000,
        "rcv_wnd": 50_000,
        "rcv_wup": 10,
        "receive_queue": 40,
        "send_queue": 60,
        "unsent": 20,
        "window_clamp": 65_536,
        "receive_buffer": 131_072,
        "send_buffer": 87_040,
        "buffers_fixed": 0,
    }


def test_ipv6_and_half_closed() -> None:
    six = socket.inet_pton(socket.AF_INET6, "2001:db8::7")
    told = tcp_repair.describe(build(family=6, local=six, peer=six, flags=1, options=0, **NO_SCALE))
    assert (told["local"], told["family"], told["half_closed"]) == ("2001:db8::7", 6, True)
    assert told["sack"] is told["timestamps"] is told["window_scaling"] is False


NO_SCALE = {"snd_wscale": 0, "rcv_wscale": 0}
SIX = bytes(15) + b"\1"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"magic": b"PTCQ"}, "magic"),
        ({"version": 0}, "version"),
        ({"version": 2}, "version"),
        ({"flags": 2}, "flags"),
        ({"family": 5}, "family"),
        ({"family": 6}, "family"),
        ({"peer": SIX}, "family"),
        ({"local": SIX}, "family"),
        ({"options": 8}, "options"),
        ({"options": 3}, "without the option"),
        ({"buf_lock": 4}, "options"),
        ({"local_port": 0}, "port"),
        ({"peer_port": 0}, "port"),
        ({"mss": 0}, "MSS"),
        ({"snd_wscale": 15}, "scale"),
        ({"rcv_wscale": 15}, "scale"),
        ({"snd_wnd": 64_001}, "windows"),
        ({"max_window": 0x4000_0000}, "windows"),
        ({"rcv_wnd": 0xFFFF_FFFF}, "windows"),
        ({"rcv_wup": 21}, "ahead"),
        ({"snd_wl1": 20 + 50_001}, "ahead"),
        ({"unsent_len": 61}, "unsent"),
        ({"recv_len": 39}, "length"),
        ({"send_len": 61}, "length"),
        ({"recv_len": 0xFFFF_FFFF, "send_len": 101}, "16 MiB"),
        ({"recv_len": 9 << 20, "send_len": 9 << 20}, "16 MiB"),
        ({"reserved": b"\0\0\0\0\0\0\1"}, "reserved"),
    ],
)
def test_inconsistent_states_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(tcp_repair.StateError, match=reason):
        tcp_repair.describe(build(**changes))
    with pytest.raises(tcp_repair.StateError, match=reason):
        tcp_repair.import_state(build(**changes), "127.0.0.1", 80)


def test_every_truncation_and_any_surplus_is_refused() -> None:
    whole = build()
    for length in range(len(whole)):
        with pytest.raises(tcp_repair.StateError, match="truncated"):
            tcp_repair.describe(whole[:length])
    with pytest.raises(tcp_repair.StateError, match="too long"):
        tcp_repair.describe(whole + b"\0")


@pytest.mark.parametrize(
    "accepted", [{"rcv_wup": 20}, {"snd_wl1": 20 + 50_000}, {"unsent_len": 60}]
)
def test_the_edges_are_inside(accepted: dict[str, Any]) -> None:
    assert tcp_repair.describe(build(**accepted))["receive_queue"] == 40


@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(tcp_repair.StateError):
        tcp_repair.import_state(data, "127.0.0.1", 80)


@settings(max_examples=500)
@given(st.data())
def test_mutations_are_described_or_refused(data: st.DataObject) -> None:
    mutated = bytearray(build())
    for _ in range(data.draw(st.integers(1, 6))):
        mutated[data.draw(st.integers(4, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    try:
        told = tcp_repair.describe(bytes(mutated))
    except tcp_repair.StateError:
        return
    assert told["snd_una"] == int.from_bytes(mutated[52:56], "big")
    assert told["receive_queue"] + told["send_queue"] == 100  # type: ignore[operator]


def test_arguments_are_checked_before_anything_is_made() -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - one call, no objects
    for port in (0, -1, 65_536):
        with pytest.raises(ValueError, match="port"):
            tcp_repair.import_state(build(), "127.0.0.1", port)
    for count in (-1, 1025):
        with pytest.raises(ValueError, match="alternatives"):
            tcp_repair.import_state(build(), "127.0.0.1", 80, alternatives=count)
    for address in ("", "localhost", "1.2.3", "é", "127.0.0.1\0"):
        with pytest.raises(ValueError, match="not an IP address"):
            tcp_repair.import_state(build(), address, 80)
    with pytest.raises(ValueError, match="family"):
        tcp_repair.import_state(build(), "::1", 80)
    with pytest.raises(TypeError):
        tcp_repair.import_state(None, "127.0.0.1", 80)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        tcp_repair.Imported()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_errors_have_the_classes_they_promise() -> None:
    assert issubclass(tcp_repair.StateError, ValueError)
    assert issubclass(tcp_repair.NotCarriable, OSError)
    with pytest.raises(OSError):
        tcp_repair.freeze(-1)
    with pytest.raises(OSError):
        tcp_repair.export_state(-1)
    with pytest.raises(OSError):
        tcp_repair.resume(-1)
    tcp_repair.close_quietly(-1)
