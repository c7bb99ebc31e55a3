/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Freezing and exporting.
 *
 * A frozen socket is not deaf: the kernel goes on taking segments that arrive, and acknowledges
 * them. So an export reads everything between two looks at the sequence numbers and starts again
 * when they moved. (What the frozen socket still says is dropped by the switch: the flow is
 * locked.)
 */
#define _GNU_SOURCE /* POLLRDHUP */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <netinet/in.h>
#include <sys/ioctl.h>
#include <linux/sockios.h>
#include <linux/tcp.h>
#include <linux/tls.h>

#include "tcp_repair.h"

#ifndef SOL_TLS
#define SOL_TLS 282 /* linux/socket.h */
#endif
#ifndef SO_BUF_LOCK
#define SO_BUF_LOCK 72 /* Linux 5.15 */
#endif

/* Places in SO_MEMINFO's array: both buffer sizes for one system call (linux/sock_diag.h). */
#define MEMORY_RCVBUF 1
#define MEMORY_SNDBUF 3
#define MEMORY_FIELDS 4

#define EXPORT_ATTEMPTS 8
/* The first segment of the send queue may be acknowledged in part: it is peeked whole. */
#define PEEK_SLACK 65536u

enum prism_tcp_result prism_fail(struct prism_fault *fault, int error, const char *what)
{
	fault->error = error;
	fault->what = what;
	return PRISM_TCP_OS_ERROR;
}

static enum prism_tcp_result refuse(struct prism_fault *fault, int error, const char *what)
{
	fault->error = error;
	fault->what = what;
	return PRISM_TCP_NOT_CARRIABLE;
}

enum prism_tcp_result prism_set_int(int fd, int level, int name, int value, const char *what,
				    struct prism_fault *fault)
{
	if (setsockopt(fd, level, name, &value, sizeof(value)) == 0)
		return PRISM_TCP_OK;
	return prism_fail(fault, errno, what);
}

static enum prism_tcp_result get_u32(int fd, int level, int name, uint32_t *value, const char *what,
				     struct prism_fault *fault)
{
	socklen_t size = sizeof(*value);

	if (getsockopt(fd, level, name, value, &size) == 0)
		return PRISM_TCP_OK;
	return prism_fail(fault, errno, what);
}

static enum prism_tcp_result set_queue(int fd, int queue, struct prism_fault *fault)
{
	return prism_set_int(fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, queue, "TCP_REPAIR_QUEUE", fault);
}

enum prism_tcp_result prism_tcp_freeze(int fd, struct prism_fault *fault)
{
	return prism_set_int(fd, IPPROTO_TCP, TCP_REPAIR, TCP_REPAIR_ON, "TCP_REPAIR on", fault);
}

enum prism_tcp_result prism_tcp_resume(int fd, int probe, struct prism_fault *fault)
{
	PRISM_TRY(prism_set_int(fd, IPPROTO_TCP, TCP_REPAIR,
				probe ? TCP_REPAIR_OFF : TCP_REPAIR_OFF_NO_WP, "TCP_REPAIR off",
				fault));
	/* Leaving repair mode clears it, and then no listener could bind to the port again. */
	return prism_set_int(fd, SOL_SOCKET, SO_REUSEADDR, 1, "SO_REUSEADDR", fault);
}

void prism_tcp_close_quietly(int fd)
{
	struct prism_fault ignored;

	(void)prism_tcp_freeze(fd, &ignored);
	close(fd);
}

enum prism_tcp_result prism_tcp_kernel_state(int fd, uint8_t *state, struct prism_fault *fault)
{
	struct tcp_info info;
	socklen_t size = sizeof(info.tcpi_state);

	if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size) != 0)
		return prism_fail(fault, errno, "TCP_INFO");
	*state = info.tcpi_state;
	return PRISM_TCP_OK;
}

void prism_blob_free(struct prism_blob *blob)
{
	if (blob->allocated)
		free(blob->data);
	blob->data = NULL;
	blob->allocated = 0;
}

/* Make room for size octets; what the blob holds is kept. */
static enum prism_tcp_result reserve(struct prism_blob *blob, size_t size,
				     struct prism_fault *fault)
{
	uint8_t *data;

	if (size <= blob->capacity)
		return PRISM_TCP_OK;
	data = blob->allocated ? realloc(blob->data, size) : malloc(size);
	if (!data)
		return prism_fail(fault, ENOMEM, "memory for the queues");
	if (!blob->allocated)
		memcpy(data, blob->data, blob->capacity);
	blob->data = data;
	blob->capacity = size;
	blob->allocated = 1;
	return PRISM_TCP_OK;
}

