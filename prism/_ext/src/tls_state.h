/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The serialised form of a TLS connection, and the kernel's view of it. No I/O here.
 *
 * Layout, all numbers big-endian:
 *
 *     0  4 magic "PTLS"                 24  8 sequence number of the next record to read
 *     4  1 version                      32  8 sequence number of the next record to write
 *     5  1 flags                        40 48 secret of the reading direction (TLS 1.3)
 *     6  2 cipher suite                 88 32 key
 *     8  2 most plaintext in a record  120 12 IV
 *    10  1 records without data        132 48 secret of the writing direction
 *    11  1 octets of hs_header here    180 32 key
 *    12  4 hs_header                   212 12 IV
 *    16  4 hs_left                     224
 *    20  1 alert that ended reading
 *    21  3 zero
 *
 * Secrets, keys and IVs shorter than their field are followed by zeros.
 */
#ifndef PRISM_TLS_STATE_H
#define PRISM_TLS_STATE_H

#include "tls_record.h"

#define PRISM_TLS_STATE_VERSION 1
#define PRISM_TLS_STATE_SIZE	224

#define PRISM_TLS_CRYPTO_INFO_MAX                                                                  \
	64 /* no less than the largest struct tls12_crypto_info_ we use                            \
	    */

void prism_tls_pack(const struct prism_tls *tls, uint8_t out[PRISM_TLS_STATE_SIZE]);

/* Read and check a whole state into a zeroed `tls`: NULL, or the reason. */
const char *prism_tls_parse(const uint8_t *data, size_t length, struct prism_tls *tls);

/*
 * The struct for setsockopt(SOL_TLS, TLS_TX or TLS_RX) (linux/tls.h): its length. `write`: for
 * TLS_TX.
 */
size_t prism_tls_crypto_info(const struct prism_tls *tls, int write,
			     uint8_t out[PRISM_TLS_CRYPTO_INFO_MAX]);

/*
 * Take the sequence number over from such a struct, read back with getsockopt(2): NULL, or why it
 * is not one of this connection's.
 */
const char *prism_tls_sync(struct prism_tls *tls, int write, const uint8_t *info, size_t length);

#endif
