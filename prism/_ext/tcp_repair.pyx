"""Freezes, serialises and rebuilds TCP connections; see tcp_repair.pyi and src/tcp_state.h."""

import os

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy, memset


cdef extern from "<arpa/inet.h>" nogil:
    int AF_INET
    int AF_INET6
    int inet_pton(int family, const char *text, void *address)
    const char *inet_ntop(int family, const void *address, char *text, unsigned int size)


cdef extern from "tcp_state.h" nogil:
    enum: PRISM_TCP_VERSION
    enum: PRISM_TCP_HEADER
    enum: PRISM_TCP_HALF_CLOSED
    enum: PRISM_TCP_TIMESTAMPS
    enum: PRISM_TCP_SACK
    enum: PRISM_TCP_WSCALE

    cdef enum prism_tcp_result:
        PRISM_TCP_OK
        PRISM_TCP_OS_ERROR
        PRISM_TCP_NOT_CARRIABLE
        PRISM_TCP_BAD_STATE

    cdef struct prism_fault:
        int error
        const char *what

    cdef struct prism_tcp_state:
        uint8_t flags, family, options, buf_lock
        uint8_t local[16]
        uint8_t peer[16]
        uint16_t local_port, peer_port, mss
        uint8_t snd_wscale, rcv_wscale
        uint32_t timestamp, snd_una, rcv_nxt
        uint32_t snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup
        uint32_t recv_len, send_len, unsent_len
        uint32_t window_clamp, rcvbuf, sndbuf

    bint prism_is_v4_mapped(const uint8_t *address)
    prism_tcp_result prism_tcp_parse(
        const uint8_t *data, size_t length, prism_tcp_state *state, prism_fault *fault
    )


cdef extern from "tcp_repair.h" nogil:
    cdef struct prism_blob:
        uint8_t *data
        size_t capacity, length
        int allocated

    cdef struct prism_import:
        int fd, buffers_moved
        uint16_t port

    prism_tcp_result prism_tcp_freeze(int fd, prism_fault *fault)
    prism_tcp_result prism_tcp_resume(int fd, int probe, prism_fault *fault)
    void prism_tcp_close_quietly(int fd)
    prism_tcp_result prism_tcp_narrow(
        int fd, uint32_t octets, uint32_t *clamp, prism_fault *fault
    )
    prism_tcp_result prism_tcp_export(int fd, prism_blob *blob, prism_fault *fault)
    void prism_blob_free(prism_blob *blob)
    prism_tcp_result prism_tcp_import(
        const prism_tcp_state *state, const uint8_t *payload, const uint8_t *local,
        uint16_t port, unsigned int alternatives, prism_import *imported, prism_fault *fault
    )
    prism_tcp_result prism_tcp_activate(
        const prism_import *imported, const prism_tcp_state *state, const uint8_t *payload,
        const uint8_t *local, int probe, prism_fault *fault
    )


VERSION = PRISM_TCP_VERSION
HEADER_SIZE = PRISM_TCP_HEADER


class StateError(ValueError):
    """Bytes that are not a TCP state this version can restore."""


class NotCarriable(OSError):
    """The connection is in a state that cannot be carried over."""


cdef object _error(prism_tcp_result result, prism_fault *fault):
    what = fault.what.decode("ascii")
    if result == PRISM_TCP_BAD_STATE:
        return StateError(f"TCP state {what}" if not what.startswith("not ") else what)
    if result == PRISM_TCP_NOT_CARRIABLE:
        return NotCarriable(fault.error, f"the connection cannot be carried: {what}")
    return OSError(fault.error, f"{what}: {os.strerror(fault.error)}")


cdef str _text(const uint8_t *address):
    cdef char text[64]
    if prism_is_v4_mapped(address):
        inet_ntop(AF_INET, address + 12, text, sizeof(text))
    else:
        inet_ntop(AF_INET6, address, text, sizeof(text))
    return text.decode("ascii")


cdef int _pack_address(str address, uint8_t *packed) except -1:
    """The 16-octet form; inet_pton(3) decides what an address is."""
    cdef bytes text = address.encode("ascii", "replace")
    memset(packed, 0, 10)
    packed[10] = packed[11] = 0xFF
    if b"\0" not in text:
        if inet_pton(AF_INET, text, packed + 12) == 1 or inet_pton(AF_INET6, text, packed) == 1:
            return 0
    raise ValueError(f"{address!r} is not an IP address")


def freeze(int fd):
    cdef prism_fault fault
    cdef prism_tcp_result result
    with nogil:
        result = prism_tcp_freeze(fd, &fault)
    if result != PRISM_TCP_OK:
        raise _error(result, &fault)


def resume(int fd, *, bint probe=True):
    cdef prism_fault fault
    cdef prism_tcp_result result
    with nogil:
        result = prism_tcp_resume(fd, probe, &fault)
    if result != PRISM_TCP_OK:
        raise _error(result, &fault)


def probe(int fd):
    cdef prism_fault fault
    cdef prism_tcp_result result
    with nogil:
        result = prism_tcp_freeze(fd, &fault)
        if result == PRISM_TCP_OK:
            result = prism_tcp_resume(fd, 1, &fault)
    if result != PRISM_TCP_OK:
        raise _error(result, &fault)


def narrow(int fd, int octets):
    cdef prism_fault fault
    cdef prism_tcp_result result
    cdef uint32_t clamp
    if not 4096 <= octets <= 1 << 30:
        raise ValueError(f"octets must be 4096 to 2**30, not {octets}")
    with nogil:
        result = prism_tcp_narrow(fd, <uint32_t>octets, &clamp, &fault)
    if result != PRISM_TCP_OK:
        raise _error(result, &fault)
    return clamp


