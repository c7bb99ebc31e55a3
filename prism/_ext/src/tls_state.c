/* SPDX-License-Identifier: Apache-2.0 */
/* Packing and checking serialised connections, and the kernel's structs; see tls_state.h. */
#include <string.h>

#include <linux/tls.h>

#include <openssl/crypto.h>

#include "tls_state.h"

#define FLAG_SERVER	  0x01
#define FLAG_READ_CLOSED  0x02
#define FLAG_WRITE_CLOSED 0x04
#define FLAG_OWES_UPDATE  0x08
#define FLAG_OWES_REFUSAL 0x10
#define FLAG_ASKED	  0x20
#define FLAGS		  0x3f

#define READ_AT	 40
#define WRITE_AT 132

static const uint8_t MAGIC[4] = {'P', 'T', 'L', 'S'};

static void put32(uint8_t *at, uint32_t value)
{
	prism_put16(at, value >> 16);
	prism_put16(at + 2, value & 0xffff);
}

static uint32_t get32(const uint8_t *at)
{
	return (uint32_t)prism_get16(at) << 16 | prism_get16(at + 2);
}

static void pack_half(const struct prism_tls_half *half, uint8_t *out)
{
	memcpy(out, half->secret, PRISM_TLS_SECRET_MAX);
	memcpy(out + PRISM_TLS_SECRET_MAX, half->key, PRISM_TLS_KEY_MAX);
	memcpy(out + PRISM_TLS_SECRET_MAX + PRISM_TLS_KEY_MAX, half->iv, PRISM_TLS_NONCE);
}

static void unpack_half(const uint8_t *data, struct prism_tls_half *half)
{
	memcpy(half->secret, data, PRISM_TLS_SECRET_MAX);
	memcpy(half->key, data + PRISM_TLS_SECRET_MAX, PRISM_TLS_KEY_MAX);
	memcpy(half->iv, data + PRISM_TLS_SECRET_MAX + PRISM_TLS_KEY_MAX, PRISM_TLS_NONCE);
}

void prism_tls_pack(const struct prism_tls *tls, uint8_t out[PRISM_TLS_STATE_SIZE])
{
	const struct prism_tls_progress *at = &tls->progress;

	memset(out, 0, PRISM_TLS_STATE_SIZE);
	memcpy(out, MAGIC, sizeof(MAGIC));
	out[4] = PRISM_TLS_STATE_VERSION;
	out[5] =
		(uint8_t)((tls->is_server ? FLAG_SERVER : 0) | (at->closed ? FLAG_READ_CLOSED : 0) |
			  (tls->write_closed ? FLAG_WRITE_CLOSED : 0) |
			  (tls->owes & PRISM_TLS_OWES_UPDATE ? FLAG_OWES_UPDATE : 0) |
			  (tls->owes & PRISM_TLS_OWES_REFUSAL ? FLAG_OWES_REFUSAL : 0) |
			  (tls->asked ? FLAG_ASKED : 0));
	prism_put16(out + 6, tls->suite->id);
	prism_put16(out + 8, tls->max_fragment);
	out[10] = at->idle;
	out[11] = at->hs_have;
	memcpy(out + 12, at->hs_header, 4);
	put32(out + 16, at->hs_left);
	out[20] = at->alert;
	prism_put64(out + 24, at->seq);
	prism_put64(out + 32, tls->write.seq);
	pack_half(&tls->read, out + READ_AT);
	pack_half(&tls->write, out + WRITE_AT);
}

static void unpack(const uint8_t *data, struct prism_tls *tls)
{
	struct prism_tls_progress *at = &tls->progress;

	tls->is_server = (data[5] & FLAG_SERVER) != 0;
	at->closed = (data[5] & FLAG_READ_CLOSED) != 0;
	tls->write_closed = (data[5] & FLAG_WRITE_CLOSED) != 0;
	tls->owes = (uint8_t)((data[5] & FLAG_OWES_UPDATE ? PRISM_TLS_OWES_UPDATE : 0) |
			      (data[5] & FLAG_OWES_REFUSAL ? PRISM_TLS_OWES_REFUSAL : 0));
	tls->asked = (data[5] & FLAG_ASKED) != 0;
	tls->max_fragment = (uint16_t)prism_get16(data + 8);
	at->idle = data[10];
	at->hs_have = data[11];
	memcpy(at->hs_header, data + 12, 4);
	at->hs_left = get32(data + 16);
	at->alert = data[20];
	at->seq = prism_get64(data + 24);
	tls->write.seq = prism_get64(data + 32);
	unpack_half(data + READ_AT, &tls->read);
	unpack_half(data + WRITE_AT, &tls->write);
}

static const char *check_envelope(const uint8_t *data, size_t length)
{
	if (length != PRISM_TLS_STATE_SIZE)
		return "truncated or too long";
	if (memcmp(data, MAGIC, sizeof(MAGIC)) != 0)
		return "not one of ours: wrong magic";
	if (data[4] != PRISM_TLS_STATE_VERSION)
		return "of another version";
	if (data[5] & ~FLAGS || data[21] || data[22] || data[23])
		return "unknown flags";
	if (!prism_tls_find_suite(prism_get16(data + 6)))
		return "an unknown cipher suite";
	return NULL;
}

static int is_zero(const uint8_t *data, size_t from, size_t to)
{
	uint8_t any = 0;

	for (size_t i = from; i < to; i++)
		any |= data[i];
	return any == 0;
}

