/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Exercises the C core under the sanitizers, in a network namespace of its own.
 *
 *   tcp_repair_driver CYCLES MUTATIONS SEED
 *
 * CYCLES connections over loopback are exported, closed, imported and activated, with queues of
 * many sizes; MUTATIONS damaged states are parsed, and those that pass are imported. Prints the
 * counts; the exit status is 0 when everything held.
 */
#define _GNU_SOURCE /* unshare */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/ioctl.h>

#include "tcp_repair.h"

#define PORT	80
#define SCRATCH 16384
#define LARGEST 60000

static uint8_t outgoing[LARGEST], incoming[LARGEST];
static unsigned long long random_state;

static const uint8_t LOOPBACK4[16] = {[10] = 0xff, [11] = 0xff, [12] = 127, [15] = 1};
static const uint8_t LOOPBACK6[16] = {[15] = 1};

static void demand(int holds, const char *what)
{
	if (holds)
		return;
	fprintf(stderr, "failed: %s (%s)\n", what, strerror(errno));
	exit(1);
}

static void demand_ok(enum prism_tcp_result result, const struct prism_fault *fault,
		      const char *what)
{
	if (result == PRISM_TCP_OK)
		return;
	fprintf(stderr, "failed: %s: %s (%s)\n", what, fault->what, strerror(fault->error));
	exit(1);
}

static unsigned int next_random(unsigned int below)
{
	random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
	return (unsigned int)(random_state >> 33) % below;
}

static void enter_namespace(void)
{
	struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP};
	int fd;

	demand(unshare(CLONE_NEWNET) == 0, "a network namespace");
	fd = socket(AF_INET, SOCK_DGRAM, 0);
	demand(ioctl(fd, SIOCSIFFLAGS, &request) == 0, "loopback up");
	close(fd);
}

static int count_descriptors(void)
{
	DIR *directory = opendir("/proc/self/fd");
	int count = 0;

	demand(directory != NULL, "/proc/self/fd");
	while (readdir(directory))
		count++;
	closedir(directory);
	return count;
}

static int listen_on(int family)
{
	struct sockaddr_in6 six = {.sin6_family = AF_INET6, .sin6_port = htons(PORT)};
	struct sockaddr_in four = {.sin_family = AF_INET, .sin_port = htons(PORT)};
	int fd = socket(family, SOCK_STREAM, 0), one = 1;

	memcpy(&six.sin6_addr, LOOPBACK6, 16);
	four.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (family == AF_INET)
		demand(bind(fd, (struct sockaddr *)&four, sizeof(four)) == 0, "bind");
	else
		demand(bind(fd, (struct sockaddr *)&six, sizeof(six)) == 0, "bind");
	demand(listen(fd, 8) == 0, "listen");
	return fd;
}

static void connect_pair(int listener, int family, int *client, int *server)
{
	struct sockaddr_storage address;
	socklen_t size = sizeof(address);

	*client = socket(family, SOCK_STREAM, 0);
	getsockname(listener, (struct sockaddr *)&address, &size);
	demand(connect(*client, (struct sockaddr *)&address, size) == 0, "connect");
	*server = accept(listener, NULL, NULL);
	demand(*server >= 0, "accept");
}

static void pass(int from, int to, size_t length)
{
	demand(send(from, outgoing, length, 0) == (ssize_t)length, "send");
	for (size_t got = 0; got < length;) {
		ssize_t part = recv(to, incoming + got, length - got, 0);

		demand(part > 0, "receive");
		got += (size_t)part;
	}
	demand(memcmp(outgoing, incoming, length) == 0, "what arrives is what was sent");
}

static void export_socket(int fd, struct prism_blob *blob, uint8_t scratch[SCRATCH])
{
	struct prism_fault fault;

	*blob = (struct prism_blob){.data = scratch, .capacity = SCRATCH};
	demand_ok(prism_tcp_export(fd, blob, &fault), &fault, "export");
}

static int rebuild(const struct prism_blob *blob, const uint8_t local[16])
{
	struct prism_tcp_state state;
	struct prism_import import;
	struct prism_fault fault;
	const uint8_t *payload = blob->data + PRISM_TCP_HEADER;

	demand_ok(prism_tcp_parse(blob->data, blob->length, &state, &fault), &fault, "parse");
	demand_ok(prism_tcp_import(&state, payload, local, PORT, 0, &import, &fault), &fault,
		  "import");
	demand_ok(prism_tcp_activate(&import, &state, payload, local, -1, &fault), &fault,
		  "activate");
	return import.fd;
}

/* Its window is taken back and given again, and octets pass both ways all the time. */
static void narrowed(int client, int server)
{
	struct prism_fault fault;
	uint32_t clamp, none;

	fcntl(server, F_SETFL, 0); /* to wait for what comes */
	demand_ok(prism_tcp_narrow(server, 16384, &clamp, &fault), &fault, "narrow");
	demand(clamp != 0, "the window's bound is told");
	pass(server, client, 1 + next_random(1000));
	pass(client, server, 1 + next_random(1000));
	demand(send(client, outgoing, 1, 0) == 1, "send");
	demand(recv(server, incoming, 1, MSG_PEEK) == 1, "peek");
	demand_ok(prism_tcp_narrow(server, 16384, &none, &fault), &fault, "narrow");
	demand(none == 0, "octets are there: nothing is done");
	demand(recv(server, incoming, 1, 0) == 1, "receive");
	setsockopt(server, IPPROTO_TCP, TCP_WINDOW_CLAMP, &clamp, sizeof(clamp));
	pass(client, server, 8000);
	demand(prism_tcp_narrow(-1, 16384, &none, &fault) == PRISM_TCP_OS_ERROR, "no descriptor");
}