def close_quietly(int fd):
    with nogil:
        prism_tcp_close_quietly(fd)


def export_state(int fd):
    cdef uint8_t scratch[16384]
    cdef prism_blob blob
    cdef prism_fault fault
    cdef prism_tcp_result result
    blob.data = scratch
    blob.capacity = sizeof(scratch)
    blob.length = 0
    blob.allocated = 0
    with nogil:
        result = prism_tcp_export(fd, &blob, &fault)
    try:
        if result != PRISM_TCP_OK:
            raise _error(result, &fault)
        return PyBytes_FromStringAndSize(<const char *>blob.data, <Py_ssize_t>blob.length)
    finally:
        prism_blob_free(&blob)


cdef class Imported:
    cdef prism_import _import
    cdef prism_tcp_state _state
    cdef uint8_t _local[16]
    cdef bytes _bytes  # keeps the queues until they are sent

    def __cinit__(self):
        self._import.fd = -1

    def __init__(self):
        raise TypeError("use import_state()")

    def __dealloc__(self):
        if self._import.fd >= 0:
            prism_tcp_close_quietly(self._import.fd)

    def __repr__(self):
        life = "gone" if self._import.fd < 0 else "frozen"
        return f"<Imported {life}: {_text(self._state.peer)} port {self._state.peer_port}>"

    @property
    def local(self):
        return _text(self._local), self._import.port

    @property
    def peer(self):
        return _text(self._state.peer), self._state.peer_port

    @property
    def half_closed(self):
        return bool(self._state.flags & PRISM_TCP_HALF_CLOSED)

    @property
    def unsent(self):
        return self._state.unsent_len

    @property
    def unacknowledged(self):
        return self._state.send_len - self._state.unsent_len

    @property
    def received(self):
        return self._state.recv_len

    def fileno(self):
        return self._import.fd

    def activate(self, *, probe=None):
        cdef prism_import imported = self._import
        cdef prism_fault fault
        cdef prism_tcp_result result
        cdef int how = -1 if probe is None else bool(probe)
        cdef const uint8_t *payload
        if imported.fd < 0:
            raise ValueError("the imported connection has been activated or discarded already")
        payload = <const uint8_t *>PyBytes_AS_STRING(self._bytes) + PRISM_TCP_HEADER
        self._import.fd = -1
        with nogil:
            result = prism_tcp_activate(
                &imported, &self._state, payload, self._local, how, &fault
            )
            if result != PRISM_TCP_OK:
                prism_tcp_close_quietly(imported.fd)
        self._bytes = None
        if result != PRISM_TCP_OK:
            raise _error(result, &fault)
        return imported.fd

    def discard(self):
        cdef int fd = self._import.fd
        self._import.fd = -1
        self._bytes = None
        if fd >= 0:
            with nogil:
                prism_tcp_close_quietly(fd)


cdef int _parse(bytes state, prism_tcp_state *parsed) except -1:
    cdef prism_fault fault
    cdef prism_tcp_result result = prism_tcp_parse(
        <const uint8_t *>PyBytes_AS_STRING(state), PyBytes_GET_SIZE(state), parsed, &fault
    )
    if result != PRISM_TCP_OK:
        raise _error(result, &fault)
    return 0


def import_state(bytes state not None, str address not None, int port, *, int alternatives=16):
    cdef Imported imported = Imported.__new__(Imported)
    cdef prism_fault fault
    cdef prism_tcp_result result
    cdef const uint8_t *payload
    if not 0 < port < 65536:
        raise ValueError(f"{port} is not a port")
    if not 0 <= alternatives <= 1024:
        raise ValueError(f"alternatives must be 0 to 1024, not {alternatives}")
    _parse(state, &imported._state)
    _pack_address(address, imported._local)
    if prism_is_v4_mapped(imported._local) != (imported._state.family == 4):
        raise ValueError(f"{address} is of another family than the connection")
    payload = <const uint8_t *>PyBytes_AS_STRING(state) + PRISM_TCP_HEADER
    with nogil:
        result = prism_tcp_import(
            &imported._state, payload, imported._local, <uint16_t>port,
            <unsigned int>alternatives, &imported._import, &fault
        )
    if result != PRISM_TCP_OK:
        raise _error(result, &fault)
    imported._bytes = state
    return imported


def describe(bytes state not None):
    cdef prism_tcp_state parsed
    _parse(state, &parsed)
    return {
        "local": _text(parsed.local),
        "local_port": parsed.local_port,
        "peer": _text(parsed.peer),
        "peer_port": parsed.peer_port,
        "family": parsed.family,
        "half_closed": bool(parsed.flags & PRISM_TCP_HALF_CLOSED),
        "timestamps": bool(parsed.options & PRISM_TCP_TIMESTAMPS),
        "sack": bool(parsed.options & PRISM_TCP_SACK),
        "window_scaling": bool(parsed.options & PRISM_TCP_WSCALE),
        "snd_wscale": parsed.snd_wscale,
        "rcv_wscale": parsed.rcv_wscale,
        "mss": parsed.mss,
        "timestamp": parsed.timestamp,
        "snd_una": parsed.snd_una,
        "rcv_nxt": parsed.rcv_nxt,
        "snd_wl1": parsed.snd_wl1,
        "snd_wnd": parsed.snd_wnd,
        "max_window": parsed.max_window,
        "rcv_wnd": parsed.rcv_wnd,
        "rcv_wup": parsed.rcv_wup,
        "receive_queue": parsed.recv_len,
        "send_queue": parsed.send_len,
        "unsent": parsed.unsent_len,
        "window_clamp": parsed.window_clamp,
        "receive_buffer": parsed.rcvbuf,
        "send_buffer": parsed.sndbuf,
        "buffers_fixed": parsed.buf_lock,
    }
