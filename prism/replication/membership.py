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

from collections.abc import Callable

from prism.replication.views import NO_BALLOT, Kind, Message, View, Want
from prism.replication.voting import DRIFT, Out, Voter

__all__ = ["Membership", "Out"]


class Membership(Voter):
    """One node's part; :class:`Voter` says what it is made of. Times are monotonic, in seconds."""

    # -- what others ask ----------------------------------------------------------------------

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
        return out + self._handle(message, now)

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

    # -- the view there should be -------------------------------------------------------------

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

    def _on_tell(self, message: Message, now: float) -> Out:
        return []

    def _handle(self, message: Message, now: float) -> Out:
        return _HANDLERS[message.kind](self, message, now)


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
