"""The control datagram's hot parts; see control.pyi for what the functions promise."""

from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_GET_SIZE
from cpython.bytes cimport (
    PyBytes_AS_STRING,
    PyBytes_FromStringAndSize,
    PyBytes_GET_SIZE,
)
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy


cdef extern from "arpa/inet.h" nogil:
    uint16_t htons(uint16_t)
    uint16_t ntohs(uint16_t)
    uint32_t htonl(uint32_t)
    uint32_t ntohl(uint32_t)

cdef extern from "endian.h" nogil:
    uint64_t htobe64(uint64_t)
    uint64_t be64toh(uint64_t)

cdef extern from "siphash.h" nogil:
    struct prism_datagram:
        uint16_t size
        uint8_t data[1472]

    struct prism_exchange:
        unsigned int others_count
        int answered
        prism_datagram answer
        prism_datagram others[16]

    uint64_t prism_siphash24(const uint8_t *key, const uint8_t *data, size_t size)
    int c_exchange "prism_exchange"(int fd, const uint8_t *request, size_t size,
                                    unsigned int wait_us, prism_exchange *result)

cdef extern from "prism_abi.h" nogil:
    enum:
        PRISM_MAGIC
        PRISM_VERSION
        PRISM_MSG_SIZE
        PRISM_MAC_OFFSET

    struct prism_flow:
        uint8_t client_addr[16]

    struct prism_msg:
        uint32_t magic
        uint8_t version
        uint8_t op
        uint8_t status
        uint8_t flags
        uint64_t node
        uint64_t seq
        prism_flow flow
        uint16_t owner_port
        uint8_t owner_mac[6]
        uint32_t reserved
        uint8_t owner_addr[16]
        uint64_t owner
        uint64_t gen
        uint64_t cookie
        uint64_t mac

cdef enum:
    FLOW_SIZE = 36


cdef const uint8_t *_key(bytes key) except NULL:
    if PyBytes_GET_SIZE(key) != 16:
        raise ValueError("a cluster key has 16 octets, not %d" % len(key))
    return <const uint8_t *>PyBytes_AS_STRING(key)


def siphash24(bytes key not None, bytes data not None):
    return prism_siphash24(
        _key(key), <const uint8_t *>PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data)
    )


def sign(bytes key not None, bytearray message not None):
    cdef const uint8_t *secret = _key(key)
    cdef prism_msg *raw
    if PyByteArray_GET_SIZE(message) != PRISM_MSG_SIZE:
        raise ValueError("a control message has 120 octets, not %d" % len(message))
    raw = <prism_msg *>PyByteArray_AS_STRING(message)
    raw.mac = htobe64(prism_siphash24(secret, <const uint8_t *>raw, PRISM_MAC_OFFSET))


def verify(bytes key not None, bytes message not None):
    cdef const uint8_t *secret = _key(key)
    cdef const prism_msg *raw
    if PyBytes_GET_SIZE(message) != PRISM_MSG_SIZE:
        return False
    raw = <const prism_msg *>PyBytes_AS_STRING(message)
    # One comparison of two machine words: no early exit to time.
    return raw.mac == htobe64(prism_siphash24(secret, <const uint8_t *>raw, PRISM_MAC_OFFSET))


def build(
    bytes key not None,
    uint8_t op,
    uint8_t status,
    uint8_t flags,
    uint64_t node,
    uint64_t seq,
    bytes flow not None,
    bytes owner_addr not None,
    uint16_t owner_port,
    bytes owner_mac not None,
    uint64_t owner,
    uint64_t gen,
    uint64_t cookie,
    /,
):
    cdef const uint8_t *secret = _key(key)
    cdef bytes message
    cdef prism_msg *raw
    if (
        PyBytes_GET_SIZE(flow) != FLOW_SIZE
        or PyBytes_GET_SIZE(owner_addr) != 16
        or PyBytes_GET_SIZE(owner_mac) != 6
    ):
        raise ValueError("a flow has 36 octets, an address 16, a MAC address 6")
    message = PyBytes_FromStringAndSize(NULL, PRISM_MSG_SIZE)
    raw = <prism_msg *>PyBytes_AS_STRING(message)
    raw.magic = htonl(PRISM_MAGIC)
    raw.version = PRISM_VERSION
    raw.op = op
    raw.status = status
    raw.flags = flags
    raw.node = htobe64(node)
    raw.seq = htobe64(seq)
    memcpy(&raw.flow, PyBytes_AS_STRING(flow), FLOW_SIZE)
    raw.owner_port = htons(owner_port)
    memcpy(raw.owner_mac, PyBytes_AS_STRING(owner_mac), 6)
    raw.reserved = 0
    memcpy(raw.owner_addr, PyBytes_AS_STRING(owner_addr), 16)
    raw.owner = htobe64(owner)
    raw.gen = htobe64(gen)
    raw.cookie = htobe64(cookie)
    raw.mac = htobe64(prism_siphash24(secret, <const uint8_t *>raw, PRISM_MAC_OFFSET))
    return message


def parse(bytes key not None, bytes data not None, Py_ssize_t offset=0, /):
    cdef const uint8_t *secret = _key(key)
    cdef const prism_msg *raw
    if offset < 0 or PyBytes_GET_SIZE(data) - offset < PRISM_MSG_SIZE:
        return None
    raw = <const prism_msg *>(PyBytes_AS_STRING(data) + offset)
    if ntohl(raw.magic) != PRISM_MAGIC or raw.version != PRISM_VERSION:
        return None
    if raw.mac != htobe64(prism_siphash24(secret, <const uint8_t *>raw, PRISM_MAC_OFFSET)):
        return None
    return (
        raw.op,
        raw.status,
        raw.flags,
        be64toh(raw.node),
        be64toh(raw.seq),
        PyBytes_FromStringAndSize(<const char *>&raw.flow, FLOW_SIZE),
        PyBytes_FromStringAndSize(<const char *>raw.owner_addr, 16),
        ntohs(raw.owner_port),
        PyBytes_FromStringAndSize(<const char *>raw.owner_mac, 6),
        be64toh(raw.owner),
        be64toh(raw.gen),
        be64toh(raw.cookie),
    )


def exchange(int fd, bytes request not None, unsigned int wait_us, /):
    cdef prism_exchange result
    cdef const uint8_t *data = <const uint8_t *>PyBytes_AS_STRING(request)
    cdef size_t size = PyBytes_GET_SIZE(request)
    cdef int error
    cdef unsigned int i
    cdef object answer = None
    cdef list others
    if size < 24:
        raise ValueError("a request has at least 24 octets")
    with nogil:
        error = c_exchange(fd, data, size, wait_us, &result)
    if error:
        raise OSError(-error, "cannot send to the switch")
    if result.answered:
        answer = PyBytes_FromStringAndSize(<const char *>result.answer.data, result.answer.size)
    if result.others_count == 0:
        return answer, ()
    others = []
    for i in range(result.others_count):
        others.append(
            PyBytes_FromStringAndSize(<const char *>result.others[i].data, result.others[i].size)
        )
    return answer, others
