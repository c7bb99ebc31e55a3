/* SPDX-License-Identifier: Apache-2.0 */
/* Opening records; peeking and committing are explained in tls_record.h. */
#include <string.h>

#include <openssl/crypto.h>
#include <openssl/err.h>

#include "tls_record.h"

static int refuse(struct prism_tls_fault *fault, int alert, const char *what)
{
	fault->alert = alert;
	fault->what = what;
	return -1;
}

/* The error queue is the thread's: others who use libcrypto must not find our errors in it. */
static int libcrypto_failed(struct prism_tls_fault *fault, int alert, const char *what)
{
	ERR_clear_error();
	return refuse(fault, alert, what);
}

static size_t explicit_len(const struct prism_tls *tls)
{
	return tls->suite->explicit_len;
}

/* Check a record's header: the length of its body, or -1. */
static int body_length(const struct prism_tls *tls, const uint8_t *header,
		       struct prism_tls_fault *fault)
{
	int is_1_3 = tls->suite->version == PRISM_TLS_1_3;
	unsigned int length = prism_get16(header + 3);
	unsigned int most = PRISM_TLS_FRAGMENT;

	most += is_1_3 ? PRISM_TLS_EXPAND_1_3 : PRISM_TLS_EXPAND_1_2;
	if (is_1_3 ? header[0] != PRISM_TLS_DATA
		   : header[0] < PRISM_TLS_ALERT || header[0] > PRISM_TLS_DATA)
		return refuse(fault, PRISM_TLS_UNEXPECTED_MESSAGE,
			      "a record of a type that is not allowed now");
	if (prism_get16(header + 1) != PRISM_TLS_1_2) /* in both versions: RFC 8446, 5.2 */
		return refuse(fault, PRISM_TLS_PROTOCOL_VERSION, "a record of another version");
	if (length > most)
		return refuse(fault, PRISM_TLS_RECORD_OVERFLOW, "a record that is too large");
	if (length < explicit_len(tls) + PRISM_TLS_TAG)
		return refuse(fault, PRISM_TLS_BAD_RECORD_MAC, "a record that is too short");
	return (int)length;
}

size_t prism_tls_open_bound(const struct prism_tls *tls, const uint8_t *in, size_t len,
			    size_t *records)
{
	struct prism_tls_fault fault;
	size_t bound = 0;

	*records = 0;
	while (len >= PRISM_TLS_HEADER) {
		int length = body_length(tls, in, &fault);

		if (length < 0 || (size_t)length > len - PRISM_TLS_HEADER)
			break;
		bound += (size_t)length - explicit_len(tls) - PRISM_TLS_TAG;
		in += PRISM_TLS_HEADER + length;
		len -= PRISM_TLS_HEADER + (size_t)length;
		++*records;
	}
	return bound;
}

/* Decrypt one record's body to `out`: the octets written, or -1. */
static int decrypt(const struct prism_tls *tls, struct prism_tls_half *half, const uint8_t *record,
		   size_t length, uint8_t *out, struct prism_tls_fault *fault)
{
	const uint8_t *body = record + PRISM_TLS_HEADER + explicit_len(tls);
	size_t plain = length - explicit_len(tls) - PRISM_TLS_TAG;
	uint8_t nonce[PRISM_TLS_NONCE], aad[13];
	int written, aad_len = PRISM_TLS_HEADER;

	prism_tls_nonce(half, nonce);
	if (tls->suite->version == PRISM_TLS_1_3) {
		memcpy(aad, record, PRISM_TLS_HEADER);
	} else { /* RFC 5246, 6.2.3.3 */
		prism_put64(aad, half->seq);
		memcpy(aad + 8, record, 3);
		prism_put16(aad + 11, (unsigned int)plain);
		aad_len = sizeof(aad);
		if (explicit_len(tls))
			memcpy(nonce + 4, record + PRISM_TLS_HEADER, 8);
	}
	if (prism_tls_half_ready(half, tls->suite, 0) ||
	    EVP_DecryptInit_ex(half->ctx, NULL, NULL, NULL, nonce) != 1 ||
	    EVP_CIPHER_CTX_ctrl(half->ctx, EVP_CTRL_AEAD_SET_TAG, PRISM_TLS_TAG,
				(void *)(body + plain)) != 1 ||
	    EVP_DecryptUpdate(half->ctx, NULL, &written, aad, aad_len) != 1)
		return libcrypto_failed(fault, PRISM_TLS_INTERNAL_ERROR, "libcrypto failed");
	if ((plain && EVP_DecryptUpdate(half->ctx, out, &written, body, (int)plain) != 1) ||
	    EVP_DecryptFinal_ex(half->ctx, out + plain, &written) != 1)
		return libcrypto_failed(fault, PRISM_TLS_BAD_RECORD_MAC,
					"a record that does not authenticate");
	return (int)plain;
}

