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

#include <linux/types.h>

#define PRISM_MAGIC 0x5052534dU /* "PRSM" */
#define PRISM_VERSION 1

/* Operations. HELLO .. DELETE are answered by the data plane itself, the rest by the agent. */
enum prism_op {
	PRISM_OP_HELLO = 1,  /* cookie: lease in ms, 0 = leaving; reply: cookie = incarnation */
	PRISM_OP_ADD = 2,    /* cookie: token that makes a repeated ADD recognisable */
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
	PRISM_FULL = 4,    /* no room for one more rule */
	PRISM_DENIED = 5,  /* not the owner, or no HELLO yet */
	PRISM_INVALID = 6, /* a well-signed message that makes no sense */
};

#define PRISM_FLAG_LOCKED 0x01 /* ADD, CHOWN: the state asked for; replies: the rule's state */
#define PRISM_FLAG_MORE 0x02   /* LIST replies: there is more from `cookie` on */
#define PRISM_FLAG_REPLY 0x80

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
	__be64 node;            /* who asks: first 8 octets of BLAKE2b(node name); 0 = the agent */
	__be64 seq;             /* grows by one with each request of a node; echoed */
	struct prism_flow flow; /* zero for HELLO and LIST */
	__be16 owner_port;      /* replies: as the rule stands now */
	__u8 owner_mac[6];
	__be32 reserved;        /* zero */
	__u8 owner_addr[16];
	__be64 owner;  /* node that owns the rule, or shall own it (ADD, CHOWN: must equal node) */
	__be64 gen;    /* CHOWN etc.: the generation expected; replies: the one in force */
	__be64 cookie;
	__be64 mac;    /* SipHash-2-4 of the 112 octets before it, key: cluster key */
} __attribute__((packed));

#define PRISM_MSG_SIZE 120
#define PRISM_MAC_OFFSET 112

enum prism_state { PRISM_FORWARD = 1, PRISM_LOCKED = 2, PRISM_DEAD = 3 };

#endif
