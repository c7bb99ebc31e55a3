/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The TLS record layer of one connection after the handshake: TLS 1.3 (RFC 8446, section 5) and
 * TLS 1.2 with AEAD suites (RFC 5246, section 6). No I/O but prism_tls_seal_file.
 *
 * Reading is split in two. *Opening* decrypts whole records of a buffer and leaves the connection
 * as it was; it starts at a *progress* and leaves one *mark* per record, with the progress behind
 * it. *Committing* a mark makes its progress the connection's. So input that was only peeked at can
 * be opened again and again, by whoever has the connection then.
 *
 *   ciphertext   | record | record: KeyUpdate | record | rec...      consumed: up to "rec"
 *   marks                 0                   1        2             wanted: the whole of "rec"
 *   plaintext    |--data--|                   |--data--|
 *                keys N                        keys N+1, derived for this call alone
 */
#ifndef PRISM_TLS_RECORD_H
#define PRISM_TLS_RECORD_H

#include "tls_keys.h"

#define PRISM_TLS_HEADER     5
#define PRISM_TLS_FRAGMENT   16384	/* the most plaintext in a record (RFC 8446, 5.1) */
#define PRISM_TLS_EXPAND_1_3 256	/* what ciphertext may have beyond that (5.2) */
#define PRISM_TLS_EXPAND_1_2 2048	/* the same of TLS 1.2 (RFC 5246, 6.2.3) */
#define PRISM_TLS_IDLE_MAX   32		/* records without application data, one after another */
#define PRISM_TLS_CALL_MAX   (1u << 30) /* plaintext for one call, octets */

/*
 * RFC 8446, 5.5: AES-GCM may protect 2^24.5 full records with one key. From SOFT on the key is
 * moved on (1.3); at HARD nothing more but alerts is sealed (1.2).
 */
#define PRISM_TLS_SOFT_LIMIT  (1ull << 23)
#define PRISM_TLS_HARD_LIMIT  23726566ull
#define PRISM_TLS_LAST_ALERTS 16

/* Content types (RFC 8446, B.1) */
#define PRISM_TLS_CHANGE_CIPHER_SPEC 20
#define PRISM_TLS_ALERT		     21
#define PRISM_TLS_HANDSHAKE	     22
#define PRISM_TLS_DATA		     23

/* Alerts that we send (RFC 8446, B.2; RFC 5246, 7.2) */
#define PRISM_TLS_CLOSE_NOTIFY	     0
#define PRISM_TLS_UNEXPECTED_MESSAGE 10
#define PRISM_TLS_BAD_RECORD_MAC     20
#define PRISM_TLS_RECORD_OVERFLOW    22
#define PRISM_TLS_ILLEGAL_PARAMETER  47
#define PRISM_TLS_DECODE_ERROR	     50
#define PRISM_TLS_PROTOCOL_VERSION   70
#define PRISM_TLS_INTERNAL_ERROR     80
#define PRISM_TLS_USER_CANCELED	     90
#define PRISM_TLS_NO_RENEGOTIATION   100

/* What a committed record obliges us to, in prism_tls.owes and in a mark's event. */
#define PRISM_TLS_OWES_UPDATE  0x01 /* the peer asked for our KeyUpdate */
#define PRISM_TLS_OWES_REFUSAL 0x02 /* the peer asked for a renegotiation (TLS 1.2) */
#define PRISM_TLS_PEER_UPDATED 0x04 /* an event only: what we asked for, if we did, has come */

/* How far reading has come. */
struct prism_tls_progress {
	uint64_t seq;	  /* of the next record */
	uint64_t updates; /* as in prism_tls_half */
	uint64_t records; /* read since this process has the connection */
	uint32_t hs_left; /* octets of a handshake message's body still to come */
	uint8_t hs_have;  /* octets of its header that are here; 0: not inside a message */
	uint8_t hs_header[4];
	uint8_t idle;	/* records since the last application data */
	uint8_t closed; /* close_notify or a fatal alert has come: nothing more is read */
	uint8_t alert;	/* which one it was */
};

