/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The operations on the table, each a compare-and-swap under the rule's lock.
 *
 * Nothing but plain memory may be touched between bpf_spin_lock and bpf_spin_unlock, so a
 * deletion first marks the rule DEAD under the lock and then takes it out of the map. Whoever
 * finds a rule checks under the lock that it is not DEAD and still carries the flow: elements
 * are reused.
 */
#ifndef PRISM_SWITCH_RULES_H
#define PRISM_SWITCH_RULES_H

#include "switch_owners.h"

#define NO_ANSWER -1 /* instead of an enum prism_status: drop the request, it will be repeated */
#define PROCEED	  -2

/* Who asks for what. `owner` is the asker, or whom the agent names. */
struct request {
	__u64 owner;
	__u64 gen;
	bool agent; /* may change any rule */
	bool locked;
};

/* Put the rule as it stands into a reply. Call with the lock held. */
static __always_inline void describe(union message *reply, const struct prism_rule *rule)
{
	bool locked = rule->state == PRISM_LOCKED;

	reply->msg.flags = PRISM_FLAG_REPLY | (locked ? PRISM_FLAG_LOCKED : 0);
	copy_words(&reply->msg.owner_port, &rule->owner_port, 2); /* port and MAC */
	copy_words(reply->msg.owner_addr, rule->owner_addr, 4);
	FIELD(reply, owner) = bpf_cpu_to_be64(rule->owner);
	FIELD(reply, gen) = bpf_cpu_to_be64(rule->gen);
	FIELD(reply, cookie) = bpf_cpu_to_be64(rule->cookie);
}

static __always_inline void set_owner(struct prism_rule *rule, const struct prism_msg *request,
				      __u64 owner)
{
	rule->owner = owner;
	copy_words(&rule->owner_port, &request->owner_port, 2);
	copy_words(rule->owner_addr, request->owner_addr, 4);
}

/* Tell the agent that packets it holds may go on. */
static __always_inline void tell_agent(__u32 kind, __u32 held, const void *flow, __u32 state,
				       __u64 gen, __u64 owner)
{
	struct prism_event event = {
		.kind = kind,
		.held = held,
		.state = state,
		.gen = gen,
		.owner = owner,
	};

	copy_words(&event.flow, flow, FLOW_WORDS);
	if (bpf_ringbuf_output(&events, &event, sizeof(event), 0))
		count(PRISM_STAT_EVENTS_LOST);
}

/* The operations. Each returns a status and fills the reply. */

static __always_inline int rule_get(struct scratch *scratch)
{
	struct prism_rule *rule = bpf_map_lookup_elem(&rules, &scratch->request.msg.flow);
	int status = PRISM_NOENT;

	if (!rule)
		return PRISM_NOENT;
	bpf_spin_lock(&rule->lock);
	if (stands_for(rule, &scratch->request.msg.flow)) {
		describe(&scratch->reply, rule);
		status = PRISM_OK;
	}
	bpf_spin_unlock(&rule->lock);
	return status;
}

static __always_inline bool makes_sense(const struct prism_msg *msg)
{
	const __u32 *client = (const __u32 *)msg->flow.client_addr;
	const __u32 *service = (const __u32 *)msg->flow.service_addr;
	const __u32 *owner = (const __u32 *)msg->owner_addr;
	const __be32 mapped = bpf_htonl(0xffff);
	bool v4 = !(service[0] | service[1]) && service[2] == mapped;
	bool client_v4 = !(client[0] | client[1]) && client[2] == mapped;
	bool owner_v4 = !(owner[0] | owner[1]) && owner[2] == mapped;

	return msg->flow.client_port && msg->flow.service_port && msg->owner_port &&
	       v4 == client_v4 && v4 == owner_v4;
}

/* A rule stands for the flow already: the answer to a repeated ADD, or EXISTS. */
static __always_inline int add_again(struct scratch *scratch, const struct request *by,
				     struct prism_rule *rule)
{
	struct prism_msg *msg = &scratch->request.msg;
	__u64 cookie = bpf_be64_to_cpu(FIELD(&scratch->request, cookie));
	int status = NO_ANSWER; /* it is just being deleted */

	bpf_spin_lock(&rule->lock);
	if (stands_for(rule, &msg->flow)) {
		describe(&scratch->reply, rule);
		status = rule->owner == by->owner && rule->cookie == cookie ? PRISM_OK
									    : PRISM_EXISTS;
	}
	bpf_spin_unlock(&rule->lock);
	return status;
}

