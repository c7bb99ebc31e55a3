/* SPDX-License-Identifier: Apache-2.0 */
/* Suites and key derivation; what becomes what is drawn in tls_keys.h. */
#include <string.h>

#include <openssl/core_names.h>
#include <openssl/crypto.h>

#include "tls_keys.h"

#define HASH_MAX  48
#define LABEL_MAX 32  /* of ours; the longest is "tls13 traffic upd" */
#define SEED_MAX  128 /* of the TLS 1.2 PRF: label and two randoms */

static const struct prism_tls_suite SUITES[] = {
	/* TLS 1.3 (RFC 8446, B.4) */
	{0x1301, PRISM_TLS_1_3, PRISM_TLS_AES_128_GCM, 32, 16, 12, 0},
	{0x1302, PRISM_TLS_1_3, PRISM_TLS_AES_256_GCM, 48, 32, 12, 0},
	{0x1303, PRISM_TLS_1_3, PRISM_TLS_CHACHA20_POLY1305, 32, 32, 12, 0},
	/* ECDHE with ECDSA and RSA (RFC 5289) */
	{0xc02b, PRISM_TLS_1_2, PRISM_TLS_AES_128_GCM, 32, 16, 4, 8},
	{0xc02c, PRISM_TLS_1_2, PRISM_TLS_AES_256_GCM, 48, 32, 4, 8},
	{0xc02f, PRISM_TLS_1_2, PRISM_TLS_AES_128_GCM, 32, 16, 4, 8},
	{0xc030, PRISM_TLS_1_2, PRISM_TLS_AES_256_GCM, 48, 32, 4, 8},
	/* ECDHE with RSA and ECDSA (RFC 7905) */
	{0xcca8, PRISM_TLS_1_2, PRISM_TLS_CHACHA20_POLY1305, 32, 32, 12, 0},
	{0xcca9, PRISM_TLS_1_2, PRISM_TLS_CHACHA20_POLY1305, 32, 32, 12, 0},
};

/* Fetched once: looking one up by name costs as much as sealing a small record. */
static EVP_CIPHER *ciphers[PRISM_TLS_AEADS];

/* HMAC with SHA-256 and SHA-384, without keys: only ever copied, for the same reason. */
static EVP_MAC_CTX *hmacs[2];

static EVP_MAC_CTX *new_hmac(char *digest)
{
	OSSL_PARAM params[] = {
		OSSL_PARAM_construct_utf8_string(OSSL_MAC_PARAM_DIGEST, digest, 0),
		OSSL_PARAM_construct_end(),
	};
	EVP_MAC *mac = EVP_MAC_fetch(NULL, OSSL_MAC_NAME_HMAC, NULL);
	EVP_MAC_CTX *made = mac ? EVP_MAC_CTX_new(mac) : NULL;

	EVP_MAC_free(mac); /* the context has its own reference */
	if (made && EVP_MAC_CTX_set_params(made, params) == 1)
		return made;
	EVP_MAC_CTX_free(made);
	return NULL;
}

int prism_tls_init(void)
{
	static const char *const names[PRISM_TLS_AEADS] = {
		[PRISM_TLS_AES_128_GCM] = "AES-128-GCM",
		[PRISM_TLS_AES_256_GCM] = "AES-256-GCM",
		[PRISM_TLS_CHACHA20_POLY1305] = "ChaCha20-Poly1305",
	};

	for (int i = 0; i < PRISM_TLS_AEADS; i++) {
		if (!ciphers[i])
			ciphers[i] = EVP_CIPHER_fetch(NULL, names[i], NULL);
		if (!ciphers[i])
			return -1;
	}
	for (int i = 0; i < 2; i++) {
		char sha256[] = "SHA256", sha384[] = "SHA384";

		if (!hmacs[i])
			hmacs[i] = new_hmac(i ? sha384 : sha256);
		if (!hmacs[i])
			return -1;
	}
	return 0;
}

const struct prism_tls_suite *prism_tls_find_suite(unsigned int id)
{
	for (size_t i = 0; i < sizeof(SUITES) / sizeof(SUITES[0]); i++)
		if (SUITES[i].id == id)
			return &SUITES[i];
	return NULL;
}

