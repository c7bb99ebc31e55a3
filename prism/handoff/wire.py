"""What travels on a link between two nodes: authenticated frames, and the messages in them.

A frame, all numbers in network order::

    0        4     5      6          8               16                 16 + length
    +--------+-----+------+----------+---------------+------------------+--------+
    | length | ver | type | reserved | counter       | body             | MAC    |
    +--------+-----+------+----------+---------------+------------------+--------+
       4        1     1        2        8               length             16

The MAC is BLAKE2b (RFC 7693), keyed, 16 octets, over everything before it. The counter starts at 0
in each direction of each session and grows by one, so a frame that is repeated, left out or put
elsewhere is noticed. A link starts with one ``HELLO`` each way, under keys made from the cluster
key alone: the caller's with its nonce, the listener's with its own nonce and the caller's. Both
nonces go into the session's two keys, one for each direction; all later frames are under these,
so nothing captured from one session is good for another.

The MAC keeps others out; it does not keep the state secret. TLS underneath does that.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from enum import IntEnum
from typing import NamedTuple

from prism.errors import HandoffError, ProtocolError
from prism.flow import FLOW_SIZE

__all__ = [
    "MAX_BODY",
    "MAX_HELLO",
    "MAX_OFFER",
    "MAX_REPORT",
    "NONCE_SIZE",
    "VERSION",
    "Decoder",
    "Fault",
    "Hello",
    "Message",
    "Offer",
    "Ping",
    "Pong",
    "Reason",
    "Refused",
    "Report",
    "Sealer",
    "State",
    "Taken",
    "WireError",
    "hello_keys",
    "session_keys",
]

VERSION = 1
MAX_OFFER = 32 << 20
"""Largest sum of an offer's states and pending octets."""
MAX_HELLO = 1024
MAX_REPORT = 1024
NONCE_SIZE = 16
_MAC_SIZE = 16
_MAX_TEXT = 200
_MAX_NAME = 64

_HEADER = struct.Struct("!IBBHQ")  # length, version, type, reserved, counter
_OFFER = struct.Struct(f"!QQQQ{FLOW_SIZE}sBxxxIII")
_ID = struct.Struct("!Q")
_REFUSED = struct.Struct("!QB")
_STATE = struct.Struct("!BI")
_OVERHEAD = _HEADER.size + _MAC_SIZE
MAX_BODY = MAX_OFFER + _OFFER.size


class Fault(IntEnum):
    """What was wrong with a frame; counted by this name."""

    MALFORMED = 1
    BAD_MAC = 2
    REPLAY = 3


class WireError(ProtocolError):
    """Octets that the peer could not have sent; the connection is of no use any more."""

    def __init__(self, fault: Fault, text: str) -> None:
        super().__init__(text)
        self.fault = fault


class Reason(IntEnum):
    """Why a connection was not taken."""

    OTHER = 0
    IMPORT_FAILED = 1
    SWITCH = 2  # the switch said no, or A has taken it back
    BUSY = 3  # the target has as many connections as it wants
    DRAINING = 4
    TOO_MANY_HOPS = 5
    DROPPED = 6  # committed and lost: the source must not resume its copy
    LINK_BUSY = 7  # never left the source: too much is waiting for the link
    LINK_DOWN = 8  # never left the source: no link
    TOO_LARGE = 9  # never left the source: more than MAX_OFFER


class Hello(NamedTuple):
    """The first frame each way. ``answers`` is the caller's nonce, zero in the caller's own."""

    name: str
    peer: str
    nonce: bytes
    answers: bytes = bytes(NONCE_SIZE)


class Offer(NamedTuple):
    """A frozen connection.

    Attributes:
        flow: the packed flow (36 octets).
        gen: the rule's generation under the lock.
        tcp: ``tcp_repair.export_state``'s octets.
        tls: the TLS state, empty without TLS.
        pending: octets that were consumed already and are read before the socket.
        hops: how often the connection has been handed over before.
        arrived_ns: when the request arrived at the source, CLOCK_MONOTONIC of the source's host.
        sent_ns: when the offer was made, by the same clock.
        id: chosen by the link.
    """

    flow: bytes
    gen: int
    tcp: bytes
    tls: bytes = b""
    pending: bytes = b""
    hops: int = 0
    arrived_ns: int = 0
    sent_ns: int = 0
    id: int = 0


class Taken(NamedTuple):
    """The target serves the connection."""

    id: int = 0

    @property
    def label(self) -> str:
        """For counters: ``taken``."""
        return "taken"


class Refused(NamedTuple):
    """The target has not taken it."""

    reason: Reason
    text: str = ""
    id: int = 0

    @property
    def label(self) -> str:
        """For counters: the reason, ``import-failed`` for instance."""
        return self.reason.name.lower().replace("_", "-")


class Ping(NamedTuple):
    """Are you there?"""

    id: int = 0


class Pong(NamedTuple):
    """I am."""

    id: int = 0


class Report(NamedTuple):
    """What the listener has learned of late, for whoever calls it (`prism.adaptive`)."""

    data: bytes = b""


