/* SPDX-License-Identifier: Apache-2.0 */
/* Sealing records, with what is due in front of them. */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include <openssl/err.h>

#include "tls_record.h"

#define UPDATE_LEN 5 /* a KeyUpdate message (RFC 8446, 4.6.3) */
#define ALERT_LEN  2

static const uint8_t ZEROS[PRISM_TLS_FRAGMENT];

static int refuse(struct prism_tls_fault *fault, const char *what)
{
	fault->alert = PRISM_TLS_INTERNAL_ERROR;
	fault->what = what;
	return -1;
}

static int is_1_3(const struct prism_tls *tls)
{
	return tls->suite->version == PRISM_TLS_1_3;
}

/* RFC 8446, 5.5: ChaCha20-Poly1305 runs out of sequence numbers first. */
static int has_limit(const struct prism_tls *tls)
{
	return tls->suite->aead != PRISM_TLS_CHACHA20_POLY1305;
}

/* Octets that a record has beside its content (and padding). */
static size_t overhead(const struct prism_tls *tls)
{
	return PRISM_TLS_HEADER + tls->suite->explicit_len + PRISM_TLS_TAG + (is_1_3(tls) ? 1 : 0);
}

/* The padding of a record with `len` octets: what the caller wants, if there is room for it. */
static size_t padding_of(const struct prism_tls *tls, const struct prism_tls_job *job, size_t len)
{
	size_t room = PRISM_TLS_FRAGMENT - len;

	if (!is_1_3(tls))
		return 0;
	return job->padding < room ? job->padding : room;
}

/* Octets of ciphertext for `len` octets of plaintext, without what is due in front. */
static size_t sealed_len(const struct prism_tls *tls, const struct prism_tls_job *job, size_t len)
{
	size_t full = len / tls->max_fragment, rest = len % tls->max_fragment;
	size_t size = full * (tls->max_fragment + padding_of(tls, job, tls->max_fragment));

	size += full * overhead(tls);
	if (rest)
		size += rest + padding_of(tls, job, rest) + overhead(tls);
	return size;
}

/* Whether `records` more fit under the key's limits. */
static int within_limits(const struct prism_tls *tls, const struct prism_tls_job *job, uint64_t seq,
			 uint64_t records)
{
	uint64_t most = UINT64_MAX;

	if (has_limit(tls))
		most = PRISM_TLS_HARD_LIMIT;
	if (job->type != PRISM_TLS_ALERT) /* room to say good-bye */
		most -= PRISM_TLS_LAST_ALERTS;
	return seq <= most && records <= most - seq;
}

/* The KeyUpdate that is due before `records` more: 0 or 1 (update_requested), or -1. */
static int update_due(const struct prism_tls *tls, uint64_t records)
{
	if (!is_1_3(tls))
		return -1;
	if (has_limit(tls) && tls->progress.seq >= PRISM_TLS_SOFT_LIMIT && !tls->asked &&
	    !tls->progress.closed)
		return 1;
	if (tls->owes & PRISM_TLS_OWES_UPDATE)
		return 0;
	if (has_limit(tls) && tls->write.seq + records > PRISM_TLS_SOFT_LIMIT)
		return 0;
	return -1;
}

int prism_tls_plan(const struct prism_tls *tls, size_t len, struct prism_tls_job *job,
		   struct prism_tls_fault *fault)
{
	uint64_t records = (len + tls->max_fragment - 1) / tls->max_fragment;
	uint64_t seq = tls->write.seq;

	if (tls->write_closed)
		return refuse(fault, "nothing may be sent after close_notify or a fatal alert");
	if (job->update < 0)
		job->update = update_due(tls, records);
	job->size = sealed_len(tls, job, len);
	if (job->update >= 0) {
		job->size += overhead(tls) + UPDATE_LEN;
		if (!within_limits(tls, job, seq, 1))
			return refuse(fault, "the key has sealed as many records as it may");
		seq = 0;
	}
	if (tls->owes & PRISM_TLS_OWES_REFUSAL) {
		job->size += overhead(tls) + ALERT_LEN;
		records++;
	}
	if (!within_limits(tls, job, seq, records))
		return refuse(fault, "the key has sealed as many records as it may");
	return 0;
}

/* Write header and explicit nonce, and give the cipher nonce and additional data: 0, or -1. */
static int begin_record(struct prism_tls *tls, uint8_t type, size_t len, size_t inner, uint8_t *out)
{
	struct prism_tls_half *half = &tls->write;
	uint8_t nonce[PRISM_TLS_NONCE], aad[13];
	int written, aad_len = PRISM_TLS_HEADER;

	prism_tls_nonce(half, nonce);
	out[0] = is_1_3(tls) ? PRISM_TLS_DATA : type;
	prism_put16(out + 1, PRISM_TLS_1_2);
	prism_put16(out + 3, (unsigned int)(tls->suite->explicit_len + inner + PRISM_TLS_TAG));
	if (is_1_3(tls)) {
		memcpy(aad, out, PRISM_TLS_HEADER);
	} else { /* RFC 5246, 6.2.3.3 */
		prism_put64(aad, half->seq);
		memcpy(aad + 8, out, 3);
		prism_put16(aad + 11, (unsigned int)len);
		aad_len = sizeof(aad);
		memcpy(out + PRISM_TLS_HEADER, nonce + 4, tls->suite->explicit_len);
	}
	if (prism_tls_half_ready(half, tls->suite, 1) ||
	    EVP_EncryptInit_ex(half->ctx, NULL, NULL, NULL, nonce) != 1 ||
	    EVP_EncryptUpdate(half->ctx, NULL, &written, aad, aad_len) != 1)
		return -1;
	return 0;
}