static void store_address(const struct sockaddr_storage *from, uint8_t address[16], uint16_t *port)
{
	if (from->ss_family == AF_INET6) {
		const struct sockaddr_in6 *six = (const struct sockaddr_in6 *)from;

		memcpy(address, &six->sin6_addr, 16);
		*port = ntohs(six->sin6_port);
	} else {
		const struct sockaddr_in *four = (const struct sockaddr_in *)from;

		memset(address, 0, 10);
		address[10] = address[11] = 0xff;
		memcpy(address + 12, &four->sin_addr, 4);
		*port = ntohs(four->sin_port);
	}
}

static enum prism_tcp_result read_addresses(int fd, struct prism_tcp_state *state,
					    struct prism_fault *fault)
{
	struct sockaddr_storage address;
	socklen_t size = sizeof(address);

	if (getpeername(fd, (struct sockaddr *)&address, &size) != 0)
		return errno == ENOTCONN ? refuse(fault, ENOTCONN, "not connected")
					 : prism_fail(fault, errno, "getpeername");
	store_address(&address, state->peer, &state->peer_port);
	size = sizeof(address);
	if (getsockname(fd, (struct sockaddr *)&address, &size) != 0)
		return prism_fail(fault, errno, "getsockname");
	store_address(&address, state->local, &state->local_port);
	state->family = prism_is_v4_mapped(state->peer) ? 4 : 6;
	if (state->family == 6 && state->peer[0] == 0xfe && (state->peer[1] & 0xc0) == 0x80)
		return refuse(fault, EADDRNOTAVAIL, "a link-local client means nothing elsewhere");
	return PRISM_TCP_OK;
}

/*
 * A layer on top may have us read something else than the stream. Kernel TLS does not where it only
 * seals (TLS_TX): both queues hold what is on the wire. What it has not put into the send queue yet
 * cannot be seen from here; the caller sees to it that there is nothing. Where the kernel opens
 * records (TLS_RX), neither queue can be peeked at, so they have to be empty; whether the kernel
 * keeps a part of a record back is for the caller, too.
 */
static enum prism_tcp_result check_layers(int fd, struct prism_fault *fault)
{
	struct tls_crypto_info info;
	int unread = 0, unsent = 0;
	char name[16] = "";
	socklen_t size = sizeof(name);

	if (getsockopt(fd, IPPROTO_TCP, TCP_ULP, name, &size) != 0 || size == 0)
		return PRISM_TCP_OK;
	if (strncmp(name, "tls", sizeof(name)) != 0)
		return refuse(fault, EPROTOTYPE, "an upper-layer protocol (TCP_ULP) is attached");
	size = sizeof(info); /* version and cipher only, no keys */
	if (getsockopt(fd, SOL_TLS, TLS_RX, &info, &size) != 0 && errno == EBUSY)
		return PRISM_TCP_OK;
	if (ioctl(fd, SIOCINQ, &unread) != 0 || ioctl(fd, SIOCOUTQ, &unsent) != 0)
		return prism_fail(fault, errno, "SIOCINQ, SIOCOUTQ");
	if (unread || unsent)
		return refuse(fault, EPROTOTYPE,
			      "the kernel opens its TLS records (TLS_RX) and a queue is not empty");
	return PRISM_TCP_OK;
}

/* TCP state, options and conditions that forbid carrying the connection. */
static enum prism_tcp_result read_condition(int fd, struct prism_tcp_state *state,
					    struct prism_fault *fault)
{
	struct pollfd poller = {.fd = fd, .events = POLLPRI | POLLRDHUP};
	struct tcp_info info;
	socklen_t size = offsetof(struct tcp_info, tcpi_rto); /* all that is needed */

	if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size) != 0)
		return prism_fail(fault, errno, "TCP_INFO");
	if (info.tcpi_state == PRISM_KERNEL_CLOSE_WAIT)
		state->flags = PRISM_TCP_HALF_CLOSED;
	else if (info.tcpi_state == PRISM_KERNEL_ESTABLISHED)
		state->flags = 0;
	else if (info.tcpi_state == PRISM_KERNEL_CLOSE)
		return refuse(fault, ECONNRESET, "the connection is closed or was reset");
	else
		return refuse(fault, EOPNOTSUPP, "the TCP state is not ESTABLISHED or CLOSE_WAIT");
	state->options = info.tcpi_options & PRISM_TCP_OPTIONS;
	state->snd_wscale = state->options & PRISM_TCP_WSCALE ? info.tcpi_snd_wscale : 0;
	state->rcv_wscale = state->options & PRISM_TCP_WSCALE ? info.tcpi_rcv_wscale : 0;

	if (poll(&poller, 1, 0) < 0)
		return prism_fail(fault, errno, "poll");
	if (poller.revents & POLLPRI)
		return refuse(fault, EOPNOTSUPP, "urgent data is pending");
	if (poller.revents & (POLLERR | POLLHUP))
		return refuse(fault, ECONNABORTED, "the connection has a pending error");
	if (poller.revents & POLLRDHUP && !state->flags)
		return refuse(fault, EOPNOTSUPP, "the socket is shut down for reading");
	return PRISM_TCP_OK;
}

