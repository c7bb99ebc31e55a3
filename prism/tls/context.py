"""What handshakes have in common: certificates, versions, suites, ALPN, tickets, client CAs.

Every handshake starts with one *base* context, and the name the client asks for then selects the
context with the certificates. OpenSSL takes the ticket keys from the context a connection was
started with, and makes them when that context is made. So:

- tickets outlive a reload of the certificates, which replaces only the contexts behind the base;
- worker processes accept each other's tickets if the base was made before they were forked;
- a change of the client CA makes a new base, so that no ticket carries an identity over that was
  verified by another CA; from then on each worker knows only its own tickets.

Ticket keys live as long as the process and exist only in its memory.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import Final

from OpenSSL import SSL

from prism.config_tls import Suite, TlsConfig
from prism.errors import ConfigError
from prism.tls.certificates import Credential, Names, load_credential, read_certificates
from prism.tls.openssl import keep_secrets

__all__ = ["SUITES", "NoProtocol", "TlsContexts", "reason"]

log = logging.getLogger(__name__)

SUITES: Final[dict[str, int]] = {
    "TLS_AES_128_GCM_SHA256": 0x1301,
    "TLS_AES_256_GCM_SHA384": 0x1302,
    "TLS_CHACHA20_POLY1305_SHA256": 0x1303,
    "ECDHE-ECDSA-AES128-GCM-SHA256": 0xC02B,
    "ECDHE-ECDSA-AES256-GCM-SHA384": 0xC02C,
    "ECDHE-RSA-AES128-GCM-SHA256": 0xC02F,
    "ECDHE-RSA-AES256-GCM-SHA384": 0xC030,
    "ECDHE-RSA-CHACHA20-POLY1305": 0xCCA8,
    "ECDHE-ECDSA-CHACHA20-POLY1305": 0xCCA9,
}
"""OpenSSL's names of the suites and their numbers in the IANA registry."""

_OLD: Final[dict[Suite, str]] = {
    "AES-128-GCM": "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256",
    "AES-256-GCM": "ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-RSA-AES256-GCM-SHA384",
    "CHACHA20-POLY1305": "ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-RSA-CHACHA20-POLY1305",
}
_NEW: Final[dict[Suite, str]] = {
    "AES-128-GCM": "TLS_AES_128_GCM_SHA256",
    "AES-256-GCM": "TLS_AES_256_GCM_SHA384",
    "CHACHA20-POLY1305": "TLS_CHACHA20_POLY1305_SHA256",
}
_PROTOCOLS = (b"http/1.1", b"http/1.0")
_TICKET_LIFE = 7200  # seconds


class NoProtocol(Exception):
    """The client offers protocols by ALPN, and none of them is HTTP/1."""


