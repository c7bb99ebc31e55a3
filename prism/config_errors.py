"""Turns what is wrong with a configuration into lines a person can act on."""

from __future__ import annotations

import difflib
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from prism.tomlpos import Path, line_of

__all__ = ["dotted", "explain", "model_at", "report", "syntax_line"]


def syntax_line(error: tomllib.TOMLDecodeError, text: str) -> int:
    """The line a syntax error speaks of (its message names it, or the end of the document)."""
    match = re.search(r"at line (\d+)", str(error))
    return int(match[1]) if match else text.count("\n") + 1


def dotted(path: Path) -> str:
    """``("nodes", 1, "name")`` as ``nodes[1].name``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def report(source: str, where: Mapping[Path, int], path: Path, message: str) -> str:
    """One problem as ``file:line: key: what is wrong; what to do``."""
    line = line_of(where, path)
    return f"{source}{f':{line}' if line else ''}: {dotted(path) or 'file'}: {message}"


def explain(
    error: ValidationError, model: type[BaseModel], where: Mapping[Path, int], source: str
) -> str:
    """Every problem of a validation error, one a line. Values of keys are shown, secrets never."""
    lines = []
    for problem in error.errors(include_url=False, include_input=False):
        path: Path = tuple(part for part in problem["loc"] if part != "function-plain")
        lines.append(report(source, where, path, _message(dict(problem), path, model)))
    return "\n".join(lines)


def _message(problem: dict[str, Any], path: Path, model: type[BaseModel]) -> str:
    kind = problem["type"]
    owner = model_at(model, path[:-1])
    if kind == "extra_forbidden":
        return _unknown(str(path[-1]), owner)
    if kind == "missing":
        return f"is missing; {_remedy(path, owner)}"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:] if message[:2] != message[:2].upper() else message
    return f"{message}; {_remedy(path, owner)}"


def _unknown(key: str, owner: type[BaseModel] | None) -> str:
    known = sorted(owner.model_fields) if owner else []
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if near:
        return f"unknown key; did you mean {near[0]!r}?"
    return f"unknown key; known here: {', '.join(known)}"


def _remedy(path: Path, owner: type[BaseModel] | None) -> str:
    """What the key means, and what might stand there."""
    field = owner.model_fields.get(str(path[-1])) if owner and path else None
    if field is None:
        return "see docs/configuration.md"
    if field.examples:
        return f'{field.description} Example: {path[-1]} = "{field.examples[0]}"'
    if field.description:
        return field.description
    return f"see [{path[-1]}] in docs/configuration.md"


def model_at(model: type[BaseModel], path: Path) -> type[BaseModel] | None:
    """The model of the section at ``path``, if it is one."""
    current: type[BaseModel] | None = model
    for part in path:
        if isinstance(part, int):
            continue
        field = current.model_fields.get(part) if current else None
        current = _section(field.annotation) if field else None
    return current


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (tuple, list, typing.Union, types.UnionType):
        for argument in typing.get_args(annotation):
            if found := _section(argument):
                return found
    return None
