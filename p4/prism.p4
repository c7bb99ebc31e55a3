/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The switch's data plane for a P4 target, v1model architecture.
 *
 * It forwards Ethernet frames and IP packets, and rewrites the packets of TCP flows that have been
 * handed over: the client goes on speaking to the service's address, whoever owns the connection.
 * What to do with a flow is in four tables that a controller writes over P4Runtime; nothing is
 * learnt from packets, and no packet leaves state behind but counters.
 *
 *   parser -> verify IPv4 checksum -> rules -> addresses, ports, TCP checksum
 *          -> route (packets to the switch's own MAC) -> bridge (by destination MAC) -> egress
 *
 * docs/p4.md says how it is run; README.md beside this file what it takes of a hardware pipeline.
 */
#include <core.p4>
#include <v1model.p4>

/* How many flows there can be. An owner's packets take up to two entries of a rule. */
#ifndef MAX_RULES
#define MAX_RULES 1048576
#endif

/* Where the control plane gets packets from and puts them in (bmv2: --cpu-port). */
#ifndef CPU_PORT
#define CPU_PORT 255
#endif

const bit<16> TYPE_IPV4 = 0x0800;
const bit<16> TYPE_ARP = 0x0806;
const bit<16> TYPE_VLAN = 0x8100;
const bit<16> TYPE_IPV6 = 0x86dd;
const bit<8> PROTOCOL_TCP = 6;
const bit<8> TCP_SYN = 0x02;
const bit<8> TCP_ACK = 0x10;
const bit<16> ARP_REQUEST = 1;
const bit<16> ARP_REPLY = 2;

/* Frames to group addresses (broadcast, IPv6 neighbour discovery) go to this multicast group. */
const bit<16> FLOOD_GROUP = 1;

typedef bit<9> port_t;
typedef bit<48> mac_t;

/* Why the CPU gets a packet: the `reason` of a packet_in. */
const bit<8> REASON_LOCAL = 1;    // for one of the switch's own addresses
const bit<8> REASON_HOPS = 2;     // its TTL or hop limit is used up
const bit<8> REASON_BARE_SYN = 3; // a SYN on a flow with a rule: ask the owner

/* Where a packet_out goes: its `way`. */
const bit<8> WAY_PIPELINE = 0; // as if it had come in by `port`, and routed whatever its MACs
const bit<8> WAY_PORT = 1;     // out by `port`, as it is

/* ---------------------------------------------------------------------------- headers */

@id(0x04000001) @controller_header("packet_in")
header packet_in_h {
    @id(1) bit<16> port; // by which it came
    @id(2) bit<8> reason;
}

@id(0x04000002) @controller_header("packet_out")
header packet_out_h {
    @id(1) bit<16> port;
    @id(2) bit<8> way;
}

header ethernet_h {
    mac_t dst_addr;
    mac_t src_addr;
    bit<16> ether_type;
}

header vlan_h {
    bit<16> tci;
    bit<16> ether_type;
}

header arp_h {
    bit<16> hardware_type;
    bit<16> protocol_type;
    bit<8> hardware_size;
    bit<8> protocol_size;
    bit<16> operation;
    mac_t sender_mac;
    bit<32> sender_addr;
    mac_t target_mac;
    bit<32> target_addr;
}

header ipv4_h {
    bit<4> version;
    bit<4> ihl;
    bit<8> tos;
    bit<16> total_length;
    bit<16> id;
    bit<1> reserved;
    bit<1> dont_fragment;
    bit<1> more_fragments;
    bit<13> fragment_offset;
    bit<8> ttl;
    bit<8> protocol;
    bit<16> checksum;
    bit<32> src_addr;
    bit<32> dst_addr;
}

header ipv4_options_h {
    varbit<320> octets;
}

header ipv6_h {
    bit<4> version;
    bit<8> traffic_class;
    bit<20> flow_label;
    bit<16> payload_length;
    bit<8> next_header;
    bit<8> hop_limit;
    bit<128> src_addr;
    bit<128> dst_addr;
}

/* Its options stay in the payload: nothing here reads them. */
header tcp_h {
    bit<16> src_port;
    bit<16> dst_port;
    bit<32> seq;
    bit<32> ack;
    bit<4> data_offset;
    bit<4> reserved;
    bit<8> flags;
    bit<16> window;
    bit<16> checksum;
    bit<16> urgent;
}

struct headers_t {
    packet_in_h packet_in;
    packet_out_h packet_out;
    ethernet_h ethernet;
    vlan_h vlan;
    arp_h arp;
    ipv4_h ipv4;
    ipv4_options_h ipv4_options;
    ipv6_h ipv6;
    tcp_h tcp;
}

/* What the rule tables say about a packet. */
enum bit<8> Verdict {
    NO_RULE = 0,
    PASS = 1,      // there is a rule, and the packet goes on as it is
    TO_OWNER = 2,  // the destination becomes the owner
    TO_CLIENT = 3, // the source becomes the service
    LOCKED = 4     // drop
}

struct metadata_t {
    Verdict verdict;
    bit<16> new_port;
    bit<32> new_v4;
    bit<128> new_v6;
    port_t in_port; // a packet_out stands in for another port
    bit<8> reason;  // why the CPU gets it; 0: it does not
    bit<1> routed;  // through the router: other MAC addresses, one hop less
    bit<1> from_client; // a flow with a rule
    bit<16> next_hop;
    bit<32> ports;  // TCP's, to spread flows by; 0 where there are none
}

/* ----------------------------------------------------------------------------- parser */

error {
    BadIPv4Header,
    BadIPv6Header
}

parser PrismParser(packet_in packet, out headers_t hdr, inout metadata_t meta,
                   inout standard_metadata_t standard) {
    state start {
        /* Not every target begins with zeros. */
        meta.verdict = Verdict.NO_RULE;
        meta.new_port = 0;
        meta.new_v4 = 0;
        meta.new_v6 = 0;
        meta.in_port = standard.ingress_port;
        meta.reason = 0;
        meta.routed = 0;
        meta.from_client = 0;
        meta.next_hop = 0;
        meta.ports = 0;
        transition select(standard.ingress_port) {
            CPU_PORT: parse_packet_out;
            default: parse_ethernet;
        }
    }

    state parse_packet_out {
        packet.extract(hdr.packet_out);
        transition parse_ethernet;
    }

    state parse_ethernet {
        packet.extract(hdr.ethernet);
        transition select(hdr.ethernet.ether_type) {
            TYPE_VLAN: parse_vlan;
            TYPE_ARP: parse_arp;
            TYPE_IPV4: parse_ipv4;
            TYPE_IPV6: parse_ipv6;
            default: accept;
        }
    }

    /* One tag, passed on as it is. A second one makes the frame one to bridge only. */
    state parse_vlan {
        packet.extract(hdr.vlan);
        transition select(hdr.vlan.ether_type) {
            TYPE_ARP: parse_arp;
            TYPE_IPV4: parse_ipv4;
            TYPE_IPV6: parse_ipv6;
            default: accept;
        }
    }

    state parse_arp {
        packet.extract(hdr.arp);
        transition accept;
    }

    state parse_ipv4 {
        packet.extract(hdr.ipv4);
        verify(hdr.ipv4.version == 4 && hdr.ipv4.ihl >= 5, error.BadIPv4Header);
        transition select(hdr.ipv4.ihl) {
            5: after_ipv4_options;
            default: parse_ipv4_options;
        }
    }

    state parse_ipv4_options {
        packet.extract(hdr.ipv4_options, ((bit<32>)hdr.ipv4.ihl - 5) * 32);
        transition after_ipv4_options;
    }

    /* Only the first fragment has ports: to treat all alike, none is looked into. */
    state after_ipv4_options {
        transition select(hdr.ipv4.more_fragments, hdr.ipv4.fragment_offset, hdr.ipv4.protocol) {
            (0, 0, PROTOCOL_TCP): parse_tcp;
            default: accept;
        }
    }

    /* Behind an extension header TCP is not looked for: such packets are forwarded untouched. */
    state parse_ipv6 {
        packet.extract(hdr.ipv6);
        verify(hdr.ipv6.version == 6, error.BadIPv6Header);
        transition select(hdr.ipv6.next_header) {
            PROTOCOL_TCP: parse_tcp;
            default: accept;
        }
    }

    state parse_tcp {
        packet.extract(hdr.tcp);
        transition accept;
    }
}

/* ------------------------------------------------------------------- checksum, ingress */

/*
 * The IPv4 header's checksum is verified here and written anew at the end, so that what arrives
 * damaged is dropped and never repaired. TCP's covers the payload, which a hardware pipeline does
 * not see: it is adjusted by the difference (RFC 1624), so that what is damaged stays damaged, and
 * the receiver notices.
 */
control PrismVerify(inout headers_t hdr, inout metadata_t meta) {
    apply {
        verify_checksum(hdr.ipv4.isValid(),
            { hdr.ipv4.version, hdr.ipv4.ihl, hdr.ipv4.tos, hdr.ipv4.total_length, hdr.ipv4.id,
              hdr.ipv4.reserved, hdr.ipv4.dont_fragment, hdr.ipv4.more_fragments,
              hdr.ipv4.fragment_offset, hdr.ipv4.ttl, hdr.ipv4.protocol, hdr.ipv4.src_addr,
              hdr.ipv4.dst_addr, hdr.ipv4_options.octets },
            hdr.ipv4.checksum, HashAlgorithm.csum16);
    }
}

/* The sum of the 16-bit words of an address. */
bit<32> words_v4(in bit<32> addr) {
    return (bit<32>)addr[31:16] + (bit<32>)addr[15:0];
}

bit<32> words_v6(in bit<128> addr) {
    return (bit<32>)addr[127:112] + (bit<32>)addr[111:96] + (bit<32>)addr[95:80] +
           (bit<32>)addr[79:64] + (bit<32>)addr[63:48] + (bit<32>)addr[47:32] +
           (bit<32>)addr[31:16] + (bit<32>)addr[15:0];
}

/* RFC 1624, equation 3: ~(~check + ~old + new); `change` is ~old + new, not yet folded. */
bit<16> adjusted(in bit<16> check, in bit<32> change) {
    bit<32> sum = (bit<32>)(~check) + change;
    sum = (bit<32>)sum[31:16] + (bit<32>)sum[15:0];
    sum = (bit<32>)sum[31:16] + (bit<32>)sum[15:0];
    return ~sum[15:0];
}

/* ---------------------------------------------------------------------------- ingress */

control PrismIngress(inout headers_t hdr, inout metadata_t meta,
                     inout standard_metadata_t standard) {
    /* By Verdict, then malformed packets (5) and bare SYNs on flows with a rule (6). */
    @id(0x12000001) counter(8, CounterType.packets_and_bytes) verdicts;
    @id(0x13000011) direct_counter(CounterType.packets_and_bytes) to_owner_v4_packets;
    @id(0x13000012) direct_counter(CounterType.packets_and_bytes) to_client_v4_packets;
    @id(0x13000013) direct_counter(CounterType.packets_and_bytes) to_owner_v6_packets;
    @id(0x13000014) direct_counter(CounterType.packets_and_bytes) to_client_v6_packets;

    @id(0x01000061) action drop_it() {
        mark_to_drop(standard);
    }

    /* ------- rules. An action only notes what is to be done: one rewrite serves all tables. */

    @id(0x01000011) action send_to_owner_v4(@id(1) bit<32> owner_addr, @id(2) bit<16> owner_port) {
        meta.verdict = Verdict.TO_OWNER;
        meta.new_v4 = owner_addr;
        meta.new_port = owner_port;
    }

    @id(0x01000012) action send_to_owner_v6(@id(1) bit<128> owner_addr, @id(2) bit<16> owner_port) {
        meta.verdict = Verdict.TO_OWNER;
        meta.new_v6 = owner_addr;
        meta.new_port = owner_port;
    }

    @id(0x01000021) action speak_as_service_v4(@id(1) bit<32> service_addr,
                                               @id(2) bit<16> service_port) {
        meta.verdict = Verdict.TO_CLIENT;
        meta.new_v4 = service_addr;
        meta.new_port = service_port;
    }

    @id(0x01000022) action speak_as_service_v6(@id(1) bit<128> service_addr,
                                               @id(2) bit<16> service_port) {
        meta.verdict = Verdict.TO_CLIENT;
        meta.new_v6 = service_addr;
        meta.new_port = service_port;
    }

    /* The owner has the service's address: a frontend, whose packets need no rewriting. */
    @id(0x01000031) action pass() {
        meta.verdict = Verdict.PASS;
    }

    /* Dropped, and counted by the entry. */
    @id(0x01000032) action lock() {
        meta.verdict = Verdict.LOCKED;
    }

    /* From clients. One entry for each rule. */
    @id(0x02000011) table to_owner_v4 {
        key = {
            hdr.ipv4.src_addr: exact @id(1) @name("client_addr");
            hdr.tcp.src_port: exact @id(2) @name("client_port");
            hdr.ipv4.dst_addr: exact @id(3) @name("service_addr");
            hdr.tcp.dst_port: exact @id(4) @name("service_port");
        }
        actions = {
            send_to_owner_v4;
            pass;
            lock;
            @defaultonly NoAction;
        }
        const default_action = NoAction();
        counters = to_owner_v4_packets;
        size = MAX_RULES;
    }

    @id(0x02000013) table to_owner_v6 {
        key = {
            hdr.ipv6.src_addr: exact @id(1) @name("client_addr");
            hdr.tcp.src_port: exact @id(2) @name("client_port");
            hdr.ipv6.dst_addr: exact @id(3) @name("service_addr");
            hdr.tcp.dst_port: exact @id(4) @name("service_port");
        }
        actions = {
            send_to_owner_v6;
            pass;
            lock;
            @defaultonly NoAction;
        }
        const default_action = NoAction();
        counters = to_owner_v6_packets;
        size = MAX_RULES;
    }

    /*
     * To clients: from the owner, who speaks as the service, and from the service's own address,
     * whose frontend may speak (pass) only while it is the owner (lock otherwise). A former
     * owner's entry can be left for a moment as a lock, for what it still sends.
     */
    @id(0x02000012) table to_client_v4 {
        key = {
            hdr.ipv4.src_addr: exact @id(1) @name("owner_addr");
            hdr.tcp.src_port: exact @id(2) @name("owner_port");
            hdr.ipv4.dst_addr: exact @id(3) @name("client_addr");
            hdr.tcp.dst_port: exact @id(4) @name("client_port");
        }
        actions = {
            speak_as_service_v4;
            pass;
            lock;
            @defaultonly NoAction;
        }
        const default_action = NoAction();
        counters = to_client_v4_packets;
        size = 2 * MAX_RULES;
    }

    @id(0x02000014) table to_client_v6 {
        key = {
            hdr.ipv6.src_addr: exact @id(1) @name("owner_addr");
            hdr.tcp.src_port: exact @id(2) @name("owner_port");
            hdr.ipv6.dst_addr: exact @id(3) @name("client_addr");
            hdr.tcp.dst_port: exact @id(4) @name("client_port");
        }
        actions = {
            speak_as_service_v6;
            pass;
            lock;
            @defaultonly NoAction;
        }
        const default_action = NoAction();
        counters = to_client_v6_packets;
        size = 2 * MAX_RULES;
    }

    /*
     * A bare SYN on a flow with a rule: the client uses its port again, or somebody forges. Never
     * to the owner at once. The controller chooses by the default action: to the frontend, or to
     * the CPU: the controller asks the owner, and puts the packet back in, once the rule is gone
     * or with the owner as its destination.
     */
    @id(0x01000041) action syn_to_frontend() {
        meta.verdict = Verdict.PASS;
    }

    @id(0x01000042) action syn_to_cpu() {
        meta.verdict = Verdict.PASS;
        meta.reason = REASON_BARE_SYN;
    }

    @id(0x02000021) table bare_syn {
        actions = {
            syn_to_frontend;
            syn_to_cpu;
        }
        default_action = syn_to_frontend();
    }

    /* ------- the router */

    @id(0x01000051) action route() {
        meta.routed = 1;
    }

    /* The router's own MAC addresses. */
    @id(0x02000001) table my_mac {
        key = {
            hdr.ethernet.dst_addr: exact @id(1) @name("dst_addr");
        }
        actions = {
            route;
            @defaultonly NoAction;
        }
        const default_action = NoAction();
        size = 512;
    }

    @id(0x01000052) action arp_answer(@id(1) mac_t mac) {
        hdr.ethernet.dst_addr = hdr.arp.sender_mac;
        hdr.ethernet.src_addr = mac;
        hdr.arp.operation = ARP_REPLY;
        hdr.arp.target_mac = hdr.arp.sender_mac;
        hdr.arp.sender_mac = mac;
        bit<32> asked_for = hdr.arp.target_addr;
        hdr.arp.target_addr = hdr.arp.sender_addr;
        hdr.arp.sender_addr = asked_for;
        standard.egress_spec = meta.in_port;
    }

    /* The router's own IPv4 addresses, so that it needs no CPU to be found. */
    @id(0x02000002) table arp {
        key = {
            hdr.arp.target_addr: exact @id(1) @name("target_addr");
        }
        actions = {
            arp_answer;
            @defaultonly NoAction;
        }
        const default_action = NoAction();
        size = 512;
    }

    @id(0x01000053) action via(@id(1) bit<16> next_hop) {
        meta.next_hop = next_hop;
    }

    /* One of `count` next hops from `first` on, always the same one for a flow. */
    @id(0x01000054) action spread_v4(@id(1) bit<16> first, @id(2) bit<16> count) {
        hash(meta.next_hop, HashAlgorithm.crc16, first,
             { hdr.ipv4.src_addr, hdr.ipv4.dst_addr, hdr.ipv4.protocol, meta.ports }, count);
    }

    @id(0x01000055) action spread_v6(@id(1) bit<16> first, @id(2) bit<16> count) {
        hash(meta.next_hop, HashAlgorithm.crc16, first,
             { hdr.ipv6.src_addr, hdr.ipv6.dst_addr, hdr.ipv6.next_header, meta.ports }, count);
    }

    /* An address of the switch itself. */
    @id(0x01000056) action to_cpu() {
        meta.reason = REASON_LOCAL;
    }

    @id(0x01000057) action no_route() {
        meta.next_hop = 0;
    }

    @id(0x02000003) table ipv4_lpm {
        key = {
            hdr.ipv4.dst_addr: lpm @id(1) @name("dst_addr");
        }
        actions = {
            via;
            spread_v4;
            to_cpu;
            no_route;
        }
        const default_action = no_route();
        size = 16384;
    }

    @id(0x02000004) table ipv6_lpm {
        key = {
            hdr.ipv6.dst_addr: lpm @id(1) @name("dst_addr");
        }
        actions = {
            via;
            spread_v6;
            to_cpu;
            no_route;
        }
        const default_action = no_route();
        size = 8192;
    }

    @id(0x01000058) action neighbour(@id(1) mac_t mac) {
        hdr.ethernet.dst_addr = mac;
    }

    /* Next hops are numbered from 1; what has none is dropped. */
    @id(0x02000005) table next_hops {
        key = {
            meta.next_hop: exact @id(1) @name("next_hop");
        }
        actions = {
            neighbour;
            @defaultonly drop_it;
        }
        const default_action = drop_it();
        size = 4096;
    }

    /* ------- the bridge */

    @id(0x01000059) action out_by(@id(1) port_t port) {
        standard.egress_spec = port;
    }

    @id(0x02000006) table bridge {
        key = {
            hdr.ethernet.dst_addr: exact @id(1) @name("dst_addr");
        }
        actions = {
            out_by;
            @defaultonly drop_it;
        }
        const default_action = drop_it();
        size = 16384;
    }

    @id(0x01000062) action to_controller() {
        standard.egress_spec = CPU_PORT;
    }

    @id(0x01000063) action rewrite_v4_destination() {
        hdr.tcp.checksum = adjusted(hdr.tcp.checksum,
            words_v4(~hdr.ipv4.dst_addr) + words_v4(meta.new_v4) +
            (bit<32>)(~hdr.tcp.dst_port) + (bit<32>)meta.new_port);
        hdr.ipv4.dst_addr = meta.new_v4;
        hdr.tcp.dst_port = meta.new_port;
    }

    @id(0x01000064) action rewrite_v4_source() {
        hdr.tcp.checksum = adjusted(hdr.tcp.checksum,
            words_v4(~hdr.ipv4.src_addr) + words_v4(meta.new_v4) +
            (bit<32>)(~hdr.tcp.src_port) + (bit<32>)meta.new_port);
        hdr.ipv4.src_addr = meta.new_v4;
        hdr.tcp.src_port = meta.new_port;
    }

    @id(0x01000065) action rewrite_v6_destination() {
        hdr.tcp.checksum = adjusted(hdr.tcp.checksum,
            words_v6(~hdr.ipv6.dst_addr) + words_v6(meta.new_v6) +
            (bit<32>)(~hdr.tcp.dst_port) + (bit<32>)meta.new_port);
        hdr.ipv6.dst_addr = meta.new_v6;
        hdr.tcp.dst_port = meta.new_port;
    }

    @id(0x01000066) action rewrite_v6_source() {
        hdr.tcp.checksum = adjusted(hdr.tcp.checksum,
            words_v6(~hdr.ipv6.src_addr) + words_v6(meta.new_v6) +
            (bit<32>)(~hdr.tcp.src_port) + (bit<32>)meta.new_port);
        hdr.ipv6.src_addr = meta.new_v6;
        hdr.tcp.src_port = meta.new_port;
    }

    apply {
        /* What the controller puts in. */
        if (hdr.packet_out.isValid()) {
            if (hdr.packet_out.way == WAY_PORT) {
                standard.egress_spec = (port_t)hdr.packet_out.port;
                hdr.packet_out.setInvalid();
                return;
            }
            meta.in_port = (port_t)hdr.packet_out.port;
            meta.routed = 1;
            hdr.packet_out.setInvalid();
        }

        /* What is cut short, or damaged in the IPv4 header. */
        if (standard.parser_error != error.NoError || standard.checksum_error == 1) {
            verdicts.count(5);
            mark_to_drop(standard);
            return;
        }

        /* Who owns the flow. */
        if (hdr.tcp.isValid()) {
            meta.ports = hdr.tcp.src_port ++ hdr.tcp.dst_port;
            if (hdr.ipv4.isValid()) {
                if (to_owner_v4.apply().hit) {
                    meta.from_client = 1;
                } else {
                    to_client_v4.apply();
                }
            } else {
                if (to_owner_v6.apply().hit) {
                    meta.from_client = 1;
                } else {
                    to_client_v6.apply();
                }
            }
            verdicts.count((bit<32>)(bit<8>)meta.verdict);
        }
        if (meta.verdict == Verdict.LOCKED) {
            mark_to_drop(standard);
            return;
        }
        if (meta.from_client == 1 && hdr.tcp.flags & (TCP_SYN | TCP_ACK) == TCP_SYN) {
            verdicts.count(6);
            bare_syn.apply();
            if (meta.reason != 0) {
                to_controller();
                return;
            }
        }
        if (meta.verdict == Verdict.TO_OWNER) {
            if (hdr.ipv4.isValid()) {
                rewrite_v4_destination();
            } else {
                rewrite_v6_destination();
            }
        } else if (meta.verdict == Verdict.TO_CLIENT) {
            if (hdr.ipv4.isValid()) {
                rewrite_v4_source();
            } else {
                rewrite_v6_source();
            }
        }

        /* Group addresses: the switch may be who is asked for, else everybody is told. */
        if (hdr.arp.isValid() && hdr.arp.operation == ARP_REQUEST &&
            hdr.arp.hardware_type == 1 && hdr.arp.protocol_type == TYPE_IPV4) {
            if (arp.apply().hit) {
                return;
            }
        }
        if (hdr.ethernet.dst_addr[40:40] == 1) {
            standard.mcast_grp = FLOOD_GROUP;
            return;
        }

        /* Packets to the router: one hop less, and the MAC address of the next one. */
        my_mac.apply();
        if (meta.routed == 1) {
            if (hdr.ipv4.isValid()) {
                ipv4_lpm.apply();
                if (meta.reason == 0 && hdr.ipv4.ttl <= 1) {
                    meta.reason = REASON_HOPS;
                }
            } else if (hdr.ipv6.isValid()) {
                ipv6_lpm.apply();
                if (meta.reason == 0 && hdr.ipv6.hop_limit <= 1) {
                    meta.reason = REASON_HOPS;
                }
            } else {
                meta.reason = REASON_LOCAL;
            }
            if (meta.reason != 0) {
                to_controller();
                return;
            }
            if (hdr.ipv4.isValid()) {
                hdr.ipv4.ttl = hdr.ipv4.ttl - 1;
            } else {
                hdr.ipv6.hop_limit = hdr.ipv6.hop_limit - 1;
            }
            if (!next_hops.apply().hit) {
                return;
            }
        }
        bridge.apply();
    }
}

/* ----------------------------------------------------------------------------- egress */

control PrismEgress(inout headers_t hdr, inout metadata_t meta,
                    inout standard_metadata_t standard) {
    @id(0x0100005a) action from_mac(@id(1) mac_t mac) {
        hdr.ethernet.src_addr = mac;
    }

    /* The router's MAC address on each port. */
    @id(0x02000007) table port_mac {
        key = {
            standard.egress_port: exact @id(1) @name("port");
        }
        actions = {
            from_mac;
            @defaultonly NoAction;
        }
        const default_action = NoAction();
        size = 512;
    }

    apply {
        if (standard.egress_port == CPU_PORT) {
            hdr.packet_in.setValid();
            hdr.packet_in.port = (bit<16>)meta.in_port;
            hdr.packet_in.reason = meta.reason;
        } else if (standard.mcast_grp != 0 && standard.egress_port == meta.in_port) {
            mark_to_drop(standard);
        } else if (meta.routed == 1) {
            port_mac.apply();
        }
    }
}

/* -------------------------------------------------------------------- checksum, egress */

control PrismUpdate(inout headers_t hdr, inout metadata_t meta) {
    apply {
        update_checksum(hdr.ipv4.isValid(),
            { hdr.ipv4.version, hdr.ipv4.ihl, hdr.ipv4.tos, hdr.ipv4.total_length, hdr.ipv4.id,
              hdr.ipv4.reserved, hdr.ipv4.dont_fragment, hdr.ipv4.more_fragments,
              hdr.ipv4.fragment_offset, hdr.ipv4.ttl, hdr.ipv4.protocol, hdr.ipv4.src_addr,
              hdr.ipv4.dst_addr, hdr.ipv4_options.octets },
            hdr.ipv4.checksum, HashAlgorithm.csum16);
    }
}

control PrismDeparser(packet_out packet, in headers_t hdr) {
    apply {
        packet.emit(hdr.packet_in);
        packet.emit(hdr.ethernet);
        packet.emit(hdr.vlan);
        packet.emit(hdr.arp);
        packet.emit(hdr.ipv4);
        packet.emit(hdr.ipv4_options);
        packet.emit(hdr.ipv6);
        packet.emit(hdr.tcp);
    }
}

@pkginfo(name = "prism", version = "1")
V1Switch(PrismParser(), PrismVerify(), PrismIngress(), PrismEgress(), PrismUpdate(),
         PrismDeparser()) main;