/* An HMAC for any number of messages with one key, or NULL; EVP_MAC_CTX_free wipes it. */
static EVP_MAC_CTX *keyed(size_t hash_len, const uint8_t *key, size_t key_len)
{
	EVP_MAC_CTX *mac = EVP_MAC_CTX_dup(hmacs[hash_len == HASH_MAX]);

	if (mac && EVP_MAC_init(mac, key, key_len, NULL) == 1)
		return mac;
	EVP_MAC_CTX_free(mac);
	return NULL;
}

/* One message; the key is ready for the next one then. */
static int hmac(EVP_MAC_CTX *mac, const uint8_t *data, size_t data_len, uint8_t out[HASH_MAX])
{
	size_t written;

	return EVP_MAC_update(mac, data, data_len) == 1 &&
			       EVP_MAC_final(mac, out, &written, HASH_MAX) == 1 &&
			       EVP_MAC_init(mac, NULL, 0, NULL) == 1
		       ? 0
		       : -1;
}

static int expand(EVP_MAC_CTX *mac, size_t hash_len, const uint8_t *info, size_t info_len,
		  uint8_t *out, size_t out_len)
{
	uint8_t block[HASH_MAX + 512 + 1], digest[HASH_MAX];
	size_t before = 0; /* octets of the block before: none ahead of the first */
	int failed = 0;

	if (out_len > 255 * hash_len || info_len > 512)
		return -1;
	for (unsigned int i = 1; out_len && !failed; i++) {
		size_t take = out_len < hash_len ? out_len : hash_len;

		memcpy(block + before, info, info_len);
		block[before + info_len] = (uint8_t)i;
		failed = hmac(mac, block, before + info_len + 1, digest);
		memcpy(out, digest, take);
		memcpy(block, digest, hash_len);
		before = hash_len;
		out += take;
		out_len -= take;
	}
	OPENSSL_cleanse(block, sizeof(block));
	OPENSSL_cleanse(digest, sizeof(digest));
	return failed;
}

int prism_tls_hkdf_expand(size_t hash_len, const uint8_t *prk, size_t prk_len, const uint8_t *info,
			  size_t info_len, uint8_t *out, size_t out_len)
{
	EVP_MAC_CTX *mac = keyed(hash_len, prk, prk_len);
	int failed = mac ? expand(mac, hash_len, info, info_len, out, out_len) : -1;

	EVP_MAC_CTX_free(mac);
	return failed;
}

static int expand_label(EVP_MAC_CTX *mac, size_t hash_len, const char *label, uint8_t *out,
			size_t out_len)
{
	uint8_t info[2 + 1 + 6 + LABEL_MAX + 1];
	size_t label_len = strlen(label);

	if (label_len > LABEL_MAX || out_len > 255 * hash_len)
		return -1;
	prism_put16(info, (unsigned int)out_len);
	info[2] = (uint8_t)(6 + label_len);
	memcpy(info + 3, "tls13 ", 6);
	memcpy(info + 9, label, label_len);
	info[9 + label_len] = 0; /* no context */
	return expand(mac, hash_len, info, 10 + label_len, out, out_len);
}

int prism_tls_expand_label(size_t hash_len, const uint8_t *secret, const char *label, uint8_t *out,
			   size_t out_len)
{
	EVP_MAC_CTX *mac = keyed(hash_len, secret, hash_len);
	int failed = mac ? expand_label(mac, hash_len, label, out, out_len) : -1;

	EVP_MAC_CTX_free(mac);
	return failed;
}

int prism_tls_prf(size_t hash_len, const uint8_t *secret, size_t secret_len, const char *label,
		  const uint8_t *seed, size_t seed_len, uint8_t *out, size_t out_len)
{
	/* A(i), then label and seed: what P_hash feeds to the HMAC */
	uint8_t block[HASH_MAX + SEED_MAX], digest[HASH_MAX];
	size_t label_len = strlen(label), tail = label_len + seed_len;
	EVP_MAC_CTX *mac;
	int failed;

	if (label_len > SEED_MAX || seed_len > SEED_MAX || tail > SEED_MAX)
		return -1;
	mac = keyed(hash_len, secret, secret_len);
	if (!mac)
		return -1;
	memcpy(block + hash_len, label, label_len);
	memcpy(block + hash_len + label_len, seed, seed_len);
	failed = hmac(mac, block + hash_len, tail, block); /* A(1) */
	while (out_len && !failed) {
		size_t take = out_len < hash_len ? out_len : hash_len;

		failed = hmac(mac, block, hash_len + tail, digest);
		memcpy(out, digest, take);
		out += take;
		out_len -= take;
		if (out_len && !failed) {
			failed = hmac(mac, block, hash_len, digest);
			memcpy(block, digest, hash_len); /* A(i + 1) */
		}
	}
	EVP_MAC_CTX_free(mac);
	OPENSSL_cleanse(block, sizeof(block));
	OPENSSL_cleanse(digest, sizeof(digest));
	return failed;
}

