"""The ``[telemetry]`` section of the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from prism.config_types import HostPort, Section
from prism.flow import Endpoint

__all__ = ["TelemetryConfig"]


class TelemetryConfig(Section):
    """What the process tells about itself."""

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least important level that is logged."
    )
    log_format: Literal["auto", "human", "json"] = Field(
        "auto", description="`auto`: for people on a terminal, JSON lines elsewhere."
    )
    log_file: Path | None = Field(None, description="File to append to, instead of stderr.")
    trace: bool = Field(False, description="Log each handoff with the time of each step.")
    status_socket: Path | None = Field(
        None, description="Unix socket that answers `prism-proxy status`; worker i: `NAME-i.sock`."
    )
    metrics_listen: HostPort | None = Field(
        None, description="Where Prometheus metrics are served; worker i: the port plus i."
    )

    def status_path(self, worker: int | None) -> Path | None:
        """The status socket of a worker, or of a role without workers (``None``)."""
        path = self.status_socket
        if path is None or worker is None:
            return path
        return path.with_name(f"{path.stem}-{worker}{path.suffix or '.sock'}")

    def metrics_endpoint(self, worker: int | None) -> Endpoint | None:
        """The metrics endpoint of a worker, or of a role without workers (``None``)."""
        listen = self.metrics_listen
        return listen and Endpoint(listen.host, listen.port + (worker or 0))
