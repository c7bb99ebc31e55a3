/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Exercises the C core of the TLS record layer.
 *
 *   tls_record_driver fuzz ROUNDS SEED    for the sanitizers: streams, cuts, damage, states
 *   tls_record_driver wipe                without them: no key is left in the process's memory
 *
 * Buffers are allocated to the octet, so that AddressSanitizer sees the first one too many. The
 * exit status is 0 when everything held.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <openssl/crypto.h>

#include "tls_state.h"

#define PIECE_MAX 40000
#define SUITES	  9

static const unsigned int suites[SUITES] = {0x1301, 0x1302, 0x1303, 0xc02b, 0xc02c,
					    0xc02f, 0xc030, 0xcca8, 0xcca9};
static uint8_t plain[PIECE_MAX];
static unsigned long long random_state;
static unsigned long opened_records, refused_records, states_good, states_bad;

static void demand(int holds, const char *what)
{
	if (holds)
		return;
	fprintf(stderr, "failed: %s\n", what);
	exit(1);
}

static unsigned int next_random(unsigned int below)
{
	random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
	return (unsigned int)(random_state >> 33) % below;
}

static uint8_t *exactly(size_t size)
{
	uint8_t *memory = malloc(size ? size : 1);

	demand(memory != NULL, "memory");
	return memory;
}

static void fill(uint8_t *at, size_t size)
{
	while (size--)
		*at++ = (uint8_t)next_random(256);
}

static void begin(struct prism_tls *server, struct prism_tls *client, unsigned int suite)
{
	uint8_t master[PRISM_TLS_MASTER], randoms[2][PRISM_TLS_RANDOM];

	memset(server, 0, sizeof(*server));
	server->suite = prism_tls_find_suite(suite);
	server->is_server = 1;
	server->max_fragment = next_random(2) ? PRISM_TLS_FRAGMENT : 512;
	if (server->suite->version == PRISM_TLS_1_3) {
		fill(server->read.secret, server->suite->secret_len);
		fill(server->write.secret, server->suite->secret_len);
		demand(!prism_tls_derive(&server->read, server->suite), "keys");
		demand(!prism_tls_derive(&server->write, server->suite), "keys");
	} else {
		fill(master, sizeof(master));
		fill(randoms[0], 2 * PRISM_TLS_RANDOM);
		demand(!prism_tls_key_block(server->suite, master, randoms[0], randoms[1],
					    &server->read, &server->write),
		       "keys");
		OPENSSL_cleanse(master, sizeof(master));
	}
	*client = *server;
	client->is_server = 0;
	client->read = server->write;
	client->write = server->read;
}

/* Seal `len` octets: the ciphertext, allocated. */
static uint8_t *seal(struct prism_tls *tls, uint8_t type, const uint8_t *in, size_t len, int update,
		     size_t *size)
{
	struct prism_tls_job job = {.type = type, .update = update};
	struct prism_tls_fault fault;
	uint8_t *out;

	if (next_random(4) == 0)
		job.padding = next_random(400);
	demand(!prism_tls_plan(tls, len, &job, &fault), "a plan");
	out = exactly(job.size);
	demand(!prism_tls_seal(tls, &job, in, len, out), "sealing");
	*size = job.size;
	return out;
}

/* Open what is whole in `in` and commit some of it: octets taken. */
static size_t take(struct prism_tls *tls, const uint8_t *in, size_t len, uint8_t *out, size_t *got,
		   int *failed)
{
	struct prism_tls_opened opened;
	struct prism_tls_mark *marks;
	size_t records, count, taken = 0;
	size_t bound = prism_tls_open_bound(tls, in, len, &records);
	uint8_t *copy = exactly(len), *data = exactly(bound);

	memcpy(copy, in, len);
	marks = (struct prism_tls_mark *)exactly(records * sizeof(*marks));
	prism_tls_open(tls, &tls->progress, copy, len, data, marks, records, &opened);
	demand(opened.consumed <= len && opened.plain <= bound, "bounds");
	demand(opened.records <= records, "no more records than there are");
	opened_records += opened.records;
	refused_records += opened.fault.what != NULL;
	count = next_random(2) ? opened.records : next_random((unsigned int)opened.records + 1);
	demand(!prism_tls_commit(tls, marks, count), "committing");
	if (count) {
		taken = marks[count - 1].cipher_end;
		memcpy(out + *got, data, marks[count - 1].plain_end);
		*got += marks[count - 1].plain_end;
	}
	*failed = opened.fault.what != NULL || tls->progress.closed;
	free(marks);
	free(data);
	free(copy);
	return taken;
}

