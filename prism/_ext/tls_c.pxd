"""The C interface of the record layer, for tls_record.pyx and what it includes."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from "Python.h":
    ctypedef struct PyObject
    int _PyBytes_Resize(PyObject **bytes, Py_ssize_t size) except -1
    PyObject *_new_bytes "PyBytes_FromStringAndSize"(const char *data, Py_ssize_t size) except NULL
    char *_octets "PyBytes_AS_STRING"(PyObject *bytes)
    void Py_DECREF(PyObject *)


cdef extern from "<openssl/crypto.h>" nogil:
    void OPENSSL_cleanse(void *at, size_t length)


cdef extern from "tls_keys.h" nogil:
    enum: PRISM_TLS_1_3
    enum: PRISM_TLS_MASTER
    enum: PRISM_TLS_RANDOM

    cdef struct prism_tls_suite:
        uint16_t id, version
        uint8_t secret_len

    cdef struct prism_tls_fault:
        int alert
        const char *what

    cdef struct prism_tls_half:
        uint8_t *secret
        uint64_t seq, updates

    int prism_tls_init()
    const prism_tls_suite *prism_tls_find_suite(unsigned int id)
    int prism_tls_hkdf_expand(
        size_t hash_len, const uint8_t *prk, size_t prk_len, const uint8_t *info,
        size_t info_len, uint8_t *out, size_t out_len
    )
    int prism_tls_expand_label(
        size_t hash_len, const uint8_t *secret, const char *label, uint8_t *out, size_t out_len
    )
    int prism_tls_prf(
        size_t hash_len, const uint8_t *secret, size_t secret_len, const char *label,
        const uint8_t *seed, size_t seed_len, uint8_t *out, size_t out_len
    )
    int prism_tls_derive(prism_tls_half *half, const prism_tls_suite *suite)
    int prism_tls_key_block(
        const prism_tls_suite *suite, const uint8_t *master, const uint8_t *client_random,
        const uint8_t *server_random, prism_tls_half *client, prism_tls_half *server
    )


cdef extern from "tls_record.h" nogil:
    enum: PRISM_TLS_FRAGMENT
    enum: PRISM_TLS_CALL_MAX
    enum: PRISM_TLS_ALERT
    enum: PRISM_TLS_HANDSHAKE
    enum: PRISM_TLS_UNEXPECTED_MESSAGE
    enum: PRISM_TLS_DATA
    enum: PRISM_TLS_CLOSE_NOTIFY
    enum: PRISM_TLS_INTERNAL_ERROR

    cdef struct prism_tls_progress:
        uint64_t seq, updates, records
        uint8_t hs_have, closed, alert

    cdef struct prism_tls_mark:
        prism_tls_progress after
        size_t cipher_end, plain_end
        uint8_t type, event

    cdef struct prism_tls:
        const prism_tls_suite *suite
        prism_tls_half read, write
        prism_tls_progress progress
        uint16_t max_fragment
        uint8_t is_server, owes, asked, write_closed

    cdef struct prism_tls_opened:
        size_t records, consumed, plain, wanted
        prism_tls_fault fault

    cdef struct prism_tls_job:
        uint8_t type
        size_t padding, size
        int update

    size_t prism_tls_open_bound(
        const prism_tls *tls, const uint8_t *data, size_t length, size_t *records
    )
    void prism_tls_open(
        prism_tls *tls, const prism_tls_progress *start, const uint8_t *data, size_t length,
        uint8_t *out, prism_tls_mark *marks, size_t max_marks, prism_tls_opened *opened
    )
    int prism_tls_commit(prism_tls *tls, const prism_tls_mark *marks, size_t count)
    int prism_tls_note(
        prism_tls *tls, uint8_t type, const uint8_t *data, size_t length, prism_tls_fault *fault
    )
    int prism_tls_plan(
        const prism_tls *tls, size_t length, prism_tls_job *job, prism_tls_fault *fault
    )
    int prism_tls_seal(
        prism_tls *tls, const prism_tls_job *job, const uint8_t *data, size_t length, uint8_t *out
    )
    int prism_tls_seal_file(
        prism_tls *tls, prism_tls_job *job, int fd, uint64_t offset, size_t *length, uint8_t *out
    )
    void prism_tls_wipe(prism_tls *tls)


cdef extern from "tls_state.h" nogil:
    enum: PRISM_TLS_STATE_VERSION
    enum: PRISM_TLS_STATE_SIZE
    enum: PRISM_TLS_CRYPTO_INFO_MAX

    void prism_tls_pack(const prism_tls *tls, uint8_t *out)
    const char *prism_tls_parse(const uint8_t *data, size_t length, prism_tls *tls)
    size_t prism_tls_crypto_info(const prism_tls *tls, int write, uint8_t *out)
    const char *prism_tls_sync(prism_tls *tls, int write, const uint8_t *info, size_t length)
