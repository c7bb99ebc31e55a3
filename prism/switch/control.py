"""The switch's control datagrams: what they say, how they are signed, which are replays.

Sans-I/O. The layout is ``struct prism_msg`` of ``_ext/bpf/prism_abi.h``; ``docs/protocol.md`` says
what each operation does. The kernel's classifier speaks the same datagrams.
"""

from __future__ import annotations

import hashlib
from enum import IntEnum, IntFlag
from typing import Final, NamedTuple

from prism._ext import control as _control
from prism.errors import ProtocolError
from prism.flow import Endpoint, pack_address, unpack_address

__all__ = [
    "AGENT",
    "KEY_SIZE",
    "LIST_LIMIT",
    "MESSAGE_SIZE",
    "NO_ENDPOINT",
    "NO_FLOW",
    "NO_MAC",
    "Flags",
    "Message",
    "Op",
    "ReplayWindow",
    "Status",
    "decode",
    "decode_all",
    "encode",
    "format_mac",
    "has_form",
    "node_id",
    "packed_address",
    "parse_mac",
]

MESSAGE_SIZE: Final = 120
_FORM: Final = b"PRSM\x01"  # PRISM_MAGIC, PRISM_VERSION
KEY_SIZE: Final = 16
LIST_LIMIT: Final = 11  # messages in one LIST reply: what fits one frame of 1,500 octets over IPv6
AGENT: Final = 0  # the switch agent's node id
NO_FLOW: Final = bytes(36)
NO_MAC: Final = bytes(6)
NO_ENDPOINT: Final = Endpoint("::", 0)


class Op(IntEnum):
    """What is asked (``enum prism_op``)."""

    HELLO = 1
    ADD = 2
    LOCK = 3
    CHOWN = 4
    UNLOCK = 5
    DELETE = 6
    GET = 7
    LIST = 16
    QUERY = 17


class Status(IntEnum):
    """How it went (``enum prism_status``)."""

    OK = 0
    EXISTS = 1
    NOENT = 2
    STALE = 3
    FULL = 4
    DENIED = 5
    INVALID = 6


class Flags(IntFlag):
    """Modifiers of a message (``PRISM_FLAG_*``)."""

    NONE = 0
    LOCKED = 0x01
    MORE = 0x02
    REPLY = 0x80


_OPS: Final[dict[int, Op]] = {int(op): op for op in Op}
_STATUSES: Final[dict[int, Status]] = {int(status): status for status in Status}
_LOCKED: Final = int(Flags.LOCKED)
_MORE: Final = int(Flags.MORE)
_REPLY: Final = int(Flags.REPLY)

packed_address = pack_address
_new = tuple.__new__  # makes a named tuple without the call of its own constructor


class Message(NamedTuple):
    """One request or reply.

    ``op`` and ``status`` are members of :class:`Op` and :class:`Status` where they are known, and
    plain numbers otherwise. ``flags`` is a plain number, see :class:`Flags`.
    """

    op: int
    node: int
    seq: int
    status: int = Status.OK
    flags: int = 0
    flow: bytes = NO_FLOW
    owner: int = 0
    owner_endpoint: Endpoint = NO_ENDPOINT
    owner_mac: bytes = NO_MAC
    gen: int = 0
    cookie: int = 0

    @property
    def locked(self) -> bool:
        """Requests: the state asked for; replies: the rule's state."""
        return bool(self.flags & _LOCKED)

    @property
    def more(self) -> bool:
        """LIST replies: the list goes on from ``cookie``."""
        return bool(self.flags & _MORE)

    @property
    def is_reply(self) -> bool:
        """Whether this answers a request."""
        return bool(self.flags & _REPLY)

    def reply(self, status: Status, *, gen: int = 0, cookie: int = 0) -> Message:
        """The answer to this request, with no rule in it."""
        return Message(
            self.op, self.node, self.seq, status, _REPLY, self.flow, gen=gen, cookie=cookie
        )


