"""The rules of the switch that name a backend's worker as the owner, from take-over to withdrawal.

A rule outlives its connection: it goes when the kernel has nothing left of the connection, after
TIME_WAIT where due, or when another node has taken the connection over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from prism.flow import Endpoint, Flow
from prism.monitor.base import TIME_WAIT, Gone, Monitor
from prism.switch.control import Message, Op, Status

if TYPE_CHECKING:
    from prism.switch.client import SwitchClient
    from prism.telemetry.metrics import Metrics

__all__ = ["Owned", "Ownership"]

DELETE_PAUSE = 1.0  # seconds until a rule's removal is tried again


class Owned:
    """A rule of this worker: of a connection, or of one whose kernel state is not gone yet."""

    __slots__ = ("ended", "gen", "local")

    def __init__(self, gen: int, local: Endpoint) -> None:
        self.gen = gen
        self.local = local
        self.ended = False


class Ownership:
    """The rules of one worker, and the watch over the connections they are for.

    Attributes:
        rules: by packed flow, the rules that name this worker as the owner.
    """

    def __init__(
        self,
        switch: SwitchClient,
        monitor: Monitor,
        metrics: Metrics,
        stopping: Callable[[], bool],
        unsure: Callable[[bytes], None],
    ) -> None:
        """Begin without a rule.

        Args:
            switch: where rules are added and removed.
            monitor: tells when a connection is gone.
            metrics: count what the switch refuses.
            stopping: whether the worker ends. Removals are not tried again then: the agent
                removes what is left when the lease is over.
            unsure: told the packed flow of a rule that has another generation in the switch than
                here, so that it was not removed: somebody has to look what it is.
        """
        self.rules: dict[bytes, Owned] = {}
        self._stopping = stopping
        self._unsure = unsure
        self._switch = switch
        self._monitor = monitor
        self._metrics = metrics

    def __len__(self) -> int:
        return len(self.rules)

    def begin(self, key: bytes, gen: int, local: Endpoint, client: Endpoint, fd: int) -> None:
        """A connection has been taken over: its rule is this worker's until its state is gone.

        Args:
            key: the packed flow; a rule of its last connection is the one that was taken over.
            gen: the rule's generation.
            local: the socket's own end.
            client: its other end.
            fd: the socket.

        Raises:
            OSError: ``fd`` is not an open socket.
        """
        self.rules[key] = owned = Owned(gen, local)
        self._monitor.watch(fd, local, client, lambda gone: self._gone(key, owned, gone))

    def end(self, key: bytes, client: Endpoint) -> None:
        """Another node has the connection, and with it the rule."""
        owned = self.rules.pop(key, None)
        if owned is not None:
            self._monitor.forget(owned.local, client)

    def changed(self, key: bytes, gen: int) -> None:
        """The switch says that a rule has another generation, or (0) is gone."""
        if not gen:
            self.rules.pop(key, None)
            return
        owned = self.rules.get(key)
        if owned is not None:
            owned.gen = gen

    def alive(self, key: bytes) -> bool:
        """Whether the kernel has the connection of a rule; one in TIME_WAIT does not count.

        A rule whose connection is gone is forgotten: the caller removes it from the switch.
        """
        owned = self.rules.get(key)
        if owned is None:
            return False
        client = Flow.unpack(key).client
        # The kernel knows best: this process may not have heard yet that the client has gone.
        if not owned.ended and self._monitor.alive(owned.local, client):
            return True
        self.end(key, client)
        return False

    async def restore(self, added: Callable[[bytes, int], None]) -> None:
        """Add the rules of all connections again, after the switch has lost its table.

        Args:
            added: told at once of each rule that was added: the packed flow, the new generation.
        """
        for key, owned in list(self.rules.items()):
            if owned.ended:
                del self.rules[key]
                continue
            reply = await self._switch.request(
                Op.ADD, key, cookie=owned.gen & (1 << 63) - 1, endpoint=owned.local
            )
            if reply is not None and reply.status == Status.OK:
                owned.gen = reply.gen
                added(key, reply.gen)

    def _gone(self, key: bytes, owned: Owned, gone: Gone) -> None:
        """The kernel has forgotten a connection, or keeps only its TIME_WAIT state."""
        if self.rules.get(key) is not owned or owned.ended:
            return  # the client uses its port for a new connection already
        owned.ended = True
        if gone.time_wait:
            asyncio.get_running_loop().call_later(TIME_WAIT, self._withdraw, key, owned)
        else:
            self._withdraw(key, owned)

    def _withdraw(self, key: bytes, owned: Owned) -> None:
        """Remove a rule whose connection is gone; again until the switch answers."""
        if self.rules.get(key) is not owned:
            return

        def answered(reply: Message | None) -> None:
            if reply is not None:
                if self.rules.get(key) is owned:
                    del self.rules[key]
                if reply.status not in (Status.OK, Status.NOENT):
                    self._metrics.control_errors.add("delete", Status(reply.status).name)
                if reply.status == Status.STALE:
                    self._unsure(key)
            elif not self._stopping():
                asyncio.get_running_loop().call_later(DELETE_PAUSE, self._withdraw, key, owned)

        self._switch.submit(Op.DELETE, key, answered, gen=owned.gen)
