"""The handoff as two tables: who may do what, when, and what comes of it.

Everything that decides what happens next in a handoff lives in this file. Nothing here does I/O:
a machine is told *events* and answers with *commands*; whoever drives it (``prism.node``) carries
the commands out and reports how they went as further events. The diagrams in
``docs/protocol.md`` are generated from the tables (``python -m prism.handoff.diagram``).

Theory of operation
===================

One ``Source`` lives on the node that has the connection (A), one ``Target`` on the node that shall
have it (B). They never need to agree with each other; both need to agree with the switch, which
says yes to exactly one of two competing ``CHOWN`` operations. The rules:

1.  Freeze and export only after the switch has said that the flow is locked. Before that, a packet
    that A acknowledges after the export would be lost for B.
2.  What was offered may be resumed by A only after the switch has given A its ``CHOWN``, or after
    B has said that it has not taken it. What was never offered may be resumed at any time.
3.  B stays silent until the switch has given B its ``CHOWN``. That answer is the commit point.
4.  A takes back with ``CHOWN(owner = A)``, never with ``UNLOCK``. ``UNLOCK`` keeps the generation,
    so a ``LOCK`` that the network has delayed could lock the flow again behind its back, and
    B's ``CHOWN`` could still succeed. After A's ``CHOWN`` both are ``STALE``.
5.  ``NOENT`` for A's ``CHOWN`` after an offer means that B took the flow, served it to its end and
    removed the rule (or that the switch has lost its table): A lets go quietly.
6.  A switch that does not answer leaves its node unsure. While nothing was offered, A serves on
    and clears the rule in the background: a locked flow only makes TCP wait. After an offer, A
    waits frozen and asks again, a bounded number of times, then aborts. B asks again longer
    than A does (``TARGET_ATTEMPTS`` > ``SOURCE_ATTEMPTS``), then discards quietly. An abort harms
    nobody: the switch lets only the owner speak.
7.  Who gives up unsure leaves a rule behind that nobody looks after, so he tells his node to
    ``RECONCILE``: when the switch answers again, ``GET`` the rule; if it is this node's, take it
    with ``CHOWN`` where the connection is still served here, ``DELETE`` it where it is not; if it
    is another node's, abort what is here.
    So a connection may have no owner for a while, but not for good: its client is reset when it
    next speaks (plain forwarding leads to the frontend, whose kernel knows no such connection).
8.  B committed and cannot bring its copy to life: A's copy may be out of date by then, so it is
    not handed back. B deletes the rule and says so (``DROPPED``); A aborts, and its reset gets
    through where A is a frontend.
9.  A source that put the rule there itself (``START_NEW``) removes it again when it keeps the
    connection, *after* resuming: an unlocked rule whose owner is A forwards exactly what no rule
    forwards, so no packet in between is treated differently. One that found it there keeps it.
10. Nobody but the machine's driver touches the socket until the machine says ``DONE``. A client
    that disappears meanwhile is no event here: it is noticed by whoever serves the connection
    next, by the same socket error as ever.
11. Each switch command is answered by exactly one switch event, ``NO_ANSWER`` at the latest; each
    ``SEND_OFFER`` by one of ``TAKEN``, ``REFUSED``, ``DROPPED``, ``LINK_LOST``, ``TIMED_OUT``, of
    which the last may be followed by one of the first three, late.
12. B says ``REFUSED`` only when it knows that it has not committed. Where a ``CHOWN`` of its own
    went unanswered and the rule is gone or has moved on since, B says nothing: A asks the switch.
13. An event that the table has no row for is a ``ProtocolError`` and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import IntEnum, auto
from typing import NamedTuple

from prism.errors import ProtocolError

__all__ = [
    "SOURCE_ATTEMPTS",
    "SOURCE_TABLE",
    "SWITCH_EVENTS",
    "TARGET_ATTEMPTS",
    "TARGET_TABLE",
    "Command",
    "Event",
    "Machine",
    "Source",
    "SourceState",
    "Target",
    "TargetState",
    "Transition",
]

SOURCE_ATTEMPTS = 8
TARGET_ATTEMPTS = 12
RETRY_FIRST = 0.02  # seconds
RETRY_LONGEST = 1.0  # seconds


class Event(IntEnum):
    """What can happen. The first seven are the switch's answers, in the order of its statuses."""

    OK = 0
    EXISTS = 1
    NOENT = 2
    STALE = 3
    FULL = 4
    DENIED = 5  # also INVALID
    NO_ANSWER = 6  # not even after the switch client's own retransmissions

    START_NEW = auto()  # source: hand this connection over, it has no rule yet
    START_RULE = auto()  # source: hand this connection over, its rule is this node's
    EXPORTED = auto()  # FREEZE_EXPORT worked
    EXPORT_FAILED = auto()  # FREEZE_EXPORT did not; the socket may be frozen
    TAKEN = auto()  # B serves it
    REFUSED = auto()  # B has not taken it and will not; also: the offer never left this node
    DROPPED = auto()  # B committed, and lost it
    LINK_LOST = auto()  # the link broke before B's answer
    TIMED_OUT = auto()  # the deadline passed before B's answer

    OFFER = auto()  # target: an offer has come in
    IMPORTED = auto()  # IMPORT or IMPORT_ELSEWHERE worked
    IMPORT_FAILED = auto()  # it did not; nothing is left behind
    ACTIVATED = auto()  # ACTIVATE worked
    ACTIVATE_FAILED = auto()  # it did not; nothing is left behind

    RETRY_DUE = auto()  # the timer of ARM_RETRY

    # Fed by the machine to itself, never from outside:
    GAVE_UP = auto()  # a NO_ANSWER too many
    EXISTS_AGAIN = auto()  # an EXISTS too many
    TIDY = auto()  # the rule was put there by this source
    KEEP = auto()  # the rule was there before