class TlsContexts:
    """The contexts of one configuration, and their renewal when files change.

    Make it before forking workers. It needs no event loop and is not thread-safe.

    Args:
        config: the section of the configuration; its paths are absolute, or relative to the
            working directory.

    Attributes:
        base: the context to start connections with.

    Raises:
        ConfigError: a file cannot be used; the message names it and the remedy.
    """

    def __init__(self, config: TlsConfig) -> None:
        self._config = config
        self._files = tuple(
            path for each in config.certificates for path in (each.certificate, each.key)
        ) + ((config.client_ca,) if config.client_ca else ())
        self._seen = self._stamps()
        self._mark = b""  # of who may be a client
        self._load()

    def changed(self) -> bool:
        """Whether a file has changed since :meth:`reload` or this was called last."""
        stamps = self._stamps()
        if stamps == self._seen:
            return False
        self._seen = stamps
        return True

    def reload(self) -> bool:
        """Read the files again; broken ones are logged, and what there was stays in use."""
        self._seen = self._stamps()  # first: what changes meanwhile is seen next time
        try:
            self._load()
        except ConfigError as error:
            log.error("the certificates stay as they were: %s", error)
            return False
        log.info("certificates read anew")
        return True

    def _stamps(self) -> tuple[tuple[int, ...] | None, ...]:
        return tuple(map(_stamp, self._files))

    # -- making contexts -------------------------------------------------------------------

    def _load(self) -> None:
        """Read everything, and only then put it to use."""
        config = self._config
        client_ca = _read_client_ca(config.client_ca) if config.client_ca else b""
        mark = hashlib.sha256(config.client_auth.encode() + client_ca).digest()
        names = Names([load_credential(each.certificate, each.key) for each in config.certificates])
        contexts: dict[tuple[Credential, ...], SSL.Context] = {}
        for choice in names.choices():
            if choice not in contexts:
                contexts[choice] = self._context(client_ca, mark, choice)
        if mark != self._mark:
            self.base = self._context(client_ca, mark, ())
            self.base.set_tlsext_servername_callback(self._choose)
            self._mark = mark
        self._names, self._contexts = names, contexts

    def _context(
        self, client_ca: bytes, mark: bytes, credentials: tuple[Credential, ...]
    ) -> SSL.Context:
        config = self._config
        context = SSL.Context(SSL.TLS_SERVER_METHOD)
        context.set_min_proto_version(
            SSL.TLS1_3_VERSION if config.min_version == "1.3" else SSL.TLS1_2_VERSION
        )
        context.set_max_proto_version(SSL.TLS1_3_VERSION)
        context.set_cipher_list(":".join(_OLD[suite] for suite in config.suites).encode())
        context.set_tls13_ciphersuites(":".join(_NEW[suite] for suite in config.suites).encode())
        context.set_options(
            SSL.OP_NO_RENEGOTIATION
            | SSL.OP_NO_COMPRESSION
            | SSL.OP_CIPHER_SERVER_PREFERENCE
            | (0 if config.tickets else SSL.OP_NO_TICKET)
        )
        context.set_mode(SSL.MODE_RELEASE_BUFFERS)
        context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
        context.set_timeout(_TICKET_LIFE)
        context.set_session_id(mark)
        context.set_alpn_select_callback(_select_protocol)
        keep_secrets(context)
        for each in credentials:
            _use(context, each)
        if config.client_auth != "none":
            _verify_clients(context, client_ca, required=config.client_auth == "require")
        return context

    def _choose(self, connection: SSL.Connection) -> None:
        """Give a connection the context for the name it asks for; called by OpenSSL."""
        name = connection.get_servername() or b""
        text = name.decode("ascii", "replace").lower().removesuffix(".")
        connection.set_context(self._contexts[self._names.choose(text)])


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino, status.st_mode


def _read_client_ca(path: Path) -> bytes:
    data, _ = read_certificates(path)
    return data


def _use(context: SSL.Context, credential: Credential) -> None:
    try:
        with _AsFile(credential.chain) as path:
            context.use_certificate_chain_file(path)
        context.use_privatekey(credential.key)
        context.check_privatekey()
    except SSL.Error as error:
        raise ConfigError(f"{credential.path}: OpenSSL refuses it: {reason(error)}") from None


def _verify_clients(context: SSL.Context, client_ca: bytes, *, required: bool) -> None:
    mode = SSL.VERIFY_PEER | (SSL.VERIFY_FAIL_IF_NO_PEER_CERT if required else 0)
    context.set_verify(mode)
    with _AsFile(client_ca) as path:
        context.load_verify_locations(path)
        context.load_client_ca(os.fsencode(path))


class _AsFile:
    """Octets under a file's name: OpenSSL reads a chain from files only.

    The file itself is not read a second time, for it may have changed since it was checked.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __enter__(self) -> str:
        self._fd = os.memfd_create("chain", os.MFD_CLOEXEC)
        os.write(self._fd, self._data)
        return f"/proc/self/fd/{self._fd}"

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def reason(error: SSL.Error) -> str:
    """What OpenSSL says went wrong: one of its fixed texts, nothing from the connection."""
    if isinstance(error, SSL.ZeroReturnError):
        return "closed by the client"
    entries = error.args[0] if error.args else ()
    if isinstance(entries, list | tuple) and entries and isinstance(entries[0], tuple):
        return str(entries[0][-1])
    return "unknown"


def _select_protocol(connection: SSL.Connection, offered: list[bytes]) -> bytes:
    for protocol in _PROTOCOLS:
        if protocol in offered:
            return protocol
    raise NoProtocol  # OpenSSL then sends no_application_protocol (RFC 7301, 3.2)
