/* SPDX-License-Identifier: Apache-2.0 */
/* Packing and checking serialised connections; the layout is in tcp_state.h. */
#include <errno.h>
#include <string.h>

#include "tcp_state.h"

static const uint8_t MAGIC[4] = {'P', 'T', 'C', 'P'};
static const uint8_t V4_PREFIX[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};

static void put16(uint8_t *at, uint16_t value)
{
	at[0] = (uint8_t)(value >> 8);
	at[1] = (uint8_t)value;
}

static void put32(uint8_t *at, uint32_t value)
{
	put16(at, (uint16_t)(value >> 16));
	put16(at + 2, (uint16_t)value);
}

static uint16_t get16(const uint8_t *at)
{
	return (uint16_t)(at[0] << 8 | at[1]);
}

static uint32_t get32(const uint8_t *at)
{
	return (uint32_t)get16(at) << 16 | get16(at + 2);
}

static int after(uint32_t left, uint32_t right)
{
	return (int32_t)(right - left) < 0;
}

int prism_is_v4_mapped(const uint8_t address[16])
{
	return memcmp(address, V4_PREFIX, sizeof(V4_PREFIX)) == 0;
}

void prism_tcp_pack(const struct prism_tcp_state *state, uint8_t out[PRISM_TCP_HEADER])
{
	memset(out, 0, PRISM_TCP_HEADER);
	memcpy(out, MAGIC, sizeof(MAGIC));
	out[4] = PRISM_TCP_VERSION;
	out[5] = state->flags;
	out[6] = state->family;
	out[7] = state->options;
	memcpy(out + 8, state->local, 16);
	memcpy(out + 24, state->peer, 16);
	put16(out + 40, state->local_port);
	put16(out + 42, state->peer_port);
	put16(out + 44, state->mss);
	out[46] = state->snd_wscale;
	out[47] = state->rcv_wscale;
	put32(out + 48, state->timestamp);
	put32(out + 52, state->snd_una);
	put32(out + 56, state->rcv_nxt);
	put32(out + 60, state->snd_wl1);
	put32(out + 64, state->snd_wnd);
	put32(out + 68, state->max_window);
	put32(out + 72, state->rcv_wnd);
	put32(out + 76, state->rcv_wup);
	put32(out + 80, state->recv_len);
	put32(out + 84, state->send_len);
	put32(out + 88, state->unsent_len);
	put32(out + 92, state->window_clamp);
	put32(out + 96, state->rcvbuf);
	put32(out + 100, state->sndbuf);
	out[104] = state->buf_lock;
}

static void unpack(const uint8_t *data, struct prism_tcp_state *state)
{
	state->flags = data[5];
	state->family = data[6];
	state->options = data[7];
	memcpy(state->local, data + 8, 16);
	memcpy(state->peer, data + 24, 16);
	state->local_port = get16(data + 40);
	state->peer_port = get16(data + 42);
	state->mss = get16(data + 44);
	state->snd_wscale = data[46];
	state->rcv_wscale = data[47];
	state->timestamp = get32(data + 48);
	state->snd_una = get32(data + 52);
	state->rcv_nxt = get32(data + 56);
	state->snd_wl1 = get32(data + 60);
	state->snd_wnd = get32(data + 64);
	state->max_window = get32(data + 68);
	state->rcv_wnd = get32(data + 72);
	state->rcv_wup = get32(data + 76);
	state->recv_len = get32(data + 80);
	state->send_len = get32(data + 84);
	state->unsent_len = get32(data + 88);
	state->window_clamp = get32(data + 92);
	state->rcvbuf = get32(data + 96);
	state->sndbuf = get32(data + 100);
	state->buf_lock = data[104];
}

static const char *check_envelope(const uint8_t *data, size_t length)
{
	static const uint8_t zero[7];

	if (length < PRISM_TCP_HEADER)
		return "truncated: shorter than its header";
	if (memcmp(data, MAGIC, sizeof(MAGIC)) != 0)
		return "not a TCP state: wrong magic";
	if (data[4] != PRISM_TCP_VERSION)
		return "of another version";
	if (memcmp(data + 105, zero, sizeof(zero)) != 0)
		return "reserved octets are not zero";
	return NULL;
}

static const char *check_addresses(const struct prism_tcp_state *state)
{
	int mapped = prism_is_v4_mapped(state->peer);

	if (state->family != 4 && state->family != 6)
		return "address family is neither 4 nor 6";
	if (mapped != (state->family == 4) || mapped != prism_is_v4_mapped(state->local))
		return "addresses do not belong to the family";
	if (state->local_port == 0 || state->peer_port == 0)
		return "a port is zero";
	return NULL;
}

/* The kernel refuses most of these itself (tcp_repair_set_window); saying why is better. */
static const char *check_numbers(const struct prism_tcp_state *state)
{
	if (state->flags & ~PRISM_TCP_HALF_CLOSED)
		return "unknown flags";
	if (state->options & ~PRISM_TCP_OPTIONS || state->buf_lock & ~3)
		return "unknown options";
	if (state->mss == 0)
		return "MSS is zero";
	if (state->snd_wscale > PRISM_TCP_WSCALE_MAX || state->rcv_wscale > PRISM_TCP_WSCALE_MAX)
		return "window scale above 14";
	if (!(state->options & PRISM_TCP_WSCALE) && (state->snd_wscale || state->rcv_wscale))
		return "window scale without the option";
	if (state->snd_wnd > PRISM_TCP_WINDOW_MAX || state->max_window > PRISM_TCP_WINDOW_MAX ||
	    state->rcv_wnd > PRISM_TCP_WINDOW_MAX || state->snd_wnd > state->max_window)
		return "impossible windows";
	if (after(state->rcv_wup, state->rcv_nxt) ||
	    after(state->snd_wl1, state->rcv_nxt + state->rcv_wnd))
		return "window sequence numbers lie ahead of the receive queue";
	return NULL;
}

static const char *check_queues(const struct prism_tcp_state *state, size_t length)
{
	if (state->recv_len > PRISM_TCP_QUEUE_MAX || state->send_len > PRISM_TCP_QUEUE_MAX ||
	    state->recv_len + state->send_len > PRISM_TCP_QUEUE_MAX)
		return "queues above 16 MiB";
	if (state->unsent_len > state->send_len)
		return "more unsent octets than the send queue has";
	if (length != (size_t)PRISM_TCP_HEADER + state->recv_len + state->send_len)
		return "truncated or too long: length does not match the queues";
	return NULL;
}

enum prism_tcp_result prism_tcp_parse(const uint8_t *data, size_t length,
				      struct prism_tcp_state *state, struct prism_fault *fault)
{
	const char *reason = check_envelope(data, length);

	if (!reason) {
		unpack(data, state);
		reason = check_addresses(state);
	}
	if (!reason)
		reason = check_numbers(state);
	if (!reason)
		reason = check_queues(state, length);
	if (!reason)
		return PRISM_TCP_OK;
	fault->error = EINVAL;
	fault->what = reason;
	return PRISM_TCP_BAD_STATE;
}
