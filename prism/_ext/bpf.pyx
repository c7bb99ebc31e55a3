"""The switch's classifier and its maps; see bpf.pyi for what the methods promise."""

import os

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport ENOENT, ENOSPC, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset


cdef extern from "unistd.h" nogil:
    int c_close "close"(int fd)

cdef extern from "linux/bpf.h" nogil:
    enum:
        BPF_F_LOCK
        BPF_F_RDONLY

    struct bpf_map_info:
        uint32_t key_size
        uint32_t value_size
        uint32_t max_entries

cdef extern from "bpf/bpf.h" nogil:
    struct bpf_obj_get_opts:
        size_t sz
        uint32_t file_flags

    int c_obj_get "bpf_obj_get_opts"(const char *pathname, const bpf_obj_get_opts *opts)
    int bpf_obj_get_info_by_fd(int fd, void *info, uint32_t *size)
    struct bpf_map_batch_opts:
        size_t sz
        uint64_t elem_flags
        uint64_t flags

    int bpf_map_lookup_elem_flags(int fd, const void *key, void *value, uint64_t flags)
    int bpf_map_update_elem(int fd, const void *key, const void *value, uint64_t flags)
    int bpf_map_delete_elem(int fd, const void *key)
    int bpf_map_lookup_batch(int fd, void *in_batch, void *out_batch, void *keys, void *values,
                             uint32_t *count, const bpf_map_batch_opts *opts)

cdef extern from "bpf_loader.h" nogil:
    enum:
        PRISM_BPF_ERROR_SIZE
        PRISM_EVENTS_LIMIT

    struct prism_bpf:
        pass

    struct prism_bpf_options:
        const char *object
        const char *pin_dir
        uint32_t max_rules
        uint32_t max_nodes
        uint32_t events_size
        int fresh
        uint64_t incarnation

    struct prism_map_shape:
        int fd
        uint32_t key_size
        uint32_t value_size
        uint32_t max_entries
        uint64_t flags

    int prism_bpf_open(const prism_bpf_options *options, prism_bpf **bpf, char *error)
    void prism_bpf_close(prism_bpf *bpf)
    int prism_bpf_adopted(const prism_bpf *bpf)
    int prism_bpf_program(const prism_bpf *bpf, const char *name)
    int prism_bpf_map(const prism_bpf *bpf, const char *name, prism_map_shape *shape)
    int prism_bpf_stats(const prism_bpf *bpf, uint64_t *sums, uint32_t count)
    int prism_bpf_run(int program, uint32_t flags, uint8_t *data, uint32_t *size,
                      uint32_t *verdict)
    int prism_bpf_events_fd(const prism_bpf *bpf)
    int prism_bpf_events(prism_bpf *bpf, uint8_t *buffer, uint32_t event_size)

cdef extern from "prism_abi.h" nogil:
    enum:
        PRISM_STAT_COUNT

    struct prism_event:
        uint32_t kind

cdef enum:
    KEY_LIMIT = 64
    VALUE_LIMIT = 256
    RUN_LIMIT = 2048

STAT_COUNT = PRISM_STAT_COUNT
EVENT_SIZE = sizeof(prism_event)


class BpfError(OSError):
    """libbpf or the kernel refused; the message carries the verifier's last lines."""


cdef object failed(int code, str what):
    return BpfError(-code, f"{what}: {os.strerror(-code)}")


