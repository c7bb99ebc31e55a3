"""The control datagram's hot parts: SipHash-2-4, and one round trip without leaving C."""

from collections.abc import Sequence

def siphash24(key: bytes, data: bytes) -> int:
    """SipHash-2-4 (Aumasson and Bernstein, 2012) of ``data`` as an unsigned 64-bit number.

    Raises:
        ValueError: ``key`` is not 16 octets long.
    """

def sign(key: bytes, message: bytearray) -> None:
    """Put the MAC of the first 112 octets into the last 8 of a 120-octet message.

    Raises:
        ValueError: the key has not 16 octets, or the message not 120.
    """

def verify(key: bytes, message: bytes) -> bool:
    """Whether a 120-octet message carries the right MAC (compared in constant time).

    Raises:
        ValueError: ``key`` is not 16 octets long.
    """

def build(
    key: bytes,
    op: int,
    status: int,
    flags: int,
    node: int,
    seq: int,
    flow: bytes,
    owner_addr: bytes,
    owner_port: int,
    owner_mac: bytes,
    owner: int,
    gen: int,
    cookie: int,
    /,
) -> bytes:
    """A signed message of 120 octets (``struct prism_msg``); all numbers in host order.

    Raises:
        ValueError: a field of fixed size has another size.
        OverflowError: a number does not fit its field.
    """

def parse(
    key: bytes, data: bytes, offset: int = 0, /
) -> tuple[int, int, int, int, int, bytes, bytes, int, bytes, int, int, int] | None:
    """The fields of the message at ``offset``, in the order of ``build``'s arguments.

    ``None`` when there are not 120 octets, or magic, version or MAC are wrong.
    """

def exchange(fd: int, request: bytes, wait_us: int, /) -> tuple[bytes | None, Sequence[bytes]]:
    """Send on a connected UDP socket; return the datagram that answers it, and what else came.

    Waits ``wait_us`` microseconds at most, and the thread's timer slack (0: only what has arrived
    by the time the send returns, which is the rule when a classifier answers). An answer is a
    reply with the request's node and sequence number; its MAC is not checked here. Other
    datagrams that had to be read first, 16 at most, come second, in their order. First ``None``:
    nothing came in time. Releases the GIL.

    Raises:
        OSError: the send failed.
    """
