"""Logs, metrics and the status that ``prism-proxy`` reports."""

from prism.telemetry.logging import configure, event, tracing
from prism.telemetry.metrics import LabelledCounter, Metrics
from prism.telemetry.status import StatusServer, act, read_status

__all__ = [
    "LabelledCounter",
    "Metrics",
    "StatusServer",
    "act",
    "configure",
    "event",
    "read_status",
    "tracing",
]
