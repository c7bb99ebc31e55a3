/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Putting a received FIN back.
 *
 * Repair mode has no way to say "the client has finished sending", so the kernel is shown the
 * client's FIN once more: a raw packet from the client's address to the local one. It is routed
 * by its destination, which is local, hence over the loopback device, and never leaves this
 * network namespace. A packet that comes over loopback keeps the route it was sent with, so
 * neither reverse-path filtering nor the check for foreign source addresses looks at it.
 */
#define _GNU_SOURCE /* POLLRDHUP */
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <unistd.h>
#include <netinet/in.h>
#include <netinet/ip.h>
#include <netinet/ip6.h>
#include <linux/tcp.h>

#include "tcp_repair.h"

#define FIN_ATTEMPTS 3
#define FIN_WAIT_MS  20

struct packet {
	uint8_t octets[sizeof(struct ip6_hdr) + sizeof(struct tcphdr)];
	size_t length;
};

static uint32_t sum16(const void *data, size_t length, uint32_t sum)
{
	const uint8_t *octets = data;

	for (size_t i = 0; i + 1 < length; i += 2)
		sum += (uint32_t)(octets[i] << 8 | octets[i + 1]);
	return sum;
}

static uint16_t fold(uint32_t sum)
{
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return (uint16_t)~sum;
}

/* The segment the client sent: its FIN, with an acknowledgement and a window we know already. */
static struct tcphdr make_segment(const struct prism_tcp_state *state, const uint8_t local[16],
				  uint16_t port)
{
	struct tcphdr tcp = {
		.source = htons(state->peer_port),
		.dest = htons(port),
		.seq = htonl(state->rcv_nxt),
		.ack_seq = htonl(state->snd_una),
		.doff = sizeof(tcp) / 4,
		.fin = 1,
		.ack = 1,
	};
	uint32_t window = state->snd_wnd >> state->snd_wscale;
	uint32_t sum = IPPROTO_TCP + sizeof(tcp);

	tcp.window = htons((uint16_t)(window > 0xffff ? 0xffff : window));
	/* A mapped address has twelve octets before the IPv4 one that the checksum leaves out. */
	if (state->family == 4) {
		sum = sum16(state->peer + 12, 4, sum);
		sum = sum16(local + 12, 4, sum);
	} else {
		sum = sum16(state->peer, 16, sum);
		sum = sum16(local, 16, sum);
	}
	tcp.check = htons(fold(sum16(&tcp, sizeof(tcp), sum)));
	return tcp;
}

static void make_packet(const struct prism_tcp_state *state, const uint8_t local[16], uint16_t port,
			struct packet *packet)
{
	struct tcphdr tcp = make_segment(state, local, port);
	size_t offset;

	if (state->family == 4) {
		struct iphdr ip = {.version = 4, .ihl = 5, .ttl = 64, .protocol = IPPROTO_TCP};

		memcpy(&ip.saddr, state->peer + 12, 4);
		memcpy(&ip.daddr, local + 12, 4);
		ip.tot_len = htons(sizeof(ip) + sizeof(tcp)); /* the kernel adds id and checksum */
		offset = sizeof(ip);
		memcpy(packet->octets, &ip, offset);
	} else {
		struct ip6_hdr ip = {0};

		ip.ip6_flow = htonl(6u << 28);
		ip.ip6_plen = htons(sizeof(tcp));
		ip.ip6_nxt = IPPROTO_TCP;
		ip.ip6_hlim = 64;
		memcpy(&ip.ip6_src, state->peer, 16);
		memcpy(&ip.ip6_dst, local, 16);
		offset = sizeof(ip);
		memcpy(packet->octets, &ip, offset);
	}
	memcpy(packet->octets + offset, &tcp, sizeof(tcp));
	packet->length = offset + sizeof(tcp);
}

static enum prism_tcp_result send_packet(int raw, const struct prism_tcp_state *state,
					 const uint8_t local[16], const struct packet *packet,
					 struct prism_fault *fault)
{
	struct sockaddr_in four = {.sin_family = AF_INET};
	struct sockaddr_in6 six = {.sin6_family = AF_INET6};
	const void *to = &six;
	socklen_t size = sizeof(six);

	if (state->family == 4) {
		memcpy(&four.sin_addr, local + 12, 4);
		to = &four;
		size = sizeof(four);
	} else {
		memcpy(&six.sin6_addr, local, 16);
	}
	if (sendto(raw, packet->octets, packet->length, MSG_DONTWAIT, to, size) < 0)
		return prism_fail(fault, errno, "restoring the FIN over the loopback device");
	return PRISM_TCP_OK;
}

/* Normally the packet has been dealt with by the time sendto returns. */
static enum prism_tcp_result await_close_wait(int fd, int *arrived, struct prism_fault *fault)
{
	struct pollfd poller = {.fd = fd, .events = POLLRDHUP};
	uint8_t kernel_state;

	if (poll(&poller, 1, FIN_WAIT_MS) < 0 && errno != EINTR)
		return prism_fail(fault, errno, "poll");
	PRISM_TRY(prism_tcp_kernel_state(fd, &kernel_state, fault));
	if (kernel_state == PRISM_KERNEL_CLOSE)
		return prism_fail(fault, ECONNRESET, "the client reset the connection");
	*arrived = kernel_state == PRISM_KERNEL_CLOSE_WAIT;
	return PRISM_TCP_OK;
}

enum prism_tcp_result prism_tcp_inject_fin(int fd, const struct prism_tcp_state *state,
					   const uint8_t local[16], uint16_t port,
					   struct prism_fault *fault)
{
	enum prism_tcp_result result = PRISM_TCP_OK;
	struct packet packet;
	int arrived = 0;
	int raw = socket(state->family == 4 ? AF_INET : AF_INET6, SOCK_RAW | SOCK_CLOEXEC,
			 IPPROTO_RAW);

	if (raw < 0)
		return prism_fail(fault, errno, "a raw socket to restore the FIN (CAP_NET_RAW)");
	make_packet(state, local, port, &packet);
	for (int i = 0; i < FIN_ATTEMPTS && !arrived && result == PRISM_TCP_OK; i++) {
		result = send_packet(raw, state, local, &packet, fault);
		if (result == PRISM_TCP_OK)
			result = await_close_wait(fd, &arrived, fault);
	}
	close(raw);
	if (result == PRISM_TCP_OK && !arrived)
		return prism_fail(fault, EHOSTUNREACH,
				  "the restored FIN did not arrive: is the loopback device up, and "
				  "does a packet filter drop packets from clients on it?");
	return result;
}
