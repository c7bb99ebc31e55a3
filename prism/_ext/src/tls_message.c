/* SPDX-License-Identifier: Apache-2.0 */
/* What is in records: application data, alerts, and handshake messages after the handshake. */
#include <string.h>

#include "tls_record.h"

/* Handshake messages (RFC 8446, B.3; RFC 5246, A.4) */
#define HELLO_REQUEST	   0
#define CLIENT_HELLO	   1
#define NEW_SESSION_TICKET 4
#define KEY_UPDATE	   24

#define TICKET_MAX	 (4 + 4 + 256 + 2 + 65535 + 2 + 65535) /* RFC 8446, 4.6.1 */
#define CLIENT_HELLO_MAX 131072 /* a bound of ours; real ones have some hundred octets */

static int refuse(struct prism_tls_fault *fault, int alert, const char *what)
{
	fault->alert = alert;
	fault->what = what;
	return -1;
}

/* One alert to a record: RFC 8446, 5.1; TLS 1.2 allows otherwise, but nobody does it. */
static int take_alert(const struct prism_tls *tls, struct prism_tls_mark *mark, const uint8_t *data,
		      size_t len, struct prism_tls_fault *fault)
{
	struct prism_tls_progress *at = &mark->after;
	int fatal;

	if (len == 0 && tls->suite->version == PRISM_TLS_1_3) /* RFC 8446, 5.4 */
		return refuse(fault, PRISM_TLS_UNEXPECTED_MESSAGE, "an empty alert");
	if (len != 2)
		return refuse(fault, PRISM_TLS_DECODE_ERROR, "an alert that has not two octets");
	if (data[0] != 1 && data[0] != 2)
		return refuse(fault, PRISM_TLS_ILLEGAL_PARAMETER, "an alert of unknown level");
	/* TLS 1.3 ignores the level: all are fatal but two (RFC 8446, section 6). */
	fatal = tls->suite->version == PRISM_TLS_1_3 ? data[1] != PRISM_TLS_USER_CANCELED
						     : data[0] == 2;
	if (fatal || data[1] == PRISM_TLS_CLOSE_NOTIFY) {
		at->closed = 1;
		at->alert = data[1];
	}
	return 0;
}

static size_t body_len(const struct prism_tls_progress *at)
{
	return (size_t)at->hs_header[1] << 16 | prism_get16(at->hs_header + 2);
}

/* Refuse a message by its header, so that nothing large is waited for. */
int prism_tls_check_message(const struct prism_tls *tls, const struct prism_tls_progress *at,
			    struct prism_tls_fault *fault)
{
	size_t len = body_len(at), least = 1, most;

	if (tls->suite->version == PRISM_TLS_1_3) {
		if (at->hs_header[0] == KEY_UPDATE)
			most = 1;
		else if (at->hs_header[0] == NEW_SESSION_TICKET && !tls->is_server)
			most = TICKET_MAX;
		else
			return refuse(fault, PRISM_TLS_UNEXPECTED_MESSAGE,
				      "a handshake message after the handshake");
	} else {
		/* A renegotiation is asked for; it will be refused (RFC 5246, 7.2.2). */
		if (at->hs_header[0] == CLIENT_HELLO && tls->is_server)
			most = CLIENT_HELLO_MAX;
		else if (at->hs_header[0] == HELLO_REQUEST && !tls->is_server)
			least = most = 0;
		else
			return refuse(fault, PRISM_TLS_UNEXPECTED_MESSAGE,
				      "a handshake message after the handshake");
	}
	if (len < least || len > most)
		return refuse(fault, PRISM_TLS_DECODE_ERROR,
			      "a handshake message of impossible length");
	return 0;
}

/* A message is complete; `rest` octets follow it in its record, `last` is its last octet. */
static int finish_message(const struct prism_tls *tls, struct prism_tls_mark *mark, uint8_t last,
			  size_t rest, struct prism_tls_fault *fault)
{
	struct prism_tls_progress *at = &mark->after;
	uint8_t type = at->hs_header[0];

	at->hs_have = 0;
	memset(at->hs_header, 0, sizeof(at->hs_header));
	if (tls->suite->version == PRISM_TLS_1_2) {
		mark->event |= PRISM_TLS_OWES_REFUSAL;
		return 0;
	}
	if (type != KEY_UPDATE)
		return 0;
	if (last > 1)
		return refuse(fault, PRISM_TLS_ILLEGAL_PARAMETER, "a KeyUpdate of unknown kind");
	if (rest)
		return refuse(fault, PRISM_TLS_UNEXPECTED_MESSAGE,
			      "a KeyUpdate with more behind it"); /* RFC 8446, 5.1 */
	at->seq = 0;
	at->updates++;
	mark->event |= PRISM_TLS_PEER_UPDATED | (last ? PRISM_TLS_OWES_UPDATE : 0);
	return 0;
}

/* Messages may be cut over records, and share one. Bodies are counted, not kept. */
static int take_handshake(const struct prism_tls *tls, struct prism_tls_mark *mark,
			  const uint8_t *data, size_t len, struct prism_tls_fault *fault)
{
	struct prism_tls_progress *at = &mark->after;

	if (len == 0) /* RFC 8446, 5.1 and 5.4; RFC 5246, 6.2.1 */
		return refuse(fault, PRISM_TLS_UNEXPECTED_MESSAGE, "an empty handshake record");
	while (len) {
		size_t take = 1;

		if (at->hs_have < 4) {
			at->hs_header[at->hs_have++] = *data;
			if (at->hs_have == 4) {
				if (prism_tls_check_message(tls, at, fault))
					return -1;
				at->hs_left = (uint32_t)body_len(at);
			}
		} else {
			take = at->hs_left < len ? at->hs_left : len;
			at->hs_left -= (uint32_t)take;
		}
		data += take;
		len -= take;
		if (at->hs_have == 4 && at->hs_left == 0 &&
		    finish_message(tls, mark, data[-1], len, fault))
			return -1;
	}
	return 0;
}

int prism_tls_take(const struct prism_tls *tls, struct prism_tls_mark *mark, const uint8_t *data,
		   size_t len, struct prism_tls_fault *fault)
{
	struct prism_tls_progress *at = &mark->after;

	if (at->hs_have && mark->type != PRISM_TLS_HANDSHAKE) /* RFC 8446, 5.1 */
		return refuse(fault, PRISM_TLS_UNEXPECTED_MESSAGE,
			      "another record inside a handshake message");
	if (mark->type == PRISM_TLS_DATA && len) {
		at->idle = 0;
		return 0;
	}
	if (at->idle >= PRISM_TLS_IDLE_MAX)
		return refuse(fault, PRISM_TLS_UNEXPECTED_MESSAGE,
			      "too many records without application data");
	at->idle++;
	switch (mark->type) {
	case PRISM_TLS_DATA:
		return 0;
	case PRISM_TLS_ALERT:
		return take_alert(tls, mark, data, len, fault);
	case PRISM_TLS_HANDSHAKE:
		return take_handshake(tls, mark, data, len, fault);
	default:
		return refuse(fault, PRISM_TLS_UNEXPECTED_MESSAGE,
			      "a record of a type that is not allowed now");
	}
}
