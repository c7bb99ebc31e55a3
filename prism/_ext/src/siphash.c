// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#include "siphash.h"

static inline uint64_t rotate(uint64_t value, unsigned int bits)
{
	return (value << bits) | (value >> (64 - bits));
}

static inline uint64_t load_le64(const uint8_t *data)
{
	uint64_t value;

	memcpy(&value, data, sizeof(value));
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
	value = __builtin_bswap64(value);
#endif
	return value;
}

struct sip_state {
	uint64_t v0, v1, v2, v3;
};

static inline void sip_round(struct sip_state *s)
{
	s->v0 += s->v1;
	s->v2 += s->v3;
	s->v1 = rotate(s->v1, 13) ^ s->v0;
	s->v3 = rotate(s->v3, 16) ^ s->v2;
	s->v0 = rotate(s->v0, 32);
	s->v2 += s->v1;
	s->v0 += s->v3;
	s->v1 = rotate(s->v1, 17) ^ s->v2;
	s->v3 = rotate(s->v3, 21) ^ s->v0;
	s->v2 = rotate(s->v2, 32);
}

static inline void sip_absorb(struct sip_state *s, uint64_t word)
{
	s->v3 ^= word;
	sip_round(s);
	sip_round(s);
	s->v0 ^= word;
}

uint64_t prism_siphash24(const uint8_t key[16], const uint8_t *data, size_t size)
{
	uint64_t k0 = load_le64(key), k1 = load_le64(key + 8);
	struct sip_state s = {
		.v0 = k0 ^ 0x736f6d6570736575ULL,
		.v1 = k1 ^ 0x646f72616e646f6dULL,
		.v2 = k0 ^ 0x6c7967656e657261ULL,
		.v3 = k1 ^ 0x7465646279746573ULL,
	};
	uint64_t last = (uint64_t)size << 56;
	size_t whole = size & ~(size_t)7;

	for (size_t i = 0; i < whole; i += 8)
		sip_absorb(&s, load_le64(data + i));
	for (size_t i = whole; i < size; i++)
		last |= (uint64_t)data[i] << (8 * (i - whole));
	sip_absorb(&s, last);
	s.v2 ^= 0xff;
	for (int i = 0; i < 4; i++)
		sip_round(&s);
	return s.v0 ^ s.v1 ^ s.v2 ^ s.v3;
}

/* The sequence number sits at octet 16 of every message, the flags at octet 7; the node (octet 8)
 * is echoed as well. */
static int answers(const uint8_t *request, const struct prism_datagram *datagram)
{
	return datagram->size >= PRISM_MSG_SIZE && (datagram->data[7] & PRISM_FLAG_REPLY) &&
	       memcmp(datagram->data + 8, request + 8, 16) == 0;
}

/* One datagram into `into`; 0 when nothing is there. Errors that ICMP left on the socket are
 * news about earlier datagrams, not about this one: skipped. */
static int receive(int fd, struct prism_datagram *into)
{
	for (int tries = 0; tries < 4; tries++) {
		ssize_t got = recv(fd, into->data, sizeof(into->data), MSG_DONTWAIT);

		if (got >= 0) {
			into->size = (uint16_t)got;
			return 1;
		}
		if (errno == EAGAIN || errno == EWOULDBLOCK)
			return 0;
	}
	return 0;
}

static void drain(int fd, const uint8_t *request, struct prism_exchange *result)
{
	while (!result->answered) {
		struct prism_datagram *slot = &result->answer;

		/* Checked before reading, so that nothing that was read is ever lost. */
		if (result->others_count == PRISM_MAX_OTHERS || !receive(fd, slot))
			return;
		if (answers(request, slot)) {
			result->answered = 1;
			return;
		}
		result->others[result->others_count].size = slot->size;
		memcpy(result->others[result->others_count].data, slot->data, slot->size);
		result->others_count++;
	}
}

static int transmit(int fd, const uint8_t *request, size_t size)
{
	for (int tries = 0; tries < 3; tries++) {
		if (send(fd, request, size, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0)
			return 0;
		/* An ICMP error about an earlier datagram is reported once, in place of the send.
		 */
		if (errno != ECONNREFUSED && errno != EHOSTUNREACH && errno != ENETUNREACH &&
		    errno != EINTR)
			break;
	}
	return -errno;
}

static int64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000LL + now.tv_nsec;
}

int prism_exchange(int fd, const uint8_t *request, size_t size, unsigned int wait_us,
		   struct prism_exchange *result)
{
	int64_t deadline, left;
	int error;

	result->others_count = 0;
	result->answered = 0;
	error = transmit(fd, request, size);
	if (error)
		return error;
	drain(fd, request, result);
	if (result->answered || wait_us == 0)
		return 0;

	deadline = now_ns() + (int64_t)wait_us * 1000;
	while (!result->answered && result->others_count < PRISM_MAX_OTHERS &&
	       (left = deadline - now_ns()) > 0) {
		struct pollfd wait = {.fd = fd, .events = POLLIN};
		struct timespec limit = {.tv_sec = left / 1000000000LL,
					 .tv_nsec = left % 1000000000LL};

		if (ppoll(&wait, 1, &limit, NULL) <= 0)
			return 0; /* time is up, or a signal: the caller has other means to wait */
		drain(fd, request, result);
	}
	return 0;
}