class Command(IntEnum):
    """What the driver shall do."""

    SWITCH_ADD = auto()  # ADD(owner = me, locked), always with this handoff's cookie
    SWITCH_LOCK = auto()  # LOCK
    SWITCH_CHOWN = auto()  # CHOWN(owner = me, unlock) at the generation of the lock
    SWITCH_DELETE = auto()  # DELETE at the generation of the last reply
    ARM_RETRY = auto()  # feed RETRY_DUE after Machine.retry_delay seconds
    FREEZE_EXPORT = auto()  # -> EXPORTED | EXPORT_FAILED
    SEND_OFFER = auto()  # with the deadline -> TAKEN | REFUSED | DROPPED | LINK_LOST | TIMED_OUT
    RESUME = auto()  # unfreeze (a socket that was not frozen stays as it is)
    SERVE_HERE = auto()  # go on serving; Source.why says why it was not handed over
    CLOSE_QUIETLY = auto()  # close the frozen socket without a packet
    ABORT = auto()  # reset and close
    IMPORT = auto()  # -> IMPORTED | IMPORT_FAILED
    IMPORT_ELSEWHERE = auto()  # discard, import on another port -> IMPORTED | IMPORT_FAILED
    ACTIVATE = auto()  # -> ACTIVATED | ACTIVATE_FAILED
    SERVE = auto()  # the connection is this node's: answer its client
    DISCARD = auto()  # drop the imported copy quietly
    SEND_TAKEN = auto()
    SEND_REFUSED = auto()
    SEND_DROPPED = auto()
    RECONCILE = auto()  # the rule's state is unknown: see rule 7
    DONE = auto()  # the machine is at its end; always the last command


class SourceState(IntEnum):
    """Where a source is; the last five are ends."""

    IDLE = auto()
    ADDING = auto()
    LOCKING = auto()
    EXPORTING = auto()
    OFFERED = auto()
    TAKING_BACK = auto()  # frozen; B may have it
    RELEASING = auto()  # serving; the rule may still be locked
    FINDING_OUT = auto()  # serving; there may be a rule
    RETURNED = auto()  # serving, owner again; passed through
    TIDYING = auto()  # serving; removing the rule
    GONE = auto()  # B has it
    LOST = auto()  # nobody has it here
    KEPT = auto()  # served here, no rule
    KEPT_WITH_RULE = auto()  # served here, unlocked rule owned by this node
    KEPT_UNSURE = auto()  # served here, rule unknown


