"""What a monitor is: it tells when the kernel has let go of a connection.

A rule may be removed only when its owner's kernel knows nothing of the connection any more, which
is later than ``close()``: what is queued is still sent, a FIN still waits for its ACK.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import NamedTuple, Protocol

from prism.flow import Endpoint

__all__ = ["TIME_WAIT", "Gone", "Monitor", "OnGone", "Reason"]

TIME_WAIT = 60.0
"""Seconds that Linux keeps TIME_WAIT (TCP_TIMEWAIT_LEN, ``include/net/tcp.h``)."""


class Reason(Enum):
    """Why a connection is gone, as far as the monitor can tell."""

    ENDED = "ended"  # closed by the peer or reset, in either direction
    TIME_WAIT = "time-wait"  # closed from this side first; its TIME_WAIT has ended, or begun:
    # Gone.time_wait tells
    TIMED_OUT = "timed-out"  # given up while retransmitting or probing
    UNKNOWN = "unknown"  # found missing after notifications were lost


class Gone(NamedTuple):
    """The kernel's socket of a connection is gone, and its TIME_WAIT too where that is observed.

    Attributes:
        local: the connection's own end.
        peer: the other end.
        reason: why.
        time_wait: whether a TIME_WAIT may still stand for it: then its rule has to stay for
            ``TIME_WAIT`` seconds more, so that a repeated FIN of the client is acknowledged.
    """

    local: Endpoint
    peer: Endpoint
    reason: Reason
    time_wait: bool


OnGone = Callable[[Gone], None]


class Monitor(Protocol):
    """Tells when connections are gone. Belongs to one event loop and one network namespace.

    Attributes:
        name: of the kind, for people.
    """

    name: str

    async def start(self) -> None:
        """Begin to listen to the kernel.

        Raises:
            OSError: the kernel does not offer it, or a privilege is missing.
        """

    def watch(self, sock_fd: int, local: Endpoint, peer: Endpoint, on_gone: OnGone) -> None:
        """Call ``on_gone`` once, from the event loop, when this very socket is gone.

        ``sock_fd`` is only needed during the call. Watching the same ends again replaces what
        was watched before.

        Raises:
            OSError: ``sock_fd`` is not an open socket.
        """

    def forget(self, local: Endpoint, peer: Endpoint) -> None:
        """Stop watching; what is not watched may be forgotten too."""

    def alive(self, local: Endpoint, peer: Endpoint) -> bool:
        """Whether the kernel has this connection now; one in TIME_WAIT does not count.

        Raises:
            OSError: the kernel cannot be asked.
        """

    async def close(self) -> None:
        """Stop; nothing is called any more."""
