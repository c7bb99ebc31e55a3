"""OpenSSL's calls of a handshake, by way of what pyOpenSSL binds.

pyOpenSSL makes contexts and connections. Where its methods do more than a handshake needs (they
look connections up by their address, copy, and say with an exception that there is no more), the
functions here make the same call on the same object.
"""

from __future__ import annotations

from typing import Any, Final

from OpenSSL import SSL
from OpenSSL._util import ffi as _ffi
from OpenSSL._util import lib as _lib

__all__ = ["feed", "keep_secrets", "output", "protocol", "server_random", "shake", "was_resumed"]

_WANT_READ: Final[int] = _lib.SSL_ERROR_WANT_READ
_WANTED: Final = (b"CLIENT_TRAFFIC_SECRET_0 ", b"SERVER_TRAFFIC_SECRET_0 ", b"CLIENT_RANDOM ")
_ROOM: Final = 16 * 1024

# One of each for all connections: nothing is left in them that anybody relies on.
_room: Final[Any] = _ffi.new("char[]", _ROOM)
_found: Final[Any] = _ffi.new("unsigned char **")
_random: Final[Any] = _ffi.new("unsigned char[32]")
_length: Final[Any] = _ffi.new("unsigned int *")
_told: Final[list[bytes]] = []  # lines of the key log, until shake() gives them to their owner


def keep_secrets(context: SSL.Context) -> None:
    """Have :func:`shake` tell the secrets of a context's connections."""
    _lib.SSL_CTX_set_keylog_callback(context._context, _keep)


@_ffi.callback("void (*)(const SSL *, const char *)")  # type: ignore[untyped-decorator]
def _keep(_: Any, line: Any) -> None:
    """Called by OpenSSL, inside :func:`shake` only: whose line it is need not be looked up."""
    text = _ffi.string(line)
    if text.startswith(_WANTED):
        _told.append(text)


def shake(connection: SSL.Connection, secrets: list[bytes]) -> bool:
    """``do_handshake``, which needs no exception to say that it wants more input.

    Args:
        connection: in the accept state.
        secrets: gets the lines of the key log with the application's secrets: a label, the
            client's random and a secret, the latter two in hexadecimal.

    Returns:
        whether the handshake is complete.

    Raises:
        SSL.Error: it has failed.
        Exception: what a callback has raised.
    """
    result = _lib.SSL_do_handshake(connection._ssl)
    if _told:
        secrets += _told
        _told.clear()
    if result == 1:
        return True
    if _lib.SSL_get_error(connection._ssl, result) != _WANT_READ:
        connection._raise_ssl_error(connection._ssl, result)
    return False


def feed(connection: SSL.Connection, data: bytes) -> None:
    """Give OpenSSL what was received; some octets."""
    if _lib.BIO_write(connection._into_ssl, data, len(data)) != len(data):
        raise MemoryError  # nothing else can go wrong in memory


def output(connection: SSL.Connection) -> bytes:
    """Take all that is to be sent."""
    data = b""
    while (count := _lib.BIO_read(connection._from_ssl, _room, _ROOM)) > 0:
        data += _ffi.unpack(_room, count)
        if count < _ROOM:
            break
    return data


def protocol(connection: SSL.Connection) -> bytes:
    """What was agreed on by ALPN; empty: nothing."""
    _lib.SSL_get0_alpn_selected(connection._ssl, _found, _length)
    return bytes(_ffi.buffer(_found[0], _length[0])) if _length[0] else b""


def server_random(connection: SSL.Connection) -> bytes:
    """The random octets of the server's hello."""
    _lib.SSL_get_server_random(connection._ssl, _random, 32)
    return bytes(_ffi.buffer(_random))


def was_resumed(connection: SSL.Connection) -> bool:
    """Whether the client came with a ticket. pyOpenSSL has no method for it."""
    return bool(_lib.SSL_session_reused(connection._ssl))