class State(NamedTuple):
    """How the listener is, for whoever calls it.

    Attributes:
        draining: it wants no more connections, and will soon be gone.
        connections: how many clients' connections it has.
    """

    draining: bool = False
    connections: int = 0


Message = Hello | Offer | Taken | Refused | Ping | Pong | Report | State
_HELLO_TYPE, _OFFER_TYPE, _TAKEN_TYPE, _REFUSED_TYPE = range(1, 5)
_PING_TYPE, _PONG_TYPE, _REPORT_TYPE, _STATE_TYPE = range(5, 9)


def _derive(key: bytes, purpose: bytes, data: bytes = b"") -> bytes:
    return hashlib.blake2b(data, key=key, person=purpose, digest_size=32).digest()


def hello_keys(cluster_key: bytes) -> tuple[bytes, bytes]:
    """The keys of the two HELLOs: (caller's, listener's)."""
    key = hashlib.blake2b(cluster_key, person=b"prism-link", digest_size=32).digest()
    return _derive(key, b"hello-caller"), _derive(key, b"hello-listener")


def session_keys(cluster_key: bytes, caller: Hello, listener: Hello) -> tuple[bytes, bytes]:
    """The keys of one session: (caller to listener, listener to caller)."""
    key = hashlib.blake2b(cluster_key, person=b"prism-link", digest_size=32).digest()
    names = b"".join(_text(name, _MAX_NAME) for name in (caller.name, listener.name))
    data = caller.nonce + listener.nonce + names
    return _derive(key, b"caller", data), _derive(key, b"listener", data)


def _text(text: str, limit: int) -> bytes:
    """A length octet and that many octets of UTF-8, cut to ``limit``."""
    data = text.encode("utf-8", "replace")
    if len(data) > limit:
        data = data[:limit].decode("utf-8", "ignore").encode()
    return bytes((len(data),)) + data


class Sealer:
    """Makes the frames of one direction of one session."""

    __slots__ = ("_base", "_counter")

    def __init__(self, key: bytes) -> None:
        self._base = hashlib.blake2b(key=key, digest_size=_MAC_SIZE)
        self._counter = 0

    def _seal(self, kind: int, *parts: bytes) -> bytes:
        header = _HEADER.pack(sum(map(len, parts)), VERSION, kind, 0, self._counter)
        self._counter += 1
        mac = self._base.copy()
        mac.update(header)
        for part in parts:
            mac.update(part)
        return b"".join((header, *parts, mac.digest()))

    def hello(self, hello: Hello) -> bytes:
        """A HELLO frame."""
        names = _text(hello.name, _MAX_NAME) + _text(hello.peer, _MAX_NAME)
        return self._seal(_HELLO_TYPE, hello.nonce, hello.answers, names)

    def offer(self, offer: Offer, number: int) -> bytes:
        """An OFFER frame; ``number`` goes in place of ``offer.id``.

        Raises:
            HandoffError: more than ``MAX_OFFER`` octets; nothing was counted.
        """
        flow, gen, tcp, tls, pending, hops, arrived_ns, sent_ns, _ = offer
        sizes = len(tcp), len(tls), len(pending)
        if sum(sizes) > MAX_OFFER:
            raise HandoffError(f"the connection's state has {sum(sizes)} octets, over {MAX_OFFER}")
        fixed = _OFFER.pack(number, gen, arrived_ns, sent_ns, flow, hops, *sizes)
        return self._seal(_OFFER_TYPE, fixed, tcp, tls, pending)

    def taken(self, number: int) -> bytes:
        """A TAKEN frame."""
        return self._seal(_TAKEN_TYPE, _ID.pack(number))

    def refused(self, number: int, reason: Reason, text: str = "") -> bytes:
        """A REFUSED frame; the text is cut to 200 octets."""
        return self._seal(_REFUSED_TYPE, _REFUSED.pack(number, reason), _text(text, _MAX_TEXT))

    def ping(self, number: int) -> bytes:
        """A PING frame."""
        return self._seal(_PING_TYPE, _ID.pack(number))

    def pong(self, number: int) -> bytes:
        """A PONG frame."""
        return self._seal(_PONG_TYPE, _ID.pack(number))

    def report(self, data: bytes) -> bytes:
        """A REPORT frame, of up to ``MAX_REPORT`` octets."""
        return self._seal(_REPORT_TYPE, data)

    def state(self, state: State) -> bytes:
        """A STATE frame."""
        return self._seal(_STATE_TYPE, _STATE.pack(state.draining, state.connections))