class TargetState(IntEnum):
    """Where a target is; the last two are ends."""

    IDLE = auto()
    IMPORTING = auto()
    COMMITTING = auto()
    MOVING = auto()  # importing again on another port
    UNSURE = auto()  # a CHOWN went unanswered: it may be committed
    ACTIVATING = auto()
    UNDOING = auto()  # committed, dead: removing the rule
    SERVING = auto()
    DISCARDED = auto()


class Transition(NamedTuple):
    """A table's row: where to go, what to do on the way."""

    state: IntEnum
    commands: tuple[Command, ...] = ()


Table = Mapping[tuple[IntEnum, Event], Transition]

_S = SourceState
_T = TargetState
_E = Event
_C = Command
_SWITCH_ANSWERS = (_E.OK, _E.EXISTS, _E.NOENT, _E.STALE, _E.FULL, _E.DENIED, _E.NO_ANSWER)
SWITCH_EVENTS: tuple[Event, ...] = (*_SWITCH_ANSWERS[:6], _E.DENIED)  # by prism_status
"""``SWITCH_EVENTS[reply.status]`` is the event of a switch's reply."""

_KEEP_ON = (_C.SERVE_HERE, _C.DONE)
_BACK = (_C.SWITCH_CHOWN, _C.RESUME, _C.SERVE_HERE)


def _senseless(
    table: dict[tuple[IntEnum, Event], Transition],
) -> dict[tuple[IntEnum, Event], Transition]:
    """Answers that make no sense for the operation count as DENIED; adds their rows."""
    for state in [state for state, event in table if event == _E.DENIED]:
        for answer in _SWITCH_ANSWERS:
            table.setdefault((state, answer), table[state, _E.DENIED])
    return table


def _asking(state: IntEnum, again: Command) -> dict[tuple[IntEnum, Event], Transition]:
    """A state that repeats its switch command until it is answered."""
    return {
        (state, _E.NO_ANSWER): Transition(state, (_C.ARM_RETRY,)),
        (state, _E.RETRY_DUE): Transition(state, (again,)),
    }


def _ignoring(
    states: Iterable[IntEnum], events: Iterable[Event]
) -> dict[tuple[IntEnum, Event], Transition]:
    """Events that come too late to matter."""
    wanted = tuple(events)
    return {(state, event): Transition(state) for state in states for event in wanted}


