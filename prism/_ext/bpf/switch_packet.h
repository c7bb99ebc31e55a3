/* SPDX-License-Identifier: GPL-2.0-only */
/* Finds the TCP or UDP header of a packet, or says that there is none to touch. */
#ifndef PRISM_SWITCH_PACKET_H
#define PRISM_SWITCH_PACKET_H

#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <stddef.h>

#include "switch_maps.h"

#define MAX_VLAN_TAGS	    2 /* in the packet itself; the outermost one is usually beside it */
#define MAX_IPV6_EXTENSIONS 6
#define TCP_SYN		    0x02
#define TCP_ACK		    0x10

struct packet {
	union flow_key key; /* source as the client, destination as the service */
	__u32 l3;	    /* offsets of the headers */
	__u32 l4;
	__be16 ethertype;
	__be16 check; /* UDP's checksum field */
	__u16 udp_length;
	__u8 protocol;
	__u8 tcp_flags;
	bool ethernet; /* there is an Ethernet header */
	bool tagged;   /* with VLAN tags inside the packet */
};

struct ports {
	__be16 source;
	__be16 dest;
};

static __always_inline bool skip_vlan_tags(struct __sk_buff *skb, struct packet *packet)
{
	struct {
		__be16 tci;
		__be16 ethertype;
	} tag;

#pragma unroll
	for (int i = 0; i < MAX_VLAN_TAGS; i++) {
		if (packet->ethertype != bpf_htons(ETH_P_8021Q) &&
		    packet->ethertype != bpf_htons(ETH_P_8021AD))
			return true;
		if (bpf_skb_load_bytes(skb, packet->l3, &tag, sizeof(tag)))
			return false;
		packet->l3 += sizeof(tag);
		packet->ethertype = tag.ethertype;
		packet->tagged = true;
	}
	return true;
}

static __always_inline bool parse_ipv4(struct __sk_buff *skb, struct packet *packet)
{
	struct iphdr ip;
	__u32 *words = packet->key.words;

	if (bpf_skb_load_bytes(skb, packet->l3, &ip, sizeof(ip)))
		return false;
	if (ip.version != 4 || ip.ihl < 5 || ip.frag_off & bpf_htons(0x3fff))
		return false; /* a fragment: more fragments to come, or an offset */
	packet->protocol = ip.protocol;
	packet->l4 = packet->l3 + ip.ihl * 4;
	words[0] = words[1] = words[4] = words[5] = 0;
	words[2] = words[6] = bpf_htonl(0xffff);
	words[3] = ip.saddr;
	words[7] = ip.daddr;
	return true;
}

static __always_inline bool parse_ipv6(struct __sk_buff *skb, struct packet *packet)
{
	struct ipv6hdr ip;
	__u8 next, extension[8];

	if (bpf_skb_load_bytes(skb, packet->l3, &ip, sizeof(ip)) || ip.version != 6)
		return false;
	copy_words(packet->key.words, &ip.saddr, 8);
	packet->l4 = packet->l3 + sizeof(ip);
	next = ip.nexthdr;
	for (int i = 0; i < MAX_IPV6_EXTENSIONS; i++) {
		if (next == IPPROTO_TCP || next == IPPROTO_UDP)
			break;
		if (next != IPPROTO_HOPOPTS && next != IPPROTO_DSTOPTS && next != IPPROTO_FRAGMENT)
			return false; /* also a routing header: its checksum is another one */
		if (bpf_skb_load_bytes(skb, packet->l4, extension, sizeof(extension)))
			return false;
		if (next == IPPROTO_FRAGMENT) {
			if (extension[2] || extension[3] & 0xf9)
				return false; /* not an atomic fragment (RFC 6946) */
			packet->l4 += 8;
		} else {
			packet->l4 += (extension[1] + 1) * 8;
		}
		next = extension[0];
	}
	packet->protocol = next;
	return true;
}

static __always_inline bool parse_ports(struct __sk_buff *skb, struct packet *packet)
{
	struct {
		struct ports ports;
		union {
			struct {
				__be16 length;
				__be16 check;
			} udp;
			__be32 seq;
		};
		__be32 ack;
		__u8 offset;
		__u8 flags;
	} l4;

	if (packet->protocol == IPPROTO_TCP) {
		if (bpf_skb_load_bytes(skb, packet->l4, &l4, 14))
			return false;
		packet->tcp_flags = l4.flags;
	} else if (packet->protocol == IPPROTO_UDP) {
		if (bpf_skb_load_bytes(skb, packet->l4, &l4, 8))
			return false;
		packet->udp_length = bpf_ntohs(l4.udp.length);
		packet->check = l4.udp.check;
	} else {
		return false;
	}
	packet->key.flow.client_port = l4.ports.source;
	packet->key.flow.service_port = l4.ports.dest;
	return true;
}

/* False: not an unfragmented TCP or UDP packet; the switch has no business with it. */
static __always_inline bool parse(struct __sk_buff *skb, struct packet *packet, bool ethernet)
{
	packet->ethertype = skb->protocol;
	packet->ethernet = ethernet;
	packet->tagged = false;
	packet->l3 = ethernet ? ETH_HLEN : 0;
	if (ethernet && !skip_vlan_tags(skb, packet))
		return false;
	if (packet->ethertype == bpf_htons(ETH_P_IP)) {
		if (!parse_ipv4(skb, packet))
			return false;
	} else if (packet->ethertype == bpf_htons(ETH_P_IPV6)) {
		if (!parse_ipv6(skb, packet))
			return false;
	} else {
		return false;
	}
	return parse_ports(skb, packet);
}

static __always_inline bool is_ipv4(const struct packet *packet)
{
	return packet->ethertype == bpf_htons(ETH_P_IP);
}

#endif
