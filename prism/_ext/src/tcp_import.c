/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rebuilding a connection. The order matters to the kernel:
 *
 *   in state CLOSE        repair on; both queues' first sequence numbers; bind; connect
 *                         (which sends nothing and leads straight to ESTABLISHED)
 *   in repair mode        options, timestamp, receive queue, windows, segment size, the sent part
 *                         of the send queue
 *   alive                 repair off; SO_REUSEADDR; the FIN; the unsent part of the send queue
 *
 * SO_REUSEADDR any earlier would take away the forced address reuse that repair mode gives.
 */
#include <errno.h>
#include <string.h>
#include <unistd.h>
#include <netinet/in.h>
#include <sys/uio.h>
#include <linux/tcp.h>

#include "tcp_repair.h"

#ifndef SO_BUF_LOCK
#define SO_BUF_LOCK 72 /* Linux 5.15 */
#endif

#define PORT_FIRST     1024
#define CHUNK	       (1u << 18)
#define CHUNK_LEAST    4096u
#define QUEUE_HEADROOM (128u << 10)
#define SMALL_QUEUE    (16u << 10) /* fits into any buffer the kernel starts with */
#define SMALL_WINDOW   (8u << 10)

/* TCP option kinds (RFC 9293, RFC 7323, RFC 2018). */
#define OPTION_MSS	  2
#define OPTION_WSCALE	  3
#define OPTION_SACK	  4
#define OPTION_TIMESTAMPS 8

#ifndef IPV6_2292PKTOPTIONS
#define IPV6_2292PKTOPTIONS 6 /* linux/in6.h, which cannot stand beside netinet/in.h */
#endif

static socklen_t make_sockaddr(struct sockaddr_storage *to, int family, const uint8_t address[16],
			       uint16_t port)
{
	memset(to, 0, sizeof(*to));
	if (family == 6) {
		struct sockaddr_in6 *six = (struct sockaddr_in6 *)to;

		six->sin6_family = AF_INET6;
		six->sin6_port = htons(port);
		memcpy(&six->sin6_addr, address, 16);
		return sizeof(*six);
	}
	struct sockaddr_in *four = (struct sockaddr_in *)to;

	four->sin_family = AF_INET;
	four->sin_port = htons(port);
	memcpy(&four->sin_addr, address + 12, 4);
	return sizeof(*four);
}

static enum prism_tcp_result select_queue(int fd, int queue, struct prism_fault *fault)
{
	return prism_set_int(fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, queue, "TCP_REPAIR_QUEUE", fault);
}

static enum prism_tcp_result set_sequence(int fd, int queue, uint32_t sequence,
					  struct prism_fault *fault)
{
	PRISM_TRY(select_queue(fd, queue, fault));
	return prism_set_int(fd, IPPROTO_TCP, TCP_QUEUE_SEQ, (int)sequence, "TCP_QUEUE_SEQ", fault);
}

/* Bind and connect; *retry says that another local port may help. */
static enum prism_tcp_result establish(int fd, const struct prism_tcp_state *state,
				       const uint8_t local[16], uint16_t port, int *retry,
				       struct prism_fault *fault)
{
	struct sockaddr_storage address;
	socklen_t size = make_sockaddr(&address, state->family, local, port);

	if (bind(fd, (struct sockaddr *)&address, size) != 0) {
		*retry = errno == EADDRINUSE;
		return prism_fail(fault, errno, "bind to the local address");
	}
	size = make_sockaddr(&address, state->family, state->peer, state->peer_port);
	if (connect(fd, (struct sockaddr *)&address, size) != 0) {
		*retry = errno == EADDRNOTAVAIL || errno == EADDRINUSE;
		return prism_fail(fault, errno, "connect in repair mode");
	}
	return PRISM_TCP_OK;
}