def encode(message: Message, key: bytes) -> bytes:
    """Pack and sign a message.

    Raises:
        ProtocolError: a field is out of range, or the owner's address is no IP address.
        ValueError: ``key`` is not 16 octets long.
    """
    op, node, seq, status, flags, flow, owner, endpoint, mac, gen, cookie = message
    address = packed_address(endpoint[0])
    if len(flow) != len(NO_FLOW) or len(mac) != len(NO_MAC):
        raise ProtocolError("a packed flow has 36 octets, and a MAC address 6")
    try:
        return _control.build(
            key, op, status, flags, node, seq, flow, address, endpoint[1], mac, owner, gen, cookie
        )
    except OverflowError as error:
        raise ProtocolError(f"a field of a control message is out of range: {error}") from None


def _message(
    fields: tuple[int, int, int, int, int, bytes, bytes, int, bytes, int, int, int],
) -> Message:
    op, status, flags, node, seq, flow, address, port, mac, owner, gen, cookie = fields
    endpoint = _new(Endpoint, (unpack_address(address), port))
    op, status = _OPS.get(op, op), _STATUSES.get(status, status)
    return _new(Message, (op, node, seq, status, flags, flow, owner, endpoint, mac, gen, cookie))


def decode(data: bytes, key: bytes) -> Message:
    """Check and unpack one datagram of exactly one message.

    Raises:
        ProtocolError: not 120 octets, not a control message, another version, or a wrong MAC.
        ValueError: ``key`` is not 16 octets long.
    """
    if len(data) != MESSAGE_SIZE:
        raise ProtocolError(f"a control message has {MESSAGE_SIZE} octets, not {len(data)}")
    fields = _control.parse(key, data)
    if fields is None:
        raise ProtocolError("not a control message signed with this key")
    return _message(fields)


def has_form(data: bytes) -> bool:
    """Whether a datagram is of the size and version of a control message, whoever signed it."""
    return len(data) == MESSAGE_SIZE and data.startswith(_FORM)


def decode_all(data: bytes, key: bytes) -> list[Message]:
    """Check and unpack a datagram of one or more messages (replies to LIST).

    Raises:
        ProtocolError: the size is no multiple of 120, or one of the messages is not good.
        ValueError: ``key`` is not 16 octets long.
    """
    if not data or len(data) % MESSAGE_SIZE:
        raise ProtocolError(f"{len(data)} octets are no whole number of control messages")
    messages = []
    for offset in range(0, len(data), MESSAGE_SIZE):
        fields = _control.parse(key, data, offset)
        if fields is None:
            raise ProtocolError("not a control message signed with this key")
        messages.append(_message(fields))
    return messages


def node_id(name: str) -> int:
    """The id of a node: the first 8 octets of BLAKE2b (RFC 7693) of its name.

    Raises:
        ProtocolError: the name is empty, or its id is the switch agent's.
    """
    number = int.from_bytes(hashlib.blake2b(name.encode()).digest()[:8], "big")
    if not name or number == AGENT:
        raise ProtocolError(f"{name!r} cannot be a node's name")
    return number


def parse_mac(text: str) -> bytes:
    """A MAC address in ``aa:bb:cc:dd:ee:ff`` form as 6 octets.

    Raises:
        ProtocolError: it is not in that form.
    """
    try:
        octets = bytes.fromhex(text.replace(":", ""))
    except ValueError:
        octets = b""
    if len(octets) != len(NO_MAC) or text.count(":") != len(NO_MAC) - 1:
        raise ProtocolError(f"{text!r} is not a MAC address")
    return octets


def format_mac(octets: bytes) -> str:
    """The inverse of :func:`parse_mac`."""
    return octets.hex(":")


class ReplayWindow:
    """Which sequence numbers of one node have been used (after RFC 4303, section 3.4.3)."""

    SIZE: Final = 64
    __slots__ = ("_seen", "highest")

    def __init__(self) -> None:
        self.highest = -1  # nothing seen
        self._seen = 0  # bit n: highest - n has been used

    def accept(self, seq: int) -> bool:
        """Note ``seq`` as used; ``False`` when it was used before or is older than the window."""
        ahead = seq - self.highest
        if ahead > 0:
            self._seen = 1 if ahead >= self.SIZE else (self._seen << ahead | 1) & (1 << 64) - 1
            self.highest = seq
            return True
        bit = 1 << -ahead
        if -ahead >= self.SIZE or self._seen & bit:
            return False
        self._seen |= bit
        return True
