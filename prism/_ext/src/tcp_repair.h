/* SPDX-License-Identifier: Apache-2.0 */
/* Freezing, exporting and rebuilding TCP connections with TCP_REPAIR (tcp(7), linux/tcp.h). */
#ifndef PRISM_TCP_REPAIR_H
#define PRISM_TCP_REPAIR_H

#include <sys/socket.h>

#include "tcp_state.h"

/* A state being written: the caller's memory first, malloc'ed memory when that is too small. */
struct prism_blob {
	uint8_t *data;
	size_t capacity, length;
	int allocated; /* data is to be freed */
};

/* A rebuilt socket and what is still to be done when it is brought to life. */
struct prism_import {
	int fd;		   /* -1 when there is none */
	int buffers_moved; /* buffer sizes are to be settled */
	uint16_t port;	   /* the local port it got */
};

/* Enter repair mode. */
enum prism_tcp_result prism_tcp_freeze(int fd, struct prism_fault *fault);

/* Leave repair mode, with or without a window probe, and let the address be reused again. */
enum prism_tcp_result prism_tcp_resume(int fd, int probe, struct prism_fault *fault);

/* Close without a packet being sent; what is no TCP socket is just closed. */
void prism_tcp_close_quietly(int fd);

/* Freeze and serialise. On success blob->data holds blob->length octets. */
enum prism_tcp_result prism_tcp_export(int fd, struct prism_blob *blob, struct prism_fault *fault);
void prism_blob_free(struct prism_blob *blob);

/*
 * Build a socket in repair mode from a checked state; payload is what follows the header.
 * local is an address of the state's family in 16-octet form. On failure nothing stays open.
 */
enum prism_tcp_result prism_tcp_import(const struct prism_tcp_state *state, const uint8_t *payload,
				       const uint8_t local[16], uint16_t port,
				       unsigned int alternatives, struct prism_import *import,
				       struct prism_fault *fault);

/*
 * Bring it to life: the FIN if there was one, out of repair mode, the unsent octets.
 * probe: 1 ask the client for its window, 0 do not, -1 when something hangs on the answer.
 */
enum prism_tcp_result prism_tcp_activate(const struct prism_import *import,
					 const struct prism_tcp_state *state,
					 const uint8_t *payload, const uint8_t local[16], int probe,
					 struct prism_fault *fault);

/*
 * Offer a peer that waits for an answer no more than octets from here on. *clamp: what the window's
 * bound was, to be put back; 0 when nothing was done, since octets are there to be read.
 */
enum prism_tcp_result prism_tcp_narrow(int fd, uint32_t octets, uint32_t *clamp,
				       struct prism_fault *fault);

/* Shared by the files behind this header. */
enum prism_tcp_result prism_fail(struct prism_fault *fault, int error, const char *what);
enum prism_tcp_result prism_set_int(int fd, int level, int name, int value, const char *what,
				    struct prism_fault *fault);
enum prism_tcp_result prism_tcp_kernel_state(int fd, uint8_t *state, struct prism_fault *fault);
enum prism_tcp_result prism_tcp_inject_fin(int fd, const struct prism_tcp_state *state,
					   const uint8_t local[16], uint16_t port,
					   struct prism_fault *fault);

#define PRISM_TRY(call)                                                                            \
	do {                                                                                       \
		enum prism_tcp_result result_ = (call);                                            \
		if (result_ != PRISM_TCP_OK)                                                       \
			return result_;                                                            \
	} while (0)

/* TCP states as tcpi_state tells them (include/net/tcp_states.h, part of the kernel's ABI). */
#define PRISM_KERNEL_ESTABLISHED 1
#define PRISM_KERNEL_CLOSE	 7
#define PRISM_KERNEL_CLOSE_WAIT	 8

#endif
