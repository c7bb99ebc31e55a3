/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * The control datagram, and the layout of the pinned maps. Shared by the eBPF
 * classifier, the loader and (by a test that compares offsets) by the Python codec.
 *
 * Everything that travels is in network byte order; what stays in maps is in host
 * order, except addresses and ports, which stay as they are on the wire.
 */
#ifndef PRISM_ABI_H
#define PRISM_ABI_H

#include <linux/bpf.h>
#include <linux/types.h>

#define PRISM_MAGIC   0x5052534dU /* "PRSM" */
#define PRISM_VERSION 1

/* Operations. HELLO .. DELETE are answered by the data plane itself, the rest by the agent. */
enum prism_op {
	PRISM_OP_HELLO = 1, /* cookie: lease in ms, 0 = leaving; reply: cookie = incarnation */
	PRISM_OP_ADD = 2,   /* cookie: token that makes a repeated ADD recognisable */
	PRISM_OP_LOCK = 3,
	PRISM_OP_CHOWN = 4,
	PRISM_OP_UNLOCK = 5,
	PRISM_OP_DELETE = 6,
	PRISM_OP_GET = 7,    /* reads one rule; changes nothing */
	PRISM_OP_LIST = 16,  /* to the agent; cookie: cursor */
	PRISM_OP_QUERY = 17, /* agent to owner: does this connection still exist? */
};

enum prism_status {
	PRISM_OK = 0,
	PRISM_EXISTS = 1,  /* ADD: another rule stands for this flow */
	PRISM_NOENT = 2,   /* no rule for this flow */
	PRISM_STALE = 3,   /* the generation has moved on */
	PRISM_FULL = 4,	   /* no room for one more rule */
	PRISM_DENIED = 5,  /* not the owner, or no HELLO yet */
	PRISM_INVALID = 6, /* a well-signed message that makes no sense */
};

#define PRISM_FLAG_LOCKED 0x01 /* ADD, CHOWN: the state asked for; replies: the rule's state */
#define PRISM_FLAG_MORE	  0x02 /* LIST replies: there is more from `cookie` on */
#define PRISM_FLAG_REPLY  0x80

struct prism_flow { /* 36 octets; addresses IPv4-mapped where IPv4 */
	__u8 client_addr[16];
	__u8 service_addr[16];
	__be16 client_port;
	__be16 service_port;
} __attribute__((packed));

struct prism_msg { /* 120 octets, the same for requests and replies */
	__be32 magic;
	__u8 version;
	__u8 op;
	__u8 status; /* 0 in requests */
	__u8 flags;
	__be64 node;		/* who asks: first 8 octets of BLAKE2b(node name); 0 = the agent */
	__be64 seq;		/* grows by one with each request of a node; echoed */
	struct prism_flow flow; /* zero for HELLO and LIST */
	__be16 owner_port;	/* replies: as the rule stands now */
	__u8 owner_mac[6];
	__be32 reserved; /* zero */
	__u8 owner_addr[16];
	__be64 owner; /* node that owns the rule, or shall own it (ADD, CHOWN: must equal node) */
	__be64 gen;   /* CHOWN etc.: the generation expected; replies: the one in force */
	__be64 cookie;
	__be64 mac; /* SipHash-2-4 of the 112 octets before it, key: cluster key */
} __attribute__((packed));

#define PRISM_MSG_SIZE	 120
#define PRISM_MAC_OFFSET 112

enum prism_state { PRISM_FORWARD = 1, PRISM_LOCKED = 2, PRISM_DEAD = 3 };

/*
 * The pinned maps. Sizes are padded explicitly: what userspace reads has no holes. A change in
 * any of these structures is a new PRISM_TABLE_VERSION: tables of another version are not adopted.
 */
#define PRISM_TABLE_VERSION 1

/* rules: prism_flow -> prism_rule. An element and its bookkeeping are 256 octets together. */
struct prism_rule {
	struct bpf_spin_lock lock; /* guards everything below */
	__u32 state;		   /* enum prism_state */
	struct prism_flow flow;	   /* the key again: an element freed under a reader is reused */
	__be16 owner_port;
	__u8 owner_mac[6];
	__u8 owner_addr[16];
	__u32 held; /* packets held since the rule was locked */
	__u64 owner;
	__u64 gen;
	__u64 cookie;
	__u64 to_owner_packets;
	__u64 to_owner_bytes;
	__u64 to_client_packets;
	__u64 to_client_bytes;
	__u64 seen_ns;	  /* last packet forwarded or held, CLOCK_MONOTONIC_COARSE */
	__u64 created_ns; /* CLOCK_MONOTONIC */
	__u64 locked_ns;  /* when it was locked last, CLOCK_MONOTONIC */
	__u32 held_total;
	__u32 dropped; /* while locked, or from a former owner */
};

/* owners: whose packets are spoken for by which rule. Proves nothing without the rule. */
struct prism_owner_key {
	__u8 owner_addr[16];
	__u8 client_addr[16];
	__be16 owner_port;
	__be16 client_port;
};

