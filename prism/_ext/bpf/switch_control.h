/* SPDX-License-Identifier: GPL-2.0-only */
/* Control datagrams: which are good, who may ask, and the answer (docs/protocol.md). */
#ifndef PRISM_SWITCH_CONTROL_H
#define PRISM_SWITCH_CONTROL_H

#include <linux/pkt_cls.h>

#include "switch_maps.h"
#include "switch_packet.h"
#include "switch_rewrite.h"
#include "switch_rules.h"
#include "switch_siphash.h"

#define REPLAY_WINDOW 64

enum admission { ADMITTED, REPLAYED, UNKNOWN };

/* Note a sequence number as used (after RFC 4303, section 3.4.3). */
static __always_inline enum admission admit(struct prism_node *node, __u64 seq)
{
	enum admission result = ADMITTED;

	bpf_spin_lock(&node->lock);
	if (seq > node->highest) {
		__u64 ahead = seq - node->highest;

		node->window = ahead >= REPLAY_WINDOW ? 1 : node->window << ahead | 1;
		node->highest = seq;
	} else {
		__u64 behind = node->highest - seq;

		if (behind >= REPLAY_WINDOW || node->window >> behind & 1)
			result = REPLAYED;
		else
			node->window |= 1ULL << behind;
	}
	if (result == ADMITTED && !node->lease_ms)
		result = UNKNOWN; /* it has left */
	bpf_spin_unlock(&node->lock);
	return result;
}

/* Renew a known node's lease. False: the sequence number was used before. */
static __always_inline bool renew(struct prism_node *node, const struct prism_node *hello)
{
	bool good;

	good = admit(node, hello->highest) != REPLAYED;
	if (!good)
		return false;
	bpf_spin_lock(&node->lock);
	node->lease_ms = hello->lease_ms;
	node->hello_ns = hello->hello_ns;
	copy_words(node->addr, hello->addr, 4);
	node->port = hello->port;
	node->ifindex = hello->ifindex;
	bpf_spin_unlock(&node->lock);
	return true;
}

static __always_inline int hello(struct scratch *scratch, const struct prism_config *config,
				 const struct packet *packet, __u32 ifindex)
{
	union message *request = &scratch->request;
	struct prism_node *known, *fresh = (struct prism_node *)scratch->node;
	__u64 id = bpf_be64_to_cpu(FIELD(request, node));
	__u64 lease = bpf_be64_to_cpu(FIELD(request, cookie));
	long error;

	if (lease > config->lease_max_ms)
		lease = config->lease_max_ms;
	clear_words(fresh, sizeof(*fresh) / 4);
	fresh->lease_ms = lease;
	fresh->highest = bpf_be64_to_cpu(FIELD(request, seq));
	fresh->window = 1;
	fresh->hello_ns = bpf_ktime_get_ns();
	copy_words(fresh->addr, packet->key.flow.client_addr, 4);
	fresh->port = packet->key.flow.client_port;
	fresh->ifindex = ifindex;

	FIELD(&scratch->reply, cookie) = bpf_cpu_to_be64(config->incarnation);
	FIELD(&scratch->reply, gen) = bpf_cpu_to_be64(lease);
	known = bpf_map_lookup_elem(&nodes, &id);
	if (!known) {
		if (!lease)
			return PRISM_OK;
		error = bpf_map_update_elem(&nodes, &id, fresh, BPF_NOEXIST);
		if (!error)
			return PRISM_OK;
		if (error != -EEXIST)
			return PRISM_FULL;
		known = bpf_map_lookup_elem(&nodes, &id);
		if (!known)
			return NO_ANSWER;
	}
	if (renew(known, fresh))
		return PRISM_OK;
	count(PRISM_STAT_REPLAY);
	return NO_ANSWER;
}

