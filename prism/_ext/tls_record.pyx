"""The TLS record layer after the handshake; see tls_record.pyi and src/tls_record.h.

In parts: tls_opened.pxi has what was opened, tls_base.pxi the state that travels, this file what
reads and writes with it, tls_derive.pxi the key derivations on their own, tls_flight.pxi what the
handshake before asks of records.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint16_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from prism._ext.tls_c cimport *

STATE_VERSION = PRISM_TLS_STATE_VERSION
STATE_SIZE = PRISM_TLS_STATE_SIZE
MAX_FRAGMENT = PRISM_TLS_FRAGMENT
TX = 1
RX = 2

if prism_tls_init() != 0:
    raise ImportError("libcrypto lacks AES-GCM, ChaCha20-Poly1305 or HMAC")


include "tls_base.pxi"
include "tls_opened.pxi"
include "tls_derive.pxi"
include "tls_flight.pxi"


cdef class Tls(_Connection):
    @staticmethod
    cdef Tls _make(
        const prism_tls_suite *suite, bint is_server, uint64_t read_seq, uint64_t write_seq,
        int max_fragment
    ):
        if not 64 <= max_fragment <= PRISM_TLS_FRAGMENT:
            raise ValueError(f"a fragment has 64 to {PRISM_TLS_FRAGMENT} octets")
        cdef Tls self = Tls.__new__(Tls)
        self._tls.suite = suite
        self._tls.is_server = is_server
        self._tls.max_fragment = <uint16_t>max_fragment
        self._tls.progress.seq = read_seq
        self._tls.write.seq = write_seq
        return self

    @staticmethod
    def from_traffic_secrets(
        int suite, client_secret not None, server_secret not None, *, bint is_server,
        uint64_t read_seq=0, uint64_t write_seq=0, int max_fragment=PRISM_TLS_FRAGMENT
    ):
        cdef const prism_tls_suite *found = _suite_of(suite, True)
        cdef Tls self = Tls._make(found, is_server, read_seq, write_seq, max_fragment)
        cdef prism_tls_half *client = &self._tls.read if is_server else &self._tls.write
        cdef prism_tls_half *server = &self._tls.write if is_server else &self._tls.read
        _copy_exactly(client_secret, client.secret, found.secret_len, "client_secret")
        _copy_exactly(server_secret, server.secret, found.secret_len, "server_secret")
        if prism_tls_derive(client, found) or prism_tls_derive(server, found):
            raise _libcrypto_failed()
        return self

    @staticmethod
    def from_master_secret(
        int suite, master not None, client_random not None, server_random not None, *,
        bint is_server, uint64_t read_seq=1, uint64_t write_seq=1,
        int max_fragment=PRISM_TLS_FRAGMENT
    ):
        cdef const prism_tls_suite *found = _suite_of(suite, False)
        cdef Tls self = Tls._make(found, is_server, read_seq, write_seq, max_fragment)
        cdef prism_tls_half *client = &self._tls.read if is_server else &self._tls.write
        cdef prism_tls_half *server = &self._tls.write if is_server else &self._tls.read
        cdef uint8_t secret[PRISM_TLS_MASTER]
        cdef uint8_t randoms[2 * PRISM_TLS_RANDOM]
        cdef int failed
        try:
            _copy_exactly(master, secret, PRISM_TLS_MASTER, "master")
            _copy_exactly(client_random, randoms, PRISM_TLS_RANDOM, "client_random")
            _copy_exactly(
                server_random, randoms + PRISM_TLS_RANDOM, PRISM_TLS_RANDOM, "server_random"
            )
            failed = prism_tls_key_block(
                found, secret, randoms, randoms + PRISM_TLS_RANDOM, client, server
            )
        finally:
            OPENSSL_cleanse(secret, sizeof(secret))
        if failed:
            raise _libcrypto_failed()
        return self

    @staticmethod
    def from_state(state not None):
        cdef Tls self = Tls.__new__(Tls)
        cdef Py_buffer view
        cdef const char *reason
        PyObject_GetBuffer(state, &view, PyBUF_SIMPLE)
        reason = prism_tls_parse(<const uint8_t *>view.buf, <size_t>view.len, &self._tls)
        PyBuffer_Release(&view)
        if reason != NULL:
            prism_tls_wipe(&self._tls)
            raise TlsError(PRISM_TLS_INTERNAL_ERROR, f"TLS state: {reason.decode('ascii')}")
        return self

    cdef Opened _open(self, object data, const prism_tls_progress *start):
        """Decrypts into a bytes object of the largest possible size, which is cut afterwards."""
        cdef Opened opened = Opened.__new__(Opened)
        cdef Py_buffer view
        cdef PyObject *out = NULL
        cdef uint8_t *octets
        cdef size_t bound, records, length
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            length = <size_t>view.len
            bound = prism_tls_open_bound(
                &self._tls, <const uint8_t *>view.buf, length, &records
            )
            out = _new_bytes(NULL, <Py_ssize_t>bound)
            opened._marks = <prism_tls_mark *>malloc((records or 1) * sizeof(prism_tls_mark))
            if opened._marks == NULL:
                raise MemoryError
            octets = <uint8_t *>_octets(out)
            opened._start = start[0]
            with nogil:
                prism_tls_open(
                    &self._tls, start, <const uint8_t *>view.buf, length, octets,
                    opened._marks, records, &opened._result
                )
                # What a bad record left there is not to be seen by anyone.
                if opened._result.fault.what != NULL:
                    OPENSSL_cleanse(
                        octets + opened._result.plain, bound - opened._result.plain
                    )
            if opened._result.plain != bound:
                _PyBytes_Resize(&out, <Py_ssize_t>opened._result.plain)
            opened.data = <bytes>out
        finally:
            PyBuffer_Release(&view)
            if out != NULL:
                Py_DECREF(out)
        if opened._result.records:
            opened._end = opened._marks[opened._result.records - 1].after
        else:
            opened._end = opened._start
        if opened._result.fault.what != NULL:
            opened.error = _error(&opened._result.fault)
        return opened

    def peek(self, data not None, Opened after=None):
        cdef const prism_tls_progress *start = &self._tls.progress
        self._begin_read()
        try:
            if after is not None:
                if after._end.records < self._tls.progress.records:
                    raise ValueError("records behind these were committed already")
                start = &after._end
            return self._open(data, start)
        finally:
            self._reading = False

    cdef int _commit(self, Opened opened, size_t records) except -1:
        if prism_tls_commit(&self._tls, opened._marks, records) != 0:
            raise _libcrypto_failed()
        return 0

    def commit(self, Opened opened not None, records=None):
        cdef uint64_t now = self._tls.progress.records
        cdef size_t count = opened._result.records
        cdef size_t done
        if records is not None:
            if not 0 <= records <= count:
                raise ValueError(f"{records} of {count} records cannot be committed")
            count = records
        self._begin_read()
        try:
            if not opened._start.records <= now <= opened._end.records:
                raise ValueError("these records do not follow the ones committed last")
            done = <size_t>(now - opened._start.records)
            if count <= done:
                return 0
            self._commit(opened, count)
            return opened._marks[count - 1].cipher_end - (
                opened._marks[done - 1].cipher_end if done else 0
            )
        finally:
            self._reading = False

    def open(self, data not None):
        cdef Opened opened
        self._begin_read()
        try:
            opened = self._open(data, &self._tls.progress)
            self._commit(opened, opened._result.records)
            return opened
        finally:
            self._reading = False

    def note(self, int content_type, data not None):
        cdef prism_tls_fault fault
        cdef Py_buffer view
        cdef int failed
        if content_type != PRISM_TLS_ALERT and content_type != PRISM_TLS_HANDSHAKE:
            raise TlsError(
                PRISM_TLS_UNEXPECTED_MESSAGE, f"TLS: a record of type {content_type} (alert 10)"
            )
        self._begin_read()
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        failed = prism_tls_note(
            &self._tls, <uint8_t>content_type, <const uint8_t *>view.buf, <size_t>view.len, &fault
        )
        PyBuffer_Release(&view)
        self._reading = False
        if failed:
            raise _libcrypto_failed() if fault.what == NULL else _error(&fault)

    cdef bytes _seal(self, prism_tls_job *job, const uint8_t *data, size_t length):
        """Plans and seals; the caller has called ``_begin_write``."""
        cdef prism_tls_fault fault
        cdef bytes out
        cdef uint8_t *octets
        cdef int failed
        if length > PRISM_TLS_CALL_MAX:
            raise ValueError("too much for one call: 1 GiB at most")
        if prism_tls_plan(&self._tls, length, job, &fault) != 0:
            raise _error(&fault)
        out = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>job.size)
        octets = <uint8_t *>PyBytes_AS_STRING(out)
        with nogil:
            failed = prism_tls_seal(&self._tls, job, data, length, octets)
        if failed:
            raise _libcrypto_failed()
        return out

    def seal(self, data not None, int content_type=PRISM_TLS_DATA, *, Py_ssize_t padding=0):
        cdef Py_buffer view
        cdef prism_tls_job job
        _fill_job(&job, content_type, padding)
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            self._begin_write()
            try:
                return self._seal(&job, <const uint8_t *>view.buf, <size_t>view.len)
            finally:
                self._writing = False
        finally:
            PyBuffer_Release(&view)

    def sealed_size(self, Py_ssize_t length):
        cdef prism_tls_job job
        cdef prism_tls_fault fault
        self._check()
        if not 0 <= length <= PRISM_TLS_CALL_MAX:
            raise ValueError("0 octets to 1 GiB in one call")
        _fill_job(&job, PRISM_TLS_DATA, 0)
        if prism_tls_plan(&self._tls, <size_t>length, &job, &fault) != 0:
            raise _error(&fault)
        return job.size

    def seal_file(self, int fd, uint64_t offset, Py_ssize_t length):
        cdef prism_tls_job job
        cdef prism_tls_fault fault
        cdef PyObject *out = NULL
        cdef uint8_t *octets
        cdef size_t taken
        cdef int failed
        if not 0 <= length <= PRISM_TLS_CALL_MAX:
            raise ValueError("0 octets to 1 GiB in one call")
        _fill_job(&job, PRISM_TLS_DATA, 0)
        taken = <size_t>length
        self._begin_write()
        try:
            if prism_tls_plan(&self._tls, taken, &job, &fault) != 0:
                raise _error(&fault)
            out = _new_bytes(NULL, <Py_ssize_t>job.size)
            octets = <uint8_t *>_octets(out)
            with nogil:
                failed = prism_tls_seal_file(&self._tls, &job, fd, offset, &taken, octets)
            if failed < 0:
                raise _libcrypto_failed()
            if failed > 0:
                raise OSError(failed, "the file to be sealed could not be read")
            if taken != <size_t>length:
                _PyBytes_Resize(&out, <Py_ssize_t>job.size)
            return <bytes>out, taken
        finally:
            self._writing = False
            if out != NULL:
                Py_DECREF(out)

    def key_update(self, bint request_update=False):
        cdef prism_tls_job job
        self._check()
        if self._tls.suite.version != PRISM_TLS_1_3:
            raise ValueError("only TLS 1.3 has KeyUpdate")
        _fill_job(&job, PRISM_TLS_DATA, 0)
        job.update = request_update
        self._begin_write()
        try:
            return self._seal(&job, NULL, 0)
        finally:
            self._writing = False

    def alert(self, int description, bint fatal=True):
        cdef prism_tls_job job
        cdef uint8_t message[2]
        cdef bytes out
        if not 0 <= description <= 255:
            raise ValueError(f"{description} is not an alert")
        _fill_job(&job, PRISM_TLS_ALERT, 0)
        message[0] = 2 if fatal else 1
        message[1] = <uint8_t>description
        self._begin_write()
        try:
            out = self._seal(&job, message, 2)
            if fatal or description == PRISM_TLS_CLOSE_NOTIFY:
                self._tls.write_closed = 1
            return out
        finally:
            self._writing = False

    def close_notify(self):
        return self.alert(PRISM_TLS_CLOSE_NOTIFY, False)
