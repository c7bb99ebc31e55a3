"""OpenSSL as the other side: a TLS connection over memory, driven through ctypes.

Python's ssl module cannot send a KeyUpdate, pad records or tell the randoms; libssl can.
"""

from __future__ import annotations

import ctypes
import subprocess
from ctypes import c_char_p, c_int, c_long, c_size_t, c_void_p
from pathlib import Path

_ssl = ctypes.CDLL("libssl.so.3")
_crypto = ctypes.CDLL("libcrypto.so.3")

SSL_CTRL_MAX_SEND_FRAGMENT = 52
SSL_CTRL_MIN_PROTO, SSL_CTRL_MAX_PROTO = 123, 124
SSL_ERROR_SSL, WANT_READ, ZERO_RETURN = 1, 2, 6
TLS1_2, TLS1_3 = 0x0303, 0x0304
KEY_UPDATE_NOT_REQUESTED, KEY_UPDATE_REQUESTED = 0, 1

_KEYLOG = ctypes.CFUNCTYPE(None, c_void_p, c_char_p)


def _declare(library: ctypes.CDLL, name: str, result: object, *arguments: object) -> None:
    function = getattr(library, name)
    function.restype = result
    function.argtypes = list(arguments)


for _name, _result, _arguments in [
    ("TLS_method", c_void_p, ()),
    ("SSL_CTX_new", c_void_p, (c_void_p,)),
    ("SSL_CTX_free", None, (c_void_p,)),
    ("SSL_CTX_ctrl", c_long, (c_void_p, c_int, c_long, c_void_p)),
    ("SSL_CTX_set_ciphersuites", c_int, (c_void_p, c_char_p)),
    ("SSL_CTX_set_cipher_list", c_int, (c_void_p, c_char_p)),
    ("SSL_CTX_set_num_tickets", c_int, (c_void_p, c_size_t)),
    ("SSL_CTX_set_block_padding", c_int, (c_void_p, c_size_t)),
    ("SSL_CTX_use_certificate_file", c_int, (c_void_p, c_char_p, c_int)),
    ("SSL_CTX_use_PrivateKey_file", c_int, (c_void_p, c_char_p, c_int)),
    ("SSL_CTX_set_keylog_callback", None, (c_void_p, _KEYLOG)),
    ("SSL_new", c_void_p, (c_void_p,)),
    ("SSL_free", None, (c_void_p,)),
    ("SSL_set_bio", None, (c_void_p, c_void_p, c_void_p)),
    ("SSL_set_connect_state", None, (c_void_p,)),
    ("SSL_set_accept_state", None, (c_void_p,)),
    ("SSL_do_handshake", c_int, (c_void_p,)),
    ("SSL_read", c_int, (c_void_p, c_char_p, c_int)),
    ("SSL_write", c_int, (c_void_p, c_char_p, c_int)),
    ("SSL_get_error", c_int, (c_void_p, c_int)),
    ("SSL_key_update", c_int, (c_void_p, c_int)),
    ("SSL_renegotiate", c_int, (c_void_p,)),
    ("SSL_shutdown", c_int, (c_void_p,)),
    ("SSL_get_client_random", c_size_t, (c_void_p, c_char_p, c_size_t)),
    ("SSL_get_server_random", c_size_t, (c_void_p, c_char_p, c_size_t)),
    ("SSL_get_current_cipher", c_void_p, (c_void_p,)),
    ("SSL_CIPHER_get_protocol_id", ctypes.c_uint16, (c_void_p,)),
]:
    _declare(_ssl, _name, _result, *_arguments)
for _name, _result, _arguments in [
    ("BIO_s_mem", c_void_p, ()),
    ("BIO_new", c_void_p, (c_void_p,)),
    ("BIO_read", c_int, (c_void_p, c_char_p, c_int)),
    ("BIO_write", c_int, (c_void_p, c_char_p, c_int)),
    ("ERR_clear_error", None, ()),
    ("ERR_get_error", ctypes.c_ulong, ()),
    ("EVP_CIPHER_CTX_new", c_void_p, ()),
    ("EVP_CIPHER_CTX_free", None, (c_void_p,)),
    ("EVP_aes_128_gcm", c_void_p, ()),
    ("EVP_EncryptInit_ex", c_int, (c_void_p, c_void_p, c_void_p, c_char_p, c_char_p)),
    ("EVP_EncryptUpdate", c_int, (c_void_p, c_char_p, ctypes.POINTER(c_int), c_char_p, c_int)),
    ("EVP_EncryptFinal_ex", c_int, (c_void_p, c_char_p, ctypes.POINTER(c_int))),
    ("EVP_CIPHER_CTX_ctrl", c_int, (c_void_p, c_int, c_int, c_char_p)),
]:
    _declare(_crypto, _name, _result, *_arguments)


