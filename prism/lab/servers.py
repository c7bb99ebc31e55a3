"""Servers beside the lab's backends: one of ``lab up --upstream CMD`` in each one's namespace."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from prism.errors import PrismError
from prism.lab import files

if TYPE_CHECKING:
    from prism.lab.cluster import Cluster

__all__ = ["PORT", "URL", "start_servers"]

PORT: Final = 9000
"""TCP port on the loopback address at which the command has to listen."""

URL: Final = f"http://127.0.0.1:{PORT}"

_PATIENCE = 20.0  # seconds a server has until it listens
_POLL = 0.02
_LISTEN = "0A"  # a socket's state in /proc/net/tcp


def start_servers(cluster: Cluster) -> list[subprocess.Popen[bytes]]:
    """Start the lab's server command beside each backend; nothing without one.

    The command is the shell's. It finds its node's name in ``PRISM_NODE``, a directory of its own
    in ``PRISM_DIR`` and the port to listen at in ``PRISM_PORT``. What runs in a namespace ends
    with the lab.

    Raises:
        PrismError: one does not listen in time; the message ends with the last lines of its log.
    """
    command = cluster.options.upstream
    if command is None:
        return []
    servers = []
    for site in cluster.topology.backends:
        own = cluster.dir / f"server/{site.role}"
        own.mkdir(parents=True, exist_ok=True)
        log = cluster.dir / f"log/{site.role}-server.log"
        variables = {"PRISM_NODE": site.role, "PRISM_DIR": str(own), "PRISM_PORT": str(PORT)}
        with log.open("ab") as output:
            process = site.namespace.popen(
                ["sh", "-c", command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | variables,
                start_new_session=True,
            )
        servers.append(process)
    deadline = time.monotonic() + _PATIENCE
    for site, process in zip(cluster.topology.backends, servers, strict=True):
        log = cluster.dir / f"log/{site.role}-server.log"
        while not _listens(process.pid):
            ended = process.poll() not in (None, 0)  # 0: it went into the background
            if ended or time.monotonic() > deadline:
                what = "has ended" if ended else f"does not listen at 127.0.0.1:{PORT}"
                text = f"the server beside {site.role} {what}:\n{files.tail(log)}"
                raise PrismError(text)
            time.sleep(_POLL)
    return servers


def _listens(pid: int) -> bool:
    """Whether something listens at the port in the network namespace of a process."""
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            _, local, _, state = line.split()[:4]
            if state == _LISTEN and int(local.rpartition(":")[2], 16) == PORT:
                return True
    return False
