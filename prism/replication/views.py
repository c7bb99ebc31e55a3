"""What replicas tell each other about who is in: views, versions, messages. No I/O.

A *view* says which nodes may answer reads (``serving``) and which get all writes but have still to
catch up (``joining``); all other nodes are away. Views are numbered by their *epoch*; there is one
view for each epoch, chosen by a majority of the configured nodes (``docs/replication.md``).
"""

from __future__ import annotations

import enum
import json
from typing import Any, NamedTuple

from prism.errors import ProtocolError

__all__ = [
    "NO_BALLOT",
    "NO_VERSION",
    "NO_VIEW",
    "Ballot",
    "Kind",
    "Message",
    "Saved",
    "Version",
    "View",
    "Want",
    "decode",
    "dump",
    "encode",
    "load",
]


class Version(NamedTuple):
    """An object's version: later ones compare greater.

    One node assigns the versions of a key in an epoch, the head of its chain, each greater than
    all it has seen; so no version is ever given twice.
    """

    epoch: int
    serial: int  # microseconds since 1970, or one more than the last


NO_VERSION = Version(0, 0)
"""Of what was never written."""


class View(NamedTuple):
    """Who is in, from one epoch on. Names are sorted."""

    epoch: int
    serving: tuple[str, ...]
    joining: tuple[str, ...] = ()

    @property
    def members(self) -> tuple[str, ...]:
        """Those who have to get every write."""
        return self.serving + self.joining


NO_VIEW = View(0, ())
"""Before the nodes have met for the first time."""


class Ballot(NamedTuple):
    """Number of an attempt to have a view chosen; the index of the node makes it unique."""

    round: int
    node: int


NO_BALLOT = Ballot(0, -1)


class Saved(NamedTuple):
    """What a node must not forget: written to disk before a message that depends on it leaves.

    Attributes:
        view: the latest one known to be chosen.
        promised: no lower ballot is taken part in, for the epoch after ``view``'s.
        ballot, accepted: what was accepted last for that epoch.
        votes_from: first epoch in whose choice the node has a voice: a node that lost its disk
            has lost its promises, too. -1: not known yet.
        whole: no write has been acknowledged that this node should have and has not, unless a
            view says that it is not serving.
    """

    view: View = NO_VIEW
    promised: Ballot = NO_BALLOT
    ballot: Ballot = NO_BALLOT
    accepted: View | None = None
    votes_from: int = -1
    whole: bool = False


class Want(enum.IntEnum):
    """What a node asks for."""

    SERVE = 0
    JOIN = 1
    LEAVE = 2


class Kind(enum.IntEnum):
    """Kinds of messages; the last six are Paxos's (Lamport, 2001), one instance for an epoch."""

    RENEW = 0
    GRANT = 1
    TELL = 2
    PREPARE = 3
    PROMISE = 4
    ACCEPT = 5
    ACCEPTED = 6
    REJECT = 7


class Message(NamedTuple):
    """From one node to another. The first six fields say how the sender is.

    Attributes:
        serial: grows with every message of the sender, over restarts too.
        view: the latest that the sender knows.
        applied: the epoch the sender has finished changing to.
        want: what it asks for.
        caught: the epoch in which it has caught up; 0: it has not.
        number: of the ``RENEW`` that is asked or answered.
        lease: seconds, asked for by ``RENEW``.
        ballot: of the attempt.
        proposal: the view proposed (``ACCEPT``) or accepted before (``PROMISE``).
        proposed: the ballot of the latter.
    """

    sender: str
    serial: int
    view: View
    applied: int
    want: Want
    caught: int
    kind: Kind
    number: int = 0
    lease: float = 0.0
    ballot: Ballot = NO_BALLOT
    proposal: View | None = None
    proposed: Ballot = NO_BALLOT


def encode(message: Message) -> bytes:
    """A message as JSON."""
    return json.dumps(message).encode()


def decode(data: bytes) -> Message:
    """The inverse of :func:`encode`.

    Raises:
        ProtocolError: this is none.
    """
    try:
        values = json.loads(data)
        (sender, serial, view, applied, want, caught, kind, number, lease, ballot, proposal,
         proposed) = values  # fmt: skip
        return Message(
            str(sender), int(serial), _view(view), int(applied), Want(want), int(caught),
            Kind(kind), int(number), float(lease), _ballot(ballot),
            None if proposal is None else _view(proposal), _ballot(proposed),
        )  # fmt: skip
    except (ValueError, TypeError, RecursionError) as error:
        raise ProtocolError(f"not a message about views: {error}") from None


def dump(saved: Saved) -> bytes:
    """What goes to the disk."""
    return json.dumps(saved._asdict()).encode()


def load(data: bytes) -> Saved:
    """The inverse of :func:`dump`.

    Raises:
        ProtocolError: the file is damaged.
    """
    try:
        values: dict[str, Any] = json.loads(data)
        accepted = values["accepted"]
        return Saved(
            _view(values["view"]),
            _ballot(values["promised"]),
            _ballot(values["ballot"]),
            None if accepted is None else _view(accepted),
            int(values["votes_from"]),
            bool(values["whole"]),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise ProtocolError(f"not a saved view: {error!r}") from None


def _view(value: Any) -> View:
    epoch, serving, joining = value
    if not all(isinstance(name, str) for name in (*serving, *joining)):
        raise ValueError("a name is no text")
    return View(int(epoch), tuple(serving), tuple(joining))


def _ballot(value: Any) -> Ballot:
    number, node = value
    return Ballot(int(number), int(node))
