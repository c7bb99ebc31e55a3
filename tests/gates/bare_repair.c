/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The system calls that moving a connection needs, and nothing else: the floor that the extension
 * is measured against. Prints the medians of both halves, in nanoseconds: "EXPORT IMPORT".
 *
 * Needs CAP_NET_ADMIN. Everything is over loopback of the namespace it runs in.
 */
#include <arpa/inet.h>
#include <linux/sockios.h>
#include <linux/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define ROUNDS 800

/* TCP option kinds (RFC 9293, RFC 7323, RFC 2018) */
enum { OPT_MSS = 2, OPT_WINDOW = 3, OPT_SACK_PERMITTED = 4, OPT_TIMESTAMP = 8 };
#define MUST(call)                                                                                 \
	do {                                                                                       \
		if ((call) < 0) {                                                                  \
			perror(#call);                                                             \
			exit(1);                                                                   \
		}                                                                                  \
	} while (0)

struct moved {
	struct sockaddr_in local, peer;
	struct tcp_info info;
	struct tcp_repair_window window;
	uint32_t seq[2], stamp, mss;
	int inq, outq, unsent, got;
	char data[512];
};

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void put(int fd, int option, const void *value, socklen_t size)
{
	MUST(setsockopt(fd, IPPROTO_TCP, option, value, size));
}

static void get(int fd, int option, void *value, socklen_t size)
{
	MUST(getsockopt(fd, IPPROTO_TCP, option, value, &size));
}

static void export(int fd, struct moved *m)
{
	socklen_t size = sizeof(m->local);
	int queue, on = 1;

	put(fd, TCP_REPAIR, &on, sizeof(on));
	MUST(getsockname(fd, (struct sockaddr *)&m->local, &size));
	MUST(getpeername(fd, (struct sockaddr *)&m->peer, &size));
	get(fd, TCP_INFO, &m->info, sizeof(m->info));
	get(fd, TCP_MAXSEG, &m->mss, sizeof(m->mss));
	get(fd, TCP_TIMESTAMP, &m->stamp, sizeof(m->stamp));
	get(fd, TCP_REPAIR_WINDOW, &m->window, sizeof(m->window));
	MUST(ioctl(fd, SIOCINQ, &m->inq));
	MUST(ioctl(fd, SIOCOUTQ, &m->outq));
	MUST(ioctl(fd, SIOCOUTQNSD, &m->unsent));
	queue = TCP_SEND_QUEUE;
	put(fd, TCP_REPAIR_QUEUE, &queue, sizeof(queue));
	get(fd, TCP_QUEUE_SEQ, &m->seq[0], sizeof(m->seq[0]));
	queue = TCP_RECV_QUEUE;
	put(fd, TCP_REPAIR_QUEUE, &queue, sizeof(queue));
	get(fd, TCP_QUEUE_SEQ, &m->seq[1], sizeof(m->seq[1]));
	m->got = (int)recv(fd, m->data, sizeof(m->data), MSG_PEEK | MSG_DONTWAIT);
	MUST(m->got);
}

static int import(const struct moved *m)
{
	struct tcp_repair_opt options[4] = {
		{OPT_MSS, m->mss},
		{OPT_WINDOW, m->info.tcpi_snd_wscale | m->info.tcpi_rcv_wscale << 16},
		{OPT_SACK_PERMITTED, 0},
		{OPT_TIMESTAMP, 0},
	};
	uint32_t received = m->seq[1] - (uint32_t)m->inq;
	int on = 1, queue, fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);

	MUST(fd);
	put(fd, TCP_REPAIR, &on, sizeof(on));
	queue = TCP_SEND_QUEUE;
	put(fd, TCP_REPAIR_QUEUE, &queue, sizeof(queue));
	put(fd, TCP_QUEUE_SEQ, &m->seq[0], sizeof(m->seq[0]));
	queue = TCP_RECV_QUEUE;
	put(fd, TCP_REPAIR_QUEUE, &queue, sizeof(queue));
	put(fd, TCP_QUEUE_SEQ, &received, sizeof(received));
	MUST(bind(fd, (const struct sockaddr *)&m->local, sizeof(m->local)));
	MUST(connect(fd, (const struct sockaddr *)&m->peer, sizeof(m->peer)));
	MUST(send(fd, m->data, (size_t)m->got, 0));
	put(fd, TCP_REPAIR_OPTIONS, options, sizeof(options));
	put(fd, TCP_TIMESTAMP, &m->stamp, sizeof(m->stamp));
	put(fd, TCP_REPAIR_WINDOW, &m->window, sizeof(m->window));
	return fd;
}

static int order(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return (x > y) - (x < y);
}

int main(void)
{
	static const char request[] = "GET /bucket/object HTTP/1.1\r\nHost: store.example\r\n\r\n";
	static uint64_t took[2][ROUNDS];
	struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(0x7f000001)};
	struct linger reset = {1, 0};
	int listener = socket(AF_INET, SOCK_STREAM, 0);
	socklen_t size = sizeof(at);

	MUST(listener);
	MUST(bind(listener, (struct sockaddr *)&at, size));
	MUST(listen(listener, 16));
	MUST(getsockname(listener, (struct sockaddr *)&at, &size));
	for (int i = 0; i < ROUNDS; i++) {
		struct moved m;
		int client = socket(AF_INET, SOCK_STREAM, 0), server, moved;
		uint64_t began;

		MUST(client);
		MUST(setsockopt(client, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset)));
		MUST(connect(client, (struct sockaddr *)&at, size));
		server = accept(listener, NULL, NULL);
		MUST(server);
		MUST(send(client, request, sizeof(request) - 1, 0));
		began = now();
		export(server, &m);
		took[0][i] = now() - began;
		close(server);
		began = now();
		moved = import(&m);
		took[1][i] = now() - began;
		close(moved);
		close(client);
	}
	for (int half = 0; half < 2; half++)
		qsort(took[half], ROUNDS, sizeof(took[half][0]), order);
	printf("%llu %llu\n", (unsigned long long)took[0][ROUNDS / 2],
	       (unsigned long long)took[1][ROUNDS / 2]);
	return 0;
}
