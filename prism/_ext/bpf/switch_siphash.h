/* SPDX-License-Identifier: GPL-2.0-only */
/* SipHash-2-4 (Aumasson and Bernstein, 2012) of a control message without its MAC. */
#ifndef PRISM_SWITCH_SIPHASH_H
#define PRISM_SWITCH_SIPHASH_H

#include "switch_maps.h"

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define little_endian(x) (x)
#else
#define little_endian(x) __builtin_bswap64(x)
#endif

#define ROTATE(x, bits) (((x) << (bits)) | ((x) >> (64 - (bits))))

#define SIP_ROUND                                                                                  \
	do {                                                                                       \
		v0 += v1;                                                                          \
		v1 = ROTATE(v1, 13) ^ v0;                                                          \
		v0 = ROTATE(v0, 32);                                                               \
		v2 += v3;                                                                          \
		v3 = ROTATE(v3, 16) ^ v2;                                                          \
		v0 += v3;                                                                          \
		v3 = ROTATE(v3, 21) ^ v0;                                                          \
		v2 += v1;                                                                          \
		v1 = ROTATE(v1, 17) ^ v2;                                                          \
		v2 = ROTATE(v2, 32);                                                               \
	} while (0)

/* The MAC field's value for `message`, in network order. */
static __noinline __u64 message_mac(const union message *message, __u64 k0, __u64 k1)
{
	__u64 v0 = k0 ^ 0x736f6d6570736575ULL, v1 = k1 ^ 0x646f72616e646f6dULL;
	__u64 v2 = k0 ^ 0x6c7967656e657261ULL, v3 = k1 ^ 0x7465646279746573ULL;
	__u64 last = (__u64)PRISM_MAC_OFFSET << 56;

	for (int i = 0; i < PRISM_MAC_OFFSET / 8; i++) {
		__u64 word = little_endian(message->words[i]);

		v3 ^= word;
		SIP_ROUND;
		SIP_ROUND;
		v0 ^= word;
	}
	v3 ^= last;
	SIP_ROUND;
	SIP_ROUND;
	v0 ^= last;
	v2 ^= 0xff;
	SIP_ROUND;
	SIP_ROUND;
	SIP_ROUND;
	SIP_ROUND;
	return bpf_cpu_to_be64(v0 ^ v1 ^ v2 ^ v3);
}

#endif
