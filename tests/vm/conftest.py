"""Tests that need a stock kernel: they run inside the guest that scripts/vm boots, as root.

One boot serves all of them. Whatever the kernel complains about fails the test that is
running then.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
for neighbour in ("net", "e2e"):
    sys.path.append(str(HERE.with_name(neighbour)))
pytest.register_assert_rewrite("monitor_conformance", "e2e_bed", "kmod_device")

from kmod_device import KernelLog, load_module  # noqa: E402

from prism.lab import cluster  # noqa: E402

# The emulated machine is some twenty times slower than a real one.
cluster._READY_PATIENCE *= 10
cluster._STOP_PATIENCE *= 10
cluster._LINK_PATIENCE *= 10
cluster._POLL *= 5


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.vm)


@pytest.fixture(scope="session", autouse=True)
def _guest() -> None:
    if "PRISM_VM" not in os.environ:
        pytest.exit("these tests need a stock kernel: run scripts/vm, or scripts/test vm", 1)


@pytest.fixture(scope="session")
def module(_guest: None) -> str:
    """The monitor module, loaded."""
    load_module()
    return os.environ["PRISM_VM_MODULE"]


@pytest.fixture(scope="session")
def _kernel_log(_guest: None) -> Iterator[KernelLog]:
    log = KernelLog()
    yield log
    log.close()


@pytest.fixture(autouse=True)
def _no_complaints(_kernel_log: KernelLog) -> Iterator[None]:
    """The kernel must not complain during a test: no warning, no oops, nothing left allocated."""
    yield
    assert _kernel_log.complaints() == []


@pytest.fixture
def sysctl() -> Iterator[object]:
    """Sets kernel parameters of the present network namespace or machine, and sets them back."""
    changed: list[tuple[Path, str]] = []

    def change(path: str, value: object) -> None:
        file = Path(path)
        changed.append((file, file.read_text()))
        file.write_text(f"{value}\n")

    yield change
    for file, value in reversed(changed):
        file.write_text(value)


@pytest.fixture(scope="session", autouse=True)
def _kernel(_guest: None) -> None:
    """Says what is tested."""
    release = subprocess.run(["uname", "-rv"], capture_output=True, text=True, check=True).stdout
    print(f"\nkernel {release.strip()}")