static void drop_context(struct prism_tls_half *half)
{
	EVP_CIPHER_CTX_free(half->ctx); /* wipes its key schedule */
	half->ctx = NULL;
}

int prism_tls_derive(struct prism_tls_half *half, const struct prism_tls_suite *suite)
{
	size_t hash_len = suite->secret_len;
	EVP_MAC_CTX *mac = keyed(hash_len, half->secret, hash_len);
	int failed = !mac || expand_label(mac, hash_len, "key", half->key, suite->key_len) ||
		     expand_label(mac, hash_len, "iv", half->iv, PRISM_TLS_NONCE);

	EVP_MAC_CTX_free(mac);
	drop_context(half);
	return failed ? -1 : 0;
}

int prism_tls_move_on(struct prism_tls_half *half, const struct prism_tls_suite *suite)
{
	uint8_t next[PRISM_TLS_SECRET_MAX];
	int failed = prism_tls_expand_label(suite->secret_len, half->secret, "traffic upd", next,
					    suite->secret_len);

	if (!failed) {
		memcpy(half->secret, next, suite->secret_len);
		failed = prism_tls_derive(half, suite);
		half->seq = 0;
		half->updates++;
	}
	OPENSSL_cleanse(next, sizeof(next));
	return failed;
}

int prism_tls_key_block(const struct prism_tls_suite *suite, const uint8_t master[PRISM_TLS_MASTER],
			const uint8_t client_random[PRISM_TLS_RANDOM],
			const uint8_t server_random[PRISM_TLS_RANDOM],
			struct prism_tls_half *client, struct prism_tls_half *server)
{
	uint8_t block[2 * (PRISM_TLS_KEY_MAX + PRISM_TLS_NONCE)], seed[2 * PRISM_TLS_RANDOM];
	size_t key_len = suite->key_len, iv_len = suite->iv_len;
	int failed;

	memcpy(seed, server_random, PRISM_TLS_RANDOM);
	memcpy(seed + PRISM_TLS_RANDOM, client_random, PRISM_TLS_RANDOM);
	failed = prism_tls_prf(suite->secret_len, master, PRISM_TLS_MASTER, "key expansion", seed,
			       sizeof(seed), block, 2 * (key_len + iv_len));
	if (!failed) {
		memcpy(client->key, block, key_len);
		memcpy(server->key, block + key_len, key_len);
		memcpy(client->iv, block + 2 * key_len, iv_len);
		memcpy(server->iv, block + 2 * key_len + iv_len, iv_len);
	}
	OPENSSL_cleanse(block, sizeof(block));
	return failed;
}

int prism_tls_half_ready(struct prism_tls_half *half, const struct prism_tls_suite *suite,
			 int encrypt)
{
	if (half->ctx)
		return 0;
	half->ctx = EVP_CIPHER_CTX_new();
	if (half->ctx && EVP_CipherInit_ex2(half->ctx, ciphers[suite->aead], half->key, NULL,
					    encrypt, NULL) == 1)
		return 0;
	drop_context(half);
	return -1;
}

void prism_tls_nonce(const struct prism_tls_half *half, uint8_t nonce[PRISM_TLS_NONCE])
{
	uint8_t sequence[8];

	prism_put64(sequence, half->seq);
	memcpy(nonce, half->iv, PRISM_TLS_NONCE); /* zero behind a fixed IV of 4 octets */
	for (int i = 0; i < 8; i++)
		nonce[4 + i] ^= sequence[i];
}

void prism_tls_half_wipe(struct prism_tls_half *half)
{
	drop_context(half);
	OPENSSL_cleanse(half, sizeof(*half));
}
