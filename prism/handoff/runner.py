"""Drives a handoff machine: the only loop between events and commands."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from prism.errors import ProtocolError
from prism.handoff.machine import Command, Event, Machine

__all__ = ["Runner"]


class Runner:
    """Drives a machine: events in, commands carried out, also when one answers inside the other.

    A switch that answers at once feeds its answer while the command that asked is still running.
    Such an event waits until the commands before it are done, so the order of the table holds.

    ``execute(command)`` must not raise: what fails is an event. ``violation(error)`` is told of
    events that the machine does not take (rule 13).
    """

    __slots__ = ("_busy", "_execute", "_violation", "_waiting", "machine")

    def __init__(
        self,
        machine: Machine,
        execute: Callable[[Command], None],
        violation: Callable[[ProtocolError], None],
    ) -> None:
        self.machine = machine
        self._execute = execute
        self._violation = violation
        self._waiting: deque[Event] = deque()
        self._busy = False

    def post(self, event: Event) -> None:
        """Feed one event and carry out what follows."""
        if self._busy:
            self._waiting.append(event)
            return
        self._busy = True
        execute = self._execute
        try:
            while True:
                try:
                    commands = self.machine.feed(event)
                except ProtocolError as error:
                    self._violation(error)
                else:
                    for command in commands:
                        execute(command)
                if not self._waiting:
                    return
                event = self._waiting.popleft()
        finally:
            self._busy = False