/* One connection: some octets unread, perhaps a FIN, a move, and everything is still there. */
static void cycle(int listener, int family)
{
	const uint8_t *local = family == AF_INET ? LOOPBACK4 : LOOPBACK6;
	struct linger reset = {.l_onoff = 1};
	uint8_t scratch[SCRATCH];
	struct prism_blob blob;
	size_t queued = next_random(4) ? next_random(2000) : next_random(LARGEST);
	int half = next_random(4) == 0, client, server;

	connect_pair(listener, family, &client, &server);
	demand(send(client, outgoing, queued, 0) == (ssize_t)queued, "send");
	if (half)
		shutdown(client, SHUT_WR);
	export_socket(server, &blob, scratch);
	prism_tcp_close_quietly(server);
	server = rebuild(&blob, local);
	prism_blob_free(&blob);
	for (size_t got = 0; got < queued;) {
		ssize_t part = recv(server, incoming + got, queued - got, 0);

		demand(part > 0, "the queue is there to read");
		got += (size_t)part;
	}
	demand(memcmp(outgoing, incoming, queued) == 0, "the queue is what was sent");
	if (half)
		demand(recv(server, incoming, 1, 0) == 0, "the end after the queue");
	pass(server, client, 1 + next_random(1000));
	if (!half)
		narrowed(client, server);
	setsockopt(client, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
	close(client);
	close(server);
}

/* Any octets at all: refused with a reason, or a socket that can be made and thrown away. */
static int try_state(const uint8_t *data, size_t length)
{
	struct prism_tcp_state state;
	struct prism_import import;
	struct prism_fault fault = {0};
	uint8_t *exact = malloc(length ? length : 1); /* so that reading past the end is seen */
	const uint8_t *local;
	int imported = 0;

	memcpy(exact, data, length);
	if (prism_tcp_parse(exact, length, &state, &fault) != PRISM_TCP_OK) {
		demand(fault.what != NULL && fault.error != 0, "a refusal has a reason");
		free(exact);
		return 0;
	}
	local = state.family == 4 ? LOOPBACK4 : LOOPBACK6;
	if (prism_tcp_import(&state, exact + PRISM_TCP_HEADER, local, PORT, 1, &import, &fault) ==
	    PRISM_TCP_OK) {
		imported = 1;
		(void)prism_tcp_activate(&import, &state, exact + PRISM_TCP_HEADER, local,
					 (int)next_random(3) - 1, &fault);
		prism_tcp_close_quietly(import.fd);
	} else {
		demand(import.fd == -1, "a failed import leaves no descriptor");
	}
	free(exact);
	return imported;
}

static int mutate(const uint8_t *valid, size_t length, int count)
{
	uint8_t *copy = malloc(length + 64);
	int imported = 0;

	while (count--) {
		size_t used = length;

		memcpy(copy, valid, length);
		memset(copy + length, 0xa5, 64);
		for (unsigned int flips = next_random(5); flips; flips--)
			copy[next_random((unsigned int)length)] = (uint8_t)next_random(256);
		if (next_random(4) == 0)
			used = next_random((unsigned int)length + 64);
		imported += try_state(copy, used);
	}
	free(copy);
	return imported;
}

int main(int argc, char **argv)
{
	static const int families[2] = {AF_INET, AF_INET6};
	int cycles = argc > 1 ? atoi(argv[1]) : 100, mutations = argc > 2 ? atoi(argv[2]) : 1000;
	int imported = 0, before, listeners[2];
	uint8_t scratch[SCRATCH];
	struct prism_blob blob;

	random_state = argc > 3 ? strtoull(argv[3], NULL, 10) : 1;
	for (size_t i = 0; i < sizeof(outgoing); i++)
		outgoing[i] = (uint8_t)next_random(256);
	enter_namespace();
	before = count_descriptors();
	for (int i = 0; i < 2; i++) {
		int client, server;

		listeners[i] = listen_on(families[i]);
		for (int done = 0; done < cycles; done++)
			cycle(listeners[i], families[i]);
		connect_pair(listeners[i], families[i], &client, &server);
		demand(send(client, outgoing, 200, 0) == 200, "send");
		demand(send(server, outgoing, 3000, 0) == 3000, "send");
		export_socket(server, &blob, scratch);
		prism_tcp_close_quietly(server);
		imported += mutate(blob.data, blob.length, mutations);
		prism_blob_free(&blob);
		prism_tcp_close_quietly(client);
		close(listeners[i]);
	}
	demand(count_descriptors() == before, "no descriptor is left behind");
	demand(mutations == 0 || imported > 0, "some damaged states could be imported");
	printf("cycles %d mutations %d imported %d\n", 2 * cycles, 2 * mutations, imported);
	return 0;
}
