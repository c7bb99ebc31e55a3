"""What prism.monitor.kmod knows by heart is what the module's header says."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from prism.monitor import kmod
from prism.monitor.choose import monitor_for
from prism.monitor.module import ModuleError, build, sources, status

PROGRAM = """
#include <stdio.h>
#include <stddef.h>
#include "prism_monitor.h"
#define EVENT(field) (int)offsetof(struct prism_monitor_event, field)
int main(void)
{
    printf("%lu %lu %lu %lu\\n", (unsigned long)PRISM_MONITOR_REGISTER,
        (unsigned long)PRISM_MONITOR_UNREGISTER, (unsigned long)PRISM_MONITOR_INFO,
        (unsigned long)PRISM_MONITOR_CHECK);
    printf("%d %d %d\\n", (int)sizeof(struct prism_monitor_register),
        (int)sizeof(struct prism_monitor_info), (int)sizeof(struct prism_monitor_event));
    printf("%d %d %d\\n", EVENT(cookie), EVENT(reason), EVENT(flags));
    printf("%d %d %d\\n", PRISM_MONITOR_ABI, PRISM_MONITOR_STARTS, PRISM_MONITOR_SEES_TIME_WAIT);
    printf("%d %d %d %d %d %d\\n", PRISM_MONITOR_CLOSED, PRISM_MONITOR_RESET,
        PRISM_MONITOR_TIMED_OUT, PRISM_MONITOR_TIME_WAIT, PRISM_MONITOR_HANDED_OFF,
        PRISM_MONITOR_LOST);
    return 0;
}
"""


def test_the_header_and_python_agree(tmp_path: Path) -> None:
    program = tmp_path / "abi"
    command = ["gcc", "-x", "c", "-", f"-I{sources()}", "-o", str(program)]
    subprocess.run(command, input=PROGRAM, text=True, check=True)
    said = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    lines = [[int(word) for word in line.split()] for line in said.splitlines()]
    assert lines == [
        [kmod.REGISTER_IOCTL, kmod.UNREGISTER_IOCTL, kmod.INFO_IOCTL, kmod.CHECK_IOCTL],
        [kmod.REGISTER.size, kmod.INFO.size, kmod.EVENT.size],
        [0, 26, 27],
        [kmod.ABI, kmod.STARTS, kmod.SEES_TIME_WAIT],
        [kmod.CLOSED, kmod.RESET, kmod.TIMED_OUT, kmod.TIME_WAIT, kmod.HANDED_OFF, kmod.LOST],
    ]
    event = bytearray(kmod.EVENT.size)
    event[0], event[26], event[27] = 7, 4, 1
    assert kmod.EVENT.unpack(event) == (7, 4, 1)


class Backend:
    def __init__(self, monitor: str) -> None:
        self.monitor = monitor


def test_without_the_device_the_kernels_notices_are_used(tmp_path: Path) -> None:
    device = tmp_path / "none"
    assert monitor_for(Backend("auto"), device).name == "sockdiag"  # type: ignore[arg-type]
    assert monitor_for(Backend("sockdiag"), device).name == "sockdiag"  # type: ignore[arg-type]
    assert monitor_for(Backend("kmod"), device).name == "kmod"  # type: ignore[arg-type]


def test_a_device_that_is_something_else_is_worth_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    device = tmp_path / "file"
    device.touch()
    assert monitor_for(Backend("auto"), device).name == "sockdiag"  # type: ignore[arg-type]
    assert "not using the monitor module" in caplog.text


async def test_a_monitor_that_is_asked_for_and_not_there_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await kmod.KmodMonitor(tmp_path / "none").start()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Inappropriate ioctl"):
        await kmod.KmodMonitor(tmp_path / "file").start()


def test_building_without_headers_names_the_package(tmp_path: Path) -> None:
    with pytest.raises(ModuleError, match=r"apt-get install linux-headers-0\.0\.0-none"):
        build(tmp_path, "0.0.0-none")


def test_building_against_what_are_no_headers_shows_what_make_says(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text("modules:\n\t@echo no headers here >&2; false\n")
    with pytest.raises(ModuleError, match="does not build:\nno headers here"):
        build(tmp_path / "out", "0.0.0-none", tmp_path)
    assert not (tmp_path / "out").exists()


def test_the_status_says_why_the_device_cannot_be_used(tmp_path: Path) -> None:
    found = status(tmp_path / "none")
    assert found.info is None
    assert "No such file" in found.problem
