"""The TLS record layer after the handshake; see tls_record.pyi and src/tls_record.h."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset


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
    enum: PRISM_TLS_DATA
    enum: PRISM_TLS_CLOSE_NOTIFY
    enum: PRISM_TLS_INTERNAL_ERROR

    cdef struct prism_tls_progress:
        uint64_t seq, updates, records
        uint8_t closed, alert

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


STATE_VERSION = PRISM_TLS_STATE_VERSION
STATE_SIZE = PRISM_TLS_STATE_SIZE
MAX_FRAGMENT = PRISM_TLS_FRAGMENT
TX = 1
RX = 2

if prism_tls_init() != 0:
    raise ImportError("libcrypto has no AES-GCM or no ChaCha20-Poly1305")


class TlsError(ValueError):
    """A record, a message or a state that breaks the protocol."""

    def __init__(self, alert, text):
        super().__init__(text)
        self.alert = alert

    def __reduce__(self):
        return TlsError, (self.alert, self.args[0])


cdef object _error(const prism_tls_fault *fault):
    return TlsError(fault.alert, f"TLS: {fault.what.decode('ascii')} (alert {fault.alert})")


cdef object _libcrypto_failed():
    return TlsError(PRISM_TLS_INTERNAL_ERROR, "TLS: libcrypto failed")


cdef int _copy_exactly(object source, uint8_t *target, size_t size, str name) except -1:
    cdef Py_buffer view
    PyObject_GetBuffer(source, &view, PyBUF_SIMPLE)
    try:
        if <size_t>view.len != size:
            raise ValueError(f"{name} must have {size} octets, not {view.len}")
        memcpy(target, view.buf, size)
    finally:
        PyBuffer_Release(&view)
    return 0


cdef const prism_tls_suite *_suite_of(int number, bint is_1_3) except NULL:
    cdef const prism_tls_suite *suite = NULL
    if 0 <= number <= 0xFFFF:
        suite = prism_tls_find_suite(<unsigned int>number)
    if suite == NULL or (suite.version == PRISM_TLS_1_3) != is_1_3:
        version = "1.3" if is_1_3 else "1.2"
        raise ValueError(f"{number:#06x} is not an AEAD cipher suite of TLS {version} known here")
    return suite


cdef class Opened:
    cdef prism_tls_mark *_marks
    cdef prism_tls_opened _result
    cdef prism_tls_progress _start
    cdef prism_tls_progress _end
    cdef readonly bytes data
    cdef readonly object error

    def __init__(self):
        raise TypeError("use Tls.peek() or Tls.open()")

    def __dealloc__(self):
        free(self._marks)

    def __repr__(self):
        return (
            f"<Opened {self._result.records} records: {self._result.consumed} octets, "
            f"{self._result.plain} of data{', closed' if self._end.closed else ''}"
            f"{', failed' if self.error is not None else ''}>"
        )

    @property
    def records(self):
        return self._result.records

    @property
    def consumed(self):
        return self._result.consumed

    @property
    def wanted(self):
        return self._result.wanted

    @property
    def closed(self):
        return bool(self._end.closed)

    @property
    def alert(self):
        return self._end.alert if self._end.closed else None

    @property
    def ends(self):
        cdef size_t i
        return [
            (self._marks[i].type, self._marks[i].plain_end, self._marks[i].cipher_end)
            for i in range(self._result.records)
        ]

    def cut(self, Py_ssize_t octets):
        """The first mark with enough plaintext, by bisection."""
        cdef size_t low = 0
        cdef size_t high = self._result.records
        cdef size_t middle
        if octets < 0 or <size_t>octets > self._result.plain:
            raise ValueError(f"{octets} is more than the {self._result.plain} octets opened")
        if octets == 0:
            return 0, 0, 0
        while low < high:
            middle = (low + high) // 2
            if self._marks[middle].plain_end < <size_t>octets:
                low = middle + 1
            else:
                high = middle
        return low + 1, self._marks[low].cipher_end, self._marks[low].plain_end


cdef class Tls:
    cdef prism_tls _tls
    cdef bint _reading, _writing  # a call without the GIL is under way

    def __init__(self):
        raise TypeError("use from_traffic_secrets(), from_master_secret() or from_state()")

    def __dealloc__(self):
        prism_tls_wipe(&self._tls)

    def __reduce__(self):
        raise TypeError("keys are not to be pickled; use state()")

    def __repr__(self):
        if self._tls.suite == NULL:
            return "<Tls wiped>"
        return (
            f"<Tls {'server' if self._tls.is_server else 'client'} "
            f"{'1.3' if self._tls.suite.version == PRISM_TLS_1_3 else '1.2'} "
            f"suite {self._tls.suite.id:#06x}: read {self._tls.progress.seq}, "
            f"write {self._tls.write.seq}>"
        )

    cdef int _check(self) except -1:
        if self._tls.suite == NULL:
            raise ValueError("the TLS state was wiped")
        return 0

    cdef int _begin_read(self) except -1:
        self._check()
        if self._reading:
            raise RuntimeError("another thread reads from this connection")
        self._reading = True
        return 0

    cdef int _begin_write(self) except -1:
        self._check()
        if self._writing:
            raise RuntimeError("another thread writes to this connection")
        self._writing = True
        return 0

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

    def state(self):
        self._check()
        if self._reading or self._writing:
            raise RuntimeError("another thread uses this connection")
        cdef bytes out = PyBytes_FromStringAndSize(NULL, PRISM_TLS_STATE_SIZE)
        prism_tls_pack(&self._tls, <uint8_t *>PyBytes_AS_STRING(out))
        return out

    @property
    def version(self):
        self._check()
        return self._tls.suite.version

    @property
    def suite(self):
        self._check()
        return self._tls.suite.id

    @property
    def is_server(self):
        return bool(self._tls.is_server)

    @property
    def max_fragment(self):
        return self._tls.max_fragment

    @property
    def read_seq(self):
        return self._tls.progress.seq

    @property
    def write_seq(self):
        return self._tls.write.seq

    @property
    def read_closed(self):
        return bool(self._tls.progress.closed)

    @property
    def write_closed(self):
        return bool(self._tls.write_closed)

    @property
    def owes(self):
        return bool(self._tls.owes)

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

    def crypto_info(self, int direction):
        cdef uint8_t info[PRISM_TLS_CRYPTO_INFO_MAX]
        cdef size_t size
        self._check()
        if direction != 1 and direction != 2:
            raise ValueError("the direction is TX or RX")
        size = prism_tls_crypto_info(&self._tls, direction == 1, info)
        out = PyBytes_FromStringAndSize(<const char *>info, <Py_ssize_t>size)
        OPENSSL_cleanse(info, sizeof(info))
        return out

    def sync(self, int direction, info not None):
        cdef Py_buffer view
        cdef const char *reason
        if direction != 1 and direction != 2:
            raise ValueError("the direction is TX or RX")
        self._check()
        if self._reading or self._writing:
            raise RuntimeError("another thread uses this connection")
        PyObject_GetBuffer(info, &view, PyBUF_SIMPLE)
        reason = prism_tls_sync(
            &self._tls, direction == 1, <const uint8_t *>view.buf, <size_t>view.len
        )
        PyBuffer_Release(&view)
        if reason != NULL:
            raise TlsError(
                PRISM_TLS_INTERNAL_ERROR, f"TLS: the kernel's state is {reason.decode('ascii')}"
            )

    def wipe(self):
        if self._reading or self._writing:
            raise RuntimeError("another thread uses this connection")
        prism_tls_wipe(&self._tls)


cdef int _fill_job(prism_tls_job *job, int content_type, Py_ssize_t padding) except -1:
    if not 0 <= content_type <= 255:
        raise ValueError(f"{content_type} is not a content type")
    if padding < 0:
        raise ValueError("padding cannot be negative")
    memset(job, 0, sizeof(job[0]))
    job.type = <uint8_t>content_type
    job.padding = <size_t>padding
    job.update = -1
    return 0


cdef size_t _hash_length(str name) except 0:
    if name == "sha256":
        return 32
    if name == "sha384":
        return 48
    raise ValueError(f"{name!r} is neither sha256 nor sha384")


def hkdf_expand(str hash_name not None, bytes prk not None, bytes info not None, int length):
    cdef size_t hash_len = _hash_length(hash_name)
    cdef bytes out
    if not 0 <= length <= <int>(255 * hash_len) or len(info) > 512:
        raise ValueError("length or info out of range")
    out = PyBytes_FromStringAndSize(NULL, length)
    if prism_tls_hkdf_expand(
        hash_len, <const uint8_t *>PyBytes_AS_STRING(prk), len(prk),
        <const uint8_t *>PyBytes_AS_STRING(info), len(info),
        <uint8_t *>PyBytes_AS_STRING(out), <size_t>length
    ):
        raise _libcrypto_failed()
    return out


def expand_label(str hash_name not None, bytes secret not None, str label not None, int length):
    cdef size_t hash_len = _hash_length(hash_name)
    cdef bytes text = label.encode("ascii")
    cdef bytes out
    if len(secret) != <Py_ssize_t>hash_len:
        raise ValueError(f"the secret must have {hash_len} octets")
    if not 0 <= length <= <int>(255 * hash_len) or len(text) > 32:
        raise ValueError("length or label out of range")
    out = PyBytes_FromStringAndSize(NULL, length)
    if prism_tls_expand_label(
        hash_len, <const uint8_t *>PyBytes_AS_STRING(secret), PyBytes_AS_STRING(text),
        <uint8_t *>PyBytes_AS_STRING(out), <size_t>length
    ):
        raise _libcrypto_failed()
    return out


def prf(str hash_name not None, bytes secret not None, str label not None, bytes seed not None,
        int length):
    cdef size_t hash_len = _hash_length(hash_name)
    cdef bytes text = label.encode("ascii")
    cdef bytes out
    if length < 0 or len(text) + len(seed) > 128:
        raise ValueError("length, label or seed out of range")
    out = PyBytes_FromStringAndSize(NULL, length)
    if prism_tls_prf(
        hash_len, <const uint8_t *>PyBytes_AS_STRING(secret), len(secret),
        PyBytes_AS_STRING(text), <const uint8_t *>PyBytes_AS_STRING(seed), len(seed),
        <uint8_t *>PyBytes_AS_STRING(out), <size_t>length
    ):
        raise _libcrypto_failed()
    return out
