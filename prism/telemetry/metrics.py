"""Counters: plain attributes where they are counted, Prometheus metrics where they are read.

Counting happens in the path of every request, so a counter is an integer in a slot
(``metrics.handoffs_out += 1``); ``prometheus_client`` sees it only when somebody scrapes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

__all__ = ["Exposition", "LabelledCounter", "LatencyHistogram", "Metrics", "Sampled"]

_MAX_SERIES = 64
_BUCKETS_US = (50, 100, 150, 200, 300, 500, 1000, 2000, 5000, 10_000, 50_000)


class Exposition(Protocol):
    """What can be scraped."""

    def text(self) -> bytes:
        """The Prometheus text exposition."""


class LabelledCounter:
    """A counter for each combination of labels.

    Labels may come from clients (methods), so at most 64 combinations are kept; what is beyond
    them counts as ``other``.
    """

    __slots__ = ("_values", "labels")

    def __init__(self, *labels: str) -> None:
        self.labels = labels
        self._values: dict[tuple[object, ...], int] = {}

    def add(self, *values: object) -> None:
        """Count one; ``values`` in the order of the labels' names."""
        try:
            self._values[values] += 1
        except KeyError:
            if len(self._values) >= _MAX_SERIES:
                values = ("other",) * len(self.labels)
            self._values[values] = self._values.get(values, 0) + 1

    @property
    def total(self) -> int:
        """The sum over all labels."""
        return sum(self._values.values())

    def items(self) -> Iterable[tuple[tuple[str, ...], int]]:
        """Label values, as text, and count."""
        return [(tuple(map(str, values)), count) for values, count in self._values.items()]

    def snapshot(self) -> dict[str, int]:
        """Counts by their labels, joined by a space."""
        return {" ".join(values): count for values, count in self.items()}


class LatencyHistogram:
    """Durations in cumulative buckets from 50 microseconds to 50 milliseconds."""

    __slots__ = ("_counts", "_sum_us")

    def __init__(self) -> None:
        self._counts = [0] * (len(_BUCKETS_US) + 1)
        self._sum_us = 0.0

    def observe_us(self, microseconds: float) -> None:
        """Add one duration."""
        self._counts[bisect_left(_BUCKETS_US, microseconds)] += 1
        self._sum_us += microseconds

    def family(self, name: str, text: str) -> HistogramMetricFamily:
        """As Prometheus wants it: seconds, cumulative."""
        buckets, seen = [], 0
        for bound, count in zip((*_BUCKETS_US, None), self._counts, strict=True):
            seen += count
            buckets.append(("+Inf" if bound is None else str(bound / 1e6), float(seen)))
        return HistogramMetricFamily(name, text, buckets=buckets, sum_value=self._sum_us / 1e6)


_COUNTERS = {
    "accepted": "Connections accepted from clients",
    "handoffs_out": "Connections handed over to another node",
    "handoffs_in": "Connections taken over from another node",
    "take_backs": "Handoffs taken back because no answer came in time",
    "renewals": "Connections moved to another socket here, to go on without kernel TLS",
    "bytes_in": "Octets of request bodies received",
    "bytes_out": "Octets of responses sent",
    "bodies_cut": "Requests whose client ended the connection inside their body",
    "heads_timed_out": "Connections closed because a request's head did not come in time",
    "connections_refused": "Connections closed at once because there were too many",
}
_LABELLED = {
    "refusals": (("reason",), "Handoffs a node refused to take"),
    "relays": (("reason",), "Requests relayed instead of handed over"),
    "decisions": (("rule", "action"), "What the policy said about requests"),
    "handoff_choices": (
        ("choice", "reason"),
        "Requests of other nodes, by what was chosen for them",
    ),
    "requests": (("method", "status"), "Requests answered"),
    "health_checks": (("node", "result"), "Checks of other nodes"),
    "health_changes": (("node", "change"), "Nodes that became fit or unfit for requests"),
    "bad_requests": (("status",), "Requests refused as malformed or too large"),
    "tls_alerts": (("alert",), "TLS connections given up for what the client sent"),
    "control_errors": (("operation", "status"), "Switch operations that did not succeed"),
}
_GAUGES = {
    "connections": "Client connections this process owns now",
    "handoffs_pending": "Handoffs under way now",
}


