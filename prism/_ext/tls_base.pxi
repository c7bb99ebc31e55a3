# Errors, arguments, and the state of a connection; part of tls_record.pyx.


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


cdef class _Connection:
    """What both directions share, and what travels."""

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

    @property
    def in_message(self):
        return self._tls.progress.hs_have != 0

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