static __always_inline int rule_add(struct scratch *scratch, const struct request *by)
{
	struct prism_msg *msg = &scratch->request.msg;
	struct prism_rule *fresh = (struct prism_rule *)scratch->rule, *rule;
	const __u32 *addr = (const __u32 *)msg->owner_addr;
	bool rewritten = !at_service(&msg->flow, addr, msg->owner_port);
	__u64 now = bpf_ktime_get_ns();
	int status;
	long error;

	if (!makes_sense(msg))
		return PRISM_INVALID;
	rule = bpf_map_lookup_elem(&rules, &msg->flow);
	if (rule)
		return add_again(scratch, by, rule);
	if (rewritten) {
		status = claim(&msg->flow, msg);
		if (status != PRISM_OK)
			return status;
	}
	clear_words(fresh, sizeof(*fresh) / 4);
	fresh->state = by->locked ? PRISM_LOCKED : PRISM_FORWARD;
	copy_words(&fresh->flow, &msg->flow, FLOW_WORDS);
	set_owner(fresh, msg, by->owner);
	/* The agent may know the rule from before, with its generation. */
	fresh->gen = by->agent && by->gen ? by->gen : now;
	fresh->cookie = bpf_be64_to_cpu(FIELD(&scratch->request, cookie));
	fresh->created_ns = fresh->seen_ns = now;
	fresh->locked_ns = by->locked ? now : 0;
	error = bpf_map_update_elem(&rules, &msg->flow, fresh, BPF_NOEXIST);
	if (!error) {
		describe(&scratch->reply, fresh);
		count(PRISM_STAT_ADDED);
		return PRISM_OK;
	}
	if (error == -EEXIST) { /* somebody was faster; a claim at his owner is his as well */
		rule = bpf_map_lookup_elem(&rules, &msg->flow);
		if (!rule)
			return NO_ANSWER;
		status = add_again(scratch, by, rule);
		if (rewritten && !(scratch->reply.msg.owner_port == msg->owner_port &&
				   same_words(scratch->reply.msg.owner_addr, addr, 4)))
			release(&msg->flow, addr, msg->owner_port);
		return status;
	}
	if (rewritten)
		release(&msg->flow, addr, msg->owner_port);
	return PRISM_FULL;
}

/* Whether the asker may change the rule now. Call with the lock held. */
static __always_inline int may_change(const struct prism_rule *rule, const struct request *by,
				      const void *flow)
{
	if (!stands_for(rule, flow))
		return PRISM_NOENT;
	if (rule->gen != by->gen)
		return PRISM_STALE;
	if (rule->owner != by->owner && !by->agent)
		return PRISM_DENIED;
	return PROCEED;
}

static __always_inline int rule_lock(struct scratch *scratch, const struct request *by)
{
	struct prism_rule *rule = bpf_map_lookup_elem(&rules, &scratch->request.msg.flow);
	__u64 now = bpf_ktime_get_ns();
	int status;

	if (!rule)
		return PRISM_NOENT;
	bpf_spin_lock(&rule->lock);
	status = may_change(rule, by, &scratch->request.msg.flow);
	if (status == PROCEED) {
		if (rule->state != PRISM_LOCKED) {
			rule->state = PRISM_LOCKED;
			rule->locked_ns = now;
		}
		status = PRISM_OK;
	}
	if (status != PRISM_NOENT)
		describe(&scratch->reply, rule);
	bpf_spin_unlock(&rule->lock);
	return status;
}

static __always_inline int rule_unlock(struct scratch *scratch, const struct request *by)
{
	struct prism_rule *rule = bpf_map_lookup_elem(&rules, &scratch->request.msg.flow);
	__u32 held = 0;
	int status;

	if (!rule)
		return PRISM_NOENT;
	bpf_spin_lock(&rule->lock);
	status = may_change(rule, by, &scratch->request.msg.flow);
	if (status == PROCEED) {
		rule->state = PRISM_FORWARD;
		held = rule->held;
		rule->held = 0;
		status = PRISM_OK;
	}
	if (status != PRISM_NOENT)
		describe(&scratch->reply, rule);
	bpf_spin_unlock(&rule->lock);
	if (held)
		tell_agent(PRISM_EVENT_UNLOCKED, held, &scratch->request.msg.flow, PRISM_FORWARD,
			   by->gen, bpf_be64_to_cpu(FIELD(&scratch->reply, owner)));
	return status;
}

static __always_inline int rule_delete(struct scratch *scratch, const struct request *by)
{
	struct prism_msg *msg = &scratch->request.msg;
	struct prism_rule *rule = bpf_map_lookup_elem(&rules, &msg->flow);
	struct prism_rule *was = (struct prism_rule *)scratch->rule;
	__u32 held = 0;
	int status;

	if (!rule)
		return PRISM_NOENT;
	bpf_spin_lock(&rule->lock);
	status = may_change(rule, by, &msg->flow);
	if (status != PRISM_NOENT)
		describe(&scratch->reply, rule); /* or as it was, when it is deleted now */
	if (status == PROCEED) {
		rule->state = PRISM_DEAD;
		held = rule->held;
		was->owner = rule->owner;
		was->owner_port = rule->owner_port;
		copy_words(was->owner_addr, rule->owner_addr, 4);
		status = PRISM_OK;
	}
	bpf_spin_unlock(&rule->lock);
	if (status != PRISM_OK)
		return status;
	if (!at_service(&msg->flow, (const __u32 *)was->owner_addr, was->owner_port))
		leave(&msg->flow, (const __u32 *)was->owner_addr, was->owner_port);
	bpf_map_delete_elem(&rules, &msg->flow);
	count(PRISM_STAT_DELETED);
	if (held)
		tell_agent(PRISM_EVENT_DELETED, held, &msg->flow, PRISM_DEAD, by->gen, was->owner);
	return PRISM_OK;
}

