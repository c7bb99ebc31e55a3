"""Waits until a connection whose records the kernel opens can leave its socket.

What the kernel has opened travels as pending octets; but it must not be in the middle of a record,
and all that was sent has to be acknowledged (:mod:`prism.tls.offload`). With a request that has
just come, both mostly hold at once or a moment later. A body that flows on does not let it come
to that: then the request is relayed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from prism.http.connection import Connection, State

__all__ = ["PATIENCE", "settle"]

PATIENCE: Final = 0.25
"""Seconds to wait at most; a delayed acknowledgement takes 0.04 (TCP_DELACK_MIN)."""

_FIRST: Final = 0.001  # seconds until the second look; each further one takes twice as long
_LONGEST: Final = 0.016


def settle(connection: Connection, then: Callable[[], None]) -> None:
    """Call ``then`` when the connection can be moved, or shall not be waited for any longer.

    Args:
        connection: in state DECIDING, and so again when ``then`` is called. If it is closed
            meanwhile, ``then`` is not called.
        then: looks for itself which of both it is.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + PATIENCE
    connection.detach()  # what comes meanwhile is looked at here

    def look(delay: float) -> None:
        if connection.state is not State.MOVED:
            return
        if connection.stream.unsettled and loop.time() < deadline:
            loop.call_later(delay, look, min(2 * delay, _LONGEST))
            return
        connection.attach()
        then()

    look(_FIRST)
