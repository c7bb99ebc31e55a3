"""Removes what labs and tests have left whose names begin with a prefix.

``python -m prism.lab.sweep PREFIX``; for the traps of scripts that were interrupted.
"""

from __future__ import annotations

import re
import sys

from pyroute2 import netns

from prism.errors import ConfigError
from prism.lab import files
from prism.lab.netns import Namespace
from prism.lab.topology import end_processes

__all__ = ["sweep"]


def sweep(prefix: str) -> list[str]:
    """End processes and remove namespaces and labs; the namespaces' names.

    Raises:
        ConfigError: a prefix so short that it might hit somebody else's.
    """
    if not re.fullmatch(r"[a-z0-9-]{5,}", prefix):
        raise ConfigError(f"prefix {prefix!r}: at least 5 lower-case letters, digits and hyphens")
    found = [Namespace(name) for name in sorted(netns.listnetns()) if name.startswith(prefix)]
    end_processes(found)
    for namespace in found:
        namespace.remove()
    if files.ROOT.is_dir():
        for path in files.ROOT.iterdir():
            if path.name.startswith(prefix):
                files.remove(path.name.removesuffix(".lock"))
    return [namespace.name for namespace in found]


if __name__ == "__main__":
    for removed in sweep(sys.argv[1]):
        print(f"removed {removed}")
