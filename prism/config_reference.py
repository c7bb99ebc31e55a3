"""Writes ``docs/configuration.md`` from the models, so that it cannot say anything else.

Run ``python -m prism.config_reference > docs/configuration.md``; a test compares the two.
"""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from prism.config import Config
from prism.config_errors import model_at
from prism.flow import Endpoint

__all__ = ["reference"]

_INTRODUCTION = """\
# Configuration

Made from the models in `prism/config*.py` by `python -m prism.config_reference`; do not edit.

One TOML file serves all roles of a cluster: each process reads the section of its role
(`[frontend]`, `[backend]`, `[switch]`) and the common ones. `examples/prism.toml` is a whole file;
`prism-proxy check -c FILE` says what is wrong with yours, with line, key and remedy. Unknown keys
are errors. Times are in seconds, but for those whose name ends in `_ms`.
"""


def reference() -> str:
    """The text of ``docs/configuration.md``."""
    return _INTRODUCTION + "".join(_section(name) for name in Config.model_fields)


def _section(name: str) -> str:
    model = model_at(Config, (name,))
    if model is None:
        raise TypeError(f"Config.{name} is no section")
    heading = f"[[{name}]]" if name in ("nodes", "pools") else f"[{name}]"
    rows = "".join(
        _row(key, entry) + _rows_below((name, key)) for key, entry in model.model_fields.items()
    )
    return (
        f"\n## `{heading}`\n\n{(model.__doc__ or '').strip()}\n\n"
        f"| key | value | default | meaning |\n|---|---|---|---|\n{rows}"
    )


def _rows_below(path: tuple[str, ...]) -> str:
    """The keys of a list of tables."""
    model = model_at(Config, path)
    entries = model.model_fields.items() if model else ()
    return "".join(_row(f"{path[-1]}[].{key}", entry) for key, entry in entries)


def _row(key: str, field: FieldInfo) -> str:
    default = "required" if field.is_required() else _show(field.default)
    value = _value(field.annotation, field.metadata)
    return f"| `{key}` | {value} | {default} | {field.description} |\n"


def _show(default: Any) -> str:
    if default is None:
        return "none"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, tuple):
        inside = ", ".join(f'"{each}"' for each in default)
        return f"`[{inside}]`"
    if isinstance(default, str | Path):
        return f'`"{default}"`'
    return f"`{default}`"


def _value(annotation: Any, metadata: list[Any]) -> str:
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin is typing.Annotated:
        return _value(arguments[0], list(arguments[1:]) + metadata)
    if origin in (typing.Union, types.UnionType):
        return _value(next(each for each in arguments if each is not type(None)), metadata)
    if origin is Literal:
        return ", ".join(f'`"{choice}"`' for choice in arguments)
    if origin is tuple:
        return f"list of {_value(arguments[0], [])}"
    if annotation is Endpoint:
        return '`"ADDRESS:PORT"`'
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "tables"
    kind = {bool: "`true`, `false`", int: "integer", float: "number", Path: "path"}.get(annotation)
    if annotation is SecretStr or kind is None:
        return "text"
    return f"{kind}{_bounds(metadata)}"


def _bounds(metadata: list[Any]) -> str:
    """The limits that pydantic checks, as an interval."""
    flat = [limit for entry in metadata for limit in getattr(entry, "metadata", [entry])]
    low = next((f"from {_number(limit.ge)}" for limit in flat if isinstance(limit, Ge)), "")
    low = next((f"above {_number(limit.gt)}" for limit in flat if isinstance(limit, Gt)), low)
    high = next((f"to {_number(limit.le)}" for limit in flat if isinstance(limit, Le)), "")
    high = next((f"below {_number(limit.lt)}" for limit in flat if isinstance(limit, Lt)), high)
    text = " ".join(part for part in (low, high) if part)
    return f", {text}" if text else ""


def _number(value: Any) -> str:
    return f"{value:,}"


if __name__ == "__main__":
    print(reference(), end="")