SOURCE_TABLE: Table = _senseless(
    {
        # Lock. Nothing is frozen yet, so every refusal means: serve on as before.
        (_S.IDLE, _E.START_NEW): Transition(_S.ADDING, (_C.SWITCH_ADD,)),
        (_S.ADDING, _E.OK): Transition(_S.EXPORTING, (_C.FREEZE_EXPORT,)),
        (_S.ADDING, _E.DENIED): Transition(_S.KEPT, _KEEP_ON),
        (_S.ADDING, _E.NO_ANSWER): Transition(_S.FINDING_OUT, (_C.SERVE_HERE, _C.ARM_RETRY)),
        (_S.IDLE, _E.START_RULE): Transition(_S.LOCKING, (_C.SWITCH_LOCK,)),
        (_S.LOCKING, _E.OK): Transition(_S.EXPORTING, (_C.FREEZE_EXPORT,)),
        (_S.LOCKING, _E.NOENT): Transition(_S.KEPT, _KEEP_ON),
        (_S.LOCKING, _E.DENIED): Transition(_S.KEPT_UNSURE, (_C.SERVE_HERE, _C.RECONCILE, _C.DONE)),
        (_S.LOCKING, _E.NO_ANSWER): Transition(_S.RELEASING, (_C.SERVE_HERE, _C.ARM_RETRY)),
        # Export, offer.
        (_S.EXPORTING, _E.EXPORTED): Transition(_S.OFFERED, (_C.SEND_OFFER,)),
        (_S.EXPORTING, _E.EXPORT_FAILED): Transition(_S.RELEASING, _BACK),
        (_S.OFFERED, _E.TAKEN): Transition(_S.GONE, (_C.CLOSE_QUIETLY, _C.DONE)),
        (_S.OFFERED, _E.REFUSED): Transition(_S.RELEASING, _BACK),
        (_S.OFFERED, _E.DROPPED): Transition(_S.LOST, (_C.ABORT, _C.DONE)),
        (_S.OFFERED, _E.LINK_LOST): Transition(_S.TAKING_BACK, (_C.SWITCH_CHOWN,)),
        (_S.OFFERED, _E.TIMED_OUT): Transition(_S.TAKING_BACK, (_C.SWITCH_CHOWN,)),
        # Take back: frozen, and B may have it.
        **_asking(_S.TAKING_BACK, _C.SWITCH_CHOWN),
        (_S.TAKING_BACK, _E.OK): Transition(_S.RETURNED, (_C.RESUME, _C.SERVE_HERE)),
        (_S.TAKING_BACK, _E.STALE): Transition(_S.GONE, (_C.CLOSE_QUIETLY, _C.DONE)),
        (_S.TAKING_BACK, _E.NOENT): Transition(_S.GONE, (_C.CLOSE_QUIETLY, _C.DONE)),
        (_S.TAKING_BACK, _E.DENIED): Transition(_S.TAKING_BACK, (_C.ARM_RETRY,)),
        (_S.TAKING_BACK, _E.GAVE_UP): Transition(_S.LOST, (_C.ABORT, _C.RECONCILE, _C.DONE)),
        (_S.TAKING_BACK, _E.TAKEN): Transition(_S.GONE, (_C.CLOSE_QUIETLY, _C.DONE)),
        (_S.TAKING_BACK, _E.REFUSED): Transition(_S.RELEASING, (_C.RESUME, _C.SERVE_HERE)),
        (_S.TAKING_BACK, _E.DROPPED): Transition(_S.LOST, (_C.ABORT, _C.DONE)),
        # Serving again; the rule must be unlocked, and belongs to this node.
        **_asking(_S.RELEASING, _C.SWITCH_CHOWN),
        (_S.RELEASING, _E.OK): Transition(_S.RETURNED),
        (_S.RELEASING, _E.NOENT): Transition(_S.KEPT, (_C.DONE,)),
        (_S.RELEASING, _E.STALE): Transition(_S.LOST, (_C.ABORT, _C.DONE)),
        (_S.RELEASING, _E.DENIED): Transition(_S.RELEASING, (_C.ARM_RETRY,)),
        (_S.RELEASING, _E.GAVE_UP): Transition(_S.KEPT_UNSURE, (_C.RECONCILE, _C.DONE)),
        (_S.RETURNED, _E.TIDY): Transition(_S.TIDYING, (_C.SWITCH_DELETE,)),
        (_S.RETURNED, _E.KEEP): Transition(_S.KEPT_WITH_RULE, (_C.DONE,)),
        # Serving; an ADD went unanswered. The same ADD again tells, and then the rule goes.
        **_asking(_S.FINDING_OUT, _C.SWITCH_ADD),
        (_S.FINDING_OUT, _E.OK): Transition(_S.TIDYING, (_C.SWITCH_DELETE,)),
        (_S.FINDING_OUT, _E.EXISTS): Transition(_S.KEPT, (_C.DONE,)),
        (_S.FINDING_OUT, _E.FULL): Transition(_S.KEPT, (_C.DONE,)),
        (_S.FINDING_OUT, _E.DENIED): Transition(_S.KEPT_UNSURE, (_C.RECONCILE, _C.DONE)),
        (_S.FINDING_OUT, _E.GAVE_UP): Transition(_S.KEPT_UNSURE, (_C.RECONCILE, _C.DONE)),
        **_asking(_S.TIDYING, _C.SWITCH_DELETE),
        (_S.TIDYING, _E.OK): Transition(_S.KEPT, (_C.DONE,)),
        (_S.TIDYING, _E.NOENT): Transition(_S.KEPT, (_C.DONE,)),
        (_S.TIDYING, _E.DENIED): Transition(_S.KEPT_UNSURE, (_C.RECONCILE, _C.DONE)),
        (_S.TIDYING, _E.GAVE_UP): Transition(_S.KEPT_UNSURE, (_C.RECONCILE, _C.DONE)),
        # Too late to matter: B's answer after the switch's, and the other way round.
        **_ignoring((_S.GONE, _S.LOST), (_E.TAKEN, _E.REFUSED, _E.DROPPED, _E.RETRY_DUE)),
        **_ignoring((_S.GONE, _S.LOST), _SWITCH_ANSWERS),
        **_ignoring(
            (_S.RELEASING, _S.TIDYING, _S.KEPT, _S.KEPT_WITH_RULE, _S.KEPT_UNSURE), (_E.REFUSED,)
        ),
    }
)

