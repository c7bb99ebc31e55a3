"""Drives a handoff machine: the only loop between events and commands."""

from __future__ import annotations

from abc import abstractmethod
from typing import Generic, TypeVar

from prism.errors import ProtocolError
from prism.handoff.machine import Command, Event, Machine

__all__ = ["Runner"]

M = TypeVar("M", bound=Machine)


class Runner(Generic[M]):
    """Drives a machine: events in, commands carried out, also when one answers inside the other.

    A switch that answers at once feeds its answer while the command that asked is still running.
    Such an event waits until the commands before it are done, so the order of the table holds.

    To be derived from: a runner that kept its commands' methods would be a cycle of references,
    one for each handoff, for the garbage collector to find.

    Attributes:
        machine: what is driven.
    """

    __slots__ = ("_busy", "_waiting", "machine")

    def __init__(self, machine: M) -> None:
        self.machine = machine
        self._waiting: list[Event] = []
        self._busy = False

    @abstractmethod
    def execute(self, command: Command) -> None:
        """Carry a command out. It must not raise: what fails is an event."""

    @abstractmethod
    def violation(self, error: ProtocolError) -> None:
        """Hear of an event that the machine does not take (rule 13)."""

    def post(self, event: Event) -> None:
        """Feed one event and carry out what follows."""
        if self._busy:
            self._waiting.append(event)
            return
        self._busy = True
        try:
            while True:
                try:
                    commands = self.machine.feed(event)
                except ProtocolError as error:
                    self.violation(error)
                else:
                    for command in commands:
                        self.execute(command)
                if not self._waiting:
                    return
                event = self._waiting.pop(0)
        finally:
            self._busy = False