struct prism_owner {
	__u8 service_addr[16];
	__be16 service_port;
	__u16 reserved[3];
};

/* nodes: node id (host order) -> prism_node, made by HELLO. */
struct prism_node {
	struct bpf_spin_lock lock;
	__u32 lease_ms; /* 0: the node has left */
	__u64 highest;	/* highest sequence number used */
	__u64 window;	/* bit n: highest - n has been used */
	__u64 hello_ns; /* CLOCK_MONOTONIC of the last HELLO */
	__u8 addr[16];	/* where that came from */
	__be16 port;
	__u16 reserved;
	__u32 ifindex;
};

/* config: one element. */
struct prism_config {
	__u32 table_version;
	__u32 hold_ifindex; /* TUN device that takes held packets; 0: drop them */
	__u64 incarnation;  /* random, made with the tables */
	__u64 key[2];	    /* cluster key as two little-endian words */
	__u8 control_v4[16];
	__u8 control_v6[16];
	__be16 control_port; /* 0: control is off */
	__u16 reserved;
	__u32 lease_max_ms;
};

/* agent: one element; the agent's heartbeat, CLOCK_MONOTONIC. Older than this: nobody holds. */
#define PRISM_AGENT_TIMEOUT_NS 1000000000ULL

/* How long what a former owner still sends is dropped; longer than a delayed ACK takes. */
#define PRISM_FORMER_NS 2000000000ULL

/* stats: per-CPU array of __u64. */
enum prism_stat {
	PRISM_STAT_HELLO,
	PRISM_STAT_ADD,
	PRISM_STAT_LOCK,
	PRISM_STAT_CHOWN,
	PRISM_STAT_UNLOCK,
	PRISM_STAT_DELETE,
	PRISM_STAT_GET,
	PRISM_STAT_TO_AGENT,   /* LIST and answers to QUERY */
	PRISM_STAT_REFUSED,    /* answered with something else than OK */
	PRISM_STAT_FULL,       /* of these, with FULL */
	PRISM_STAT_BAD_FORMAT, /* dropped: size, magic, version, operation */
	PRISM_STAT_BAD_MAC,    /* dropped */
	PRISM_STAT_REPLAY,     /* dropped */
	PRISM_STAT_BUSY,       /* dropped: the rule is just being deleted */
	PRISM_STAT_ADDED,      /* rules made */
	PRISM_STAT_DELETED,    /* rules deleted */
	PRISM_STAT_HANDOFFS,   /* CHOWN that gave the flow to another node */
	PRISM_STAT_TO_OWNER_PACKETS,
	PRISM_STAT_TO_OWNER_BYTES,
	PRISM_STAT_TO_CLIENT_PACKETS,
	PRISM_STAT_TO_CLIENT_BYTES,
	PRISM_STAT_HELD,	   /* packets given to the agent while locked */
	PRISM_STAT_DROPPED_LOCKED, /* client's packets dropped while locked */
	PRISM_STAT_DROPPED_OWNER,  /* owner's packets dropped while locked */
	PRISM_STAT_DROPPED_STALE,  /* packets of somebody who is not the owner */
	PRISM_STAT_SYN_ASKED,
	PRISM_STAT_SYN_DROPPED,	   /* no agent to ask */
	PRISM_STAT_SYN_PASSED,	   /* given to the owner on the agent's word */
	PRISM_STAT_REWRITE_FAILED, /* dropped: the kernel could not change the packet */
	PRISM_STAT_EVENTS_LOST,
	PRISM_STAT_COUNT,
};

/* events: ring buffer; only about rules with held packets. */
enum prism_event_kind {
	PRISM_EVENT_UNLOCKED = 1,
	PRISM_EVENT_CHOWNED = 2,
	PRISM_EVENT_DELETED = 3,
};

struct prism_event {
	__u32 kind;
	__u32 held; /* packets given to the agent since the rule was locked */
	struct prism_flow flow;
	__u32 state; /* of the rule now */
	__u64 gen;
	__u64 owner;
};

#define PRISM_SYN_PASS_NS 1000000000ULL /* how long the agent's word on a SYN lasts */

#if defined(__STDC_VERSION__) && __STDC_VERSION__ >= 201112L
_Static_assert(sizeof(struct prism_flow) == 36, "flow");
_Static_assert(sizeof(struct prism_msg) == PRISM_MSG_SIZE, "msg");
_Static_assert(sizeof(struct prism_rule) == 160, "rule");
_Static_assert(sizeof(struct prism_owner_key) == 36, "owner key");
_Static_assert(sizeof(struct prism_owner) == 24, "owner");
_Static_assert(sizeof(struct prism_node) == 56, "node");
_Static_assert(sizeof(struct prism_config) == 72, "config");
_Static_assert(sizeof(struct prism_event) == 64, "event");
#endif

#endif
