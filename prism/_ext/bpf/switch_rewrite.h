/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Changes packets, keeping their checksums right.
 *
 * An skb's checksum is in one of three conditions, and the helpers are called such that all
 * three stay true:
 *  - filled in: the field is adjusted by the difference;
 *  - PARTIAL (to be filled in by the device; GSO packets always): the field holds the sum of the
 *    pseudo header, so only changes of addresses touch it. That is BPF_F_PSEUDO_HDR;
 *  - COMPLETE (the device summed the whole packet into skb->csum): a change compensated by the
 *    change of a checksum field inside the packet leaves the sum as it is. With BPF_F_PSEUDO_HDR
 *    the helper takes the difference off skb->csum, because IPv4's own header checksum has
 *    absorbed the address. IPv6 has none, so its address is stored with BPF_F_RECOMPUTE_CSUM,
 *    which puts it back.
 */
#ifndef PRISM_SWITCH_REWRITE_H
#define PRISM_SWITCH_REWRITE_H

#include "switch_packet.h"

#define TCP_CHECK_OFFSET 16
#define UDP_CHECK_OFFSET 6
#define HOP_LIMIT	 64

/*
 * Give a TCP packet another source (`source`) or destination. `old` and `fresh` are packed
 * addresses.
 */
static __always_inline int rewrite(struct __sk_buff *skb, const struct packet *packet, bool source,
				   const __u32 *old, const __u32 *fresh, __be16 old_port,
				   __be16 port)
{
	__u32 check = packet->l4 + TCP_CHECK_OFFSET;
	__u32 port_at = packet->l4 +
			(source ? offsetof(struct ports, source) : offsetof(struct ports, dest));
	__u32 at;
	__s64 difference;
	int error = 0;

	if (is_ipv4(packet)) {
		at = packet->l3 +
		     (source ? offsetof(struct iphdr, saddr) : offsetof(struct iphdr, daddr));
		error |= bpf_l4_csum_replace(skb, check, old[3], fresh[3],
					     BPF_F_PSEUDO_HDR | sizeof(__be32));
		error |= bpf_l3_csum_replace(skb, packet->l3 + offsetof(struct iphdr, check),
					     old[3], fresh[3], sizeof(__be32));
		error |= bpf_skb_store_bytes(skb, at, &fresh[3], sizeof(__be32), 0);
	} else {
		at = packet->l3 +
		     (source ? offsetof(struct ipv6hdr, saddr) : offsetof(struct ipv6hdr, daddr));
		difference = bpf_csum_diff((__be32 *)old, 16, (__be32 *)fresh, 16, 0);
		error |= bpf_l4_csum_replace(skb, check, 0, difference, BPF_F_PSEUDO_HDR);
		error |= bpf_skb_store_bytes(skb, at, fresh, 16, BPF_F_RECOMPUTE_CSUM);
	}
	error |= bpf_l4_csum_replace(skb, check, old_port, port, sizeof(port));
	error |= bpf_skb_store_bytes(skb, port_at, &port, sizeof(port), 0);
	return error;
}

static __always_inline int swap_ethernet(struct __sk_buff *skb)
{
	__u8 old[12], fresh[12];

	if (bpf_skb_load_bytes(skb, 0, old, sizeof(old)))
		return -1;
	__builtin_memcpy(fresh, old + 6, 6);
	__builtin_memcpy(fresh + 6, old, 6);
	return bpf_skb_store_bytes(skb, 0, fresh, sizeof(fresh), 0);
}

/* Addresses change places, which no checksum notices; the hop limit starts anew. */
static __always_inline int swap_ip(struct __sk_buff *skb, const struct packet *packet)
{
	const __u32 *words = packet->key.words;
	__u8 hops = HOP_LIMIT;
	int error = 0;

	if (is_ipv4(packet)) {
		__be32 pair[2] = {words[7], words[3]};
		__be16 old, fresh;

		if (bpf_skb_load_bytes(skb, packet->l3 + offsetof(struct iphdr, ttl), &old, 2))
			return -1;
		fresh = bpf_htons((HOP_LIMIT << 8) | (bpf_ntohs(old) & 0xff));
		error |= bpf_l3_csum_replace(skb, packet->l3 + offsetof(struct iphdr, check), old,
					     fresh, sizeof(fresh));
		error |= bpf_skb_store_bytes(skb, packet->l3 + offsetof(struct iphdr, ttl), &fresh,
					     sizeof(fresh), 0);
		return error | bpf_skb_store_bytes(skb, packet->l3 + offsetof(struct iphdr, saddr),
						   pair, sizeof(pair), 0);
	}
	error |= bpf_skb_store_bytes(skb, packet->l3 + offsetof(struct ipv6hdr, saddr), words + 4,
				     16, 0);
	error |= bpf_skb_store_bytes(skb, packet->l3 + offsetof(struct ipv6hdr, daddr), words, 16,
				     0);
	return error | bpf_skb_store_bytes(skb, packet->l3 + offsetof(struct ipv6hdr, hop_limit),
					   &hops, sizeof(hops), BPF_F_RECOMPUTE_CSUM);
}

/* Turn a control datagram round: `reply` in place of `request`, to where it came from. */
static __always_inline int bounce(struct __sk_buff *skb, const struct packet *packet,
				  union message *request, union message *reply)
{
	struct ports ports = {packet->key.flow.service_port, packet->key.flow.client_port};
	__s64 difference = bpf_csum_diff((__be32 *)request, PRISM_MSG_SIZE, (__be32 *)reply,
					 PRISM_MSG_SIZE, 0);
	int error = 0;

	error |= bpf_l4_csum_replace(skb, packet->l4 + UDP_CHECK_OFFSET, 0, difference,
				     BPF_F_MARK_MANGLED_0);
	/* No checksum (IPv4 only): then nothing compensates the change of the payload. */
	error |= bpf_skb_store_bytes(skb, packet->l4 + 8, reply, PRISM_MSG_SIZE,
				     packet->check ? 0 : BPF_F_RECOMPUTE_CSUM);
	error |= bpf_skb_store_bytes(skb, packet->l4, &ports, sizeof(ports), 0);
	error |= swap_ip(skb, packet);
	if (packet->ethernet)
		error |= swap_ethernet(skb);
	return error;
}

#endif
