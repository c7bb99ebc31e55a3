"""Logs: lines for people on a terminal, JSON lines elsewhere, and a trace of each handoff.

Modules log through the standard library (``logging.getLogger(__name__)``). Traces go through
:func:`event`, one for each handoff with the time of each step; off, they cost a look at a flag::

    if tracing():
        event("handoff", flow=flow, gen=gen, node=peer, steps={"lock": 9_100, "export": 13_000})
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from prism.config import TelemetryConfig

__all__ = ["HumanFormatter", "JsonFormatter", "configure", "event", "tracing"]

_trace = logging.getLogger("prism.trace")
_trace.propagate = True
_on = False
_MAX_TEXT = 4096


def tracing() -> bool:
    """Whether traces are logged: ask before putting one together."""
    return _on


def event(name: str, **fields: Any) -> None:
    """Log one trace event; ``steps`` are names with nanoseconds. A no-op while traces are off."""
    if _on:
        _trace.info(name, extra={"fields": fields})


def _stamp(record: logging.LogRecord) -> str:
    whole, fraction = divmod(record.created, 1)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{int(fraction * 1e6):06d}Z"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC, RFC 3339), level, logger, process, message, the fields."""

    def __init__(self, node: str = "") -> None:
        super().__init__()
        self._node = node

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end; text is cut at 4096 characters."""
        entry: dict[str, Any] = {
            "time": _stamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": self._node,
        }
        fields = getattr(record, "fields", None)
        if fields is None:
            entry["message"] = record.getMessage()[:_MAX_TEXT]
        else:
            entry |= {"event": record.msg} | fields
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)[:_MAX_TEXT]
        # A flow or an address in a field is a tuple, which JSON would make a list: as text instead.
        return json.dumps({key: _plain(value) for key, value in entry.items()}, default=str)


def _plain(value: Any) -> Any:
    return value if isinstance(value, dict | str | int | float | list | None) else str(value)


class HumanFormatter(logging.Formatter):
    """``12:34:56.789 warning fe1/0: message``, a trace's steps in microseconds behind it."""

    def __init__(self, node: str = "") -> None:
        super().__init__()
        self._node = node

    def format(self, record: logging.LogRecord) -> str:
        """The line, with control characters escaped so that no peer can forge lines."""
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        text = record.getMessage()
        for key, value in getattr(record, "fields", {}).items():
            if key == "steps":
                value = " ".join(f"{step}={ns / 1e3:.1f}us" for step, ns in value.items())  # noqa: PLW2901
            text += f" {key}={value}"
        text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text[:_MAX_TEXT])
        line = f"{clock}.{int(record.msecs):03d} {record.levelname.lower()} {self._node}: {text}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def configure(config: TelemetryConfig, node: str = "", stream: TextIO | None = None) -> None:
    """Set the process's logging up, replacing what was; ``node`` (``fe1/0``) goes into every line.

    ``log_file`` is opened to append and reopened when it was moved away (logrotate).

    Raises:
        OSError: the log file cannot be opened.
    """
    global _on  # noqa: PLW0603 - one process, one log
    handler = _handler(config.log_file, stream)
    on_terminal = config.log_file is None and (stream or sys.stderr).isatty()
    human = config.log_format == "human" or (config.log_format == "auto" and on_terminal)
    handler.setFormatter(HumanFormatter(node) if human else JsonFormatter(node))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(config.log_level.upper())
    logging.getLogger("asyncio").setLevel("WARNING")
    _trace.setLevel("INFO")
    _on = config.trace


def _handler(path: Path | None, stream: TextIO | None) -> logging.Handler:
    if path is None:
        return logging.StreamHandler(stream or sys.stderr)
    from logging.handlers import WatchedFileHandler  # noqa: PLC0415 - pulls sockets and queues in

    path.parent.mkdir(parents=True, exist_ok=True)
    return WatchedFileHandler(path, encoding="utf-8")
