/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Finds the parts of plain HTTP/1.1 heads: the shapes that nearly all messages have.
 *
 * Both scanners are deliberately narrow. What is unusual, wrong or not complete is not judged here
 * but left to the full parsers (prism/http/head.py, prism/apps/upstream.py), which know every case
 * and say what is wrong; so a scanner may never accept what those refuse, nor read it differently.
 */
#ifndef PRISM_HTTP_SCAN_H
#define PRISM_HTTP_SCAN_H

#include <stddef.h>
#include <stdint.h>

#define PRISM_SCAN_FIELDS 64 /* more are left to the full parsers */

struct prism_span {
	uint32_t begin, size;
};

struct prism_scan_field {
	struct prism_span name, value; /* the value without blanks around it, never empty */
};

struct prism_request_scan {
	struct prism_span method, target, host;
	uint32_t path;	 /* octets of the target before '?' */
	uint32_t length; /* of the head with its blank line */
	int64_t body;	 /* Content-Length; -1: none was declared */
	int keep_alive;	 /* 0: "Connection: close" */
	int plain_path;	 /* the path is its own normal form */
	unsigned int fields_count;
	struct prism_scan_field fields[PRISM_SCAN_FIELDS];
};

struct prism_response_scan {
	int status;
	uint32_t length;	   /* of the head with its blank line */
	int64_t body;		   /* Content-Length */
	int date, server;	   /* whether there are such fields */
	unsigned int fields_count; /* those to pass on: not Content-Length, not Connection */
	struct prism_scan_field fields[PRISM_SCAN_FIELDS];
};

/* 1: a whole, plain request head is at the beginning of data; 0: let the full parser see. */
int prism_scan_request(const char *data, size_t size, size_t max_target,
		       struct prism_request_scan *out);

/* 1: a whole, plain head of a final response with a length is at the beginning; 0: see above. */
int prism_scan_response(const char *data, size_t size, struct prism_response_scan *out);

/* Whether a request is conditional, or for a range. */
int prism_asks_for_less(const char *data, const struct prism_request_scan *request);

#endif
