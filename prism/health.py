"""Which nodes are fit to get requests, as one process sees it; sans-I/O.

A node is left out of placement while one of these holds:

* *unlinked*: there is no link to any of its workers;
* *down*: ``fall`` checks in a row have failed, and not yet ``rise`` in a row were good since;
* *ejected*: ``eject_after`` handoffs or relayed requests in a row have failed; it comes back by
  itself, after a time that doubles when it fails again soon;
* *draining*: it has said that it is going.

Down is a matter of one check, so of the pools that have this check; all else is the node's. Where
nobody is left, nobody is left out but who is draining: a request has to go somewhere.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from time import monotonic
from typing import Any

from prism.config_health import CheckConfig, HealthConfig
from prism.handoff.connection import node_of
from prism.telemetry.metrics import Metrics

__all__ = ["Health"]

log = logging.getLogger(__name__)


class _Check:
    """What one check has found about one node."""

    __slots__ = ("count", "up", "why")

    def __init__(self) -> None:
        self.up = True
        self.count = 0  # results in a row that speak against ``up``
        self.why = ""

    def result(self, settings: CheckConfig, good: bool, why: str) -> bool:
        """Note a result; whether the node has gone up or down by it."""
        self.why = why
        if good is self.up:
            self.count = 0
            return False
        self.count += 1
        if self.count < (settings.rise if good else settings.fall):
            return False
        self.up, self.count = good, 0
        return True


class _Node:
    """What is known about one node."""

    __slots__ = (
        "checks", "draining", "ejected", "ejected_until", "ejections", "failures", "linked",
    )  # fmt: skip

    def __init__(self) -> None:
        self.checks: dict[CheckConfig, _Check] = {}
        self.linked: set[str] = set()
        self.draining: set[str] = set()  # its workers that have said so
        self.failures = 0
        self.ejections = 0
        self.ejected = False
        self.ejected_until = -math.inf


class Health:
    """What one process knows about the health of all nodes but its own.

    Args:
        settings: the ``[health]`` section.
        names: of the nodes.
        own: this node's name: always fit, unless :attr:`draining`.
        metrics: where changes and checks are counted.
        clock: seconds, monotonic.

    Attributes:
        draining: this very node is going.
    """

    def __init__(
        self,
        settings: HealthConfig,
        names: Iterable[str],
        own: str,
        metrics: Metrics,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.settings = settings
        self.own = own
        self.draining = False
        self._metrics = metrics
        self._clock = clock
        self._nodes: dict[str, _Node] = {}
        # Who is to be left out, by pool, and until when that is known: requests only look here.
        self._unfit: dict[
            tuple[frozenset[str], CheckConfig | None], tuple[float, frozenset[str]]
        ] = {}
        self.use(settings, names)

    def use(self, settings: HealthConfig, names: Iterable[str]) -> None:
        """Go by other settings, or for other nodes; what is known of those that stay, stays."""
        self.settings = settings
        names = [name for name in names if name != self.own]
        self._nodes = {name: self._nodes.get(name) or _Node() for name in names}
        self._unfit.clear()

    # -- what happens ----------------------------------------------------------------------

    def linked(self, worker: str, up: bool) -> None:
        """The link to a worker has come up, or gone down."""
        node = self._nodes.get(node_of(worker))
        if node is None:
            return
        before = bool(node.linked)
        (node.linked.add if up else node.linked.discard)(worker)
        self._unfit.clear()
        if up:
            node.draining.discard(worker)  # a worker that is going says so again at once
        if bool(node.linked) != before:
            self._changed(node_of(worker), "linked" if up else "unlinked", "")

    def told(self, worker: str, draining: bool) -> None:
        """A worker says whether its node is draining."""
        node = self._nodes.get(node_of(worker))
        if node is None or (worker in node.draining) == draining:
            return
        before = bool(node.draining)
        (node.draining.add if draining else node.draining.discard)(worker)
        if bool(node.draining) != before:
            self._changed(node_of(worker), "draining" if draining else "serving", "")

    def checked(self, name: str, check: CheckConfig, why: str) -> None:
        """A check has ended; ``why`` it has failed, or empty."""
        node = self._nodes.get(name)
        if node is None:
            return
        self._metrics.health_checks.add(name, "failed" if why else "good")
        found = node.checks.setdefault(check, _Check())
        if found.result(check, not why, why):
            self._changed(name, "up" if found.up else "down", why)

    def keep_checks(self, checks: Iterable[CheckConfig]) -> None:
        """Forget what other checks than these have found."""
        wanted = set(checks)
        for node in self._nodes.values():
            node.checks = {check: found for check, found in node.checks.items() if check in wanted}
        self._unfit.clear()

    def succeeded(self, name: str) -> None:
        """A handoff to a node, or a request relayed there, went well."""
        node = self._nodes.get(name)
        if node is not None:
            node.failures = 0

    def failed(self, name: str, why: str) -> None:
        """A handoff to a node, or a request relayed there, has failed."""
        node, settings = self._nodes.get(name), self.settings
        if node is None or not settings.eject_after:
            return
        node.failures += 1
        now = self._clock()
        if node.failures < settings.eject_after or now < node.ejected_until:
            return
        if self._ejected(now) >= math.floor(len(self._nodes) * settings.eject_share + 1e-9):
            return
        if now - node.ejected_until > self._ejection(node.ejections):
            node.ejections = 0  # it was well for long
        node.ejections += 1
        length = self._ejection(node.ejections)
        node.ejected_until = now + length
        node.failures = 0
        node.ejected = True
        self._changed(name, "ejected", f"{why}; for {length:g} s")

    def returned(self) -> None:
        """Tell of nodes whose ejection is over; to be called now and then."""
        now = self._clock()
        for name, node in self._nodes.items():
            if node.ejected and now >= node.ejected_until:
                node.ejected = False
                self._changed(name, "returned", "")

    def _ejection(self, number: int) -> float:
        settings = self.settings
        doublings = min(max(number - 1, 0), 30)
        return min(settings.eject_time * 2.0**doublings, settings.eject_longest)

    def _ejected(self, now: float) -> int:
        return sum(now < node.ejected_until for node in self._nodes.values())

    def drain(self, draining: bool) -> None:
        """This very node is going, or stays after all."""
        self.draining = draining
        self._changed(self.own, "draining" if draining else "serving", "")

    def _changed(self, name: str, change: str, why: str) -> None:
        self._unfit.clear()
        self._metrics.health_changes.add(name, change)
        bad = change in ("down", "ejected", "unlinked")
        log.log(
            logging.WARNING if bad else logging.INFO,
            "node %s: %s%s",
            name,
            change,
            why and f": {why}",
        )

    # -- what it means ---------------------------------------------------------------------

    def is_linked(self, name: str) -> bool:
        """Whether there is a link to any worker of a node."""
        node = self._nodes.get(name)
        return node is not None and bool(node.linked)

    def is_draining(self, name: str) -> bool:
        """Whether a node is going, as far as it has said so."""
        if name == self.own:
            return self.draining
        node = self._nodes.get(name)
        return node is not None and bool(node.draining)

    def state(self, name: str, check: CheckConfig | None = None) -> str:
        """``fit``, or why not: ``draining``, ``unlinked``, ``down``, ``ejected``.

        Args:
            name: the node's.
            check: the check that counts; by default any.
        """
        if name == self.own:
            return "draining" if self.draining else "fit"
        node = self._nodes.get(name)
        if node is None:
            return "fit"
        if node.draining:
            return "draining"
        if not node.linked:
            return "unlinked"
        for settings, found in node.checks.items():
            if not found.up and check in (None, settings):
                return "down"
        return "ejected" if self._clock() < node.ejected_until else "fit"

    def avoid(self, names: frozenset[str], check: CheckConfig | None = None) -> frozenset[str]:
        """Who of some nodes is to be left out.

        Args:
            names: of a pool's nodes.
            check: the pool's.
        """
        known = self._unfit.get((names, check))
        now = self._clock()
        if known is None or known[0] <= now:
            ends = (node.ejected_until for node in self._nodes.values() if node.ejected_until > now)
            known = self._unfit[names, check] = (
                min(ends, default=math.inf),
                self._find_unfit(names, check),
            )
        return known[1]

    def _find_unfit(self, names: frozenset[str], check: CheckConfig | None) -> frozenset[str]:
        unfit = {name: state for name in names if (state := self.state(name, check)) != "fit"}
        if len(unfit) == len(names):
            unfit = {name: state for name, state in unfit.items() if state == "draining"}
            if len(unfit) == len(names):
                return frozenset()
        return frozenset(unfit)

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """By node, for the status document."""
        now = self._clock()
        return {
            name: {
                "state": self.state(name),
                "failures": node.failures,
                "ejected_for": round(max(0.0, node.ejected_until - now), 1),
                "checks": [
                    {"path": check.path, "up": found.up, "failed": found.why}
                    for check, found in node.checks.items()
                ],
            }
            for name, node in self._nodes.items()
        }
