"""Logs, metrics and the status that ``prism-proxy`` reports."""

from prism.telemetry.logging import configure, event, tracing
from prism.telemetry.metrics import LabelledCounter, Metrics
from prism.telemetry.status import StatusServer, read_status

__all__ = [
    "LabelledCounter",
    "Metrics",
    "StatusServer",
    "configure",
    "event",
    "read_status",
    "tracing",
]
