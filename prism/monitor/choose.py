"""Which monitor a node uses: the kernel module where it is loaded, else the kernel's notices."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from prism.monitor.base import Monitor
from prism.monitor.kmod import DEVICE, KmodMonitor, device_info
from prism.monitor.sockdiag import SockDiagMonitor

if TYPE_CHECKING:
    from prism.config import BackendConfig

__all__ = ["monitor_for"]

log = logging.getLogger(__name__)


def monitor_for(backend: BackendConfig, device: Path = DEVICE) -> Monitor:
    """The monitor that a backend's settings ask for, not yet started.

    With ``auto`` a device that is there and cannot be used is worth a warning, and no more.
    """
    if backend.monitor == "kmod" or (backend.monitor == "auto" and _usable(device)):
        return KmodMonitor(device)
    return SockDiagMonitor()


def _usable(device: Path) -> bool:
    if not device.exists():
        return False
    try:
        fd = os.open(device, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        log.warning("not using the monitor module: %s", error)
        return False
    try:
        device_info(fd)
    except OSError as error:
        log.warning("not using the monitor module: %s", error.strerror)
        return False
    finally:
        os.close(fd)
    return True