/* Carry out one of ADD .. GET, and count it. */
static __always_inline int operate(struct scratch *scratch, const struct request *by)
{
	switch (scratch->request.msg.op) {
	case PRISM_OP_ADD:
		count(PRISM_STAT_ADD);
		return rule_add(scratch, by);
	case PRISM_OP_LOCK:
		count(PRISM_STAT_LOCK);
		return rule_lock(scratch, by);
	case PRISM_OP_CHOWN:
		count(PRISM_STAT_CHOWN);
		return rule_chown(scratch, by);
	case PRISM_OP_UNLOCK:
		count(PRISM_STAT_UNLOCK);
		return rule_unlock(scratch, by);
	case PRISM_OP_DELETE:
		count(PRISM_STAT_DELETE);
		return rule_delete(scratch, by);
	case PRISM_OP_GET:
		count(PRISM_STAT_GET);
		return rule_get(scratch);
	}
	return PRISM_INVALID;
}

/* The reply before anything is known: the request's names, and no rule. */
static __always_inline void begin_reply(struct scratch *scratch)
{
	clear_words(&scratch->reply, PRISM_MSG_SIZE / 4);
	copy_words(&scratch->reply, &scratch->request, 60 / 4); /* magic .. flow */
	scratch->reply.msg.flags = PRISM_FLAG_REPLY;
}

static __always_inline void end_reply(struct scratch *scratch, int status)
{
	scratch->reply.msg.status = status;
	if (status == PRISM_OK)
		return;
	count(PRISM_STAT_REFUSED);
	if (status == PRISM_FULL)
		count(PRISM_STAT_FULL);
}

/* The request of a node that is not known from a HELLO, or has no right to this one. */
static __always_inline int serve(struct scratch *scratch, const struct request *by,
				 enum admission admission)
{
	if (admission == UNKNOWN)
		return PRISM_DENIED;
	if (scratch->request.msg.op == PRISM_OP_ADD || scratch->request.msg.op == PRISM_OP_CHOWN) {
		if (FIELD(&scratch->request, owner) != FIELD(&scratch->request, node))
			return PRISM_DENIED; /* for itself only */
	}
	return operate(scratch, by);
}

static __always_inline bool well_formed(struct __sk_buff *skb, const struct packet *packet,
					struct scratch *scratch)
{
	const struct prism_msg *msg = &scratch->request.msg;

	return packet->udp_length == PRISM_MSG_SIZE + 8 &&
	       !bpf_skb_load_bytes(skb, packet->l4 + 8, &scratch->request, PRISM_MSG_SIZE) &&
	       msg->magic == bpf_htonl(PRISM_MAGIC) && msg->version == PRISM_VERSION;
}

static __always_inline int refuse(__u32 reason)
{
	count(reason);
	return TC_ACT_SHOT;
}

/* Leave it to the socket of the agent on this host, which verifies it again. */
static __always_inline int to_agent(void)
{
	count(PRISM_STAT_TO_AGENT);
	return TC_ACT_UNSPEC;
}

static __always_inline bool is_control(const struct packet *packet,
				       const struct prism_config *config)
{
	const struct prism_flow *flow = &packet->key.flow;

	return packet->protocol == IPPROTO_UDP && flow->service_port == config->control_port &&
	       config->control_port &&
	       (same_words(flow->service_addr, config->control_v4, 4) ||
		same_words(flow->service_addr, config->control_v6, 4));
}