/* TLS 1.3: the type is the last octet that is not zero (RFC 8446, 5.4). Content length, or -1. */
static int strip_padding(const uint8_t *plain, int length, uint8_t *type,
			 struct prism_tls_fault *fault)
{
	if (length > PRISM_TLS_FRAGMENT + 1)
		return refuse(fault, PRISM_TLS_RECORD_OVERFLOW, "a record that is too large");
	while (length && plain[length - 1] == 0)
		length--;
	if (length == 0)
		return refuse(fault, PRISM_TLS_UNEXPECTED_MESSAGE, "a record of zeros alone");
	*type = plain[length - 1];
	return length - 1;
}

/* Open one record of `length` octets behind its header: octets of application data, or -1. */
static int open_record(const struct prism_tls *tls, struct prism_tls_half *half,
		       const uint8_t *record, size_t length, uint8_t *out,
		       struct prism_tls_mark *mark, struct prism_tls_fault *fault)
{
	int content;

	half->seq = mark->after.seq;
	if (half->seq == UINT64_MAX)
		return refuse(fault, PRISM_TLS_INTERNAL_ERROR, "sequence numbers are used up");
	content = decrypt(tls, half, record, length, out, fault);
	mark->type = record[0];
	if (content >= 0 && tls->suite->version == PRISM_TLS_1_3)
		content = strip_padding(out, content, &mark->type, fault);
	else if (content > PRISM_TLS_FRAGMENT)
		content = refuse(fault, PRISM_TLS_RECORD_OVERFLOW, "a record that is too large");
	if (content < 0)
		return -1;
	mark->after.seq++;
	mark->after.records++;
	if (prism_tls_take(tls, mark, out, (size_t)content, fault))
		return -1;
	return mark->type == PRISM_TLS_DATA ? content : 0;
}

/*
 * The keys for a progress: the connection's own, or later ones in `spare`, whose `updates` says
 * how far it has come. NULL: derivation failed.
 */
static struct prism_tls_half *keys_at(struct prism_tls *tls, uint64_t updates,
				      struct prism_tls_half *spare)
{
	if (updates == tls->read.updates)
		return &tls->read;
	if (spare->updates == 0) { /* it never has this number: the connection's is less */
		*spare = tls->read;
		spare->ctx = NULL;
	}
	while (spare->updates < updates)
		if (prism_tls_move_on(spare, tls->suite))
			return NULL;
	return spare;
}

void prism_tls_open(struct prism_tls *tls, const struct prism_tls_progress *from, const uint8_t *in,
		    size_t len, uint8_t *out, struct prism_tls_mark *marks, size_t max_marks,
		    struct prism_tls_opened *opened)
{
	struct prism_tls_half spare = {.updates = 0};
	struct prism_tls_progress at = *from;

	memset(opened, 0, sizeof(*opened));
	while (!at.closed) {
		const uint8_t *record = in + opened->consumed;
		size_t here = len - opened->consumed;
		struct prism_tls_mark mark = {.after = at};
		struct prism_tls_half *half;
		int length, content;

		opened->wanted = PRISM_TLS_HEADER;
		if (here < PRISM_TLS_HEADER)
			break;
		length = body_length(tls, record, &opened->fault);
		if (length < 0)
			break;
		opened->wanted += (size_t)length;
		if (here < opened->wanted || opened->records == max_marks)
			break;
		half = keys_at(tls, at.updates, &spare);
		if (!half) {
			refuse(&opened->fault, PRISM_TLS_INTERNAL_ERROR, "libcrypto failed");
			break;
		}
		content = open_record(tls, half, record, (size_t)length, out + opened->plain, &mark,
				      &opened->fault);
		if (content < 0)
			break;
		opened->consumed += PRISM_TLS_HEADER + (size_t)length;
		opened->plain += (size_t)content;
		mark.cipher_end = opened->consumed;
		mark.plain_end = opened->plain;
		marks[opened->records++] = mark;
		at = mark.after;
	}
	if (at.closed)
		opened->wanted = 0;
	prism_tls_half_wipe(&spare);
}

int prism_tls_commit(struct prism_tls *tls, const struct prism_tls_mark *marks, size_t count)
{
	for (size_t i = 0; i < count; i++) {
		const struct prism_tls_mark *mark = &marks[i];

		if (mark->after.records <= tls->progress.records)
			continue; /* committed before */
		while (tls->read.updates < mark->after.updates)
			if (prism_tls_move_on(&tls->read, tls->suite))
				return -1;
		tls->progress = mark->after;
		tls->owes |= mark->event & (PRISM_TLS_OWES_UPDATE | PRISM_TLS_OWES_REFUSAL);
		if (mark->event & PRISM_TLS_PEER_UPDATED)
			tls->asked = 0;
	}
	return 0;
}

int prism_tls_note(struct prism_tls *tls, uint8_t type, const uint8_t *data, size_t len,
		   struct prism_tls_fault *fault)
{
	struct prism_tls_mark mark = {.after = tls->progress, .type = type};

	fault->what = NULL;
	mark.after.records++;
	if (prism_tls_take(tls, &mark, data, len, fault))
		return -1;
	return prism_tls_commit(tls, &mark, 1);
}

void prism_tls_wipe(struct prism_tls *tls)
{
	prism_tls_half_wipe(&tls->read);
	prism_tls_half_wipe(&tls->write);
	OPENSSL_cleanse(tls, sizeof(*tls));
}
