"""Freezes, serialises and rebuilds TCP connections (TCP_REPAIR, tcp(7), linux/tcp.h).

All calls release the GIL. Needs CAP_NET_ADMIN (and CAP_NET_RAW to restore a received FIN).
"""

VERSION: int

class StateError(ValueError):
    """Bytes that are not a TCP state this version can restore; the message says why."""

class NotCarriable(OSError):
    """The connection is in a state that cannot be carried over (for example: FIN already sent)."""

def freeze(fd: int) -> None:
    """Enter repair mode: the kernel neither sends nor acknowledges for this socket any more.

    Raises:
        OSError: not a TCP socket (ENOPROTOOPT), no privilege (EPERM).
    """

def export_state(fd: int) -> bytes:
    """Serialise a connected socket, freezing it first if it is not frozen. It stays frozen.

    Raises:
        NotCarriable: its TCP state is neither ESTABLISHED nor CLOSE_WAIT.
        OSError: a system call failed; the socket is frozen, call ``resume``.
    """

def resume(fd: int, *, probe: bool = True) -> None:
    """Leave repair mode with the connection as it was (TCP_REPAIR_OFF, or OFF_NO_WP)."""

def close_quietly(fd: int) -> None:
    """Close the descriptor without one packet being sent. Never raises for a broken connection."""

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

    def activate(self) -> int:
        """Leave repair mode, send what was unsent, restore the FIN; returns the descriptor.

        The descriptor is non-blocking and close-on-exec, and the caller's to close.

        Raises:
            OSError: the socket could not be brought to life; it has been closed quietly.
        """

    def discard(self) -> None:
        """Close quietly. Idempotent."""

def import_state(
    state: bytes, address: str, port: int, *, alternatives: int = 16
) -> Imported:
    """Build a socket in repair mode from ``export_state``'s bytes, bound to ``address``.

    The port is ``port``, or, where that four-tuple is taken (EADDRINUSE, EADDRNOTAVAIL), one of
    ``alternatives`` others.

    Raises:
        StateError: the bytes are truncated, of another version, or inconsistent.
        OSError: a system call failed; nothing is left behind.
    """

def describe(state: bytes) -> dict[str, int | str | bool]:
    """What a serialised state says, for people and tests (no payload).

    Raises:
        StateError: as for ``import_state``.
    """
