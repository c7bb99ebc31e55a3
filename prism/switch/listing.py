"""LIST: a table in pages of one datagram each; sans-I/O.

The first page takes a snapshot of the flows that match; a cursor is the snapshot's number and a
place in it, so a page that is asked for again is the same page. Rules are read when their page is
sent: one that has gone meanwhile is left out, and one that changed is told as it stands.
"""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from prism.switch.base import RuleStore
from prism.switch.control import LIST_LIMIT, Flags, Message, Status
from prism.switch.table import rule_message

__all__ = ["Lister"]

_PLACE_BITS: Final = 32
_MORE: Final = int(Flags.MORE)


class _Snapshot:
    __slots__ = ("flows", "owner", "used")

    def __init__(self, owner: int, flows: list[bytes], used: float) -> None:
        self.owner = owner
        self.flows = flows
        self.used = used


class Lister:
    """Answers LIST over any rule store."""

    def __init__(
        self,
        store: RuleStore,
        *,
        max_snapshots: int = 16,
        keep: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with no snapshot.

        Args:
            store: the rules.
            max_snapshots: lists in progress; the one unused for longest is given up.
            keep: seconds after its last page that a snapshot is given up.
            clock: seconds that never go back.
        """
        self._store = store
        self._max_snapshots = max_snapshots
        self._keep = keep
        self._clock = clock
        self._numbers = itertools.count(1)
        self._snapshots: OrderedDict[int, _Snapshot] = OrderedDict()

    def collect(self, owner: int) -> list[bytes]:
        """The flows of one owner (0: of all), for :meth:`answer`. May run in another thread."""
        return [rule.flow for rule in self._store.rules() if owner in (0, rule.owner)]

    def answer(self, request: Message, flows: list[bytes] | None = None) -> list[Message]:
        """The page that ``request`` asks for, as the messages of one datagram.

        Args:
            request: a LIST.
            flows: what :meth:`collect` found, for a first page; by default it is called.
        """
        self._expire()
        number, place = request.cookie >> _PLACE_BITS, request.cookie & ((1 << _PLACE_BITS) - 1)
        if request.cookie == 0:
            number = self._take(request.owner, flows)
        snapshot = self._snapshots.get(number)
        if snapshot is None or snapshot.owner != request.owner:
            return [request.reply(Status.INVALID)]
        snapshot.used = self._clock()
        self._snapshots.move_to_end(number)
        return self._page(request, number, snapshot, place)

    def _take(self, owner: int, flows: list[bytes] | None) -> int:
        if flows is None:
            flows = self.collect(owner)
        while len(self._snapshots) >= self._max_snapshots:
            self._snapshots.popitem(last=False)
        number = next(self._numbers)
        self._snapshots[number] = _Snapshot(owner, flows, self._clock())
        return number

    def _page(
        self, request: Message, number: int, snapshot: _Snapshot, place: int
    ) -> list[Message]:
        page: list[Message] = []
        flows = snapshot.flows
        while place < len(flows) and len(page) < LIST_LIMIT:
            rule = self._store.get(flows[place])
            place += 1
            if rule is not None and snapshot.owner in (0, rule.owner):
                page.append(rule_message(request, rule))
        if not page:
            return [request.reply(Status.NOENT)]
        if place < len(flows):
            last = page[-1]
            page[-1] = last._replace(flags=last.flags | _MORE, cookie=number << _PLACE_BITS | place)
        return page

    def _expire(self) -> None:
        horizon = self._clock() - self._keep
        while self._snapshots:
            number, snapshot = next(iter(self._snapshots.items()))
            if snapshot.used > horizon:
                return
            del self._snapshots[number]
