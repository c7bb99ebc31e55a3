// SPDX-License-Identifier: Apache-2.0
/* Feeds mutated heads to the scanners, each in memory of exactly its size. */
#include "http_scan.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const SEEDS[] = {
	"GET /a/b?c=d HTTP/1.1\r\nHost: h.example:80\r\nAccept: */*\r\nConnection: close\r\n\r\n",
	"PUT /%41//.. HTTP/1.1\r\nhost: h\r\nContent-Length: 123\r\nX: \t y \r\n\r\nbody",
	"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nServer: x\r\nDate: now\r\nETag: \"a\"\r\n\r\nabc",
	"HTTP/1.1 404 \r\nConnection: keep-alive\r\ncontent-length: 0\r\nTE: x\r\n\r\n",
};

static int inside(struct prism_span span, size_t size)
{
	return (size_t)span.begin + span.size <= size;
}

static void check(int good, const char *what)
{
	if (!good) {
		fprintf(stderr, "%s\n", what);
		exit(1);
	}
}

static size_t mutate(char *data, size_t size, size_t room)
{
	static const char pieces[] = "\r\n :/%?#\\\tAa09\x7f\x80";

	for (int turns = rand() % 4; turns > 0; turns--) {
		size_t at = size ? (size_t)rand() % size : 0;

		switch (rand() % 4) {
		case 0:
			if (size)
				data[at] = (char)rand();
			break;
		case 1:
			if (size)
				data[at] = pieces[(size_t)rand() % (sizeof(pieces) - 1)];
			break;
		case 2:
			size = at;
			break;
		default:
			if (size && size + 9 < room) {
				memmove(data + at + 9, data + at, size - at);
				size += 9;
			}
		}
	}
	return size;
}

static int one_request(const char *data, size_t size)
{
	struct prism_request_scan out;

	if (!prism_scan_request(data, size, 100, &out))
		return 0;
	check(out.length <= size && inside(out.target, size) && inside(out.host, size), "request");
	check(out.path >= 1 && out.path <= out.target.size && out.target.size <= 100, "target");
	for (unsigned int i = 0; i < out.fields_count; i++)
		check(inside(out.fields[i].name, size) && inside(out.fields[i].value, size),
		      "request field");
	return 1;
}

static int one_response(const char *data, size_t size)
{
	struct prism_response_scan out;

	if (!prism_scan_response(data, size, &out))
		return 0;
	check(out.length <= size && out.body >= 0 && out.status >= 200, "response");
	for (unsigned int i = 0; i < out.fields_count; i++)
		check(inside(out.fields[i].name, size) && inside(out.fields[i].value, size),
		      "response field");
	return 1;
}

int main(int argc, char **argv)
{
	int turns = argc > 1 ? atoi(argv[1]) : 1000, plain = 0;
	char work[512];

	srand(argc > 2 ? (unsigned int)atoi(argv[2]) : 1);
	for (int turn = 0; turn < turns; turn++) {
		const char *seed = SEEDS[(size_t)rand() % (sizeof(SEEDS) / sizeof(*SEEDS))];
		size_t size = strlen(seed);
		char *exact;

		memcpy(work, seed, size);
		size = mutate(work, size, sizeof(work));
		exact = malloc(size ? size : 1);
		if (!exact)
			return 1;
		memcpy(exact, work, size);
		plain += one_request(exact, size) + one_response(exact, size);
		free(exact);
	}
	printf("turns %d plain %d\n", turns, plain);
	return 0;
}
