"""Where each key of a TOML document stands, so that an error can name its line.

The standard library's parser keeps no positions. This scanner reads a document that ``tomllib``
has accepted already, so it only has to skip over values, not to understand them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

__all__ = ["Path", "line_of", "positions"]

Path = tuple[str | int, ...]

_KEY_PART = re.compile(r"""\s*(?:"((?:[^"\\]|\\.)*)"|'([^']*)'|([A-Za-z0-9_-]+))\s*(\.?)""")
# What matters inside a value: strings (so that their contents do not count), comments, brackets.
_VALUE_TOKEN = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}'
    r"|'''.*?'{3,5}"
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'[^'\n]*'"
    r"|\#[^\n]*|[\[{]|[\]}]|\n",
    re.DOTALL,
)


def positions(text: str) -> dict[Path, int]:
    """The line (from 1) of every table header and key outside inline values.

    Elements of an array of tables are numbered as ``tomllib`` lists them. A document that is not
    valid TOML gives some positions or none; it never raises.
    """
    found: dict[Path, int] = {}
    counts: dict[Path, int] = {}
    table: Path = ()
    for line, statement in _statements(text):
        if statement.startswith("["):
            array = statement.startswith("[[")
            table = _resolve(_key(statement.lstrip("[")), counts)
            if array:
                counts[table] = counts.get(table, -1) + 1
                table = (*table, counts[table])
        elif path := _key(statement):
            for depth in range(1, len(path) + 1):
                found.setdefault((*table, *path[:depth]), line)
            continue
        for depth in range(1, len(table) + 1):
            found.setdefault(table[:depth], line)
    return found


def line_of(found: Mapping[Path, int], path: Path) -> int | None:
    """The line of ``path``, or of the closest thing around it that has one."""
    for depth in range(len(path), 0, -1):
        if path[:depth] in found:
            return found[path[:depth]]
    return None


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """Every ``[header]`` and ``key = value`` with the line it begins on."""
    line, start = 1, 0
    while start < len(text):
        end = _end_of_statement(text, start)
        statement = text[start:end]
        stripped = statement.strip()
        if stripped and not stripped.startswith("#"):
            yield line, stripped
        line += statement.count("\n")
        start = end


def _end_of_statement(text: str, start: int) -> int:
    depth = 0
    for token in _VALUE_TOKEN.finditer(text, start):
        match token.group():
            case "[" | "{":
                depth += 1
            case "]" | "}":
                depth -= 1
            case "\n" if depth <= 0:
                return token.end()
    return len(text)


def _key(text: str) -> Path:
    """The parts of the dotted key that ``text`` begins with."""
    parts: list[str] = []
    at = 0
    while part := _KEY_PART.match(text, at):
        parts.append(next(name for name in part.groups()[:3] if name is not None))
        at = part.end()
        if not part.group(4):
            break
    return tuple(parts)


def _resolve(path: Path, counts: Mapping[Path, int]) -> Path:
    """``path`` with the number of the newest element after each array of tables it goes through."""
    resolved: Path = ()
    for depth, part in enumerate(path, 1):
        resolved = (*resolved, part)
        if depth < len(path) and resolved in counts:
            resolved = (*resolved, counts[resolved])
    return resolved