/* Whether CHOWN may go ahead. Call with the lock held. */
static __always_inline int may_chown(const struct prism_rule *rule, const struct request *by,
				     const void *flow)
{
	if (!stands_for(rule, flow))
		return PRISM_NOENT;
	if (rule->gen == by->gen + 1 && rule->owner == by->owner)
		return PRISM_OK; /* done before: a repetition */
	if (rule->gen != by->gen)
		return PRISM_STALE;
	if (rule->state != PRISM_LOCKED && rule->owner != by->owner && !by->agent)
		return PRISM_DENIED;
	return PROCEED;
}

static __always_inline int may_chown_now(struct scratch *scratch, const struct request *by,
					 struct prism_rule *rule)
{
	int status;

	bpf_spin_lock(&rule->lock);
	status = may_chown(rule, by, &scratch->request.msg.flow);
	if (status != PRISM_NOENT)
		describe(&scratch->reply, rule);
	bpf_spin_unlock(&rule->lock);
	return status;
}

/*
 * A claim was made, and then the rule changed under it. Withdraw it, unless the rule's owner is
 * there by now (by another request of the same node).
 */
static __always_inline void withdraw(struct scratch *scratch, struct prism_rule *rule)
{
	struct prism_msg *msg = &scratch->request.msg;
	const __u32 *addr = (const __u32 *)msg->owner_addr;
	bool there;

	release(&msg->flow, addr, msg->owner_port);
	bpf_spin_lock(&rule->lock);
	there = stands_for(rule, &msg->flow) && owned_at(rule, addr, msg->owner_port);
	bpf_spin_unlock(&rule->lock);
	if (there)
		claim(&msg->flow, msg);
}

static __always_inline int rule_chown(struct scratch *scratch, const struct request *by)
{
	struct prism_msg *msg = &scratch->request.msg;
	const __u32 *addr = (const __u32 *)msg->owner_addr;
	struct prism_rule *rule, *was = (struct prism_rule *)scratch->rule;
	bool rewritten = !at_service(&msg->flow, addr, msg->owner_port);
	__u64 now = bpf_ktime_get_ns(), gen = 0;
	__u64 cookie =
		bpf_be64_to_cpu(FIELD(&scratch->request, cookie)); /* agent: new generation */
	__u32 held = 0;
	int status;

	if (!makes_sense(msg))
		return PRISM_INVALID;
	rule = bpf_map_lookup_elem(&rules, &msg->flow);
	if (!rule)
		return PRISM_NOENT;
	status = may_chown_now(scratch, by, rule);
	if (status != PROCEED)
		return status;
	if (rewritten) {
		status = claim(&msg->flow, msg);
		if (status != PRISM_OK)
			return status;
	}
	bpf_spin_lock(&rule->lock);
	status = may_chown(rule, by, &msg->flow);
	if (status == PROCEED) {
		was->owner = rule->owner;
		was->owner_port = rule->owner_port;
		copy_words(was->owner_addr, rule->owner_addr, 4);
		set_owner(rule, msg, by->owner);
		rule->gen = gen = by->agent && cookie ? cookie : rule->gen + 1;
		if (!by->locked) {
			rule->state = PRISM_FORWARD;
			held = rule->held;
			rule->held = 0;
		} else if (rule->state != PRISM_LOCKED) {
			rule->state = PRISM_LOCKED;
			rule->locked_ns = now;
		}
	}
	if (status != PRISM_NOENT)
		describe(&scratch->reply, rule);
	bpf_spin_unlock(&rule->lock);

	if (status != PROCEED) {
		if (rewritten)
			withdraw(scratch, rule);
		return status;
	}
	if (!(was->owner_port == msg->owner_port && same_words(was->owner_addr, addr, 4)) &&
	    !at_service(&msg->flow, (const __u32 *)was->owner_addr, was->owner_port))
		leave(&msg->flow, (const __u32 *)was->owner_addr, was->owner_port);
	if (was->owner != by->owner)
		count(PRISM_STAT_HANDOFFS);
	if (held)
		tell_agent(PRISM_EVENT_CHOWNED, held, &msg->flow, PRISM_FORWARD, gen, by->owner);
	return PRISM_OK;
}

#endif
