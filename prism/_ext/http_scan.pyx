"""Plain HTTP heads at C's speed; see http_scan.pyi for what the functions promise."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_SetFromErrno
from cpython.tuple cimport PyTuple_New, PyTuple_SET_ITEM
from cpython.ref cimport Py_INCREF
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport int64_t, uint32_t
from libc.string cimport memcpy


cdef extern from "sys/socket.h" nogil:
    enum:
        MSG_DONTWAIT
        MSG_NOSIGNAL
        MSG_PEEK
        MSG_TRUNC
    ssize_t recv(int fd, void *buffer, size_t size, int flags)

    ssize_t send(int fd, const void *data, size_t size, int flags)

cdef extern from "sys/stat.h" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec

    struct stat_result "stat":
        unsigned long st_ino
        long st_size
        timespec st_mtim
        timespec st_ctim

    int stat(const char *path, stat_result *out)

cdef extern from "http_scan.h" nogil:
    enum:
        PRISM_SCAN_FIELDS

    struct prism_span:
        uint32_t begin
        uint32_t size

    struct prism_scan_field:
        prism_span name
        prism_span value

    struct prism_request_scan:
        prism_span method
        prism_span target
        prism_span host
        uint32_t path
        uint32_t length
        int64_t body
        int keep_alive
        int plain_path
        unsigned int fields_count
        prism_scan_field fields[64]

    struct prism_response_scan:
        int status
        uint32_t length
        int64_t body
        int date
        int server
        unsigned int fields_count
        prism_scan_field fields[64]

    int prism_scan_request(const char *data, size_t size, size_t max_target,
                           prism_request_scan *out)
    int prism_scan_response(const char *data, size_t size, prism_response_scan *out)
    int prism_asks_for_less(const char *data, const prism_request_scan *request)


cdef enum:
    BUFFER = 128 * 1024

# One thread of a process relays; what is in it between two calls means nothing.
cdef char _buffer[BUFFER]

cdef dict _METHODS = {method: method for method in (b"GET", b"HEAD", b"PUT", b"DELETE")}


cdef inline bytes _cut(const char *data, prism_span span):
    return PyBytes_FromStringAndSize(data + span.begin, span.size)


cdef inline bytes _lower(const char *data, prism_span span):
    cdef bytes name = PyBytes_FromStringAndSize(NULL, span.size)
    cdef char *to = PyBytes_AS_STRING(name)
    cdef uint32_t i
    cdef char c
    for i in range(span.size):
        c = data[span.begin + i]
        to[i] = c | 0x20 if c'A' <= c <= c'Z' else c
    return name


def scan_request(bytes data not None, object head, object limits, /):
    cdef prism_request_scan found
    cdef const char *text = PyBytes_AS_STRING(data)
    cdef size_t max_head = limits[0]
    cdef unsigned int max_fields = limits[1]
    cdef unsigned int i
    cdef prism_span part
    cdef bytes target, method
    cdef tuple fields, field
    if not prism_scan_request(text, PyBytes_GET_SIZE(data), limits[2], &found):
        return 0
    if found.length > max_head or found.fields_count > max_fields:
        return 0
    fields = PyTuple_New(found.fields_count)
    for i in range(found.fields_count):
        field = (_lower(text, found.fields[i].name), _cut(text, found.fields[i].value))
        Py_INCREF(field)
        PyTuple_SET_ITEM(fields, i, field)
    method = _cut(text, found.method)
    target = _cut(text, found.target)
    head.method = _METHODS[method]
    head.target = target
    if found.path == found.target.size:
        head.path = target
        head.query = b""
    else:
        head.path = target[: found.path]
        head.query = target[found.path + 1 :]
    part.begin = found.target.begin + 1
    part.size = found.path - 1
    head.key = _cut(text, part)
    head.version = 11
    head.host = _cut(text, found.host)
    head.headers = fields
    head.length = found.length
    head.content_length = None if found.body < 0 else found.body
    head.chunked = False
    head.keep_alive = found.keep_alive != 0
    head.expect_continue = False
    head.upgrade = None
    return 1 if found.plain_path else 2


def join_fields(headers, dropped, /):
    cdef list parts = []
    cdef bytes part
    cdef Py_ssize_t size = 0
    cdef bytes joined
    cdef char *to
    for field in headers:
        if field[0] not in dropped:
            parts.append(field)
            size += len(<bytes?>field[0]) + len(<bytes?>field[1]) + 4
    joined = PyBytes_FromStringAndSize(NULL, size)
    to = PyBytes_AS_STRING(joined)
    for field in parts:
        part = <bytes>field[0]
        memcpy(to, PyBytes_AS_STRING(part), PyBytes_GET_SIZE(part))
        to += PyBytes_GET_SIZE(part)
        to[0] = c':'
        to[1] = c' '
        part = <bytes>field[1]
        memcpy(to + 2, PyBytes_AS_STRING(part), PyBytes_GET_SIZE(part))
        to += 2 + PyBytes_GET_SIZE(part)
        to[0] = c'\r'
        to[1] = c'\n'
        to += 2
    return joined


cdef ssize_t _receive(int fd, size_t limit, int flags) except -2:
    """Octets now in the buffer; -1: there are none yet."""
    cdef ssize_t size
    while True:
        size = recv(fd, _buffer, limit, flags | MSG_DONTWAIT)
        if size >= 0:
            return size
        if errno == EAGAIN:
            return -1
        if errno != EINTR:
            PyErr_SetFromErrno(OSError)


def peek(int fd, Py_ssize_t limit, /):
    cdef ssize_t size
    if limit > BUFFER or limit < 0:
        limit = BUFFER
    size = _receive(fd, limit, MSG_PEEK)
    if size < 0:
        raise BlockingIOError(EAGAIN, "nothing to read now")
    return PyBytes_FromStringAndSize(_buffer, size)


def take(int fd, Py_ssize_t limit, /):
    cdef ssize_t size
    if limit > BUFFER or limit < 0:
        limit = BUFFER
    size = _receive(fd, limit, 0)
    if size < 0:
        raise BlockingIOError(EAGAIN, "nothing to read now")
    return PyBytes_FromStringAndSize(_buffer, size)


def drop(int fd, size_t n, /):
    cdef ssize_t size
    while True:
        size = recv(fd, NULL, n, MSG_TRUNC | MSG_DONTWAIT)
        if size >= 0:
            return size
        if errno == EAGAIN:
            return 0
        if errno != EINTR:
            PyErr_SetFromErrno(OSError)


def quiet(int fd, /):
    cdef char octet
    cdef ssize_t size
    while True:
        size = recv(fd, &octet, 1, MSG_PEEK | MSG_DONTWAIT)
        if size >= 0 or errno != EINTR:
            return size < 0 and errno == EAGAIN


def receive_response(
    int fd,
    dict status_lines not None,
    bint bodiless,
    bytes date not None,
    bytes server not None,
    bytes tail not None,
    /,
):
    cdef ssize_t size = _receive(fd, BUFFER, 0)
    if size < 0:
        return None
    return _rewrite(_buffer, size, status_lines, bodiless, date, server, tail)


def rewrite_response(
    bytes data not None,
    dict status_lines not None,
    bint bodiless,
    bytes date not None,
    bytes server not None,
    bytes tail not None,
    /,
):
    return _rewrite(
        PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), status_lines, bodiless, date, server, tail
    )


cdef inline char *_put(char *to, bytes part) noexcept:
    memcpy(to, PyBytes_AS_STRING(part), PyBytes_GET_SIZE(part))
    return to + PyBytes_GET_SIZE(part)


cdef object _rewrite(
    const char *data, Py_ssize_t size, dict lines, bint bodiless, bytes date, bytes server,
    bytes tail
):
    """A tuple for the client, or the octets as they are, for the full parser."""
    cdef prism_response_scan found
    cdef bytes line, length, made
    cdef Py_ssize_t body, total
    cdef int64_t due
    cdef unsigned int i
    cdef char *to
    if not prism_scan_response(data, size, &found):
        return PyBytes_FromStringAndSize(data, size)
    line = lines.get(found.status)
    body = size - found.length
    due = 0 if bodiless else found.body
    if line is None or body > due:
        return PyBytes_FromStringAndSize(data, size)
    if found.date:
        date = b""
    if found.server:
        server = b""
    length = b"Content-Length: %d\r\n" % found.body
    total = len(line) + len(date) + len(server) + len(length) + len(tail) + 2 + body
    for i in range(found.fields_count):
        total += found.fields[i].name.size + found.fields[i].value.size + 4
    made = PyBytes_FromStringAndSize(NULL, total)
    to = _put(PyBytes_AS_STRING(made), line)
    for i in range(found.fields_count):
        memcpy(to, data + found.fields[i].name.begin, found.fields[i].name.size)
        to += found.fields[i].name.size
        to[0] = c':'
        to[1] = c' '
        to += 2
        memcpy(to, data + found.fields[i].value.begin, found.fields[i].value.size)
        to += found.fields[i].value.size
        to[0] = c'\r'
        to[1] = c'\n'
        to += 2
    to = _put(_put(_put(_put(to, date), server), length), tail)
    to[0] = c'\r'
    to[1] = c'\n'
    memcpy(to + 2, data + found.length, body)
    return found.status, made, body, due - body


cdef bint _is_current(tuple entry):
    """Whether the file is still the one that an entry was made from."""
    cdef stat_result now
    cdef tuple stamp = <tuple?>entry[0]
    if stat(PyBytes_AS_STRING(<bytes?>entry[3]), &now) != 0:
        return False
    return (
        <unsigned long>stamp[0] == now.st_ino
        and <long>stamp[1] == now.st_size
        and <long long>stamp[2] == now.st_mtim.tv_sec * 1000000000LL + now.st_mtim.tv_nsec
        and <long long>stamp[3] == now.st_ctim.tv_sec * 1000000000LL + now.st_ctim.tv_nsec
    )


def answer_ready(int fd, dict entries not None, object limits, bytes server, bytes date, /):
    cdef prism_request_scan found
    cdef prism_span part
    cdef ssize_t size, sent
    cdef unsigned int max_fields = limits[1]
    cdef bytes key, body, data
    cdef object entry
    size = recv(fd, _buffer, BUFFER, MSG_PEEK | MSG_DONTWAIT)
    if size <= 0 or not prism_scan_request(_buffer, size, limits[2], &found):
        return None
    if (
        not found.plain_path
        or not found.keep_alive
        or found.body > 0
        or found.method.size != 3
        or _buffer[0] != c'G'
        or found.length > <size_t>limits[0]
        or found.fields_count > max_fields
        or prism_asks_for_less(_buffer, &found)
    ):
        return None
    part.begin = found.target.begin + 1
    part.size = found.path - 1
    key = _cut(_buffer, part)
    entry = entries.get(key)
    if entry is None or not _is_current(<tuple>entry):
        return None
    entries[key] = entries.pop(key)  # the one used last
    body = <bytes?>entry[2]
    data = b"HTTP/1.1 200 OK\r\n%b%b%bContent-Length: %d\r\n\r\n%b" % (
        entry[1], date, server, PyBytes_GET_SIZE(body), body
    )
    # What is left of a response that does not fit is sent by the caller.
    if recv(fd, NULL, found.length, MSG_TRUNC | MSG_DONTWAIT) != <ssize_t>found.length:
        return None
    sent = send(fd, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), MSG_DONTWAIT | MSG_NOSIGNAL)
    if sent < 0:
        if errno != EAGAIN and errno != EINTR:
            PyErr_SetFromErrno(OSError)
        sent = 0
    return PyBytes_GET_SIZE(body), data[sent:], size > <ssize_t>found.length
