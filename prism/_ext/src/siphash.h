/* SPDX-License-Identifier: Apache-2.0 */
/* SipHash-2-4, and the control datagram's exchange on a UDP socket. */
#ifndef PRISM_SIPHASH_H
#define PRISM_SIPHASH_H

#include <stddef.h>
#include <stdint.h>

#include "prism_abi.h"

#define PRISM_MAX_DATAGRAM 1472 /* what fits one Ethernet frame over IPv4 */
#define PRISM_MAX_OTHERS   16	/* datagrams set aside in one exchange */

/* SipHash-2-4 of `size` octets under a key of 16, as the number whose little-endian form the
 * paper's reference prints (Aumasson and Bernstein, 2012). */
uint64_t prism_siphash24(const uint8_t key[16], const uint8_t *data, size_t size);

struct prism_datagram {
	uint16_t size;
	uint8_t data[PRISM_MAX_DATAGRAM];
};

/* What arrived during an exchange beside the answer, in order of arrival. */
struct prism_exchange {
	unsigned int others_count;
	int answered;
	struct prism_datagram answer;
	struct prism_datagram others[PRISM_MAX_OTHERS];
};

/* Send `request` on a connected non-blocking socket and take what has arrived by then, or arrives
 * within `wait_us`. 0, or -errno when the send failed. Never blocks longer than `wait_us` and the
 * timer slack of the thread. */
int prism_exchange(int fd, const uint8_t *request, size_t size, unsigned int wait_us,
		   struct prism_exchange *result);

#endif
