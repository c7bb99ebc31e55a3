"""Mutual TLS 1.3 under the frames of a link; does no I/O.

``End`` turns octets from the network into frames' octets and the other way round. OpenSSL works
on memory here, not on the socket, so that everything happens inside ``data_received`` and a
failed handshake can be told apart by its reason. ``Complaints`` keeps the log readable while
somebody knocks without end.
"""

from __future__ import annotations

import logging
import ssl
import time
from enum import IntEnum

from prism.errors import ProtocolError
from prism.tls.identity import Identity, PeerCertificate, peer_certificate

__all__ = ["Complaints", "Distrust", "End", "Why"]

_log = logging.getLogger(__name__)
_RECORD = 16384  # octets a TLS record carries at most (RFC 8446, section 5.1)
_QUIET = 10.0  # seconds between two lines about the same peer and reason
_MAX_TOPICS = 256


class Why(IntEnum):
    """Why a peer is not trusted; counted by this name."""

    NO_CERTIFICATE = 1
    UNTRUSTED = 2  # another CA's, or not good for this use
    EXPIRED = 3  # or not valid yet
    WRONG_NODE = 4
    OLD_TLS = 5
    NOT_TLS = 6
    REFUSED_US = 7  # the peer says so of us
    BROKEN = 8  # a record that is not the peer's


_VERIFY_EXPIRED = (9, 10)  # X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED
_VERSION_REASONS = ("UNSUPPORTED_PROTOCOL", "VERSION_TOO_LOW", "NO_PROTOCOLS_AVAILABLE")


class Distrust(ProtocolError):
    """The connection is of no use: the peer is not who it should be, or somebody meddles."""

    def __init__(self, why: Why, text: str) -> None:
        super().__init__(text)
        self.why = why


class End:
    """One end of one TLS connection.

    Attributes:
        secured: whether the handshake is done at this end.
        peer: what the peer's certificate says, once ``secured``.
    """

    __slots__ = ("_incoming", "_outgoing", "_read", "_tls", "_write", "peer", "secured")

    def __init__(self, identity: Identity, *, server: bool) -> None:
        context = identity.server_context() if server else identity.client_context()
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server)
        self._read = self._tls.read
        self._write = self._tls.write
        self.secured = False
        self.peer = PeerCertificate("", 0.0)

    def shake(self, data: bytes = b"") -> None:
        """Go on with the handshake; afterwards there may be octets to send: ``outgoing``.

        Raises:
            Distrust: the handshake has failed; an alert may have to be sent still.
        """
        self._incoming.write(data)
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return
        except ssl.SSLError as error:
            raise _distrust(error, shaking=True) from None
        self.secured = True
        self.peer = peer_certificate(self._tls)

    def outgoing(self) -> bytes:
        """What TLS itself wants to send: handshake, alerts, key updates."""
        return self._outgoing.read() if self._outgoing.pending else b""

    def seal(self, data: bytes) -> bytes:
        """Octets for the network, in records. Only once ``secured``."""
        written = self._write(data)
        if written != len(data):
            rest = memoryview(data)[written:]
            while rest:
                rest = rest[self._write(rest) :]
        return self._outgoing.read()

    def open(self, data: bytes) -> bytes:
        """What the peer has sent, of as many whole records as there are; only once ``secured``.

        Raises:
            Distrust: not the peer's octets, or the peer refuses this node's certificate.
            EOFError: the peer has closed the connection.
        """
        incoming, read = self._incoming, self._read
        incoming.write(data)
        try:
            first = read(_RECORD)
            if not incoming.pending and first:
                return first
        except ssl.SSLWantReadError:
            return b""
        except ssl.SSLError as error:
            raise _distrust(error, shaking=False) from None
        parts = [first]
        try:
            while parts[-1]:
                parts.append(read(_RECORD))
        except ssl.SSLWantReadError:
            return b"".join(parts)
        except ssl.SSLError as error:
            raise _distrust(error, shaking=False) from None
        raise EOFError


def _distrust(error: ssl.SSLError, *, shaking: bool) -> Distrust:
    """What an OpenSSL error means to somebody who reads the log."""
    reason = error.reason or ""
    if isinstance(error, ssl.SSLCertVerificationError):
        why = Why.EXPIRED if error.verify_code in _VERIFY_EXPIRED else Why.UNTRUSTED
        return Distrust(why, f"its certificate is not accepted: {error.verify_message}")
    if "_ALERT_" in reason:
        text = reason.partition("_ALERT_")[2].lower().replace("_", " ")
        return Distrust(Why.REFUSED_US, f"it refuses this node's certificate or TLS: {text}")
    if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return Distrust(Why.NO_CERTIFICATE, "it has shown no certificate")
    if reason in _VERSION_REASONS:
        return Distrust(Why.OLD_TLS, "it does not speak TLS 1.3")
    text = reason.lower().replace("_", " ")
    if shaking:
        return Distrust(Why.NOT_TLS, f"it does not speak TLS as it should: {text}")
    return Distrust(Why.BROKEN, f"a TLS record that it cannot have sent: {text}")


class Complaints:
    """Logs what is wrong with peers, not more often than every 10 s for the same."""

    __slots__ = ("_topics",)

    def __init__(self) -> None:
        self._topics: dict[tuple[str, int], list[float]] = {}  # until when quiet, how many since

    def say(self, host: str, why: int, text: str) -> None:
        """Log one line about a peer, or count it into the next one."""
        now = time.monotonic()
        topic = (host, why)
        if topic not in self._topics and len(self._topics) >= _MAX_TOPICS:
            self._topics = {key: entry for key, entry in self._topics.items() if entry[0] > now}
            if len(self._topics) >= _MAX_TOPICS:
                topic = ("", 0)  # too many to tell apart
        entry = self._topics.setdefault(topic, [0.0, 0])
        if now < entry[0]:
            entry[1] += 1
            return
        more = f" (and {entry[1]:.0f} times more lately)" if entry[1] else ""
        entry[0], entry[1] = now + _QUIET, 0
        _log.warning("handoff channel: %s%s", text, more)