/* The connection through its serialised form. */
static void move(struct prism_tls *tls)
{
	uint8_t *state = exactly(PRISM_TLS_STATE_SIZE);

	prism_tls_pack(tls, state);
	prism_tls_wipe(tls);
	demand(!prism_tls_parse(state, PRISM_TLS_STATE_SIZE, tls), "the state comes back");
	OPENSSL_cleanse(state, PRISM_TLS_STATE_SIZE);
	free(state);
}

/* Feed a stream in random pieces; with `damaged` what comes out is a beginning of what went in. */
static void feed(struct prism_tls *tls, const uint8_t *stream, size_t size, const uint8_t *expected,
		 size_t expected_len, int damaged)
{
	uint8_t *out = exactly(expected_len + size);
	size_t from = 0, to = 0, got = 0;
	int failed = 0, rounds = 0;

	while (!failed && rounds++ < 10000 && from < size) {
		to += next_random(3) ? next_random((unsigned int)(size - to) + 1) : 0;
		from += take(tls, stream + from, to - from, out, &got, &failed);
		if (next_random(8) == 0)
			move(tls);
		if (to == size && damaged && next_random(20) == 0)
			break;
	}
	demand(damaged || (!failed && from == size && got == expected_len), "all of the stream");
	demand(got <= expected_len && memcmp(out, expected, got) == 0, "the right octets");
	free(out);
}

static void one_stream(unsigned int suite, int damage)
{
	struct prism_tls server, client;
	uint8_t *stream = NULL, *expected = exactly(6 * PIECE_MAX);
	size_t size = 0, expected_len = 0;

	begin(&server, &client, suite);
	for (unsigned int i = 0, pieces = 1 + next_random(6); i < pieces; i++) {
		int is_1_3 = client.suite->version == PRISM_TLS_1_3;
		int update = is_1_3 && next_random(3) == 0 ? (int)next_random(2) : -1;
		size_t len = next_random(4) ? next_random(600) : next_random(PIECE_MAX), sealed;
		uint8_t *part = seal(&client, PRISM_TLS_DATA, plain, len, update, &sealed);

		stream = realloc(stream, size + sealed + 1);
		demand(stream != NULL, "memory");
		memcpy(stream + size, part, sealed);
		memcpy(expected + expected_len, plain, len);
		size += sealed;
		expected_len += len;
		free(part);
	}
	for (int i = 0; size && damage && i < 3; i++)
		stream[next_random((unsigned int)size)] ^= (uint8_t)(1 + next_random(255));
	feed(&server, stream, size, expected, expected_len, damage);
	free(stream);
	free(expected);
	prism_tls_wipe(&server);
	prism_tls_wipe(&client);
}

/* Any content of handshake records and alerts: the parser of messages alone. */
static void odd_messages(unsigned int suite)
{
	struct prism_tls server, client;
	uint8_t message[64], *out = exactly(PIECE_MAX);
	size_t size, got = 0;
	int failed = 0;

	begin(&server, &client, suite);
	for (int i = 0; i < 40 && !failed; i++) {
		struct prism_tls *to = next_random(2) ? &server : &client;
		struct prism_tls *from = to == &server ? &client : &server;
		static const uint8_t types[] = {0, 1, 4, 24};
		uint8_t *record;

		memset(message, 0, sizeof(message));
		message[0] = types[next_random(4)];
		message[3] = (uint8_t)next_random(4);
		message[4] = (uint8_t)next_random(2);
		record = seal(from, (uint8_t)(20 + next_random(4)), message,
			      next_random(sizeof(message)), -1, &size);
		take(to, record, size, out, &got, &failed);
		got = 0;
		free(record);
		if (next_random(4) == 0)
			move(to);
	}
	free(out);
	prism_tls_wipe(&server);
	prism_tls_wipe(&client);
}

static void damaged_state(unsigned int suite)
{
	struct prism_tls server, client, again = {.suite = NULL};
	uint8_t *state = exactly(PRISM_TLS_STATE_SIZE), junk[64], *out = exactly(PIECE_MAX);
	size_t length = PRISM_TLS_STATE_SIZE, got = 0;
	int failed;

	begin(&server, &client, suite);
	prism_tls_pack(&server, state);
	for (unsigned int i = 0, edits = next_random(4); i < edits; i++)
		state[next_random(40)] = (uint8_t)next_random(256);
	if (next_random(8) == 0) {
		length = next_random(PRISM_TLS_STATE_SIZE);
		state = realloc(state, length ? length : 1);
	}
	if (prism_tls_parse(state, length, &again)) {
		states_bad++;
	} else {
		states_good++;
		fill(junk, sizeof(junk));
		junk[0] = 23, junk[1] = junk[2] = 3, junk[3] = 0;
		take(&again, junk, sizeof(junk), out, &got, &failed);
	}
	free(state);
	free(out);
	prism_tls_wipe(&server);
	prism_tls_wipe(&client);
	prism_tls_wipe(&again);
}

