"""The control datagram's hot parts: SipHash-2-4, and one round trip without leaving C."""

def siphash24(key: bytes, data: bytes) -> int:
    """SipHash-2-4 (Aumasson and Bernstein, 2012) of ``data`` as an unsigned 64-bit number.

    Raises:
        ValueError: ``key`` is not 16 octets long.
    """

def sign(key: bytes, message: bytearray) -> None:
    """Put the MAC of the first 112 octets into the last 8 of a 120-octet message."""

def verify(key: bytes, message: bytes) -> bool:
    """Whether a 120-octet message carries the right MAC (compared in constant time)."""

def exchange(fd: int, request: bytes, wait_us: int) -> bytes | None:
    """Send on a connected UDP socket, return the datagram that answers it.

    Waits ``wait_us`` microseconds at most (0: only what has arrived by the time the send
    returns, which is the rule when a classifier answers). Datagrams whose sequence number is
    not the request's are not an answer; they are returned by the next ordinary receive at the
    latest. ``None``: nothing came in time. Releases the GIL.

    Raises:
        OSError: the send failed.
    """
