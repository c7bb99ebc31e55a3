/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The serialised form of a TCP connection. No I/O here: bytes to struct and back.
 *
 * What the sequence numbers mean. The receive queue holds what the client sent and nobody has
 * read; the send queue what was written and the client has not acknowledged:
 *
 *   receive queue      copied_seq                    rcv_nxt        (FIN, half-closed only)
 *                          |<------ recv_len -------->|<--- 1 ----->|
 *     ... read by the app  |  bytes in the state      |  the next octet expected
 *                                                     |<------ window still offered ------>|
 *                                                                     rcv_wup + rcv_wnd ---^
 *
 *   send queue          snd_una                  snd_nxt               write_seq
 *                          |<-- sent, no ACK yet --->|<--- unsent_len --->|
 *                          |<------------------ send_len ---------------->|
 *     ... acknowledged     |  bytes in the state                          | not written yet
 *
 * The state carries snd_una and rcv_nxt; the others follow from the lengths. rcv_nxt never counts
 * a FIN: the flag says that one has come, and it is put back when the socket is brought to life.
 *
 * Layout, all numbers big-endian; then recv_len octets, then send_len octets, then nothing:
 *
 *     0  4 magic "PTCP"       40  2 local port        72  4 rcv_wnd
 *     4  1 version            42  2 peer port         76  4 rcv_wup
 *     5  1 flags              44  2 peer's MSS        80  4 recv_len
 *     6  1 family (4 or 6)    46  1 snd_wscale        84  4 send_len
 *     7  1 options            47  1 rcv_wscale        88  4 unsent_len
 *     8 16 local address      48  4 timestamp         92  4 window clamp
 *    24 16 peer address       52  4 snd_una           96  4 receive buffer, octets
 *       (IPv4 is mapped)      56  4 rcv_nxt          100  4 send buffer, octets
 *                             60  4 snd_wl1          104  1 buffer sizes fixed (SO_BUF_LOCK)
 *                             64  4 snd_wnd          105  7 zero
 *                             68  4 max_window       112    the queues
 */
#ifndef PRISM_TCP_STATE_H
#define PRISM_TCP_STATE_H

#include <stddef.h>
#include <stdint.h>

#define PRISM_TCP_VERSION     1
#define PRISM_TCP_HEADER      112
#define PRISM_TCP_QUEUE_MAX   (16u << 20) /* both queues together, octets */
#define PRISM_TCP_BUFFER_MAX  (64u << 20) /* a socket buffer we are ready to ask for, octets */
#define PRISM_TCP_WSCALE_MAX  14	  /* RFC 7323, section 2.3 */
#define PRISM_TCP_WINDOW_MAX  (0xffffu << PRISM_TCP_WSCALE_MAX)
#define PRISM_TCP_HALF_CLOSED 0x01 /* flags: the client's FIN has come (CLOSE_WAIT) */

/* options: the TCPI_OPT_ bits that matter here, with the kernel's values (linux/tcp.h) */
#define PRISM_TCP_TIMESTAMPS 0x01
#define PRISM_TCP_SACK	     0x02
#define PRISM_TCP_WSCALE     0x04
#define PRISM_TCP_OPTIONS    0x07

/* What a call came to. */
enum prism_tcp_result {
	PRISM_TCP_OK = 0,
	PRISM_TCP_OS_ERROR = 1,	     /* a system call failed */
	PRISM_TCP_NOT_CARRIABLE = 2, /* the connection is in a state that cannot be carried */
	PRISM_TCP_BAD_STATE = 3,     /* bytes that are no state of ours */
	PRISM_TCP_MOVED = 4,	     /* internal: segments came while the queues were read */
};

/* Why it failed: an errno and what was being done or found (a constant string). */
struct prism_fault {
	int error;
	const char *what;
};

struct prism_tcp_state {
	uint8_t flags, family, options, buf_lock;
	uint8_t local[16], peer[16];
	uint16_t local_port, peer_port, mss;
	uint8_t snd_wscale, rcv_wscale;
	uint32_t timestamp;
	uint32_t snd_una, rcv_nxt;
	uint32_t snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup;
	uint32_t recv_len, send_len, unsent_len;
	uint32_t window_clamp, rcvbuf, sndbuf;
};

/* Whether a 16-octet address is IPv4-mapped (RFC 4291, section 2.5.5.2). */
int prism_is_v4_mapped(const uint8_t address[16]);

/* Write the header; the queues are the caller's to put behind it. */
void prism_tcp_pack(const struct prism_tcp_state *state, uint8_t out[PRISM_TCP_HEADER]);

/* Read and check a whole state: PRISM_TCP_OK, or PRISM_TCP_BAD_STATE with the reason. */
enum prism_tcp_result prism_tcp_parse(const uint8_t *data, size_t length,
				      struct prism_tcp_state *state, struct prism_fault *fault);

#endif
