/* SPDX-License-Identifier: GPL-2.0-only */
/* The maps, and the counters' one-liner. The loader sets max_entries; see bpf_loader.c. */
#ifndef PRISM_SWITCH_MAPS_H
#define PRISM_SWITCH_MAPS_H

#include <linux/bpf.h>
#include <stddef.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>

#include "prism_abi.h"

typedef _Bool bool;
#define true 1
#define false 0

/* A 36-octet key both as what it means and as words, which compare and copy faster. */
#define FLOW_WORDS 9
union flow_key {
	struct prism_flow flow;
	struct prism_owner_key owner;
	__u32 words[FLOW_WORDS];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1000000);
	__type(key, struct prism_flow);
	__type(value, struct prism_rule);
} rules SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1000000);
	__type(key, struct prism_owner_key);
	__type(value, struct prism_owner);
} owners SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, __u64);
	__type(value, struct prism_node);
} nodes SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct prism_config);
} config SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} agent SEC(".maps");

/* flow -> CLOCK_MONOTONIC until which its next bare SYN goes to the owner */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct prism_flow);
	__type(value, __u64);
} syn_pass SEC(".maps");

/*
 * Where an owner was until a moment ago -> CLOCK_MONOTONIC until which what it still sends is
 * dropped. A frozen socket's delayed ACK, say, fires all the same: the client would answer such a
 * stray with a reset, and that could hit the next connection at the same place.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct prism_owner_key);
	__type(value, __u64);
} former SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, PRISM_STAT_COUNT);
	__type(key, __u32);
	__type(value, __u64);
} stats SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 262144);
} events SEC(".maps");

/*
 * Room that the stack does not have. One per CPU is enough: the classifier runs with softirqs
 * off and does not nest.
 */
union message {
	struct prism_msg msg;
	__u64 words[PRISM_MSG_SIZE / 8];
};

/* A 64-bit field of a message, which the packed struct alone would read octet by octet. */
#define FIELD(message, field) ((message)->words[offsetof(struct prism_msg, field) / 8])

struct scratch {
	union message request;
	union message reply;
	/* Bare octets: a per-CPU map may not contain what has a spin lock in it. */
	__u64 rule[sizeof(struct prism_rule) / 8];
	__u64 node[sizeof(struct prism_node) / 8];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct scratch);
} scratches SEC(".maps");

static __always_inline void add_to(__u32 stat, __u64 amount)
{
	__u64 *counter = bpf_map_lookup_elem(&stats, &stat);

	if (counter)
		*counter += amount;
}

static __always_inline void count(__u32 stat)
{
	add_to(stat, 1);
}

static __always_inline void copy_words(void *to, const void *from, const int words)
{
#pragma unroll
	for (int i = 0; i < words; i++)
		((__u32 *)to)[i] = ((const __u32 *)from)[i];
}

static __always_inline bool same_words(const void *a, const void *b, const int words)
{
	__u32 difference = 0;

#pragma unroll
	for (int i = 0; i < words; i++)
		difference |= ((const __u32 *)a)[i] ^ ((const __u32 *)b)[i];
	return !difference;
}

static __always_inline void clear_words(void *to, const int words)
{
#pragma unroll
	for (int i = 0; i < words; i++)
		((volatile __u32 *)to)[i] = 0;
}

#endif