struct prism_tls_mark {
	struct prism_tls_progress after;
	size_t cipher_end, plain_end; /* from the beginning of the buffers of the call */
	uint8_t type, event;
};

struct prism_tls {
	const struct prism_tls_suite *suite; /* NULL: wiped */
	struct prism_tls_half read, write;   /* read.seq is not used: see progress */
	struct prism_tls_progress progress;
	uint16_t max_fragment; /* plaintext in a record that we seal */
	uint8_t is_server;
	uint8_t owes;
	uint8_t asked;	      /* we asked for a KeyUpdate that has not come */
	uint8_t write_closed; /* close_notify or a fatal alert was sealed */
};

struct prism_tls_opened {
	size_t records, consumed, plain;
	size_t wanted; /* octets behind `consumed` that make the next record whole, as far as known
			*/
	struct prism_tls_fault fault; /* of the record at `consumed`; .what is NULL without one */
};

/*
 * Upper bounds of what opening a buffer gives: octets of plaintext, and the number of whole
 * records. Stops at the first record whose header cannot be.
 */
size_t prism_tls_open_bound(const struct prism_tls *tls, const uint8_t *in, size_t len,
			    size_t *records);

/*
 * Decrypt the whole records at the beginning of `in`. `out` and `marks` are as large as the bounds
 * say. Changes nothing but the cipher contexts. Records before a bad one are opened.
 */
void prism_tls_open(struct prism_tls *tls, const struct prism_tls_progress *from, const uint8_t *in,
		    size_t len, uint8_t *out, struct prism_tls_mark *marks, size_t max_marks,
		    struct prism_tls_opened *opened);

/*
 * Make marks[count - 1].after the connection's progress, carrying out the events of those that are
 * not committed yet. 0, or -1: key derivation failed.
 */
int prism_tls_commit(struct prism_tls *tls, const struct prism_tls_mark *marks, size_t count);

/*
 * Take in a record that the kernel has opened, alert or handshake, once the sequence number behind
 * it was taken over (prism_tls_sync): 0, or -1; fault->what is NULL where key derivation failed.
 */
int prism_tls_note(struct prism_tls *tls, uint8_t type, const uint8_t *data, size_t len,
		   struct prism_tls_fault *fault);

/* What the content of a decrypted record does to the progress (tls_message.c): 0, or -1. */
int prism_tls_take(const struct prism_tls *tls, struct prism_tls_mark *mark, const uint8_t *data,
		   size_t len, struct prism_tls_fault *fault);

/* Whether a message with the progress's whole header may come now: 0, or -1 (tls_message.c). */
int prism_tls_check_message(const struct prism_tls *tls, const struct prism_tls_progress *at,
			    struct prism_tls_fault *fault);

/* What a call of prism_tls_seal is to do. */
struct prism_tls_job {
	uint8_t type;
	size_t padding; /* zeros in each record, TLS 1.3 only; cut where the record is full */
	int update;	/* -1: none; else a KeyUpdate in front, its update_requested */
	size_t size;	/* out: octets of ciphertext */
};

/* Decide what is due in front of `len` octets, and how large it all gets: 0, or -1. */
int prism_tls_plan(const struct prism_tls *tls, size_t len, struct prism_tls_job *job,
		   struct prism_tls_fault *fault);

/* Carry the plan out: 0, or -1 (libcrypto failed; the connection is of no more use). */
int prism_tls_seal(struct prism_tls *tls, const struct prism_tls_job *job, const uint8_t *in,
		   size_t len, uint8_t *out);

/*
 * The same with a file's octets, at most `*len`; *len and job->size become what it was. Returns 0,
 * an errno of pread(2) when nothing was sealed, or -1 as prism_tls_seal.
 */
int prism_tls_seal_file(struct prism_tls *tls, struct prism_tls_job *job, int fd, uint64_t offset,
			size_t *len, uint8_t *out);

/* Free the contexts and wipe the whole. Idempotent. */
void prism_tls_wipe(struct prism_tls *tls);

#endif
