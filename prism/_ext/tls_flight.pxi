# Which records of a handshake are fed to OpenSSL together; part of tls_record.pyx.


def flight(bytes data not None, bint begun, /):
    cdef const uint8_t *octets = <const uint8_t *>PyBytes_AS_STRING(data)
    cdef Py_ssize_t size = len(data), at = 0, bad = -1, end
    cdef int front = 0  # the type of the last record that waits for those behind it
    cdef int kind
    cdef Py_ssize_t length
    cdef list ends = []
    while True:
        end = at + 5
        if end > size:
            break
        kind = octets[at]
        length = octets[at + 3] << 8 | octets[at + 4]
        if not 20 <= kind <= 23 or octets[at + 1] != 3 or length > PRISM_TLS_FRAGMENT + 256:
            bad = at
            break
        end += length
        if end > size:
            break
        at = end
        if kind == 20:
            if front != 20:
                front = 20
                continue
        elif at < size and octets[at] == 20 and front == 0 and begun:
            front = kind
            continue
        ends.append(at)
        front = 0
        begun = True
    return ends, end, bad