cdef class Map:
    """One map of the classifier, valid while its SwitchObject is open."""

    cdef prism_map_shape shape
    cdef SwitchObject owner
    cdef readonly str name

    @property
    def fd(self):
        return self.shape.fd

    @property
    def max_entries(self):
        return self.shape.max_entries

    cdef int alive(self) except -1:
        self.owner.check()
        return 0

    cdef int check(self, bytes key, bytes value) except -1:
        self.alive()
        if key is not None and PyBytes_GET_SIZE(key) != self.shape.key_size:
            raise ValueError(f"a key of {self.name} has {self.shape.key_size} octets")
        if value is not None and PyBytes_GET_SIZE(value) != self.shape.value_size:
            raise ValueError(f"a value of {self.name} has {self.shape.value_size} octets")
        return 0

    def get(self, bytes key not None):
        cdef uint8_t value[VALUE_LIMIT]
        cdef const char *at = PyBytes_AS_STRING(key)
        cdef int code
        self.check(key, None)
        with nogil:
            code = bpf_map_lookup_elem_flags(self.shape.fd, at, value, self.shape.flags)
        if code == -ENOENT:
            return None
        if code:
            raise failed(code, f"cannot read map {self.name}")
        return PyBytes_FromStringAndSize(<char *>value, self.shape.value_size)

    def put(self, bytes key not None, bytes value not None):
        cdef const char *at = PyBytes_AS_STRING(key)
        cdef const char *content = PyBytes_AS_STRING(value)
        cdef int code
        self.check(key, value)
        with nogil:
            code = bpf_map_update_elem(self.shape.fd, at, content, self.shape.flags)
        if code:
            raise failed(code, f"cannot write map {self.name}")

    def remove(self, bytes key not None):
        cdef const char *at = PyBytes_AS_STRING(key)
        cdef int code
        self.check(key, None)
        with nogil:
            code = bpf_map_delete_elem(self.shape.fd, at)
        if code == -ENOENT:
            return False
        if code:
            raise failed(code, f"cannot change map {self.name}")
        return True

    def batch(self, bytes cursor=None, uint32_t limit=1024):
        cdef uint8_t before[KEY_LIMIT]
        cdef uint8_t after[KEY_LIMIT]
        cdef uint32_t key_size = self.shape.key_size, value_size = self.shape.value_size
        cdef uint32_t count = limit, i
        cdef bpf_map_batch_opts options
        cdef bint first = cursor is None
        cdef char *keys
        cdef char *values
        cdef int code
        self.check(None, None)
        if not 1 <= limit <= 65536:
            raise ValueError("a batch has 1 to 65536 entries")
        if not first and PyBytes_GET_SIZE(cursor) != KEY_LIMIT:
            raise ValueError("not a cursor of this map")
        memset(after, 0, sizeof(after))
        memset(&options, 0, sizeof(options))
        options.sz = sizeof(options)
        options.elem_flags = self.shape.flags
        if not first:
            memcpy(before, PyBytes_AS_STRING(cursor), KEY_LIMIT)
        keys = <char *>malloc(<size_t>limit * (key_size + value_size))
        if keys == NULL:
            raise MemoryError()
        values = keys + <size_t>limit * key_size
        try:
            with nogil:
                code = bpf_map_lookup_batch(self.shape.fd, NULL if first else before, after, keys,
                                            values, &count, &options)
            if code and code != -ENOENT:
                raise failed(code, f"cannot read map {self.name}")
            entries = [
                (
                    PyBytes_FromStringAndSize(keys + <size_t>i * key_size, key_size),
                    PyBytes_FromStringAndSize(values + <size_t>i * value_size, value_size),
                )
                for i in range(count)
            ]
            return entries, None if code else PyBytes_FromStringAndSize(<char *>after, KEY_LIMIT)
        finally:
            free(keys)


cdef class PinnedMap(Map):
    """A pinned map by itself, to read only."""

    def __cinit__(self):
        self.shape.fd = -1

    def __init__(self, path, *, bint locked=False):
        cdef bpf_obj_get_opts options
        cdef bpf_map_info info
        cdef uint32_t size = sizeof(info)
        cdef bytes encoded = os.fsencode(path)
        cdef const char *name = encoded
        cdef int code
        self.close()
        memset(&options, 0, sizeof(options))
        memset(&info, 0, sizeof(info))
        options.sz = sizeof(options)
        options.file_flags = BPF_F_RDONLY
        with nogil:
            self.shape.fd = c_obj_get(name, &options)
            code = -errno if self.shape.fd < 0 else 0
            if not code and bpf_obj_get_info_by_fd(self.shape.fd, &info, &size):
                code = -errno
        if not code and (info.key_size > KEY_LIMIT or info.value_size > VALUE_LIMIT):
            code = -ENOENT  # whatever it is, it is no map of ours
        if code:
            self.close()
            raise failed(code, f"cannot open {os.fsdecode(path)}")
        self.shape.key_size = info.key_size
        self.shape.value_size = info.value_size
        self.shape.max_entries = info.max_entries
        self.shape.flags = BPF_F_LOCK if locked else 0
        self.name = os.path.basename(os.fsdecode(path))

    def __dealloc__(self):
        self.close()

    @property
    def value_size(self):
        return self.shape.value_size

    cdef int alive(self) except -1:
        if self.shape.fd < 0:
            raise ValueError("the map is closed")
        return 0

    cpdef close(self):
        if self.shape.fd >= 0:
            c_close(self.shape.fd)
            self.shape.fd = -1