static enum prism_tcp_result read_parameters(int fd, struct prism_tcp_state *state,
					     struct prism_fault *fault)
{
	struct tcp_repair_window window;
	socklen_t size = sizeof(window);
	uint32_t memory[MEMORY_FIELDS];
	uint32_t value = 0;

	if (getsockopt(fd, IPPROTO_TCP, TCP_REPAIR_WINDOW, &window, &size) != 0)
		return prism_fail(fault, errno, "TCP_REPAIR_WINDOW");
	state->snd_wl1 = window.snd_wl1;
	state->snd_wnd = window.snd_wnd;
	state->max_window = window.max_window;
	state->rcv_wnd = window.rcv_wnd;
	state->rcv_wup = window.rcv_wup;
	PRISM_TRY(get_u32(fd, IPPROTO_TCP, TCP_MAXSEG, &value, "TCP_MAXSEG", fault));
	state->mss = (uint16_t)(value > 0xffff ? 0xffff : value);
	PRISM_TRY(
		get_u32(fd, IPPROTO_TCP, TCP_TIMESTAMP, &state->timestamp, "TCP_TIMESTAMP", fault));
	PRISM_TRY(get_u32(fd, IPPROTO_TCP, TCP_WINDOW_CLAMP, &state->window_clamp,
			  "TCP_WINDOW_CLAMP", fault));
	size = sizeof(memory);
	if (getsockopt(fd, SOL_SOCKET, SO_MEMINFO, memory, &size) != 0)
		return prism_fail(fault, errno, "SO_MEMINFO");
	state->rcvbuf = memory[MEMORY_RCVBUF];
	state->sndbuf = memory[MEMORY_SNDBUF];
	size = sizeof(value);
	value = 0; /* before Linux 5.15 one cannot ask: taken as not fixed */
	(void)getsockopt(fd, SOL_SOCKET, SO_BUF_LOCK, &value, &size);
	state->buf_lock = value & 3;
	return PRISM_TCP_OK;
}

/* A FIN counts in the kernel's numbers; in the state it does not. */
static void uncount_fin(struct prism_tcp_state *state)
{
	uint32_t edge = state->rcv_wup + state->rcv_wnd;

	state->rcv_nxt--;
	if ((int32_t)(state->rcv_nxt - state->rcv_wup) < 0)
		state->rcv_wup = state->rcv_nxt;
	state->rcv_wnd = edge - state->rcv_wup; /* the right edge stays where it was */
}

/* Everything about the receiving side, between two equal readings of rcv_nxt. */
static enum prism_tcp_result read_receive_side(int fd, struct prism_tcp_state *state,
					       struct prism_blob *blob, struct prism_fault *fault)
{
	uint32_t again;
	int queued;
	ssize_t got;

	PRISM_TRY(set_queue(fd, TCP_RECV_QUEUE, fault));
	PRISM_TRY(get_u32(fd, IPPROTO_TCP, TCP_QUEUE_SEQ, &state->rcv_nxt, "TCP_QUEUE_SEQ", fault));
	PRISM_TRY(read_condition(fd, state, fault));
	if (ioctl(fd, SIOCINQ, &queued) != 0)
		return prism_fail(fault, errno, "SIOCINQ");
	if (queued < 0 || (uint32_t)queued > PRISM_TCP_QUEUE_MAX)
		return refuse(fault, EMSGSIZE, "more than 16 MiB are waiting to be read");
	PRISM_TRY(reserve(blob, PRISM_TCP_HEADER + (size_t)queued, fault));
	if (queued) {
		got = recv(fd, blob->data + PRISM_TCP_HEADER, (size_t)queued,
			   MSG_PEEK | MSG_DONTWAIT);
		if (got < 0 && errno != EAGAIN)
			return prism_fail(fault, errno, "peeking at the receive queue");
		if (got != queued)
			return refuse(fault, EINVAL,
				      "the receive queue cannot be peeked from its beginning");
	}
	PRISM_TRY(read_parameters(fd, state, fault));
	PRISM_TRY(get_u32(fd, IPPROTO_TCP, TCP_QUEUE_SEQ, &again, "TCP_QUEUE_SEQ", fault));
	if (again != state->rcv_nxt)
		return PRISM_TCP_MOVED;
	state->recv_len = (uint32_t)queued;
	if (state->flags & PRISM_TCP_HALF_CLOSED)
		uncount_fin(state);
	return PRISM_TCP_OK;
}

