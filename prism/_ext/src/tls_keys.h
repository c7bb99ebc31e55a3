/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Cipher suites and the keys of one direction of a TLS connection.
 *
 * What becomes what:
 *
 *   TLS 1.3 (RFC 8446, 7.1 to 7.3)            TLS 1.2 (RFC 5246, 6.3)
 *
 *   traffic secret N --"traffic upd"--> N+1    master secret, both randoms
 *     |-- "key" --> key                          |-- "key expansion" --> both keys, both fixed IVs
 *     '-- "iv" ---> IV, 12 octets
 *
 *   nonce: IV xor sequence number              GCM (RFC 5288): fixed IV (4), explicit nonce (8)
 *                                              ChaCha20 (RFC 7905): as in TLS 1.3
 */
#ifndef PRISM_TLS_KEYS_H
#define PRISM_TLS_KEYS_H

#include <stddef.h>
#include <stdint.h>

#include <openssl/evp.h>

#define PRISM_TLS_1_2	     0x0303
#define PRISM_TLS_1_3	     0x0304
#define PRISM_TLS_SECRET_MAX 48
#define PRISM_TLS_KEY_MAX    32
#define PRISM_TLS_NONCE	     12
#define PRISM_TLS_MASTER     48
#define PRISM_TLS_RANDOM     32
#define PRISM_TLS_TAG	     16

enum prism_tls_aead {
	PRISM_TLS_AES_128_GCM = 0,
	PRISM_TLS_AES_256_GCM = 1,
	PRISM_TLS_CHACHA20_POLY1305 = 2,
	PRISM_TLS_AEADS = 3,
};

struct prism_tls_suite {
	uint16_t id, version;
	enum prism_tls_aead aead;
	uint8_t secret_len;   /* of the hash: 32 (SHA-256) or 48 (SHA-384) */
	uint8_t key_len;      /* 16 or 32 */
	uint8_t iv_len;	      /* the part of the nonce that comes from the handshake: 4 or 12 */
	uint8_t explicit_len; /* the part of the nonce that is in the record: 8 or 0 */
};

/* What went wrong: the alert to send (RFC 8446, section 6) and a constant string. */
struct prism_tls_fault {
	int alert;
	const char *what;
};

/* One direction. The context is made when it is first needed and holds the same key. */
struct prism_tls_half {
	uint8_t secret[PRISM_TLS_SECRET_MAX]; /* TLS 1.3 only */
	uint8_t key[PRISM_TLS_KEY_MAX];
	uint8_t iv[PRISM_TLS_NONCE];
	uint64_t seq;	  /* of the next record */
	uint64_t updates; /* times the key was moved on since this process has the connection */
	EVP_CIPHER_CTX *ctx;
};

/* Fetch the ciphers and hashes, once per process: 0, or -1 where libcrypto lacks one. */
int prism_tls_init(void);

/* The suite with this number (two octets of the IANA registry), or NULL. */
const struct prism_tls_suite *prism_tls_find_suite(unsigned int id);

/* HKDF-Expand (RFC 5869, 2.3), hash_len 32 or 48: 0, or -1 for impossible lengths. */
int prism_tls_hkdf_expand(size_t hash_len, const uint8_t *prk, size_t prk_len, const uint8_t *info,
			  size_t info_len, uint8_t *out, size_t out_len);

/* HKDF-Expand-Label (RFC 8446, 7.1) with an empty context; the secret has hash_len octets. */
int prism_tls_expand_label(size_t hash_len, const uint8_t *secret, const char *label, uint8_t *out,
			   size_t out_len);

/* The PRF of TLS 1.2 (RFC 5246, section 5). */
int prism_tls_prf(size_t hash_len, const uint8_t *secret, size_t secret_len, const char *label,
		  const uint8_t *seed, size_t seed_len, uint8_t *out, size_t out_len);

/* TLS 1.3: key and IV from half->secret; the sequence number is left alone. */
int prism_tls_derive(struct prism_tls_half *half, const struct prism_tls_suite *suite);

/* TLS 1.3: the next generation's secret, key and IV; the sequence starts again (RFC 8446, 7.2). */
int prism_tls_move_on(struct prism_tls_half *half, const struct prism_tls_suite *suite);

/* TLS 1.2: keys and fixed IVs of both directions (RFC 5246, 6.3). */
int prism_tls_key_block(const struct prism_tls_suite *suite, const uint8_t master[PRISM_TLS_MASTER],
			const uint8_t client_random[PRISM_TLS_RANDOM],
			const uint8_t server_random[PRISM_TLS_RANDOM],
			struct prism_tls_half *client, struct prism_tls_half *server);

/* Have a cipher context with the key in it: 0, or -1 (out of memory). */
int prism_tls_half_ready(struct prism_tls_half *half, const struct prism_tls_suite *suite,
			 int encrypt);

/* The nonce of the record half->seq; in GCM of TLS 1.2 the explicit part is the sequence number. */
void prism_tls_nonce(const struct prism_tls_half *half, uint8_t nonce[PRISM_TLS_NONCE]);

/* Free the context and wipe everything. */
void prism_tls_half_wipe(struct prism_tls_half *half);

static inline void prism_put16(uint8_t *at, unsigned int value)
{
	at[0] = (uint8_t)(value >> 8);
	at[1] = (uint8_t)value;
}

static inline unsigned int prism_get16(const uint8_t *at)
{
	return (unsigned int)at[0] << 8 | at[1];
}

static inline void prism_put64(uint8_t *at, uint64_t value)
{
	for (int i = 7; i >= 0; i--, value >>= 8)
		at[i] = (uint8_t)value;
}

static inline uint64_t prism_get64(const uint8_t *at)
{
	uint64_t value = 0;

	for (int i = 0; i < 8; i++)
		value = value << 8 | at[i];
	return value;
}

#endif