static void sealed_file(unsigned int suite)
{
	struct prism_tls server, client;
	struct prism_tls_job job = {.type = PRISM_TLS_DATA, .update = -1};
	struct prism_tls_fault fault;
	size_t len = 1 + next_random(PIECE_MAX), asked = len + next_random(2) * 100, got = asked;
	char name[] = "/tmp/tls_record_driver_XXXXXX";
	uint8_t *out;
	int fd = mkstemp(name);

	demand(fd >= 0 && unlink(name) == 0, "a file");
	demand(write(fd, plain, len) == (ssize_t)len, "the file's content");
	begin(&server, &client, suite);
	demand(!prism_tls_plan(&server, asked, &job, &fault), "a plan");
	out = exactly(job.size);
	demand(!prism_tls_seal_file(&server, &job, fd, 0, &got, out), "sealing a file");
	demand(got == len, "all of the file");
	feed(&client, out, job.size, plain, len, 0);
	free(out);
	close(fd);
	prism_tls_wipe(&server);
	prism_tls_wipe(&client);
}

/* Looks for octets in all writable memory; they are given xored, so as not to find themselves. */
static int in_memory(const uint8_t *masked, size_t size)
{
	FILE *maps = fopen("/proc/self/maps", "r");
	char line[512];
	int found = 0;

	demand(maps != NULL, "/proc/self/maps");
	while (fgets(line, sizeof(line), maps)) {
		unsigned long from, to;
		char mode[5];

		if (sscanf(line, "%lx-%lx %4s", &from, &to, mode) != 3 || mode[0] != 'r' ||
		    mode[1] != 'w' || strstr(line, "[v"))
			continue;
		for (const uint8_t *at = (const uint8_t *)from; at + size <= (const uint8_t *)to;
		     at++) {
			size_t same = 0;

			while (same < size && at[same] == (masked[same] ^ 0x5a))
				same++;
			if (same == size)
				found++;
		}
	}
	fclose(maps);
	return found;
}

static void mask(uint8_t *to, const uint8_t *from, size_t size)
{
	for (size_t i = 0; i < size; i++)
		to[i] = from[i] ^ 0x5a;
}

/* Secrets and keys, before and after a KeyUpdate, are gone after wiping. */
static void wiping(unsigned int suite)
{
	static uint8_t masked[6][16];
	struct prism_tls server, client;
	size_t size, count = 0;
	uint8_t *record;
	int is_1_3;

	begin(&server, &client, suite);
	is_1_3 = server.suite->version == PRISM_TLS_1_3;
	mask(masked[count++], server.read.key, 16);
	mask(masked[count++], server.write.key, 16);
	if (is_1_3) {
		mask(masked[count++], server.read.secret, 16);
		record = seal(&client, PRISM_TLS_DATA, plain, 1000, 1, &size);
		feed(&server, record, size, plain, 1000, 0);
		free(record);
		mask(masked[count++], server.read.key, 16);
		mask(masked[count++], server.read.secret, 16);
	}
	record = seal(&server, PRISM_TLS_DATA, plain, 1000, -1, &size);
	free(record);
	move(&server);
	move(&client);
	demand(in_memory(masked[count - 1], 16) > 0, "keys are found before they are wiped");
	prism_tls_wipe(&server);
	prism_tls_wipe(&client);
	for (size_t i = 0; i < count; i++)
		if (in_memory(masked[i], 16)) {
			fprintf(stderr, "suite %04x: key %zu is still in memory\n", suite, i);
			exit(1);
		}
}

int main(int argc, char **argv)
{
	demand(argc >= 2, "arguments");
	demand(!prism_tls_init(), "libcrypto");
	random_state = argc > 3 ? strtoull(argv[3], NULL, 10) : 1;
	fill(plain, sizeof(plain));
	if (strcmp(argv[1], "wipe") == 0) {
		for (int i = 0; i < SUITES; i++)
			wiping(suites[i]);
		printf("wiped %d suites\n", SUITES);
		return 0;
	}
	demand(argc == 4, "fuzz ROUNDS SEED");
	for (int round = atoi(argv[2]); round > 0; round--) {
		unsigned int suite = suites[next_random(SUITES)];

		one_stream(suite, 0);
		one_stream(suite, 1);
		odd_messages(suite);
		for (int i = 0; i < 10; i++)
			damaged_state(suite);
		if (round % 10 == 0)
			sealed_file(suite);
	}
	printf("opened %lu refused %lu states %lu good %lu bad\n", opened_records, refused_records,
	       states_good, states_bad);
	return 0;
}
