# The key derivations on their own; part of tls_record.pyx.


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