class Metrics(Collector):
    """What one process counts.

    Attributes:
        accepted, handoffs_out, handoffs_in, take_backs, renewals, bytes_in, bytes_out,
            bodies_cut, heads_timed_out, connections_refused: counters; add to them.
        refusals, relays, decisions, handoff_choices, requests, health_checks, health_changes,
            bad_requests, tls_alerts, control_errors: :class:`LabelledCounter`.
        connections, handoffs_pending: gauges; set, or add and subtract.
        handoff_time: from the decision to the new owner's answer.
    """

    __slots__ = (*_COUNTERS, *_LABELLED, *_GAUGES, "_samples", "handoff_time", "registry")

    accepted: int
    handoffs_out: int
    handoffs_in: int
    take_backs: int
    renewals: int
    bytes_in: int
    bytes_out: int
    bodies_cut: int
    heads_timed_out: int
    connections_refused: int
    refusals: LabelledCounter
    relays: LabelledCounter
    decisions: LabelledCounter
    handoff_choices: LabelledCounter
    requests: LabelledCounter
    health_checks: LabelledCounter
    health_changes: LabelledCounter
    bad_requests: LabelledCounter
    tls_alerts: LabelledCounter
    control_errors: LabelledCounter
    connections: int
    handoffs_pending: int

    def __init__(self) -> None:
        for name in (*_COUNTERS, *_GAUGES):
            setattr(self, name, 0)
        for name, (labels, _) in _LABELLED.items():
            setattr(self, name, LabelledCounter(*labels))
        self.handoff_time = LatencyHistogram()
        self._samples: dict[str, tuple[str, Callable[[], float]]] = {}
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def sample(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Add a gauge ``prism_NAME`` that is read by a call at each scrape."""
        self._samples[name] = (text, read)

    def collect(self) -> Iterable[Metric]:
        """What ``prometheus_client`` asks for at a scrape."""
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"prism_{name}", text, value=getattr(self, name))
        for name, (labels, text) in _LABELLED.items():
            family = CounterMetricFamily(f"prism_{name}", text, labels=labels)
            for values, count in getattr(self, name).items():
                family.add_metric(values, count)
            yield family
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"prism_{name}", text, value=getattr(self, name))
        for name, (text, read) in self._samples.items():
            yield GaugeMetricFamily(f"prism_{name}", text, value=read())
        yield self.handoff_time.family("prism_handoff_seconds", "Time a handoff took")

    def snapshot(self) -> dict[str, int | float | dict[str, int]]:
        """Everything as plain values, for the status document."""
        values: dict[str, int | float | dict[str, int]] = {
            name: getattr(self, name) for name in (*_COUNTERS, *_GAUGES)
        }
        values |= {name: getattr(self, name).snapshot() for name in _LABELLED}
        values |= {name: read() for name, (_, read) in self._samples.items()}
        return values

    def text(self) -> bytes:
        """The Prometheus text exposition."""
        return generate_latest(self.registry)


class Sampled(Collector):
    """Numbers that are kept elsewhere, as gauges; nested ones under their names joined by ``_``."""

    def __init__(self, prefix: str, read: Callable[[], Mapping[str, Any]]) -> None:
        self._prefix = prefix
        self._read = read
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def describe(self) -> Iterable[Metric]:
        """Nothing ahead of time: what there is shows at a scrape."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """What ``prometheus_client`` asks for at a scrape."""
        yield from self._gauges(self._prefix, self._read())

    def _gauges(self, prefix: str, values: Mapping[str, Any]) -> Iterable[Metric]:
        for name, value in values.items():
            if isinstance(value, Mapping):
                yield from self._gauges(f"{prefix}_{name}", value)
            else:
                yield GaugeMetricFamily(f"{prefix}_{name}", name.replace("_", " "), value=value)

    def text(self) -> bytes:
        """The Prometheus text exposition."""
        return generate_latest(self._registry)
