// SPDX-License-Identifier: Apache-2.0
/*
 * Registers as many sockets at one descriptor of the monitor module as it takes, 1,048,576.
 *
 *   gcc -O2 -Ikmod -o kmod_million benchmarks/kmod_million.c
 *   scripts/vm --memory 9000 -- sh -c 'insmod $PRISM_VM_MODULE && ./kmod_million'
 *
 * Sockets in repair mode are connected without a peer, which takes half the memory. Checks that the
 * next registration is refused (ENOSPC); that of half of them, closed while nobody reads, as many
 * are told as the queue holds, each exactly once, and the number of all others; that each of the
 * closed is known to be no longer registered, and each of the others to be so; that there is room
 * again; and closes the descriptor with the other half registered.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "prism_monitor.h"

#define LIMIT (1 << 20)
#define BATCH 4096

static int sockets[LIMIT + 1];
static unsigned char told[LIMIT + 1];
static __u64 cookies[LIMIT + 1];

static double now(void)
{
	struct timespec at;

	clock_gettime(CLOCK_MONOTONIC, &at);
	return at.tv_sec + at.tv_nsec / 1e9;
}

static void check(int good, const char *what)
{
	if (!good) {
		perror(what);
		exit(1);
	}
}

static void require(int good, const char *what)
{
	if (!good) {
		fprintf(stderr, "%s\n", what);
		exit(1);
	}
}

static void allow_descriptors(void)
{
	struct rlimit limit = {LIMIT + 100, LIMIT + 100};
	FILE *file = fopen("/proc/sys/fs/nr_open", "w");

	check(file && fprintf(file, "%d\n", 2 * LIMIT) > 0 && !fclose(file), "nr_open");
	file = fopen("/proc/sys/fs/file-max", "w");
	check(file && fprintf(file, "%d\n", 4 * LIMIT) > 0 && !fclose(file), "file-max");
	check(!setrlimit(RLIMIT_NOFILE, &limit), "setrlimit");
}

/* Established, with an address of its own on either side; nothing is sent. */
static int make_socket(int number)
{
	struct sockaddr_in from = {.sin_family = AF_INET}, to = {.sin_family = AF_INET};
	int fd = socket(AF_INET, SOCK_STREAM, 0), on = 1;

	check(fd >= 0, "socket");
	check(!setsockopt(fd, IPPROTO_TCP, TCP_REPAIR, &on, sizeof(on)), "TCP_REPAIR");
	from.sin_port = htons(80);
	from.sin_addr.s_addr = htonl(0x7f000001);
	to.sin_port = htons(1024 + number % 32768);
	to.sin_addr.s_addr = htonl(0x7f010000 + number / 32768);
	check(!bind(fd, (struct sockaddr *)&from, sizeof(from)), "bind");
	check(!connect(fd, (struct sockaddr *)&to, sizeof(to)), "connect");
	return fd;
}

static int add(int device, int number)
{
	struct prism_monitor_register request = {.fd = sockets[number], .cookie = number};

	int status = ioctl(device, PRISM_MONITOR_REGISTER, &request);

	cookies[number] = request.socket;
	return status;
}

static int read_events(int device, int *lost)
{
	static struct prism_monitor_event events[BATCH];
	ssize_t size;
	int count = 0, i;

	*lost = 0;
	while ((size = read(device, events, sizeof(events))) > 0) {
		for (i = 0; i < (int)(size / sizeof(events[0])); i++) {
			if (events[i].reason == PRISM_MONITOR_LOST) {
				*lost += events[i].cookie;
				continue;
			}
			require(events[i].cookie <= LIMIT && !told[events[i].cookie]++,
				"told twice, or never registered");
			count++;
		}
	}
	check(errno == EAGAIN, "read");
	return count;
}

static int registered(int device, int number)
{
	if (!ioctl(device, PRISM_MONITOR_CHECK, &cookies[number]))
		return 1;
	check(errno == ENOENT, "check");
	return 0;
}

int main(void)
{
	int device, count, lost, i;
	double began = now();

	allow_descriptors();
	device = open(PRISM_MONITOR_PATH, O_RDWR | O_NONBLOCK);
	check(device >= 0, PRISM_MONITOR_PATH);
	for (i = 0; i <= LIMIT; i++)
		sockets[i] = make_socket(i);
	printf("%d sockets made: %.1f s\n", i, now() - began);
	began = now();
	for (i = 0; i < LIMIT; i++)
		check(!add(device, i), "register");
	printf("%d registered: %.1f s\n", i, now() - began);
	require(add(device, LIMIT) && errno == ENOSPC, "one too many was not refused");
	began = now();
	for (i = 0; i < LIMIT; i += 2)
		close(sockets[i]);
	printf("half of them closed: %.1f s\n", now() - began);
	began = now();
	count = read_events(device, &lost);
	printf("%d told, %d lost: %.1f s\n", count, lost, now() - began);
	require(count && lost && count + lost == LIMIT / 2, "told and lost are not all");
	began = now();
	for (i = 0; i < LIMIT; i++)
		require(registered(device, i) == i % 2, "the wrong ones are registered");
	printf("%d looked up: %.1f s\n", LIMIT, now() - began);
	for (i = 0; i < LIMIT; i++)
		require(told[i] == 0 || i % 2 == 0, "told of one that is open");
	require(!add(device, LIMIT), "no room again");
	began = now();
	check(!close(device), "close");
	printf("closed with the other half registered: %.1f s\n", now() - began);
	began = now();
	for (i = 1; i < LIMIT; i += 2)
		close(sockets[i]);
	close(sockets[LIMIT]);
	printf("their sockets closed: %.1f s\n", now() - began);
	return 0;
}