static __always_inline int handle_control(struct __sk_buff *skb, const struct packet *packet,
					  const struct prism_config *config)
{
	__u32 zero = 0;
	struct scratch *scratch = bpf_map_lookup_elem(&scratches, &zero);
	struct prism_msg *msg;
	struct prism_node *node;
	struct request by = {};
	enum admission admission = UNKNOWN;
	__u64 id;
	int status;

	if (!scratch)
		return TC_ACT_SHOT;
	msg = &scratch->request.msg;
	if (!well_formed(skb, packet, scratch))
		return refuse(PRISM_STAT_BAD_FORMAT);
	if (message_mac(&scratch->request, config->key[0], config->key[1]) !=
	    scratch->request.words[PRISM_MAC_OFFSET / 8])
		return refuse(PRISM_STAT_BAD_MAC);
	if (msg->flags & PRISM_FLAG_REPLY)
		return msg->op == PRISM_OP_QUERY ? to_agent() : refuse(PRISM_STAT_BAD_FORMAT);

	begin_reply(scratch);
	if (msg->op == PRISM_OP_HELLO && FIELD(&scratch->request, node)) {
		count(PRISM_STAT_HELLO);
		status = hello(scratch, config, packet, skb->ifindex);
	} else {
		id = by.owner = bpf_be64_to_cpu(FIELD(&scratch->request, node));
		by.gen = bpf_be64_to_cpu(FIELD(&scratch->request, gen));
		by.locked = msg->flags & PRISM_FLAG_LOCKED;
		node = id ? bpf_map_lookup_elem(&nodes, &id) : NULL;
		if (node)
			admission = admit(node, bpf_be64_to_cpu(FIELD(&scratch->request, seq)));
		if (admission == REPLAYED)
			return refuse(PRISM_STAT_REPLAY);
		if (msg->op == PRISM_OP_LIST && admission == ADMITTED)
			return to_agent();
		status = serve(scratch, &by, admission);
	}
	if (status == NO_ANSWER)
		return refuse(PRISM_STAT_BUSY);
	end_reply(scratch, status);
	scratch->reply.words[PRISM_MAC_OFFSET / 8] =
		message_mac(&scratch->reply, config->key[0], config->key[1]);
	if (bounce(skb, packet, &scratch->request, &scratch->reply))
		return refuse(PRISM_STAT_REWRITE_FAILED);
	return bpf_redirect(skb->ifindex, 0);
}

/*
 * The agent's HELLO in a node's name ends the node's lease, if that has run out by now: the
 * node may have renewed it since the agent looked.
 */
static __always_inline int end_lease(struct scratch *scratch)
{
	__u64 id = bpf_be64_to_cpu(FIELD(&scratch->request, node));
	struct prism_node *node = bpf_map_lookup_elem(&nodes, &id);
	__u64 now = bpf_ktime_get_ns();
	int status = PRISM_EXISTS;

	if (!node)
		return PRISM_NOENT;
	bpf_spin_lock(&node->lock);
	if (now - node->hello_ns >= node->lease_ms * 1000000ULL) {
		node->lease_ms = 0;
		status = PRISM_OK;
	}
	bpf_spin_unlock(&node->lock);
	return status;
}

/* The agent's own requests, by BPF_PROG_TEST_RUN: unsigned, and with a right to every rule. */
static __always_inline int handle_agent(struct __sk_buff *skb)
{
	__u32 zero = 0;
	struct scratch *scratch = bpf_map_lookup_elem(&scratches, &zero);
	struct request by = {.agent = true};
	int status;

	if (!scratch || bpf_skb_load_bytes(skb, ETH_HLEN, &scratch->request, PRISM_MSG_SIZE))
		return TC_ACT_SHOT;
	by.owner = bpf_be64_to_cpu(FIELD(&scratch->request, owner));
	by.gen = bpf_be64_to_cpu(FIELD(&scratch->request, gen));
	by.locked = scratch->request.msg.flags & PRISM_FLAG_LOCKED;
	begin_reply(scratch);
	status = scratch->request.msg.op == PRISM_OP_HELLO ? end_lease(scratch)
							   : operate(scratch, &by);
	if (status == NO_ANSWER)
		return TC_ACT_SHOT;
	end_reply(scratch, status);
	return bpf_skb_store_bytes(skb, ETH_HLEN, &scratch->reply, PRISM_MSG_SIZE, 0) ? TC_ACT_SHOT
										      : TC_ACT_OK;
}

#endif
