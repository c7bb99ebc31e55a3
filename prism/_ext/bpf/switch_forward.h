/* SPDX-License-Identifier: GPL-2.0-only */
/* TCP packets: to the owner, to the client, held, or dropped (docs/protocol.md, the pipeline). */
#ifndef PRISM_SWITCH_FORWARD_H
#define PRISM_SWITCH_FORWARD_H

#include <linux/pkt_cls.h>

#include "switch_maps.h"
#include "switch_packet.h"
#include "switch_rewrite.h"
#include "switch_rules.h"

enum decision { NOT_OURS, FORWARD, REWRITE, HOLD, DROP_LOCKED, DROP_STALE };

/* What the rule says about one packet, taken in one go under its lock. */
struct verdict {
	enum decision decision;
	__be16 port;
	__u32 addr[4];
};

/* A GSO packet stands for several. */
static __always_inline __u32 segments(const struct __sk_buff *skb)
{
	return skb->gso_segs > 1 ? skb->gso_segs : 1;
}

/* Whether somebody takes held packets: a TUN device, and an agent that is alive. */
static __always_inline bool agent_holds(const struct prism_config *config)
{
	__u32 zero = 0;
	__u64 *beat = bpf_map_lookup_elem(&agent, &zero);

	/* Signed, for the agent may have looked at the clock later than this packet. */
	return config->hold_ifindex && beat && *beat &&
	       (__s64)(bpf_ktime_get_ns() - *beat) < (__s64)PRISM_AGENT_TIMEOUT_NS;
}

/* Give the packet to the agent through the TUN device, which takes it without Ethernet. */
static __always_inline int give_to_agent(struct __sk_buff *skb, const struct packet *packet,
					 const struct prism_config *config, __u32 done,
					 __u32 otherwise)
{
	if (packet->tagged || (skb->vlan_present && bpf_skb_vlan_pop(skb)))
		return count(otherwise), TC_ACT_SHOT;
	add_to(done, segments(skb));
	return bpf_redirect(config->hold_ifindex, 0);
}

/* A bare SYN on a flow with a rule. True: the agent has asked, it may go to the owner. */
static __always_inline bool syn_may_pass(const union flow_key *key)
{
	__u64 *until = bpf_map_lookup_elem(&syn_pass, key);
	bool good;

	if (!until)
		return false;
	good = bpf_ktime_get_ns() < *until;
	bpf_map_delete_elem(&syn_pass, key);
	return good;
}

