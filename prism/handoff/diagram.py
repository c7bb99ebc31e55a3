"""Writes the state diagrams in ``docs/protocol.md`` from the tables in ``machine.py``.

Run ``python -m prism.handoff.diagram`` after changing a table; a test fails while the page is out
of date.
"""

from __future__ import annotations

import sys
from enum import IntEnum
from pathlib import Path

from prism.errors import ProtocolError
from prism.handoff.machine import SOURCE_TABLE, TARGET_TABLE, Command, Event, Table

__all__ = ["PAGE", "render", "rewrite"]

PAGE = Path(__file__).parents[2] / "docs" / "protocol.md"
_TABLES = {"source": SOURCE_TABLE, "target": TARGET_TABLE}


def render(table: Table) -> str:
    """A Mermaid state diagram: one arrow for all events with the same effect.

    Events that come too late and change nothing are left out.
    """
    arrows: dict[tuple[IntEnum, IntEnum, tuple[Command, ...]], list[Event]] = {}
    ends = set()
    for (state, event), (next_state, commands) in table.items():
        if next_state is state and not commands:
            continue
        arrows.setdefault((state, next_state, commands), []).append(event)
        if commands and commands[-1] is Command.DONE:
            ends.add(next_state)
    lines = ["```mermaid", "stateDiagram-v2", "    [*] --> IDLE"]
    for (state, next_state, commands), events in arrows.items():
        label = ", ".join(event.name for event in sorted(events))
        effect = " / " + ", ".join(command.name for command in commands) if commands else ""
        lines.append(f"    {state.name} --> {next_state.name}: {label}{effect}")
    lines += [f"    {state.name} --> [*]" for state in sorted(ends)]
    return "\n".join([*lines, "```"])


def rewrite(text: str) -> str:
    """The page with its diagrams brought up to date.

    Raises:
        ProtocolError: a marker is missing.
    """
    for name, table in _TABLES.items():
        begin, end = f"<!-- {name} machine: begin -->", f"<!-- {name} machine: end -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ProtocolError(f"the page lacks the markers {begin} and {end}")
        text = f"{before}{begin}\n{render(table)}\n{end}{after}"
    return text


def main() -> int:
    """Rewrite the page; 0 when all is well."""
    PAGE.write_text(rewrite(PAGE.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
