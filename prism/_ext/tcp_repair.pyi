"""Freezes, serialises and rebuilds TCP connections (TCP_REPAIR, tcp(7), linux/tcp.h).

All calls release the GIL. Needs CAP_NET_ADMIN (and CAP_NET_RAW to restore a received FIN), Linux
5.15 or later for buffer sizes to stay as they were.

Carried: addresses and ports, both queues with their sequence numbers, the peer's MSS, window
scales, SACK and timestamps as negotiated, the timestamp clock, windows, buffer sizes and whether
they were fixed, whether the client has sent its FIN.

Not carried: congestion window and round-trip time (the new socket starts from the initial ones,
and with a retransmission timer of 1 to 3 s until its first sample), ECN, TCP-MD5/AO, the peer's
last timestamp, segments received out of order (the client sends them again), TCP_CONGESTION,
SO_KEEPALIVE, SO_RCVLOWAT and any other socket option. The new socket has TCP_NODELAY, since what
it is for is sending responses whose pieces are written whole.
"""

from typing import final

VERSION: int
HEADER_SIZE: int
"""Octets of a state before the queues' contents."""

class StateError(ValueError):
    """Bytes that are not a TCP state this version can restore; the message says why."""

class NotCarriable(OSError):
    """The connection is in a state that cannot be carried over; the message says which.

    ``errno`` is EOPNOTSUPP (a TCP state other than ESTABLISHED and CLOSE_WAIT, urgent data, shut
    down for reading), ECONNRESET (closed or reset), ECONNABORTED (an error is pending), ENOTCONN,
    EMSGSIZE (more than 16 MiB queued), EADDRNOTAVAIL (link-local client), EPROTOTYPE (kernel TLS
    that receives, and a queue is not empty; or another upper-layer protocol) or EINVAL
    (SO_PEEK_OFF in use).
    """

def freeze(fd: int) -> None:
    """Enter repair mode: nothing more is read or written (EPERM, EINVAL), closing sends nothing.

    The kernel still takes segments that arrive, and acknowledges them; the switch's lock is what
    keeps both from happening.

    Raises:
        OSError: not a TCP socket (ENOPROTOOPT or EOPNOTSUPP), listening or no privilege (EPERM).
    """

def export_state(fd: int) -> bytes:
    """Serialise a connected socket, freezing it first if it is not frozen. It stays frozen.

    An IPv4-mapped connection of a dual-stack listener is exported as the IPv4 one it is. Nothing
    is consumed from the socket; ``resume`` makes it go on as if nothing had happened.

    Of a socket that the kernel seals TLS records for (TLS_TX without TLS_RX), the records travel
    and not the layer. Records that did not fit the send queue are not seen: see that there are
    none, ``prism.tls.kernel.KernelTx.settled``. With TLS_RX both queues have to be empty, and no
    part of a record may be with the kernel: ``prism.tls.kernel_rx.KernelRx.settled``.

    Raises:
        NotCarriable: its TCP state is neither ESTABLISHED nor CLOSE_WAIT, or the like.
        OSError: a system call failed; EBUSY: segments kept arriving while the queues were read.
            The socket may be frozen in each case: call ``resume`` or ``close_quietly``.
    """

def resume(fd: int, *, probe: bool = True) -> None:
    """Leave repair mode with the connection as it was (TCP_REPAIR_OFF, or OFF_NO_WP).

    Leaves SO_REUSEADDR set, without which no listener could bind to the port again.

    Args:
        fd: the socket.
        probe: send a window probe, which acknowledges what was received and has the client tell
            its acknowledgement and window.

    Raises:
        OSError: not a TCP socket, or no privilege.
    """

def probe(fd: int) -> None:
    """Send a window probe on a live connection (see ``resume``), at any time.

    Raises:
        OSError: not a TCP socket, or no privilege.
    """

def narrow(fd: int, octets: int) -> int:
    """Take back what the receive window offers beyond ``octets``, on a live connection.

    For a peer that waits for an answer: what it has under way beyond the new window would be
    dropped, and come again late. It learns from the next segment that acknowledges something new,
    usually the answer; the window grows no further until TCP_WINDOW_CLAMP is put back.

    Args:
        fd: the socket.
        octets: 4096 to 2**30.

    Returns:
        What TCP_WINDOW_CLAMP was; 0: there is input, the peer does not wait, nothing was done.

    Raises:
        OSError: not a TCP socket, or no privilege.
        ValueError: as said.
    """

def close_quietly(fd: int) -> None:
    """Close the descriptor without one packet being sent. Never raises for a broken connection."""

@final
class Imported:
    """A rebuilt socket, still in repair mode, so still silent. Closed quietly when dropped."""

    @property
    def local(self) -> tuple[str, int]:
        """Address and port it is bound to."""

    @property
    def peer(self) -> tuple[str, int]:
        """The client's address and port."""

    @property
    def half_closed(self) -> bool:
        """Whether the client has sent its FIN already (CLOSE_WAIT)."""

    @property
    def received(self) -> int:
        """Octets in the receive queue, waiting to be read."""

    @property
    def unacknowledged(self) -> int:
        """Octets that a former owner sent and the client had not acknowledged."""

    @property
    def unsent(self) -> int:
        """Octets that a former owner wrote and had not sent; ``activate`` sends them."""

    def fileno(self) -> int:
        """The descriptor, still this object's; -1 once activated or discarded."""

    def activate(self, *, probe: bool | None = None) -> int:
        """Leave repair mode, send what was unsent, restore the FIN; returns the descriptor.

        The descriptor is non-blocking, close-on-exec and TCP_NODELAY, and the caller's to close.

        Args:
            probe: send a window probe (about 5 us). None: when something hangs on the client's
                answer, that is with octets in the send queue, a window below 8 KiB, or octets
                received that nobody has acknowledged yet. False is right when a response is sent
                at once, with ``probe()`` later if it was not.

        Raises:
            OSError: the socket could not be brought to life; it has been closed quietly.
            ValueError: activated or discarded before.
        """

    def discard(self) -> None:
        """Close quietly. Idempotent."""

def import_state(state: bytes, address: str, port: int, *, alternatives: int = 16) -> Imported:
    """Build a socket in repair mode from ``export_state``'s bytes, bound to ``address``.

    The port is ``port``, or, where that four-tuple is taken (EADDRINUSE, EADDRNOTAVAIL), one of
    the ``alternatives`` (0 to 1024) next ones. For an IPv4 connection ``address`` may also be
    IPv4-mapped. Any bytes at all are safe to give.

    Raises:
        StateError: the bytes are truncated, of another version, or inconsistent.
        ValueError: not an address, an address of the other family, not a port.
        OSError: a system call failed; nothing is left behind.
    """

def describe(state: bytes) -> dict[str, int | str | bool]:
    """What a serialised state says, for people and tests (no payload).

    Raises:
        StateError: as for ``import_state``.
    """
