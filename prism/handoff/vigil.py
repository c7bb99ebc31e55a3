"""Keeps a worker awake while an offer is on its way to it.

Waking a process that sleeps takes as long as several steps of a handoff together. A source that
knows where a connection will go says so (``PREPARE``) before it locks the flow; the target's event
loop then polls instead of sleeping, for a short and bounded time, and takes the offer at once.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Final

__all__ = ["LONGEST", "Vigil"]

LONGEST: Final = 0.0004
"""Seconds for which one ``PREPARE`` keeps the loop awake at most."""


class Vigil:
    """One worker's; it goes on polling until what was announced is there, or time is up.

    Attributes:
        on: whether the loop is being kept awake.
    """

    __slots__ = ("_until", "on")

    def __init__(self) -> None:
        self._until = 0.0
        self.on = False

    def begin(self) -> None:
        """Something has been announced."""
        self._until = monotonic() + LONGEST
        if not self.on:
            self.on = True
            asyncio.get_running_loop().call_soon(self._turn)

    def end(self) -> None:
        """It is there."""
        self._until = 0.0

    def _turn(self) -> None:
        # With something to call soon, the loop looks for events without waiting for them.
        if monotonic() < self._until:
            asyncio.get_running_loop().call_soon(self._turn)
        else:
            self.on = False
