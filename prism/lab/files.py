"""What a lab keeps below ``/run/prism-lab/NAME``."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism.errors import PrismError
from prism.process import start_time

if TYPE_CHECKING:
    from prism.lab.cluster import Node, Options

__all__ = ["create", "directory", "locked", "read_state", "remove", "tail", "write_state"]
__all__ += ["mount_bpffs", "to_toml", "write_toml"]

ROOT = Path("/run/prism-lab")
_MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)


def directory(name: str) -> Path:
    """Where the lab keeps everything."""
    return ROOT / name


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Keep a second ``lab up`` of the same name out while one is at work.

    Raises:
        PrismError: one is, or this is not root.
    """
    try:
        ROOT.mkdir(parents=True, exist_ok=True, mode=0o755)
        descriptor = os.open(ROOT / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except PermissionError:
        raise PrismError("the lab makes network namespaces and needs root: use sudo") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PrismError(f"lab {name} is being brought up by another process") from None
        yield
    finally:
        os.close(descriptor)


def create(name: str) -> None:
    """Make the directories, and a bpffs of the lab's own.

    Raises:
        PrismError: a bpffs cannot be mounted.
    """
    base = directory(name)
    for part in ("", "conf", "log", "run", "bpf"):
        (base / part).mkdir(mode=0o700, exist_ok=True)
    mount_bpffs(base / "bpf")


def mount_bpffs(path: Path) -> None:
    """Mount a bpffs.

    Raises:
        PrismError: the kernel has none, or CAP_SYS_ADMIN is missing.
    """
    if _libc.mount(b"bpf", os.fsencode(path), b"bpf", 0, b"mode=0700") != 0:
        reason = os.strerror(ctypes.get_errno())
        raise PrismError(f"cannot mount a bpffs at {path}: {reason}; see prism-proxy doctor")


def remove(name: str) -> None:
    """Unmount and remove all of it. Idempotent."""
    base = directory(name)
    while _libc.umount2(os.fsencode(base / "bpf"), _MNT_DETACH) == 0:
        pass  # mounted more than once after a crash
    shutil.rmtree(base, ignore_errors=True)
    # Where a racing "up" has just taken the lock, the namespaces' names still keep two apart.
    (ROOT / f"{name}.lock").unlink(missing_ok=True)


def read_state(name: str) -> dict[str, Any] | None:
    """The state file; ``None``: there is none that can be used."""
    try:
        state = json.loads((directory(name) / "state.json").read_text())
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) and {"options", "nodes"} <= state.keys() else None


def write_state(name: str, options: Options, nodes: Sequence[Node], *, keeper: bool) -> None:
    """Write the state file; it is replaced in one step, so a reader never sees half of it.

    With ``keeper``, ``lab down`` stops the calling process first.
    """
    document = {
        "keeper": os.getpid() if keeper else 0,
        "keeper_started": start_time(os.getpid()) if keeper else None,
        "options": dataclasses.asdict(options),
        "nodes": [
            {
                field.name: getattr(node, field.name)
                for field in dataclasses.fields(node)
                if field.name != "process"
            }
            for node in nodes
        ],
    }
    path = directory(name) / "state.json"
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(document, default=_text, indent=1))
    fresh.replace(path)


def _text(value: object) -> str:
    return str(value)


def tail(path: Path, lines: int = 8) -> str:
    """The last lines of a log."""
    with contextlib.suppress(OSError):
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    return "(no log)"


def to_toml(value: object) -> str:
    """A plain value as TOML. A JSON string is a TOML one, but for surrogate pairs and DEL."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {to_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(to_toml(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def write_toml(path: Path, sections: Mapping[str, Any]) -> None:
    """Write a configuration file: tables, and arrays of tables where a section is a list."""
    lines: list[str] = []
    for name, section in sections.items():
        many = isinstance(section, list)
        for table in section if many else [section]:
            lines.append(f"\n[[{name}]]" if many else f"\n[{name}]")
            lines.extend(f"{key} = {to_toml(value)}" for key, value in table.items())
    path.write_text("\n".join(lines).lstrip() + "\n")
