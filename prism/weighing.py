"""Where adaptive handoff meets the node: what it is asked, what it is told, what nodes share.

A frontend sees the sizes of what it relays only. What went out on connections that were handed
over, it hears from the backends: each tells its callers of the responses it has sent, in reports
that are bounded in size and number.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic_ns
from typing import Any, Final, Literal

from prism.adaptive import Adaptive, Learned, pack_learned, unpack_learned
from prism.config import BackendConfig, FrontendConfig
from prism.handoff.channel import Channel
from prism.http.connection import Connection
from prism.http.exchange import Exchange
from prism.loads import Loads
from prism.policy.decision import Action
from prism.pools import Pool
from prism.telemetry.metrics import Metrics

__all__ = ["Weigher"]

PAUSE: Final = 1.0  # seconds between two reports
_ENTRIES = 42  # of one report: what fits MAX_REPORT
_REPORTS = 8  # at a time; what was learned beyond that is not told
_CROWD = 1.1  # times as many connections as another node has: one's own link is the narrow one
_FEW = 2  # connections by which nodes may differ anyway


class Weigher:
    """Decides for one node whether a connection is handed over or its request relayed.

    Attributes:
        adaptive: what was learned and measured.
    """

    def __init__(
        self,
        serving: FrontendConfig | BackendConfig,
        channel: Channel,
        metrics: Metrics,
        loads: Loads,
        owned: Callable[[], int],
    ) -> None:
        """Prepare.

        Args:
            serving: the node's settings.
            channel: to the other nodes.
            metrics: to count choices in.
            loads: how many connections the others have.
            owned: how many this node has.
        """
        self._channel = channel
        self._loads = loads
        self._owned = owned
        self._name = serving.name
        self._after = 0
        self._metrics = metrics
        self._unsaid: dict[int, Learned] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._mode: Literal["always", "never", "adaptive"] = "always"
        self._threshold = serving.handoff_threshold
        self.adaptive = Adaptive(self._threshold)
        self.use(serving)
        channel.shared.on_report = self._on_report

    def use(self, serving: FrontendConfig | BackendConfig) -> None:
        """Go by these settings from now on."""
        self._mode = serving.handoff
        self._after = serving.handoff_after if isinstance(serving, FrontendConfig) else 0
        if isinstance(serving, FrontendConfig) and not serving.relay and self._mode == "adaptive":
            self._mode = "always"  # nothing is relayed by choice where nothing may be relayed
        if serving.handoff_threshold != self._threshold:
            self._threshold = serving.handoff_threshold
            self.adaptive.set_threshold(self._threshold)

    def close(self) -> None:
        """Say nothing more."""
        if self._timer is not None:
            self._timer.cancel()

    def status(self) -> dict[str, Any]:
        """For the status document."""
        return {"mode": self._mode, **self.adaptive.costs.snapshot()}

    def why_relay(self, connection: Connection, pool: Pool) -> str:
        """Why the current request is better relayed; empty: hand the connection over."""
        action, head = connection.decision.action, connection.head
        choices = self._metrics.handoff_choices
        if action is Action.HANDOFF or action is Action.RELAY:
            choices.add(action.value, "policy")
            return "policy" if action is Action.RELAY else ""
        if self._mode != "adaptive" or head is None:
            never = self._mode == "never"
            choices.add("relay" if never else "handoff", "configured")
            return "configured" if never else ""
        # Where every node may serve every request, the next ones cost nothing any more.
        stays = connection.requests > 0 and (not pool.placement.keyed or len(pool.names) == 1)
        pays, reason = self.adaptive.weigh(head, connection.decision.rule, stays=stays)
        if not pays and (moving := self._why_move(connection, pool)):
            pays, reason = True, moving
        choices.add("handoff" if pays else "relay", reason)
        return "" if pays else reason

    def _why_move(self, connection: Connection, pool: Pool) -> str:
        """Why a connection should move although its request does not pay; empty: it should not.

        A frontend has relayed so much for it that one handoff would have cost as much, and spares
        it all that is to come. Among backends, who has most connections relays most, and its link
        holds up all of them, which would keep them there.
        """
        if self._after:
            return "frequent" if connection.requests >= self._after else ""
        own, place = pool.node(self._name), connection.place
        if own is None or place is None:
            return ""
        theirs = self._loads.of(place.name) / place.weight
        return "crowded" if self._owned() / own.weight > _CROWD * theirs + _FEW else ""

    def handed_over(self, connection: Connection) -> None:
        """A handoff has just succeeded."""
        if connection.head is None:
            return  # without a request; nobody waited for it
        self.adaptive.costs.handoff((monotonic_ns() - connection.asked_ns) / 1e9)

    def answered(self, connection: Connection, exchange: Exchange) -> None:
        """A request was answered here, or relayed."""
        decision, head = connection.decision, exchange.head
        if decision.answer is not None or not head.key or self._mode == "never":
            return
        relayed = connection.place is not None
        received = exchange.body.received
        if relayed and exchange.status < 500 and not received:
            seconds = (monotonic_ns() - connection.asked_ns) / 1e9
            self.adaptive.costs.relayed(seconds, exchange.sent)
        learned = self.adaptive.answered(
            head, decision.rule, exchange.status, exchange.sent, received
        )
        if learned is not None and not relayed and not connection.relayed_in:
            self._tell(learned)

    def _tell(self, learned: Learned) -> None:
        if len(self._unsaid) < _ENTRIES * _REPORTS or learned.key in self._unsaid:
            self._unsaid[learned.key] = learned
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(PAUSE, self._report)

    def _report(self) -> None:
        self._timer = None
        entries = list(self._unsaid.values())
        self._unsaid.clear()
        for start in range(0, len(entries), _ENTRIES):
            self._channel.report(pack_learned(entries[start : start + _ENTRIES]))

    def _on_report(self, data: bytes) -> None:
        for learned in unpack_learned(data):
            self.adaptive.learn(learned)