static enum prism_tcp_result read_unacknowledged(int fd, uint32_t *length,
						 struct prism_fault *fault)
{
	int value;

	if (ioctl(fd, SIOCOUTQ, &value) != 0)
		return prism_fail(fault, errno, "SIOCOUTQ");
	*length = (uint32_t)value;
	return PRISM_TCP_OK;
}

/*
 * The contents of the send queue. While it is the queue under repair the kernel would count
 * unsent octets as sent without sending them if an ACK came just now: leave it at once.
 */
static enum prism_tcp_result peek_send_queue(int fd, const struct prism_tcp_state *state,
					     struct prism_blob *blob, struct prism_fault *fault)
{
	size_t offset = PRISM_TCP_HEADER + (size_t)state->recv_len;
	size_t surplus;
	ssize_t got;

	PRISM_TRY(reserve(blob, offset + state->send_len + PEEK_SLACK, fault));
	PRISM_TRY(set_queue(fd, TCP_SEND_QUEUE, fault));
	got = recv(fd, blob->data + offset, state->send_len + PEEK_SLACK, MSG_PEEK | MSG_DONTWAIT);
	if (got < 0)
		return prism_fail(fault, errno, "peeking at the send queue");
	PRISM_TRY(set_queue(fd, TCP_NO_QUEUE, fault));
	if ((size_t)got < state->send_len)
		return PRISM_TCP_MOVED;
	surplus = (size_t)got - state->send_len;
	if (surplus)
		memmove(blob->data + offset, blob->data + offset + surplus, state->send_len);
	return PRISM_TCP_OK;
}

static enum prism_tcp_result read_send_side(int fd, struct prism_tcp_state *state,
					    struct prism_blob *blob, struct prism_fault *fault)
{
	uint32_t write_seq, again;
	int unsent = 0;

	PRISM_TRY(read_unacknowledged(fd, &state->send_len, fault));
	if (state->send_len > PRISM_TCP_QUEUE_MAX - state->recv_len)
		return refuse(fault, EMSGSIZE, "more than 16 MiB are queued");
	if (state->send_len && ioctl(fd, SIOCOUTQNSD, &unsent) != 0)
		return prism_fail(fault, errno, "SIOCOUTQNSD");
	state->unsent_len = (uint32_t)unsent;
	if (state->send_len)
		PRISM_TRY(peek_send_queue(fd, state, blob, fault));
	PRISM_TRY(set_queue(fd, TCP_SEND_QUEUE, fault));
	PRISM_TRY(get_u32(fd, IPPROTO_TCP, TCP_QUEUE_SEQ, &write_seq, "TCP_QUEUE_SEQ", fault));
	state->snd_una = write_seq - state->send_len;
	PRISM_TRY(set_queue(fd, TCP_NO_QUEUE, fault)); /* from here on writing fails */
	if (!state->send_len)			       /* and so it stays: nobody writes */
		return PRISM_TCP_OK;
	PRISM_TRY(read_unacknowledged(fd, &again, fault));
	if (again != state->send_len || state->unsent_len > state->send_len)
		return PRISM_TCP_MOVED;
	return PRISM_TCP_OK;
}

enum prism_tcp_result prism_tcp_export(int fd, struct prism_blob *blob, struct prism_fault *fault)
{
	struct prism_tcp_state state = {0};
	enum prism_tcp_result result = PRISM_TCP_MOVED;

	PRISM_TRY(prism_tcp_freeze(fd, fault));
	PRISM_TRY(read_addresses(fd, &state, fault));
	PRISM_TRY(check_layers(fd, fault));
	for (int attempt = 0; attempt < EXPORT_ATTEMPTS && result == PRISM_TCP_MOVED; attempt++) {
		result = read_receive_side(fd, &state, blob, fault);
		if (result == PRISM_TCP_OK)
			result = read_send_side(fd, &state, blob, fault);
	}
	if (result != PRISM_TCP_OK) {
		struct prism_fault ignored;

		(void)set_queue(fd, TCP_NO_QUEUE, &ignored);
	}
	if (result == PRISM_TCP_MOVED)
		return prism_fail(fault, EBUSY, "segments keep arriving: is the flow locked?");
	PRISM_TRY(result);
	blob->length = PRISM_TCP_HEADER + (size_t)state.recv_len + state.send_len;
	prism_tcp_pack(&state, blob->data);
	return PRISM_TCP_OK;
}
