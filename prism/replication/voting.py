"""The choice of a view: Paxos (Lamport, 2001), one instance for each epoch. Sans-I/O.

:class:`Voter` is what ``Membership`` is made of. The rules are in ``membership.py``, their reasons
in ``docs/replication.md``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Final

from prism.replication.views import (
    NO_BALLOT,
    Ballot,
    Kind,
    Message,
    Saved,
    View,
    Want,
)

__all__ = ["DRIFT", "Out", "Voter"]

DRIFT: Final = 1.05
"""How much faster one node's clock may run than another's."""

_LOST_INSTANCES: Final = 3  # epochs ahead of all heard in which a lost promise may have been made

Out = list[tuple[str, Message]]


class _Peer:
    """The last a node has told."""

    __slots__ = ("applied", "caught", "epoch", "first", "heard", "serial", "want")

    def __init__(self, now: float) -> None:
        self.heard = now  # at the start, everyone has the time of a lease to say something
        self.serial = -1
        self.first = self.epoch = -1  # when first heard of in this life, and now
        self.applied = -1
        self.want = Want.SERVE
        self.caught = 0


class Voter:
    """One node's part. Times are monotonic, in seconds.

    Args:
        me: this node's name.
        nodes: names of all configured nodes.
        replicas: of each key.
        lease: seconds.
        saved: what the last life left; the default for a node that never lived.
        now: the time.
        serial: greater than that of any message of an earlier life.
        spread: between 0 and 1, at random: keeps rivals apart.

    Attributes:
        saved: to be written to disk, when ``unsaved``, before messages are sent.
        applied: the epoch that all is in order for here.
        caught: the epoch in which this node, joining, has caught up; 0: it has not.
        leaving: whether it wants out.
    """

    def __init__(
        self,
        me: str,
        nodes: Sequence[str],
        replicas: int,
        lease: float,
        *,
        saved: Saved,
        now: float,
        serial: int,
        spread: Callable[[], float] = random.random,
    ) -> None:
        self.me = me
        self.nodes = tuple(sorted(nodes))
        self.lease = lease
        self.saved = saved
        self.unsaved = False
        self.applied = 0
        self.caught = 0
        self.leaving = False
        self._out = replicas - 1
        self._quorum = len(self.nodes) // 2 + 1
        self._index = self.nodes.index(me)
        self._peers = {name: _Peer(now) for name in self.nodes if name != me}
        self._granted = dict.fromkeys(self.nodes, now + lease * DRIFT)
        self._serial = serial
        self._lease_until = 0.0
        self._asked: dict[int, float] = {}
        self._grants: dict[int, set[str]] = {}
        self._renew_at = now
        self._spread = spread
        self._since = now  # since when the view is not as it should be
        self._round = 0
        self._ballot = NO_BALLOT  # of the attempt under way
        self._accepting: View | None = None
        self._votes: dict[str, Message] = {}
        self._retry_at = 0.0
        self._refused: View | None = None  # proposed, and turned down for rule 2
        self._refused_until = 0.0

    @property
    def view(self) -> View:
        """The latest one known."""
        return self.saved.view

    # -- what a membership is in addition -----------------------------------------------------

    @property
    def want(self) -> Want:
        """What this node asks for."""
        raise NotImplementedError

    def learn(self, view: View) -> Out:
        """A view is known to be chosen."""
        raise NotImplementedError

    def _want_of(self, name: str) -> tuple[Want, int]:
        raise NotImplementedError

    def _desired(self, now: float) -> View:
        raise NotImplementedError

    def _handle(self, message: Message, now: float) -> Out:
        raise NotImplementedError

    # -- an attempt ---------------------------------------------------------------------------

    def _propose(self, now: float) -> Out:
        self._round = max(self._round, self.saved.promised.round) + 1
        self._ballot = Ballot(self._round, self._index)
        self._accepting = None
        self._votes = {}
        self._retry_at = now + self.lease / 2
        return self._cast(self._message(Kind.PREPARE, ballot=self._ballot), now)

    def _give_up(self, now: float) -> None:
        self._ballot = NO_BALLOT
        self._retry_at = now + self.lease / 4 * (self._spread() + 0.2 * self._index)

    def _cast(self, message: Message, now: float) -> Out:
        """To everyone, and be asked oneself."""
        out = self._to_all(message)
        for name, answer in self._handle(message, now):
            out += [(name, answer)] if name != self.me else self._count(answer, now)
        return out

    def _count(self, message: Message, now: float) -> Out:
        return self._handle(message, now)

    # -- a voice ------------------------------------------------------------------------------

    def _find_voice(self) -> None:
        """Rule 6: find out from when on this node's votes are good."""
        if self.saved.votes_from >= 0:
            return
        epochs = sorted(peer.epoch for peer in self._peers.values() if peer.epoch >= 0)
        if len(epochs) == len(self._peers) and not any(epochs):
            self._have_voice(0)
        elif len(epochs) >= self._quorum and epochs[-1] > 0:
            self._have_voice(epochs[-1] + _LOST_INSTANCES)

    def _have_voice(self, epoch: int) -> None:
        self.saved = self.saved._replace(votes_from=epoch)
        self.unsaved = True

    def _may_vote(self, message: Message) -> bool:
        """Whether a ballot is for the next epoch, and this node has a voice in it."""
        votes_from = self.saved.votes_from
        next_epoch = self.view.epoch + 1
        return message.view.epoch + 1 == next_epoch and 0 <= votes_from <= next_epoch

    # -- Paxos --------------------------------------------------------------------------------

    def _on_prepare(self, message: Message, now: float) -> Out:
        if not self._may_vote(message):
            return []
        saved = self.saved
        if message.ballot <= saved.promised:
            return [(message.sender, self._message(Kind.REJECT, ballot=saved.promised))]
        self.saved = saved._replace(promised=message.ballot)
        self.unsaved = True
        answer = self._message(
            Kind.PROMISE, ballot=message.ballot, proposal=saved.accepted, proposed=saved.ballot
        )
        return [(message.sender, answer)]

    def _on_promise(self, message: Message, now: float) -> Out:
        if not self._is_mine(message) or self._accepting is not None:
            return []
        self._votes[message.sender] = message
        if len(self._votes) < self._quorum:
            return []
        earlier = max(self._votes.values(), key=lambda vote: vote.proposed)
        proposal = earlier.proposal if earlier.proposal is not None else self._desired(now)
        if proposal == self.view:
            self._give_up(now)
            return []
        self._accepting = proposal
        self._votes = {}
        return self._cast(self._message(Kind.ACCEPT, ballot=self._ballot, proposal=proposal), now)

    def _on_accept(self, message: Message, now: float) -> Out:
        proposal = message.proposal
        if proposal is None or not self._may_vote(message):
            return []
        may_drop = self._may_drop(proposal, now)
        if not may_drop:
            # Some may have accepted it, so it has to come: the leases it waits for must run out.
            self._refused, self._refused_until = proposal, now + 2 * self.lease
        if message.ballot < self.saved.promised or not may_drop:
            return [(message.sender, self._message(Kind.REJECT, ballot=self.saved.promised))]
        self.saved = self.saved._replace(
            promised=message.ballot, ballot=message.ballot, accepted=proposal
        )
        self.unsaved = True
        return [(message.sender, self._message(Kind.ACCEPTED, ballot=message.ballot))]

    def _may_drop(self, proposal: View, now: float) -> bool:
        """Rule 2."""
        return all(
            name in proposal.serving
            or self._want_of(name)[0] is not Want.SERVE
            or now >= self._granted[name]
            for name in self.view.serving
        )

    def _on_accepted(self, message: Message, now: float) -> Out:
        if not self._is_mine(message) or self._accepting is None:
            return []
        self._votes[message.sender] = message
        if len(self._votes) < self._quorum:
            return []
        out = self.learn(self._accepting)
        return out + self._to_all(self._message(Kind.TELL))

    def _on_reject(self, message: Message, now: float) -> Out:
        if self._ballot != NO_BALLOT and message.view.epoch == self.view.epoch:
            self._round = max(self._round, message.ballot.round)
            self._give_up(now)
        return []

    def _is_mine(self, message: Message) -> bool:
        """Whether an answer is about the attempt under way."""
        return (
            self._ballot != NO_BALLOT
            and message.ballot == self._ballot
            and message.view.epoch == self.view.epoch
        )

    # -- messages -----------------------------------------------------------------------------

    def _message(
        self,
        kind: Kind,
        *,
        number: int = 0,
        lease: float = 0.0,
        ballot: Ballot = NO_BALLOT,
        proposal: View | None = None,
        proposed: Ballot = NO_BALLOT,
    ) -> Message:
        self._serial += 1
        return Message(
            self.me, self._serial, self.view, self.applied, self.want, self.caught, kind,
            number, lease, ballot, proposal, proposed,
        )  # fmt: skip

    def _to_all(self, message: Message) -> Out:
        return [(name, message) for name in self._peers]