/* Seal one record; `in` may be where the content of the record goes. Octets written, or 0. */
static size_t seal_record(struct prism_tls *tls, uint8_t type, const uint8_t *in, size_t len,
			  size_t padding, uint8_t *out)
{
	EVP_CIPHER_CTX *ctx;
	size_t inner = len + (is_1_3(tls) ? 1 + padding : 0);
	uint8_t *body = out + PRISM_TLS_HEADER + tls->suite->explicit_len;
	int written, apart;

	if (begin_record(tls, type, len, inner, out))
		goto failed;
	ctx = tls->write.ctx;
	apart = is_1_3(tls) && in != body;
	if (is_1_3(tls) && !apart) /* in place there is room for the type: one call less */
		body[len++] = type;
	if (len && EVP_EncryptUpdate(ctx, body, &written, in, (int)len) != 1)
		goto failed;
	body += len;
	if (apart) {
		if (EVP_EncryptUpdate(ctx, body, &written, &type, 1) != 1)
			goto failed;
		body++;
	}
	if (padding && EVP_EncryptUpdate(ctx, body, &written, ZEROS, (int)padding) != 1)
		goto failed;
	body += padding;
	if (EVP_EncryptFinal_ex(ctx, body, &written) != 1 ||
	    EVP_CIPHER_CTX_ctrl(ctx, EVP_CTRL_AEAD_GET_TAG, PRISM_TLS_TAG, body) != 1)
		goto failed;
	tls->write.seq++;
	return (size_t)(body - out) + PRISM_TLS_TAG;
failed:
	ERR_clear_error();
	return 0;
}

/* Seal what goes in front: octets written, or -1. */
static int seal_due(struct prism_tls *tls, const struct prism_tls_job *job, uint8_t *out)
{
	size_t done = 0, size;

	if (tls->owes & PRISM_TLS_OWES_REFUSAL) {
		static const uint8_t refusal[ALERT_LEN] = {1, PRISM_TLS_NO_RENEGOTIATION};

		size = seal_record(tls, PRISM_TLS_ALERT, refusal, ALERT_LEN, 0, out);
		if (!size)
			return -1;
		done += size;
		tls->owes &= (uint8_t)~PRISM_TLS_OWES_REFUSAL;
	}
	if (job->update >= 0) {
		uint8_t message[UPDATE_LEN] = {24, 0, 0, 1, (uint8_t)job->update};

		size = seal_record(tls, PRISM_TLS_HANDSHAKE, message, UPDATE_LEN, 0, out + done);
		if (!size || prism_tls_move_on(&tls->write, tls->suite))
			return -1;
		done += size;
		tls->owes &= (uint8_t)~PRISM_TLS_OWES_UPDATE;
		tls->asked |= (uint8_t)job->update;
	}
	return (int)done;
}

int prism_tls_seal(struct prism_tls *tls, const struct prism_tls_job *job, const uint8_t *in,
		   size_t len, uint8_t *out)
{
	int due = seal_due(tls, job, out);

	if (due < 0)
		return -1;
	out += due;
	while (len) {
		size_t take = len < tls->max_fragment ? len : tls->max_fragment;
		size_t size =
			seal_record(tls, job->type, in, take, padding_of(tls, job, take), out);

		if (!size)
			return -1;
		in += take;
		out += size;
		len -= take;
	}
	return 0;
}

/* Read up to `len` octets; short only at the end of the file or at an error (*error). */
static size_t read_all(int fd, uint64_t offset, uint8_t *out, size_t len, int *error)
{
	size_t done = 0;

	while (done < len) {
		ssize_t got = pread(fd, out + done, len - done, (off_t)(offset + done));

		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			*error = errno;
		if (got <= 0)
			break;
		done += (size_t)got;
	}
	return done;
}

int prism_tls_seal_file(struct prism_tls *tls, struct prism_tls_job *job, int fd, uint64_t offset,
			size_t *len, uint8_t *out)
{
	size_t left = *len, before = PRISM_TLS_HEADER + tls->suite->explicit_len;
	int due = seal_due(tls, job, out), error = 0;

	*len = 0;
	if (due < 0)
		return -1;
	job->size = (size_t)due;
	while (left) {
		size_t take = left < tls->max_fragment ? left : tls->max_fragment;
		uint8_t *record = out + job->size;
		uint8_t *plain = record + before; /* sealed where it is read to */
		size_t got = read_all(fd, offset + *len, plain, take, &error), size;

		if (!got)
			break;
		size = seal_record(tls, PRISM_TLS_DATA, plain, got, 0, record);
		if (!size)
			return -1;
		job->size += size;
		*len += got;
		left -= got;
		if (got < take)
			break;
	}
	/* What was sealed has to be sent; the error will come again. */
	return job->size ? 0 : error;
}