static __always_inline bool is_bare_syn(const struct packet *packet)
{
	return (packet->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

static __always_inline void judge_client(struct prism_rule *rule, const struct packet *packet,
					 bool holds, __u32 packets, __u32 bytes, __u64 now,
					 struct verdict *verdict)
{
	verdict->decision = NOT_OURS;
	bpf_spin_lock(&rule->lock);
	if (stands_for(rule, packet->key.words)) {
		if (rule->state == PRISM_LOCKED && holds) {
			rule->held += packets;
			rule->held_total += packets;
			rule->seen_ns = now;
			verdict->decision = HOLD;
		} else if (rule->state == PRISM_LOCKED) {
			rule->dropped += packets;
			verdict->decision = DROP_LOCKED;
		} else {
			rule->to_owner_packets += packets;
			rule->to_owner_bytes += bytes;
			rule->seen_ns = now;
			verdict->port = rule->owner_port;
			copy_words(verdict->addr, rule->owner_addr, 4);
			verdict->decision = REWRITE;
		}
	}
	bpf_spin_unlock(&rule->lock);
}

/* Step 2 of the pipeline: the packet's flow has a rule, so it comes from the client. */
static __always_inline int from_client(struct __sk_buff *skb, const struct packet *packet,
				       const struct prism_config *config, struct prism_rule *rule)
{
	struct verdict verdict;
	__u32 packets = segments(skb), bytes = skb->len;
	bool holds = false;

	if (is_bare_syn(packet)) {
		if (!syn_may_pass(&packet->key)) {
			if (agent_holds(config))
				return give_to_agent(skb, packet, config, PRISM_STAT_SYN_ASKED,
						     PRISM_STAT_SYN_DROPPED);
			return count(PRISM_STAT_SYN_DROPPED), TC_ACT_SHOT;
		}
		count(PRISM_STAT_SYN_PASSED);
	}
	if (rule->state == PRISM_LOCKED) /* a hint only: the clock is not looked at for nothing */
		holds = agent_holds(config);
	judge_client(rule, packet, holds, packets, bytes, bpf_ktime_get_coarse_ns(), &verdict);
	if (verdict.decision == NOT_OURS)
		return TC_ACT_UNSPEC;
	if (verdict.decision == HOLD)
		return give_to_agent(skb, packet, config, PRISM_STAT_HELD,
				     PRISM_STAT_DROPPED_LOCKED);
	if (verdict.decision == DROP_LOCKED)
		return add_to(PRISM_STAT_DROPPED_LOCKED, packets), TC_ACT_SHOT;
	add_to(PRISM_STAT_TO_OWNER_PACKETS, packets);
	add_to(PRISM_STAT_TO_OWNER_BYTES, bytes);
	if (at_service(&packet->key.flow, verdict.addr, verdict.port))
		return TC_ACT_UNSPEC;
	if (rewrite(skb, packet, false, packet->key.words + 4, verdict.addr,
		    packet->key.flow.service_port, verdict.port))
		return count(PRISM_STAT_REWRITE_FAILED), TC_ACT_SHOT;
	return TC_ACT_OK;
}

/*
 * A packet to the client of `flow` from (addr, port): let it pass only if that is the owner, and
 * nothing is locked.
 */
static __always_inline enum decision judge_owner(struct prism_rule *rule,
						 const union flow_key *flow, const __u32 *addr,
						 __be16 port, __u32 packets, __u32 bytes, __u64 now)
{
	enum decision decision = NOT_OURS;

	bpf_spin_lock(&rule->lock);
	if (stands_for(rule, flow->words)) {
		if (!owned_at(rule, addr, port)) {
			decision = DROP_STALE;
			rule->dropped += packets;
		} else if (rule->state == PRISM_LOCKED) {
			decision = DROP_LOCKED;
			rule->dropped += packets;
		} else {
			decision = FORWARD;
			rule->to_client_packets += packets;
			rule->to_client_bytes += bytes;
			rule->seen_ns = now;
		}
	}
	bpf_spin_unlock(&rule->lock);
	return decision;
}

static __always_inline int dropped(enum decision decision, __u32 packets)
{
	add_to(decision == DROP_LOCKED ? PRISM_STAT_DROPPED_OWNER : PRISM_STAT_DROPPED_STALE,
	       packets);
	return TC_ACT_SHOT;
}

/* Steps 3 and 4: `flow` is what the packet claims to answer, `elsewhere` when rewriting it. */
static __always_inline int from_owner(struct __sk_buff *skb, const struct packet *packet,
				      const union flow_key *flow, struct prism_rule *rule,
				      bool elsewhere)
{
	__u32 packets = segments(skb), bytes = skb->len;
	const __u32 *source = packet->key.words;
	enum decision decision = judge_owner(rule, flow, source, packet->key.flow.client_port,
					     packets, bytes, bpf_ktime_get_coarse_ns());

	if (decision == NOT_OURS)
		return TC_ACT_UNSPEC;
	if (decision != FORWARD)
		return dropped(decision, packets);
	add_to(PRISM_STAT_TO_CLIENT_PACKETS, packets);
	add_to(PRISM_STAT_TO_CLIENT_BYTES, bytes);
	if (!elsewhere)
		return TC_ACT_UNSPEC;
	if (rewrite(skb, packet, true, source, flow->words + 4, packet->key.flow.client_port,
		    flow->flow.service_port))
		return count(PRISM_STAT_REWRITE_FAILED), TC_ACT_SHOT;
	return TC_ACT_OK;
}

/* Whether (source, destination) was an owner and its client until a moment ago. */
static __always_inline bool from_former_owner(const union flow_key *key)
{
	__u64 *until = bpf_map_lookup_elem(&former, key);

	return until && bpf_ktime_get_ns() < *until;
}

static __always_inline int handle_tcp(struct __sk_buff *skb, const struct packet *packet,
				      const struct prism_config *config)
{
	struct prism_rule *rule = bpf_map_lookup_elem(&rules, &packet->key);
	struct prism_owner *owner;
	union flow_key flow;

	if (rule)
		return from_client(skb, packet, config, rule);

	owner = bpf_map_lookup_elem(&owners, &packet->key);
	if (owner) {
		owned_flow(&flow, &packet->key, owner);
		/* (owner, client): the key's first half is the owner's, the second the client's */
		rule = bpf_map_lookup_elem(&rules, &flow);
		if (rule)
			return from_owner(skb, packet, &flow, rule, true);
	}

	copy_words(flow.words, packet->key.words + 4, 4);
	copy_words(flow.words + 4, packet->key.words, 4);
	flow.flow.client_port = packet->key.flow.service_port;
	flow.flow.service_port = packet->key.flow.client_port;
	rule = bpf_map_lookup_elem(&rules, &flow);
	if (rule)
		return from_owner(skb, packet, &flow, rule, false);
	if (from_former_owner(&packet->key))
		return dropped(DROP_STALE, segments(skb));
	return TC_ACT_UNSPEC;
}

#endif
