"""Who may serve: leases and the choice of views. Sans-I/O: messages and times in, messages out.

Rules. The reasons are in ``docs/replication.md``.

1. A node serves while a majority of the configured nodes, itself included, has granted it a lease.
   The lease counts from when it was *asked* for; a grant, from when it was *given*, and a bit
   longer: clocks may differ in speed by 5 %.
2. A grant is a promise not to accept a view without that node before the grant has ended, unless
   the node itself wants out. A node that has just started has promised everything.
3. The view of each epoch is chosen by Paxos among the configured nodes, one instance for an epoch;
   promises and accepted views are on disk before they are told.
4. A view leaves at most ``replicas - 1`` nodes out of ``serving``, so that of every key one replica
   serves that has missed nothing.
5. A node that joins serves after it has caught up within one epoch.
6. A node without its disk has no voice in choices it may have promised something about.

Everything in here is bounded by the number of nodes.
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

__all__ = ["Membership"]

DRIFT: Final = 1.05  # how much faster one node's clock may run than another's
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


class Membership:
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

    # -- what others ask ----------------------------------------------------------------------

    @property
    def view(self) -> View:
        """The latest one known."""
        return self.saved.view

    @property
    def want(self) -> Want:
        """What this node asks for."""
        if self.leaving:
            return Want.LEAVE
        view = self.view
        if self.me in view.serving:
            return Want.SERVE if self.saved.whole else Want.JOIN
        if self.me in view.joining and self.caught == view.epoch:
            return Want.SERVE
        return Want.JOIN

    def serves(self, now: float) -> bool:
        """Whether this node may answer reads and be the head of chains."""
        return (
            now < self._lease_until
            and self.applied == self.view.epoch
            and self.me in self.view.serving
            and self.want is Want.SERVE
        )

    @property
    def settled(self) -> bool:
        """Whether all that serve are known to have finished changing to this view."""
        view = self.view
        return self.applied == view.epoch and all(
            name == self.me or self._peers[name].applied >= view.epoch for name in view.serving
        )

    def rejoin(self) -> None:
        """This node cannot vouch for its data any more: it asks to join again."""
        self.saved = self.saved._replace(whole=False)
        self.unsaved = True
        self.caught = 0

    def finished(self, epoch: int) -> None:
        """Everything here is in order for a view now: tell it at the next tick."""
        self.applied = epoch
        self._renew_at = 0.0

    def caught_up(self, epoch: int) -> None:
        """This node has all that was acknowledged, and was in the chains since this epoch began."""
        self.caught = epoch
        self._renew_at = 0.0

    def leave(self) -> None:
        """Ask to be left out; this node serves no more from now on."""
        self.leaving = True
        self._renew_at = 0.0

    def stay(self) -> None:
        """Do not want out any more."""
        self.leaving = False
        self._renew_at = 0.0

    # -- events -------------------------------------------------------------------------------

    def tick(self, now: float) -> Out:
        """What is due; to be called several times in a lease."""
        out: Out = []
        self._find_voice()
        if now >= self._renew_at:
            self._renew_at = now + self.lease / 4
            out += self._renew(now)
        if self._ballot != NO_BALLOT and now >= self._retry_at:
            self._give_up(now)
        if now >= self._refused_until:
            self._refused = None
        # What was accepted here may have been chosen, or keep somebody from a lease: end it.
        due = self.saved.accepted is not None or self._desired(now) != self.view
        if not due or self._ballot != NO_BALLOT:
            if not due:
                self._since = now
            return out
        if now >= self._retry_at and now - self._since >= self._rank(now) * self.lease / 2:
            out += self._propose(now)
        return out

    def receive(self, message: Message, now: float) -> Out:
        """A message has come."""
        peer = self._peers.get(message.sender)
        if peer is None:
            return []
        peer.heard = now
        if peer.first < 0:
            peer.first = message.view.epoch
        peer.epoch = max(peer.epoch, message.view.epoch)
        peer.applied = max(peer.applied, message.applied)
        self._find_voice()
        out = self.learn(message.view)
        if message.serial > peer.serial:
            peer.serial = message.serial
            if message.view.epoch == self.view.epoch:  # of an earlier one it may be out of date
                peer.want, peer.caught = message.want, message.caught
        if message.view.epoch < self.view.epoch and message.kind is not Kind.TELL:
            # Behind: whatever it asks is about an epoch that is decided. Its answers still count.
            out.append((message.sender, self._message(Kind.TELL)))
        return out + _HANDLERS[message.kind](self, message, now)

    def learn(self, view: View) -> Out:
        """A view is known to be chosen."""
        if view.epoch <= self.view.epoch:
            return []
        self._find_voice()
        # Whoever has met all others before the first view cannot have lost anything.
        met = self.view.epoch == 0 and all(peer.first == 0 for peer in self._peers.values())
        whole = self.saved.whole or met or self.me not in view.serving
        self.saved = self.saved._replace(
            view=view, promised=NO_BALLOT, ballot=NO_BALLOT, accepted=None, whole=whole
        )
        self.unsaved = True
        self._ballot = NO_BALLOT
        self._retry_at = 0.0
        self._refused = None
        for name, peer in self._peers.items():  # until they say what they want in this epoch
            joins = Want.JOIN if name in view.joining else Want.LEAVE
            peer.want, peer.caught = Want.SERVE if name in view.serving else joins, 0
        if self.me not in view.serving:
            self._lease_until = 0.0
        self._renew_at = 0.0  # tell everyone, and have the lease for it, at the next tick
        return []

    # -- leases -------------------------------------------------------------------------------

    def _renew(self, now: float) -> Out:
        self._serial += 1
        number = self._serial
        self._asked[number] = now
        self._grants[number] = set()
        for old in [n for n, asked in self._asked.items() if now - asked > self.lease]:
            del self._asked[old], self._grants[old]
        out = self._to_all(self._message(Kind.RENEW, number=number, lease=self.lease))
        if self._may_grant(self.me, self.want):
            self._granted[self.me] = now + self.lease * DRIFT
            self._grant(self.me, number)
        return out

    def _may_grant(self, name: str, want: Want) -> bool:
        accepted, refused = self.saved.accepted, self._refused
        return (
            want is Want.SERVE
            and name in self.view.serving
            and (accepted is None or name in accepted.serving)
            and (refused is None or name in refused.serving)
        )

    def _on_renew(self, message: Message, now: float) -> Out:
        peer = self._peers[message.sender]
        current = message.view.epoch == self.view.epoch and message.serial == peer.serial
        if not current or not self._may_grant(message.sender, message.want):
            return []
        until = now + message.lease * DRIFT
        self._granted[message.sender] = max(self._granted[message.sender], until)
        return [(message.sender, self._message(Kind.GRANT, number=message.number))]

    def _on_grant(self, message: Message, now: float) -> Out:
        if message.view.epoch == self.view.epoch:
            self._grant(message.sender, message.number)
        return []

    def _grant(self, name: str, number: int) -> None:
        grants = self._grants.get(number)
        if grants is None or self.want is not Want.SERVE:
            return
        grants.add(name)
        if len(grants) >= self._quorum:
            self._lease_until = max(self._lease_until, self._asked[number] + self.lease)

    # -- the choice of a view -------------------------------------------------------------------

    def _alive(self, name: str, now: float) -> bool:
        return name == self.me or now - self._peers[name].heard <= self.lease

    def _want_of(self, name: str) -> tuple[Want, int]:
        if name == self.me:
            return self.want, self.caught
        peer = self._peers[name]
        return peer.want, peer.caught

    def _rank(self, now: float) -> int:
        """How many nodes that are there come first: they propose first."""
        return sum(self._alive(name, now) for name in self.nodes[: self._index])

    def _desired(self, now: float) -> View:
        """The view there should be."""
        view = self.view
        if view.epoch == 0:
            virgin = all(peer.epoch == 0 for peer in self._peers.values())
            return View(1, self.nodes) if virgin else view
        serving: list[str] = []
        joining: list[str] = []
        dropped: list[tuple[bool, bool, str]] = []
        for name in self.nodes:
            alive = self._alive(name, now)
            want, caught = self._want_of(name)
            if name in view.serving:
                dead = not alive and now >= self._granted[name]
                if want is Want.SERVE and not dead:
                    serving.append(name)
                else:
                    dropped.append((not dead, want is Want.JOIN and alive, name))
            elif alive and want is not Want.LEAVE:
                caught_up = want is Want.SERVE and caught == view.epoch and name in view.joining
                (serving if caught_up else joining).append(name)
        room = max(0, self._out - (len(self.nodes) - len(serving) - len(dropped)))
        for index, (_, joins, name) in enumerate(sorted(dropped)):
            if index >= room:  # rule 4
                serving.append(name)
            elif joins:
                joining.append(name)
        wanted = View(view.epoch, tuple(sorted(serving)), tuple(sorted(joining)))
        return view if wanted == view else wanted._replace(epoch=view.epoch + 1)

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
        for name, answer in _HANDLERS[message.kind](self, message, now):
            out += [(name, answer)] if name != self.me else self._count(answer, now)
        return out

    def _count(self, message: Message, now: float) -> Out:
        return _HANDLERS[message.kind](self, message, now)

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

    def _on_tell(self, message: Message, now: float) -> Out:
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


_HANDLERS: dict[Kind, Callable[[Membership, Message, float], Out]] = {
    Kind.RENEW: Membership._on_renew,
    Kind.GRANT: Membership._on_grant,
    Kind.TELL: Membership._on_tell,
    Kind.PREPARE: Membership._on_prepare,
    Kind.PROMISE: Membership._on_promise,
    Kind.ACCEPT: Membership._on_accept,
    Kind.ACCEPTED: Membership._on_accepted,
    Kind.REJECT: Membership._on_reject,
}