class Decoder:
    """Takes octets as they come and gives messages; one direction of one link.

    Memory is bounded by the largest frame allowed (``limit``) and what one ``push`` brings.
    """

    __slots__ = ("_at", "_base", "_counter", "_data", "_limit", "_need")

    def __init__(self, key: bytes, limit: int = MAX_HELLO) -> None:
        self._data: bytes | bytearray = b""
        self._at = 0
        self._need = _OVERHEAD
        self.rekey(key, limit)

    def rekey(self, key: bytes, limit: int = MAX_BODY) -> None:
        """Expect the frames from here on under another key, their counter from 0 again."""
        self._base = hashlib.blake2b(key=key, digest_size=_MAC_SIZE)
        self._counter = 0
        self._limit = limit

    def push(self, data: bytes) -> None:
        """Add octets as received."""
        rest = self._data
        if self._at == len(rest):
            self._data = data
            self._at = 0
            return
        if not isinstance(rest, bytearray):
            self._data = rest = bytearray(rest[self._at :])
            self._at = 0
        elif self._at:
            del rest[: self._at]
            self._at = 0
        rest += data

    def pop(self) -> Message | None:
        """The next whole message, or None while there is none.

        Raises:
            WireError: the peer did not send this; give the connection up.
        """
        data, at = self._data, self._at
        if len(data) - at < self._need:
            return None
        length, version, kind, reserved, counter = _HEADER.unpack_from(data, at)
        if version != VERSION or reserved:
            raise WireError(Fault.MALFORMED, f"a frame of version {version}, not {VERSION}")
        if length > self._limit:
            raise WireError(Fault.MALFORMED, f"a frame of {length} octets, over {self._limit}")
        total = _OVERHEAD + length
        if len(data) - at < total:
            self._need = total
            return None
        self._need = _OVERHEAD
        end = at + total - _MAC_SIZE
        mac = self._base.copy()
        with memoryview(data) as view:
            mac.update(view[at:end])
        self._at = end + _MAC_SIZE
        if not hmac.compare_digest(mac.digest(), data[end : self._at]):
            raise WireError(Fault.BAD_MAC, "a frame with a wrong MAC")
        if counter != self._counter:
            raise WireError(Fault.REPLAY, f"frame {counter} where {self._counter} was due")
        self._counter += 1
        message = _parse(kind, data, at + _HEADER.size, end)
        if self._at == len(self._data):
            self._data = b""
            self._at = 0
        return message


def _parse(kind: int, data: bytes | bytearray, at: int, end: int) -> Message:
    """The message in an authenticated frame's body, ``data[at:end]``."""
    try:
        if kind == _OFFER_TYPE:
            return _parse_offer(data, at, end)
        if kind == _TAKEN_TYPE and end - at == _ID.size:
            return Taken(*_ID.unpack_from(data, at))
        if kind == _REFUSED_TYPE:
            return _parse_refused(data, at, end)
        if kind == _PING_TYPE and end - at == _ID.size:
            return Ping(*_ID.unpack_from(data, at))
        if kind == _PONG_TYPE and end - at == _ID.size:
            return Pong(*_ID.unpack_from(data, at))
        if kind == _REPORT_TYPE and end - at <= MAX_REPORT:
            return Report(bytes(data[at:end]))
        if kind == _STATE_TYPE and end - at == _STATE.size:
            flags, connections = _STATE.unpack_from(data, at)
            return State(bool(flags & 1), connections)
        if kind == _HELLO_TYPE:
            return _parse_hello(bytes(data[at:end]))
    except (struct.error, IndexError, UnicodeDecodeError):
        pass
    raise WireError(Fault.MALFORMED, f"a frame of type {kind} with {end - at} octets")


def _parse_offer(data: bytes | bytearray, at: int, end: int) -> Offer:
    if end - at < _OFFER.size:
        raise IndexError
    number, gen, arrived_ns, sent_ns, flow, hops, tcp_size, tls_size, pending_size = (
        _OFFER.unpack_from(data, at)
    )
    tcp = at + _OFFER.size
    tls = tcp + tcp_size
    pending = tls + tls_size
    if pending + pending_size != end:
        raise IndexError
    return Offer(
        flow,
        gen,
        bytes(data[tcp:tls]),
        bytes(data[tls:pending]),
        bytes(data[pending:end]),
        hops,
        arrived_ns,
        sent_ns,
        number,
    )


def _parse_refused(data: bytes | bytearray, at: int, end: int) -> Refused:
    if end - at < _REFUSED.size:
        raise IndexError
    number, code = _REFUSED.unpack_from(data, at)
    text, rest = _take_text(bytes(data[at + _REFUSED.size : end]), 0)
    if at + _REFUSED.size + rest != end:
        raise IndexError
    try:
        reason = Reason(code)
    except ValueError:
        reason = Reason.OTHER
    return Refused(reason, text, number)


def _parse_hello(body: bytes) -> Hello:
    if len(body) < 2 * NONCE_SIZE:
        raise IndexError
    name, at = _take_text(body, 2 * NONCE_SIZE)
    peer, at = _take_text(body, at)
    if at != len(body):
        raise IndexError
    return Hello(name, peer, body[:NONCE_SIZE], body[NONCE_SIZE : 2 * NONCE_SIZE])


def _take_text(body: bytes, at: int) -> tuple[str, int]:
    end = at + 1 + body[at]
    if end > len(body):
        raise IndexError
    return body[at + 1 : end].decode(), end