class Failed(Exception):
    """OpenSSL refused what it got; its reason (an SSL_R_ number) is the argument."""


class Peer:
    """One side of a TLS connection; what it wants sent is fetched with ``output``.

    Args:
        version: TLS1_2 or TLS1_3.
        cipher: OpenSSL's name of the only suite offered.
        certificate: PEM file with key and certificate; with one it is the server.
        tickets: session tickets a TLS 1.3 server issues.
        padding: block size that TLS 1.3 records are padded to.
        fragment: the most plaintext it puts into a record, 512 to 16384.
    """

    def __init__(
        self,
        version: int,
        cipher: str,
        certificate: Path | None = None,
        *,
        tickets: int = 2,
        padding: int = 0,
        fragment: int = 16384,
    ) -> None:
        self.log: dict[str, bytes] = {}
        self._keylog = _KEYLOG(self._note)
        self._ctx = _ssl.SSL_CTX_new(_ssl.TLS_method())
        for control in (SSL_CTRL_MIN_PROTO, SSL_CTRL_MAX_PROTO):
            assert _ssl.SSL_CTX_ctrl(self._ctx, control, version, None) == 1
        assert _ssl.SSL_CTX_ctrl(self._ctx, SSL_CTRL_MAX_SEND_FRAGMENT, fragment, None) == 1
        choose = _ssl.SSL_CTX_set_ciphersuites
        if version == TLS1_2:
            choose = _ssl.SSL_CTX_set_cipher_list
        assert choose(self._ctx, cipher.encode()) == 1
        assert _ssl.SSL_CTX_set_num_tickets(self._ctx, tickets) == 1
        assert _ssl.SSL_CTX_set_block_padding(self._ctx, padding) == 1
        _ssl.SSL_CTX_set_keylog_callback(self._ctx, self._keylog)
        if certificate is not None:
            name = str(certificate).encode()
            assert _ssl.SSL_CTX_use_certificate_file(self._ctx, name, 1) == 1
            assert _ssl.SSL_CTX_use_PrivateKey_file(self._ctx, name, 1) == 1
        self._in = _crypto.BIO_new(_crypto.BIO_s_mem())
        self._out = _crypto.BIO_new(_crypto.BIO_s_mem())
        self._ssl = _ssl.SSL_new(self._ctx)
        _ssl.SSL_set_bio(self._ssl, self._in, self._out)
        begin = _ssl.SSL_set_accept_state if certificate else _ssl.SSL_set_connect_state
        begin(self._ssl)

    def __del__(self) -> None:
        _ssl.SSL_free(self._ssl)
        _ssl.SSL_CTX_free(self._ctx)

    def _note(self, _: object, line: bytes) -> None:
        label, _random, secret = line.decode().split()
        self.log[label] = bytes.fromhex(secret)

    def _check(self, result: int) -> int:
        if result > 0:
            return result
        error = _ssl.SSL_get_error(self._ssl, result)
        if error in (WANT_READ, ZERO_RETURN):
            return -error
        reason = _crypto.ERR_get_error() & 0x7FFFFF
        _crypto.ERR_clear_error()
        raise Failed(reason)

    def handshake(self) -> bool:
        """Goes on with the handshake; whether it is done."""
        return self._check(_ssl.SSL_do_handshake(self._ssl)) > 0

    def input(self, data: bytes) -> None:
        if data:
            assert _crypto.BIO_write(self._in, data, len(data)) == len(data)

    def output(self) -> bytes:
        data = b""
        buffer = ctypes.create_string_buffer(65536)
        while (n := _crypto.BIO_read(self._out, buffer, len(buffer))) > 0:
            data += buffer.raw[:n]
        return data

    def write(self, data: bytes) -> bytes:
        """Has ``data`` sent: the ciphertext."""
        done = 0
        while done < len(data):
            part = data[done : done + 65536]
            done += self._check(_ssl.SSL_write(self._ssl, part, len(part)))
        return self.output()

    def read(self, data: bytes = b"") -> bytes | None:
        """The plaintext that is there now, or None after close_notify."""
        self.input(data)
        plain = b""
        buffer = ctypes.create_string_buffer(16384)
        while True:
            n = self._check(_ssl.SSL_read(self._ssl, buffer, len(buffer)))
            if n == -ZERO_RETURN:
                return plain or None
            if n <= 0:
                return plain
            plain += buffer.raw[:n]

    def key_update(self, kind: int) -> None:
        """Has a KeyUpdate sent in front of the next ``write``."""
        assert _ssl.SSL_key_update(self._ssl, kind) == 1

    def renegotiate(self) -> bytes:
        assert _ssl.SSL_renegotiate(self._ssl) == 1
        self.handshake()
        return self.output()

    def shutdown(self) -> bytes:
        """Its close_notify."""
        _ssl.SSL_shutdown(self._ssl)
        return self.output()

    @property
    def suite(self) -> int:
        return int(_ssl.SSL_CIPHER_get_protocol_id(_ssl.SSL_get_current_cipher(self._ssl)))

    @property
    def randoms(self) -> tuple[bytes, bytes]:
        """The client's and the server's."""
        client, server = (ctypes.create_string_buffer(32) for _ in range(2))
        assert _ssl.SSL_get_client_random(self._ssl, client, 32) == 32
        assert _ssl.SSL_get_server_random(self._ssl, server, 32) == 32
        return client.raw, server.raw