/* Field sizes as the suite says, and something in them: a wiped state is no state. */
static const char *check_half(const struct prism_tls_half *half,
			      const struct prism_tls_suite *suite)
{
	size_t secret_len = suite->version == PRISM_TLS_1_3 ? suite->secret_len : 0;

	if (!is_zero(half->secret, secret_len, PRISM_TLS_SECRET_MAX) ||
	    !is_zero(half->key, suite->key_len, PRISM_TLS_KEY_MAX) ||
	    !is_zero(half->iv, suite->iv_len, PRISM_TLS_NONCE))
		return "a key that is longer than the suite's";
	if ((secret_len && is_zero(half->secret, 0, secret_len)) ||
	    is_zero(half->key, 0, suite->key_len))
		return "without keys";
	return NULL;
}

static const char *check_progress(const struct prism_tls *tls)
{
	const struct prism_tls_progress *at = &tls->progress;
	size_t body = (size_t)at->hs_header[1] << 16 | prism_get16(at->hs_header + 2);
	struct prism_tls_fault fault;

	if (at->idle > PRISM_TLS_IDLE_MAX || (!at->closed && at->alert))
		return "inconsistent";
	if (at->hs_have > 4 || !is_zero(at->hs_header, at->hs_have, 4) ||
	    (at->hs_have < 4 && at->hs_left))
		return "inconsistent inside a handshake message";
	if (at->hs_have == 4 &&
	    (at->hs_left == 0 || at->hs_left > body || prism_tls_check_message(tls, at, &fault)))
		return "inconsistent inside a handshake message";
	return NULL;
}

const char *prism_tls_parse(const uint8_t *data, size_t length, struct prism_tls *tls)
{
	const char *reason = check_envelope(data, length);

	if (reason)
		return reason;
	tls->suite = prism_tls_find_suite(prism_get16(data + 6));
	unpack(data, tls);
	reason = check_half(&tls->read, tls->suite);
	if (!reason)
		reason = check_half(&tls->write, tls->suite);
	if (!reason)
		reason = check_progress(tls);
	if (!reason && (tls->max_fragment < 64 || tls->max_fragment > PRISM_TLS_FRAGMENT))
		reason = "a fragment size out of range";
	if (!reason && tls->suite->version == PRISM_TLS_1_3 && tls->owes & PRISM_TLS_OWES_REFUSAL)
		reason = "inconsistent with its version";
	if (!reason && tls->suite->version == PRISM_TLS_1_2 &&
	    (tls->owes & PRISM_TLS_OWES_UPDATE || tls->asked))
		reason = "inconsistent with its version";
	return reason;
}

static uint16_t kernel_cipher(const struct prism_tls_suite *suite)
{
	switch (suite->aead) {
	case PRISM_TLS_AES_128_GCM:
		return TLS_CIPHER_AES_GCM_128;
	case PRISM_TLS_AES_256_GCM:
		return TLS_CIPHER_AES_GCM_256;
	default:
		return TLS_CIPHER_CHACHA20_POLY1305;
	}
}

/*
 * All three structs are: version, cipher type (host order), then iv, key, salt, rec_seq without
 * gaps; the salt is the beginning of the IV, and has no octets with ChaCha20.
 */
static size_t build_info(const struct prism_tls *tls, int write, uint64_t seq, uint8_t *out)
{
	const struct prism_tls_half *half = write ? &tls->write : &tls->read;
	const struct prism_tls_suite *suite = tls->suite;
	struct tls_crypto_info info = {.version = suite->version,
				       .cipher_type = kernel_cipher(suite)};
	size_t salt = suite->aead == PRISM_TLS_CHACHA20_POLY1305 ? 0 : 4, at = sizeof(info);

	memcpy(out, &info, sizeof(info));
	memcpy(out + at, half->iv + salt, PRISM_TLS_NONCE - salt);
	if (suite->explicit_len) /* the explicit nonce, which the kernel counts up beside rec_seq */
		prism_put64(out + at, seq);
	at += PRISM_TLS_NONCE - salt;
	memcpy(out + at, half->key, suite->key_len);
	at += suite->key_len;
	memcpy(out + at, half->iv, salt);
	at += salt;
	prism_put64(out + at, seq);
	return at + 8;
}

size_t prism_tls_crypto_info(const struct prism_tls *tls, int write,
			     uint8_t out[PRISM_TLS_CRYPTO_INFO_MAX])
{
	_Static_assert(sizeof(struct tls12_crypto_info_aes_gcm_256) <= PRISM_TLS_CRYPTO_INFO_MAX &&
			       sizeof(struct tls12_crypto_info_chacha20_poly1305) <=
				       PRISM_TLS_CRYPTO_INFO_MAX,
		       "the kernel's structs fit");
	return build_info(tls, write, write ? tls->write.seq : tls->progress.seq, out);
}

const char *prism_tls_sync(struct prism_tls *tls, int write, const uint8_t *info, size_t length)
{
	uint8_t expected[PRISM_TLS_CRYPTO_INFO_MAX];
	uint64_t now = write ? tls->write.seq : tls->progress.seq, seq;
	const char *reason = NULL;
	size_t size;

	if (length < 8 || length > sizeof(expected))
		return "of another length";
	seq = prism_get64(info + length - 8);
	size = build_info(tls, write, seq, expected);
	if (size != length)
		reason = "of another length";
	else if (CRYPTO_memcmp(info, expected, length) != 0)
		reason = "of another key, suite or version";
	else if (seq < now) /* would use nonces twice */
		reason = "behind this connection";
	OPENSSL_cleanse(expected, sizeof(expected));
	if (reason)
		return reason;
	if (write) {
		tls->write.seq = seq;
	} else {
		if (seq > now + 1) /* all but the last were application data: see prism_tls_note */
			tls->progress.idle = 0;
		tls->progress.records += seq - now; /* what was opened before is stale */
		tls->progress.seq = seq;
	}
	return NULL;
}