_REFUSE = (_C.DISCARD, _C.SEND_REFUSED, _C.DONE)

TARGET_TABLE: Table = _senseless(
    {
        (_T.IDLE, _E.OFFER): Transition(_T.IMPORTING, (_C.IMPORT,)),
        (_T.IMPORTING, _E.IMPORTED): Transition(_T.COMMITTING, (_C.SWITCH_CHOWN,)),
        (_T.IMPORTING, _E.IMPORT_FAILED): Transition(_T.DISCARDED, (_C.SEND_REFUSED, _C.DONE)),
        # Commit.
        (_T.COMMITTING, _E.OK): Transition(_T.ACTIVATING, (_C.ACTIVATE,)),
        (_T.COMMITTING, _E.STALE): Transition(_T.DISCARDED, _REFUSE),
        (_T.COMMITTING, _E.NOENT): Transition(_T.DISCARDED, _REFUSE),
        (_T.COMMITTING, _E.FULL): Transition(_T.DISCARDED, _REFUSE),
        (_T.COMMITTING, _E.DENIED): Transition(_T.DISCARDED, _REFUSE),
        (_T.COMMITTING, _E.EXISTS): Transition(_T.MOVING, (_C.IMPORT_ELSEWHERE,)),
        (_T.COMMITTING, _E.EXISTS_AGAIN): Transition(_T.DISCARDED, _REFUSE),
        (_T.MOVING, _E.IMPORTED): Transition(_T.COMMITTING, (_C.SWITCH_CHOWN,)),
        (_T.MOVING, _E.IMPORT_FAILED): Transition(_T.DISCARDED, (_C.SEND_REFUSED, _C.DONE)),
        (_T.COMMITTING, _E.NO_ANSWER): Transition(_T.UNSURE, (_C.ARM_RETRY,)),
        # A CHOWN went unanswered. The same one again tells; STALE: A has taken it back.
        **_asking(_T.UNSURE, _C.SWITCH_CHOWN),
        (_T.UNSURE, _E.OK): Transition(_T.ACTIVATING, (_C.ACTIVATE,)),
        (_T.UNSURE, _E.STALE): Transition(_T.DISCARDED, (_C.DISCARD, _C.DONE)),
        (_T.UNSURE, _E.NOENT): Transition(_T.DISCARDED, (_C.DISCARD, _C.DONE)),
        (_T.UNSURE, _E.FULL): Transition(_T.DISCARDED, _REFUSE),
        (_T.UNSURE, _E.EXISTS): Transition(_T.MOVING, (_C.IMPORT_ELSEWHERE,)),
        (_T.UNSURE, _E.EXISTS_AGAIN): Transition(_T.DISCARDED, _REFUSE),
        (_T.UNSURE, _E.DENIED): Transition(_T.DISCARDED, (_C.DISCARD, _C.RECONCILE, _C.DONE)),
        (_T.UNSURE, _E.GAVE_UP): Transition(_T.DISCARDED, (_C.DISCARD, _C.RECONCILE, _C.DONE)),
        # Committed. The client first, then A, which only waits to close.
        (_T.ACTIVATING, _E.ACTIVATED): Transition(_T.SERVING, (_C.SERVE, _C.SEND_TAKEN, _C.DONE)),
        (_T.ACTIVATING, _E.ACTIVATE_FAILED): Transition(_T.UNDOING, (_C.SWITCH_DELETE,)),
        **_asking(_T.UNDOING, _C.SWITCH_DELETE),
        (_T.UNDOING, _E.OK): Transition(_T.DISCARDED, (_C.SEND_DROPPED, _C.DONE)),
        (_T.UNDOING, _E.NOENT): Transition(_T.DISCARDED, (_C.SEND_DROPPED, _C.DONE)),
        (_T.UNDOING, _E.STALE): Transition(_T.DISCARDED, (_C.SEND_DROPPED, _C.DONE)),
        (_T.UNDOING, _E.DENIED): Transition(_T.DISCARDED, (_C.SEND_DROPPED, _C.RECONCILE, _C.DONE)),
        (_T.UNDOING, _E.GAVE_UP): Transition(
            _T.DISCARDED, (_C.SEND_DROPPED, _C.RECONCILE, _C.DONE)
        ),
    }
)

