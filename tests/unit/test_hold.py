"""The hold buffer's bounds and order, and the flows of packets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import (
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.packet import Packet, Raw

from prism.flow import Endpoint, Flow
from prism.switch.hold import PACKET_OVERHEAD, HoldBuffer, parse_segment
from prism.switch.provoke import stray_segment

V4 = Flow(Endpoint("192.0.2.7", 40000), Endpoint("198.51.100.1", 443))
V6 = Flow(Endpoint("2001:db8::7", 40000), Endpoint("2001:db8::80", 443))
ONE = V4.pack()
OTHER = V6.pack()


def ip(flow: Flow, **fields: object) -> Packet:
    kind = IPv6 if ":" in flow.client.host else IP
    return kind(src=flow.client.host, dst=flow.service.host, **fields)


def tcp(flow: Flow, flags: str = "A") -> Packet:
    return TCP(sport=flow.client.port, dport=flow.service.port, flags=flags)


def parsed(packet: Packet) -> tuple[bytes, bool] | None:
    return parse_segment(bytes(packet))


@pytest.mark.parametrize("flow", [V4, V6], ids=["IPv4", "IPv6"])
def test_a_segment_tells_its_flow_as_the_client_sees_it(flow: Flow) -> None:
    assert parsed(ip(flow) / tcp(flow) / Raw(b"GET /")) == (flow.pack(), False)


@pytest.mark.parametrize("flow", [V4, V6], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize(
    ("flags", "bare"), [("S", True), ("SEC", True), ("SA", False), ("A", False), ("R", False)]
)
def test_only_a_syn_without_ack_is_bare(flow: Flow, flags: str, bare: bool) -> None:
    assert parsed(ip(flow) / tcp(flow, flags)) == (flow.pack(), bare)


def test_ip_options_and_extension_headers_are_passed_over() -> None:
    options = ip(V4, options=b"\x01" * 8)
    assert parsed(options / tcp(V4)) == (ONE, False)
    extended = ip(V6) / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / tcp(V6)
    assert parsed(extended) == (OTHER, False)
    atomic = ip(V6) / IPv6ExtHdrFragment(offset=0, m=0) / tcp(V6)
    assert parsed(atomic) == (OTHER, False)


@pytest.mark.parametrize(
    "packet",
    [
        ip(V4, flags="MF") / tcp(V4),
        ip(V4, frag=2) / tcp(V4),
        ip(V4) / UDP(sport=1, dport=2),
        ip(V6) / IPv6ExtHdrFragment(offset=0, m=1) / tcp(V6),
        ip(V6) / IPv6ExtHdrFragment(offset=8, m=0) / tcp(V6),
        ip(V6) / IPv6ExtHdrRouting() / tcp(V6),
        ip(V6) / UDP(sport=1, dport=2),
    ],
    ids=["more", "offset", "udp", "more6", "offset6", "routing", "udp6"],
)
def test_what_is_no_whole_tcp_segment_has_no_flow(packet: Packet) -> None:
    assert parsed(packet) is None


@given(st.binary(max_size=200))
def test_no_octets_break_the_parser(data: bytes) -> None:
    parse_segment(data)


@pytest.mark.parametrize("flow", [V4, V6], ids=["IPv4", "IPv6"])
def test_every_truncation_is_refused_without_error(flow: Flow) -> None:
    whole = bytes(ip(flow) / tcp(flow))
    for size in range(len(whole)):
        assert parse_segment(whole[:size]) is None
    assert parse_segment(whole) is not None


@pytest.mark.parametrize("flow", [V4, V6], ids=["IPv4", "IPv6"])
def test_the_stray_segment_is_from_service_to_client_with_a_good_checksum(flow: Flow) -> None:
    data = stray_segment(flow.pack())
    packet = (IPv6 if ":" in flow.client.host else IP)(data)
    assert (packet.src, packet.dst) == (flow.service.host, flow.client.host)
    segment = packet[TCP]
    assert (segment.sport, segment.dport) == (flow.service.port, flow.client.port)
    assert segment.flags == "A"
    claimed = segment.chksum
    del segment.chksum
    again = type(packet)(bytes(packet))
    assert again[TCP].chksum == claimed


class TestHoldBuffer:
    def test_packets_come_out_in_their_order_flow_by_flow(self) -> None:
        buffer = HoldBuffer()
        for number in range(10):
            assert buffer.keep((ONE, OTHER)[number % 2], b"%d" % number, number)
        assert buffer.release(ONE) == [b"0", b"2", b"4", b"6", b"8"]
        assert buffer.release(ONE) == []
        assert ONE not in buffer
        assert OTHER in buffer
        assert buffer.release(OTHER) == [b"1", b"3", b"5", b"7", b"9"]
        assert buffer.size == 0
        assert (buffer.counters.held, buffer.counters.released) == (10, 10)

    def test_one_flow_cannot_take_more_than_its_share(self) -> None:
        buffer = HoldBuffer(flow_limit=3 * (100 + PACKET_OVERHEAD))
        assert [buffer.keep(ONE, bytes(100), 0) for _ in range(5)] == [True] * 3 + [False] * 2
        assert buffer.keep(OTHER, bytes(100), 0)
        assert buffer.counters.dropped_flow_full == 2
        assert buffer.counters.dropped_total_full == 0

    def test_all_flows_together_cannot_take_more_than_the_total(self) -> None:
        buffer = HoldBuffer(total_limit=2 * (100 + PACKET_OVERHEAD))
        kept = [buffer.keep(b"%d" % flow, bytes(100), 0) for flow in range(4)]
        assert kept == [True, True, False, False]
        assert buffer.counters.dropped_total_full == 2
        assert len(buffer) == 2
        buffer.release(b"0")
        assert buffer.keep(b"9", bytes(100), 0)

    def test_the_oldest_flows_are_found_and_dropped(self) -> None:
        buffer = HoldBuffer()
        buffer.keep(ONE, b"a", 1.0)
        buffer.keep(OTHER, b"b", 2.0)
        buffer.keep(ONE, b"c", 3.0)
        assert list(buffer.older_than(0.5)) == []
        assert list(buffer.older_than(1.0)) == [ONE]
        assert list(buffer.older_than(9.0)) == [ONE, OTHER]
        assert buffer.drop(ONE) == 2
        assert buffer.drop(ONE) == 0
        assert buffer.counters.dropped_expired == 2
        assert buffer.release(OTHER) == [b"b"]
        assert buffer.size == 0

    def test_limits_must_be_positive(self) -> None:
        with pytest.raises(ValueError, match="positive"):
            HoldBuffer(flow_limit=0)

    @given(
        st.lists(
            st.tuples(
                st.sampled_from(["keep", "release", "drop"]),
                st.integers(0, 3),
                st.integers(0, 300),
            ),
            max_size=120,
        )
    )
    def test_nothing_is_lost_twice_kept_twice_or_over_the_bounds(
        self, steps: list[tuple[str, int, int]]
    ) -> None:
        buffer = HoldBuffer(flow_limit=1500, total_limit=4000)
        model: dict[bytes, list[bytes]] = {}
        for number, (action, flow_number, size) in enumerate(steps):
            flow = b"flow%d" % flow_number
            if action == "keep":
                packet = b"%05d" % number + bytes(size)
                if buffer.keep(flow, packet, number):
                    model.setdefault(flow, []).append(packet)
            elif action == "release":
                assert buffer.release(flow) == model.pop(flow, [])
            else:
                assert buffer.drop(flow) == len(model.pop(flow, []))
            sizes = {
                flow: sum(len(p) + PACKET_OVERHEAD for p in packets)
                for flow, packets in model.items()
            }
            assert buffer.size == sum(sizes.values()) <= 4000
            assert max(sizes.values(), default=0) <= 1500
            assert len(buffer) == len(model)
