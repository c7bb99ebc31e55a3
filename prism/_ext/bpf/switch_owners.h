/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Which rule speaks for an owner's packets: entries (owner, client) -> service. An entry alone
 * proves nothing; the rule that it leads to must name the owner.
 */
#ifndef PRISM_SWITCH_OWNERS_H
#define PRISM_SWITCH_OWNERS_H

#include <linux/errno.h>

#include "switch_maps.h"

static __always_inline bool stands_for(const struct prism_rule *rule, const void *flow)
{
	return rule->state != PRISM_DEAD && same_words(&rule->flow, flow, FLOW_WORDS);
}

static __always_inline bool owned_at(const struct prism_rule *rule, const __u32 *addr, __be16 port)
{
	return rule->owner_port == port && same_words(rule->owner_addr, addr, 4);
}

static __always_inline bool at_service(const struct prism_flow *flow, const __u32 *addr,
				       __be16 port)
{
	return flow->service_port == port && same_words(flow->service_addr, addr, 4);
}

static __always_inline void owner_key(union flow_key *key, const struct prism_flow *flow,
				      const __u32 *addr, __be16 port)
{
	copy_words(key->owner.owner_addr, addr, 4);
	copy_words(key->owner.client_addr, flow->client_addr, 4);
	key->owner.owner_port = port;
	key->owner.client_port = flow->client_port;
}

/* The flow that a reverse entry speaks of. */
static __always_inline void owned_flow(union flow_key *flow, const union flow_key *key,
				       const struct prism_owner *owner)
{
	copy_words(flow->flow.client_addr, key->owner.client_addr, 4);
	copy_words(flow->flow.service_addr, owner->service_addr, 4);
	flow->flow.client_port = key->owner.client_port;
	flow->flow.service_port = owner->service_port;
}

/* Whether the entry at `key` is of a flow whose rule has its owner there, so cannot be taken. */
static __always_inline bool entry_in_use(const union flow_key *key, const struct prism_owner *owner)
{
	union flow_key flow;
	struct prism_rule *rule;
	bool used;

	owned_flow(&flow, key, owner);
	rule = bpf_map_lookup_elem(&rules, &flow);
	if (!rule)
		return false;
	bpf_spin_lock(&rule->lock);
	used = stands_for(rule, flow.words) &&
	       owned_at(rule, (const __u32 *)key->owner.owner_addr, key->owner.owner_port);
	bpf_spin_unlock(&rule->lock);
	return used;
}

/*
 * Reserve the owner's (address, port) for this client's flow. Returns PRISM_OK, EXISTS or FULL.
 * An entry that no rule backs is a leftover, and is taken.
 */
static __noinline int claim(const struct prism_flow *flow, const struct prism_msg *request)
{
	union flow_key key;
	struct prism_owner *there, fresh = {};
	const __u32 *addr = (const __u32 *)request->owner_addr;
	long error;

	owner_key(&key, flow, addr, request->owner_port);
	copy_words(fresh.service_addr, flow->service_addr, 4);
	fresh.service_port = flow->service_port;
	error = bpf_map_update_elem(&owners, &key, &fresh, BPF_NOEXIST);
	if (error == -EEXIST) {
		there = bpf_map_lookup_elem(&owners, &key);
		if (there &&
		    at_service(flow, (const __u32 *)there->service_addr, there->service_port))
			return PRISM_OK;
		if (there && entry_in_use(&key, there))
			return PRISM_EXISTS;
		error = bpf_map_update_elem(&owners, &key, &fresh, BPF_ANY);
	}
	return error ? PRISM_FULL : PRISM_OK;
}

/* Undo `claim`, if the entry is this flow's. */
static __noinline int release(const struct prism_flow *flow, const __u32 *addr, __be16 port)
{
	union flow_key key;
	struct prism_owner *there;

	owner_key(&key, flow, addr, port);
	there = bpf_map_lookup_elem(&owners, &key);
	if (there && at_service(flow, (const __u32 *)there->service_addr, there->service_port))
		bpf_map_delete_elem(&owners, &key);
	return 0;
}

/* The owner was there until now: `release`, and drop what it still sends. */
static __noinline int leave(const struct prism_flow *flow, const __u32 *addr, __be16 port)
{
	union flow_key key;
	__u64 until = bpf_ktime_get_ns() + PRISM_FORMER_NS;

	owner_key(&key, flow, addr, port);
	bpf_map_update_elem(&former, &key, &until, BPF_ANY);
	return release(flow, addr, port);
}

#endif
