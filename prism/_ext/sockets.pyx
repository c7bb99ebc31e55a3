"""System calls of a connection's start, without the objects around them; see sockets.pyi."""

import os

from libc.errno cimport EAGAIN, errno
from libc.stdint cimport uint8_t, uint16_t, uint64_t
from libc.string cimport memcmp


cdef extern from "<netinet/in.h>" nogil:
    ctypedef unsigned int socklen_t

    struct in_addr:
        pass

    struct in6_addr:
        uint8_t s6_addr[16]

    struct sockaddr:
        uint16_t sa_family

    struct sockaddr_in:
        uint16_t sin_port
        in_addr sin_addr

    struct sockaddr_in6:
        uint16_t sin6_port
        in6_addr sin6_addr

    enum:
        AF_INET
        AF_INET6

    uint16_t ntohs(uint16_t)

cdef extern from "<arpa/inet.h>" nogil:
    const char *inet_ntop(int family, const void *address, char *text, socklen_t size)

cdef extern from "<sys/socket.h>" nogil:  # Python.h asks for GNU's extensions
    int SOCK_NONBLOCK
    int SOCK_CLOEXEC
    int SOL_SOCKET
    int SO_COOKIE
    int accept4(int fd, sockaddr *address, socklen_t *size, int flags)
    int getsockopt(int fd, int level, int option, void *value, socklen_t *size)


cdef union _Address:
    sockaddr any
    sockaddr_in v4
    sockaddr_in6 v6
    uint8_t room[128]


def accept(int fd, /):
    cdef _Address address
    cdef socklen_t size = sizeof(address)
    cdef char text[64]
    cdef int accepted
    cdef const uint8_t *octets
    with nogil:
        accepted = accept4(fd, &address.any, &size, SOCK_NONBLOCK | SOCK_CLOEXEC)
    if accepted < 0:
        if errno == EAGAIN:
            return None
        raise OSError(errno, f"accept: {os.strerror(errno)}")
    if address.any.sa_family == AF_INET:
        inet_ntop(AF_INET, &address.v4.sin_addr, text, sizeof(text))
        return accepted, text.decode("ascii"), ntohs(address.v4.sin_port)
    octets = address.v6.sin6_addr.s6_addr
    if memcmp(octets, b"\0\0\0\0\0\0\0\0\0\0\xff\xff", 12) == 0:
        inet_ntop(AF_INET, octets + 12, text, sizeof(text))
    else:
        inet_ntop(AF_INET6, octets, text, sizeof(text))
    return accepted, text.decode("ascii"), ntohs(address.v6.sin6_port)


def cookie_of(int fd, /):
    cdef uint64_t value = 0
    cdef socklen_t size = sizeof(value)
    if getsockopt(fd, SOL_SOCKET, SO_COOKIE, &value, &size) < 0:
        raise OSError(errno, f"SO_COOKIE: {os.strerror(errno)}")
    return value