static enum prism_tcp_result open_socket(const struct prism_tcp_state *state,
					 const uint8_t local[16], uint16_t port, int *fd,
					 int *retry, struct prism_fault *fault)
{
	enum prism_tcp_result result;

	*retry = 0;
	*fd = socket(state->family == 6 ? AF_INET6 : AF_INET,
		     SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (*fd < 0)
		return prism_fail(fault, errno, "socket");
	result = prism_set_int(*fd, IPPROTO_TCP, TCP_NODELAY, 1, "TCP_NODELAY", fault);
	if (result == PRISM_TCP_OK)
		result = prism_tcp_freeze(*fd, fault);
	if (result == PRISM_TCP_OK)
		result = set_sequence(*fd, TCP_SEND_QUEUE, state->snd_una, fault);
	if (result == PRISM_TCP_OK)
		result = set_sequence(*fd, TCP_RECV_QUEUE, state->rcv_nxt - state->recv_len, fault);
	if (result == PRISM_TCP_OK)
		result = establish(*fd, state, local, port, retry, fault);
	if (result != PRISM_TCP_OK) {
		close(*fd);
		*fd = -1;
	}
	return result;
}

static enum prism_tcp_result restore_options(int fd, const struct prism_tcp_state *state,
					     struct prism_fault *fault)
{
	struct tcp_repair_opt options[4] = {
		{.opt_code = OPTION_MSS, .opt_val = state->mss},
		/*
		 * Also without the option, then with zeros: the kernel would otherwise scale the
		 * windows it offers by its own default.
		 */
		{.opt_code = OPTION_WSCALE,
		 .opt_val = state->snd_wscale | (uint32_t)state->rcv_wscale << 16},
	};
	socklen_t count = 2;
	uint32_t timestamp = state->timestamp;

	if (state->options & PRISM_TCP_SACK)
		options[count++] = (struct tcp_repair_opt){.opt_code = OPTION_SACK};
	if (state->options & PRISM_TCP_TIMESTAMPS)
		options[count++] = (struct tcp_repair_opt){.opt_code = OPTION_TIMESTAMPS};
	if (setsockopt(fd, IPPROTO_TCP, TCP_REPAIR_OPTIONS, options, count * sizeof(*options)) != 0)
		return prism_fail(fault, errno, "TCP_REPAIR_OPTIONS");
	if (!(state->options & PRISM_TCP_TIMESTAMPS))
		return PRISM_TCP_OK;
	/*
	 * The lowest bit tells the unit (1: microseconds), so a millisecond clock may have been
	 * read one too low; it must not go backwards for a strict peer (RFC 7323, section 5.3).
	 */
	if (!(timestamp & 1))
		timestamp += 2;
	return prism_set_int(fd, IPPROTO_TCP, TCP_TIMESTAMP, (int)timestamp, "TCP_TIMESTAMP",
			     fault);
}

static enum prism_tcp_result force_buffer(int fd, int name, uint32_t octets,
					  struct prism_fault *fault)
{
	if (octets > PRISM_TCP_BUFFER_MAX)
		octets = PRISM_TCP_BUFFER_MAX;
	/* The kernel doubles what it is given. */
	return prism_set_int(fd, SOL_SOCKET, name, (int)((octets + 1) / 2),
			     "SO_RCVBUFFORCE or SO_SNDBUFFORCE", fault);
}

static uint32_t option_u32(int fd, int level, int name)
{
	uint32_t value = 0;
	socklen_t size = sizeof(value);

	(void)getsockopt(fd, level, name, &value, &size);
	return value;
}

static uint32_t room_for(uint32_t queue)
{
	return 2 * queue + QUEUE_HEADROOM;
}

/*
 * Make both buffers large enough for the queues, so that nothing is refused on the way in.
 * settle_buffers puts the sizes right afterwards, and lets the kernel tune them again.
 */
static enum prism_tcp_result make_room(int fd, const struct prism_tcp_state *state, int *moved,
				       struct prism_fault *fault)
{
	uint32_t need;

	*moved = state->buf_lock || state->rcvbuf > option_u32(fd, SOL_SOCKET, SO_RCVBUF);
	if (state->recv_len > SMALL_QUEUE) {
		need = room_for(state->recv_len);
		if (need < state->rcvbuf)
			need = state->rcvbuf;
		PRISM_TRY(force_buffer(fd, SO_RCVBUFFORCE, need, fault));
		*moved = 1;
	}
	if (state->send_len > SMALL_QUEUE) {
		need = room_for(state->send_len);
		if (need < state->sndbuf)
			need = state->sndbuf;
		PRISM_TRY(force_buffer(fd, SO_SNDBUFFORCE, need, fault));
		*moved = 1;
	}
	return PRISM_TCP_OK;
}

/* The sizes the former owner had, tuned by the kernel from here on unless they were fixed. */
static enum prism_tcp_result settle_buffers(int fd, const struct prism_tcp_state *state,
					    struct prism_fault *fault)
{
	PRISM_TRY(force_buffer(fd, SO_RCVBUFFORCE, state->rcvbuf, fault));
	PRISM_TRY(force_buffer(fd, SO_SNDBUFFORCE, state->sndbuf, fault));
	(void)prism_set_int(fd, SOL_SOCKET, SO_BUF_LOCK, state->buf_lock, "SO_BUF_LOCK", fault);
	return PRISM_TCP_OK;
}

/* Into the queue that is under repair. */
static enum prism_tcp_result fill_queue(int fd, const uint8_t *data, size_t length,
					struct prism_fault *fault)
{
	size_t chunk = CHUNK;

	while (length) {
		ssize_t put = send(fd, data, length < chunk ? length : chunk, MSG_DONTWAIT);

		if (put > 0) {
			data += put;
			length -= (size_t)put;
		} else if (put < 0 && errno == ENOMEM && chunk > CHUNK_LEAST) {
			chunk /= 2; /* no large block of memory just now */
		} else {
			return prism_fail(fault, put < 0 ? errno : ENOBUFS, "filling a queue");
		}
	}
	return PRISM_TCP_OK;
}

static enum prism_tcp_result restore_windows(int fd, const struct prism_tcp_state *state,
					     struct prism_fault *fault)
{
	struct tcp_repair_window window = {
		.snd_wl1 = state->snd_wl1,
		.snd_wnd = state->snd_wnd,
		.max_window = state->max_window,
		.rcv_wnd = state->rcv_wnd,
		.rcv_wup = state->rcv_wup,
	};

	if (setsockopt(fd, IPPROTO_TCP, TCP_REPAIR_WINDOW, &window, sizeof(window)) != 0)
		return prism_fail(fault, errno, "TCP_REPAIR_WINDOW");
	return PRISM_TCP_OK;
}

/*
 * Have the kernel work the segment size out again. It did so in connect, from the smallest MSS a
 * client may have (536), and TCP_REPAIR_OPTIONS does not make it do so again: left at that, every
 * response would leave in segments of 524 octets. Changing the IP options of a connected socket
 * makes it, also when they stay empty. With IPv6 it takes an options object to be there, so one is
 * made out of a control message that says nothing (for IPPROTO_NONE), and taken away again. A
 * refusal costs speed only, and is ignored.
 */
static void update_segment_size(int fd, const struct prism_tcp_state *state)
{
	static const struct cmsghdr nothing = {
		.cmsg_len = CMSG_LEN(0),
		.cmsg_level = IPPROTO_NONE,
	};

	if (state->family == 4) {
		(void)setsockopt(fd, IPPROTO_IP, IP_OPTIONS, NULL, 0);
		return;
	}
	(void)setsockopt(fd, IPPROTO_IPV6, IPV6_2292PKTOPTIONS, &nothing, sizeof(nothing));
	(void)setsockopt(fd, IPPROTO_IPV6, IPV6_2292PKTOPTIONS, NULL, 0);
}

/*
 * With a receive buffer that the kernel had enlarged must come the window clamp that went with it:
 * from here on tuning raises the clamp only when it raises the buffer. A clamp below the default
 * is the frontend's own bound for undecided requests and is not inherited.
 */
static enum prism_tcp_result restore_clamp(int fd, const struct prism_tcp_state *state,
					   struct prism_fault *fault)
{
	uint32_t clamp = option_u32(fd, IPPROTO_TCP, TCP_WINDOW_CLAMP);

	if (state->window_clamp <= clamp || state->window_clamp > PRISM_TCP_WINDOW_MAX)
		return PRISM_TCP_OK;
	return prism_set_int(fd, IPPROTO_TCP, TCP_WINDOW_CLAMP, (int)state->window_clamp,
			     "TCP_WINDOW_CLAMP", fault);
}

/* The part that is counted as sent; no queue is under repair afterwards. */
static enum prism_tcp_result restore_sent(int fd, const uint8_t *data, size_t length,
					  struct prism_fault *fault)
{
	PRISM_TRY(select_queue(fd, TCP_SEND_QUEUE, fault));
	PRISM_TRY(fill_queue(fd, data, length, fault));
	return select_queue(fd, TCP_NO_QUEUE, fault);
}

static enum prism_tcp_result restore(int fd, const struct prism_tcp_state *state,
				     const uint8_t *payload, int *moved, struct prism_fault *fault)
{
	uint32_t sent = state->send_len - state->unsent_len;

	PRISM_TRY(restore_options(fd, state, fault));
	PRISM_TRY(make_room(fd, state, moved, fault));
	PRISM_TRY(fill_queue(fd, payload, state->recv_len, fault)); /* the queue chosen last */
	PRISM_TRY(restore_windows(fd, state, fault));
	PRISM_TRY(restore_clamp(fd, state, fault));
	update_segment_size(fd, state);
	return sent ? restore_sent(fd, payload + state->recv_len, sent, fault) : PRISM_TCP_OK;
}

enum prism_tcp_result prism_tcp_import(const struct prism_tcp_state *state, const uint8_t *payload,
				       const uint8_t local[16], uint16_t port,
				       unsigned int alternatives, struct prism_import *import,
				       struct prism_fault *fault)
{
	enum prism_tcp_result result;
	int retry;

	import->fd = -1;
	import->buffers_moved = 0;
	for (;;) {
		result = open_socket(state, local, port, &import->fd, &retry, fault);
		if (result == PRISM_TCP_OK || !retry || !alternatives--)
			break;
		port = port == 0xffff ? PORT_FIRST : port + 1;
	}
	PRISM_TRY(result);
	import->port = port;
	result = restore(import->fd, state, payload, &import->buffers_moved, fault);
	if (result != PRISM_TCP_OK) {
		prism_tcp_close_quietly(import->fd);
		import->fd = -1;
	}
	return result;
}

static enum prism_tcp_result send_rest(int fd, const uint8_t *data, size_t length,
				       struct prism_fault *fault)
{
	while (length) {
		ssize_t put = send(fd, data, length, MSG_DONTWAIT | MSG_NOSIGNAL);

		if (put <= 0)
			return prism_fail(fault, put < 0 ? errno : ENOBUFS, "sending the unsent");
		data += put;
		length -= (size_t)put;
	}
	return PRISM_TCP_OK;
}

/*
 * Whether something hangs on the client's answer: its acknowledgement of what is in flight, its
 * window, or our acknowledgement of what it sent (which the probe carries).
 */
static int needs_probe(const struct prism_tcp_state *state)
{
	return state->send_len || state->snd_wnd < SMALL_WINDOW || state->rcv_wup != state->rcv_nxt;
}

enum prism_tcp_result prism_tcp_activate(const struct prism_import *import,
					 const struct prism_tcp_state *state,
					 const uint8_t *payload, const uint8_t local[16], int probe,
					 struct prism_fault *fault)
{
	int fd = import->fd;
	size_t sent = state->send_len - state->unsent_len;

	PRISM_TRY(prism_tcp_resume(fd, probe < 0 ? needs_probe(state) : probe, fault));
	/* After the probe, which the kernel does not send once it has seen the FIN. */
	if (state->flags & PRISM_TCP_HALF_CLOSED)
		PRISM_TRY(prism_tcp_inject_fin(fd, state, local, import->port, fault));
	PRISM_TRY(send_rest(fd, payload + state->recv_len + sent, state->unsent_len, fault));
	if (import->buffers_moved)
		PRISM_TRY(settle_buffers(fd, state, fault));
	return PRISM_TCP_OK;
}
