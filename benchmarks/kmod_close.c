// SPDX-License-Identifier: Apache-2.0
/*
 * What the monitor module adds to the end of a connection.
 *
 *   benchmarks/kmod_close.sh
 *
 * Makes rounds of connections over loopback and prints, for each mode named, the median over the
 * rounds of the nanoseconds that one connection takes to be closed, both ends, the peer first;
 * "registered" includes the reading of the events, and prints what registering costs, too.
 */
#include <arpa/inet.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "prism_monitor.h"

#define ROUNDS 41
#define BATCH  200

static double now(void)
{
	struct timespec at;

	clock_gettime(CLOCK_MONOTONIC, &at);
	return at.tv_sec * 1e9 + at.tv_nsec;
}

static int ascending(const void *left, const void *right)
{
	const double *a = left, *b = right;

	return (*a > *b) - (*a < *b);
}

static void check(int good, const char *what)
{
	if (!good) {
		perror(what);
		exit(1);
	}
}

static void make_pair(int listener, const struct sockaddr_in *address, int *client, int *ours)
{
	*client = socket(AF_INET, SOCK_STREAM, 0);
	check(!connect(*client, (const struct sockaddr *)address, sizeof(*address)), "connect");
	*ours = accept(listener, NULL, NULL);
	check(*ours >= 0, "accept");
}

static void read_events(int device)
{
	struct prism_monitor_event events[BATCH];
	ssize_t size;
	int left = BATCH;

	while (left) {
		size = read(device, events, sizeof(events));
		check(size > 0, "read");
		left -= size / sizeof(events[0]);
	}
}

static void measure(const char *mode, int listener, const struct sockaddr_in *address)
{
	double closing[ROUNDS], registering[ROUNDS], began;
	int registered = !strcmp(mode, "registered");
	int client[BATCH], ours[BATCH], device = -1;
	int round, i;

	if (registered) {
		device = open(PRISM_MONITOR_PATH, O_RDWR);
		check(device >= 0, PRISM_MONITOR_PATH);
	}
	for (round = 0; round < ROUNDS; round++) {
		for (i = 0; i < BATCH; i++)
			make_pair(listener, address, &client[i], &ours[i]);
		began = now();
		for (i = 0; registered && i < BATCH; i++) {
			struct prism_monitor_register request = {.fd = ours[i], .cookie = i};

			check(!ioctl(device, PRISM_MONITOR_REGISTER, &request), "register");
		}
		registering[round] = (now() - began) / BATCH;
		began = now();
		for (i = 0; i < BATCH; i++) {
			close(client[i]);
			close(ours[i]);
		}
		if (registered)
			read_events(device);
		closing[round] = (now() - began) / BATCH;
	}
	qsort(closing, ROUNDS, sizeof(double), ascending);
	qsort(registering, ROUNDS, sizeof(double), ascending);
	printf("%-10s close %8.0f ns", mode, closing[ROUNDS / 2]);
	if (registered)
		printf(", register %8.0f ns", registering[ROUNDS / 2]);
	printf("\n");
	if (device >= 0)
		close(device);
}

int main(int argc, char **argv)
{
	struct sockaddr_in address = {.sin_family = AF_INET};
	socklen_t size = sizeof(address);
	int listener = socket(AF_INET, SOCK_STREAM, 0);
	int i;

	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	check(!bind(listener, (struct sockaddr *)&address, sizeof(address)), "bind");
	check(!listen(listener, BATCH), "listen");
	check(!getsockname(listener, (struct sockaddr *)&address, &size), "getsockname");
	for (i = 1; i < argc; i++)
		measure(argv[i], listener, &address);
	return 0;
}