cdef class SwitchObject:
    """The classifier and its maps, loaded or found pinned."""

    cdef prism_bpf *bpf
    cdef object __weakref__

    def __cinit__(self):
        self.bpf = NULL

    def __init__(self, object_path, pin_dir, *, uint32_t max_rules=1_000_000,
                 uint32_t max_nodes=4096, uint32_t events_size=262144, bint fresh=False):
        cdef char error[PRISM_BPF_ERROR_SIZE]
        cdef prism_bpf_options options
        cdef int code
        cdef bytes path = os.fsencode(object_path)
        cdef bytes directory = os.fsencode(pin_dir)
        if self.bpf != NULL:
            raise RuntimeError("opened already")
        options.object = path
        options.pin_dir = directory
        options.max_rules = max_rules
        options.max_nodes = max_nodes
        options.events_size = events_size
        options.fresh = fresh
        options.incarnation = int.from_bytes(os.urandom(8), "big") | 1
        with nogil:
            code = prism_bpf_open(&options, &self.bpf, error)
        if code:
            detail = (<bytes>error).decode("utf-8", "replace").strip()
            raise BpfError(-code, f"{os.strerror(-code)}{': ' if detail else ''}{detail}")

    def __dealloc__(self):
        prism_bpf_close(self.bpf)

    cdef int check(self) except -1:
        if self.bpf == NULL:
            raise ValueError("the switch object is closed")
        return 0

    @property
    def adopted(self):
        self.check()
        return bool(prism_bpf_adopted(self.bpf))

    def program_fd(self, str name not None):
        self.check()
        cdef bytes encoded = name.encode()
        cdef int fd = prism_bpf_program(self.bpf, encoded)
        if fd < 0:
            raise failed(fd, f"no program {name}")
        return fd

    def map(self, str name not None):
        self.check()
        cdef Map result = Map.__new__(Map)
        cdef bytes encoded = name.encode()
        cdef int code = prism_bpf_map(self.bpf, encoded, &result.shape)
        if code:
            raise failed(code, f"no map {name}")
        if result.shape.key_size > KEY_LIMIT or result.shape.value_size > VALUE_LIMIT:
            raise ValueError(f"map {name} has larger elements than expected")
        result.owner = self
        result.name = name
        return result

    def stats(self):
        cdef uint64_t sums[PRISM_STAT_COUNT]
        cdef int code
        self.check()
        with nogil:
            code = prism_bpf_stats(self.bpf, sums, PRISM_STAT_COUNT)
        if code:
            raise failed(code, "cannot read the counters")
        return [sums[i] for i in range(PRISM_STAT_COUNT)]

    def run(self, int program_fd, bytes data not None, uint32_t flags=0):
        cdef uint8_t buffer[RUN_LIMIT]
        cdef uint32_t size = PyBytes_GET_SIZE(data), verdict = 0
        cdef int code
        self.check()
        if size > RUN_LIMIT:
            raise ValueError(f"at most {RUN_LIMIT} octets")
        memcpy(buffer, PyBytes_AS_STRING(data), size)
        with nogil:
            code = prism_bpf_run(program_fd, flags, buffer, &size, &verdict)
        if code:
            raise failed(code, "cannot run the program")
        return <int>verdict, PyBytes_FromStringAndSize(<char *>buffer, size)

    @property
    def events_fd(self):
        self.check()
        return prism_bpf_events_fd(self.bpf)

    def events(self):
        cdef int count
        cdef size_t i
        cdef uint8_t *buffer
        self.check()
        buffer = <uint8_t *>malloc(PRISM_EVENTS_LIMIT * sizeof(prism_event))
        if buffer == NULL:
            raise MemoryError()
        try:
            with nogil:
                count = prism_bpf_events(self.bpf, buffer, sizeof(prism_event))
            if count < 0:
                raise failed(count, "cannot read the event buffer")
            return [
                PyBytes_FromStringAndSize(<char *>buffer + i * sizeof(prism_event),
                                          sizeof(prism_event))
                for i in range(<size_t>count)
            ]
        finally:
            free(buffer)

    def close(self):
        cdef prism_bpf *bpf = self.bpf
        self.bpf = NULL
        with nogil:
            prism_bpf_close(bpf)