_INTERNAL = frozenset((_E.GAVE_UP, _E.EXISTS_AGAIN, _E.TIDY, _E.KEEP))
_FAILURES = frozenset(
    (
        *_SWITCH_ANSWERS[1:],
        _E.EXPORT_FAILED,
        _E.REFUSED,
        _E.DROPPED,
        _E.LINK_LOST,
        _E.TIMED_OUT,
        _E.IMPORT_FAILED,
        _E.ACTIVATE_FAILED,
    )
)
_Row = dict[Event, Transition]


def _rows(table: Table, states: Iterable[IntEnum]) -> dict[IntEnum, _Row]:
    """The table by state, so that feeding an event is one look-up."""
    rows: dict[IntEnum, _Row] = {state: {} for state in states}
    for (state, event), transition in table.items():
        if event not in _INTERNAL:
            rows[state][event] = transition
    return rows


class Machine:
    """What both machines share: the state, and feeding it events.

    Attributes:
        state: where the machine is.
        why: the first event that led off the good path, or None.
        done: whether the machine has said ``DONE``; late events may still come.
    """

    __slots__ = ("_attempts", "_moved", "_row", "done", "state", "why")

    TABLE: Table
    ROWS: dict[IntEnum, _Row]
    ATTEMPTS: int

    def __init__(self, state: IntEnum) -> None:
        self.state = state
        self.why: Event | None = None
        self.done = False
        self._attempts = 0
        self._moved = False
        self._row = self.ROWS[state]

    @property
    def retry_delay(self) -> float:
        """How long ``ARM_RETRY`` shall wait, in seconds: doubling, at most a second."""
        return float(min(RETRY_FIRST * 2 ** max(self._attempts - 1, 0), RETRY_LONGEST))

    def feed(self, event: Event) -> tuple[Command, ...]:
        """Tell the machine what happened; carry the answer out, in its order.

        Raises:
            ProtocolError: that cannot happen in this state (rule 13); nothing has changed.
        """
        transition = self._row.get(event)
        if transition is None:
            raise ProtocolError(
                f"a handoff {type(self).__name__.lower()} in state {self.state.name} "
                f"cannot take {event.name}"
            )
        state, commands = transition
        if commands:
            last = commands[-1]
            if last is _C.ARM_RETRY:
                if self._attempts == self.ATTEMPTS:
                    state, commands = self.TABLE[self.state, _E.GAVE_UP]
                    self.done = True
                self._attempts += 1
            elif last is _C.IMPORT_ELSEWHERE:
                if self._moved:
                    state, commands = self.TABLE[self.state, _E.EXISTS_AGAIN]
                    self.done = True
                self._moved = True
            elif last is _C.DONE:
                self.done = True
        if self.why is None and event in _FAILURES:
            self.why = event
        if state is not self.state:
            self.state = state
            self._row = self.ROWS[state]
        return commands


class Source(Machine):
    """The side that has the connection. Feed it START_NEW or START_RULE first."""

    __slots__ = ("_tidy",)

    TABLE = SOURCE_TABLE
    ROWS = _rows(SOURCE_TABLE, SourceState)
    ATTEMPTS = SOURCE_ATTEMPTS

    def __init__(self) -> None:
        super().__init__(SourceState.IDLE)
        self._tidy = False

    def feed(self, event: Event) -> tuple[Command, ...]:
        """As :meth:`Machine.feed`; passes through RETURNED by itself (rule 9)."""
        if event is _E.START_NEW:
            self._tidy = True
        commands = super().feed(event)
        if self.state is _S.RETURNED:
            state, more = self.TABLE[_S.RETURNED, _E.TIDY if self._tidy else _E.KEEP]
            self.state = state
            self._row = self.ROWS[state]
            self.done = not self._tidy
            commands += more
        return commands


class Target(Machine):
    """The side that shall have the connection. Feed it OFFER first."""

    __slots__ = ()

    TABLE = TARGET_TABLE
    ROWS = _rows(TARGET_TABLE, TargetState)
    ATTEMPTS = TARGET_ATTEMPTS

    def __init__(self) -> None:
        super().__init__(TargetState.IDLE)
