"""Moves a connection to a new socket of the same node, by handing it over to the node itself.

It is the ordinary handoff with its lock and its commit, but the offer never leaves the process.
The new socket has another port of the node's, so both exist until the switch has decided.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from prism.handoff.channel import Answer, Refused, Taken, TimedOut
from prism.handoff.incoming import Replier
from prism.handoff.wire import Offer

__all__ = ["Mirror"]


class _Receiver(Protocol):
    name: str

    def take_over(self, offer: Offer, reply: Replier) -> None: ...


class Mirror:
    """The way of offers from a node to itself.

    Args:
        node: takes the offers.
    """

    def __init__(self, node: _Receiver) -> None:
        self._node = node

    def offer(self, offer: Offer, on_answer: Callable[[Answer], None], deadline: float) -> None:
        """As :meth:`prism.handoff.channel.Link.offer`: a late answer may follow ``TimedOut``."""
        timer = asyncio.get_running_loop().call_later(deadline, on_answer, TimedOut())
        self._node.take_over(offer, _Reply(self._node.name, on_answer, timer))


class _Reply:
    __slots__ = ("_on_answer", "_timer", "peer")

    def __init__(
        self, peer: str, on_answer: Callable[[Answer], None], timer: asyncio.TimerHandle
    ) -> None:
        self.peer = peer
        self._on_answer = on_answer
        self._timer = timer

    def __call__(self, answer: Taken | Refused) -> None:
        self._timer.cancel()
        self._on_answer(answer)