def records(data: bytes) -> list[bytes]:
    """A stream of whole records, cut up."""
    found = []
    while data:
        end = 5 + int.from_bytes(data[3:5], "big")
        assert len(data) >= end
        found.append(data[:end])
        data = data[end:]
    return found


def connect(client: Peer, server: Peer) -> tuple[bytes, int]:
    """Does the handshake.

    Returns:
        what the server sent last, after the client's Finished, which the client has not got yet,
        and the number of records that the server has sealed with the application keys.
    """
    client.handshake()
    for _ in range(10):
        server.input(client.output())
        if server.handshake():
            last = server.output()
            if server.log.get("SERVER_TRAFFIC_SECRET_0"):
                return last, len(records(last))
            client.read(last)
            return b"", 1
        client.input(server.output())
        client.handshake()
    raise AssertionError("the handshake does not end")


def make_certificate(path: Path, algorithm: str) -> Path:
    """A self-signed certificate with its key in one file; ``algorithm`` is rsa or ec."""
    kind = ["rsa:2048"] if algorithm == "rsa" else ["ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    target = path / f"{algorithm}.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-nodes", "-subj", "/CN=peer", "-days", "2"),
            *("-newkey", *kind, "-keyout", str(target), "-out", str(path / "certificate")),
        ],
        check=True,
        capture_output=True,
    )
    with target.open("ab") as file:
        file.write((path / "certificate").read_bytes())
    return target


def aes_128_gcm(key: bytes, nonce: bytes, aad: bytes, plain: bytes) -> bytes:
    """Ciphertext and tag, by libcrypto directly: for records that no library would make."""
    ctx = _crypto.EVP_CIPHER_CTX_new()
    n = c_int()
    out = ctypes.create_string_buffer(len(plain) + 16)
    tag = ctypes.create_string_buffer(16)
    good = (
        _crypto.EVP_EncryptInit_ex(ctx, _crypto.EVP_aes_128_gcm(), None, key, nonce)
        and _crypto.EVP_EncryptUpdate(ctx, None, n, aad, len(aad))
        and _crypto.EVP_EncryptUpdate(ctx, out, n, plain, len(plain))
        and _crypto.EVP_EncryptFinal_ex(ctx, out, n)
        and _crypto.EVP_CIPHER_CTX_ctrl(ctx, 0x10, 16, tag)
    )
    _crypto.EVP_CIPHER_CTX_free(ctx)
    assert good
    return out.raw[: len(plain)] + tag.raw
