"""``prism-proxy switch rules``: the data plane's rules, as a table or as JSON."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import click

from prism.config import Config, SwitchConfig
from prism.flow import Flow
from prism.switch.rulelist import ListedRule, node_names, read_rules
from prism.switch.run import need_p4

__all__ = ["show"]

_HEADINGS: Final = {
    "flow": "flow",
    "owner": "owner",
    "owner_endpoint": "endpoint",
    "state": "state",
    "generation": "generation",
    "packets_to_owner": "to owner",
    "packets_to_client": "to client",
}
_MEASURED: Final = 1000  # rows that the columns' widths are taken from


def show(config: Config, switch: SwitchConfig, as_json: bool) -> None:
    """Print the rules one by one, however many there are.

    Raises:
        ConfigError: the extra for P4Runtime is missing.
        SwitchError: the data plane cannot be read.
    """
    if switch.kind == "p4runtime":
        need_p4()
    rows = _rows(read_rules(config, switch), node_names(config))
    for line in _json(rows) if as_json else _table(rows):
        click.echo(line)


def _rows(rules: Iterable[ListedRule], names: Mapping[int, str]) -> Iterator[dict[str, Any]]:
    for rule, to_owner, to_client in rules:
        yield {
            "flow": str(Flow.unpack(rule.flow)),
            "owner": names.get(rule.owner, f"{rule.owner:016x}"),
            "owner_endpoint": str(rule.owner_endpoint),
            "state": "locked" if rule.locked else "active",
            "generation": rule.gen,
            "packets_to_owner": to_owner,
            "packets_to_client": to_client,
        }


def _json(rows: Iterator[dict[str, Any]]) -> Iterator[str]:
    """One array, a rule a line."""
    last = next(rows, None)
    if last is None:
        yield "[]"
        return
    start = "["
    for row in rows:
        yield f"{start}{json.dumps(last)},"
        start, last = " ", row
    yield f"{start}{json.dumps(last)}]"


def _table(rows: Iterator[dict[str, Any]]) -> Iterator[str]:
    first = list(itertools.islice(rows, _MEASURED))
    widths = {
        key: max(len(heading), *(len(_text(row[key])) for row in first), 0)
        for key, heading in _HEADINGS.items()
    }
    yield _line(_HEADINGS, widths)
    count = 0
    for row in itertools.chain(first, rows):
        count += 1
        yield _line(row, widths)
    yield f"{count} rule{'' if count == 1 else 's'}"


def _line(row: Mapping[str, Any], widths: Mapping[str, int]) -> str:
    return "  ".join(_text(row[key]).ljust(width) for key, width in widths.items()).rstrip()


def _text(value: Any) -> str:
    return "-" if value is None else str(value)
