"""What prism-proxy kmod says when it cannot build, install or load the monitor module."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from prism.commands.kmod import kmod
from prism.monitor import module
from prism.monitor.module import ModuleError

NOBODY = 65534


@contextmanager
def without_privilege() -> Iterator[None]:
    """As another user than root, where the tests run as root."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if before == 0:
            os.seteuid(0)


@pytest.fixture
def headers(tmp_path: Path) -> Path:
    """Headers against which everything builds at once."""
    found = tmp_path / "headers"
    found.mkdir()
    (found / "Makefile").write_text("modules:\n\ttouch $(M)/prism_monitor.ko\n")
    return found


def command(directory: Path, name: str, *lines: str) -> None:
    file = directory / name
    file.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    file.chmod(0o755)


def test_installing_needs_root() -> None:
    with without_privilege(), pytest.raises(ModuleError, match="needs root"):
        module.install()


def test_installing_without_headers_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    wanted = r"apt-get install linux-headers-0\.0\.0-none"
    with pytest.raises(ModuleError, match=wanted):
        module.install("0.0.0-none")
    command(tmp_path, "dkms", "exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ModuleError, match=wanted):
        module.install("0.0.0-none")


@pytest.mark.parametrize("there", [[], ["make"]])
def test_building_without_a_compiler_names_the_package(
    tmp_path: Path, headers: Path, monkeypatch: pytest.MonkeyPatch, there: list[str]
) -> None:
    (tmp_path / "bin").mkdir()
    for name in there:
        command(tmp_path / "bin", name)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    missing = "gcc" if there else "make"
    with pytest.raises(ModuleError, match=f"{missing} is missing: apt-get install build-essential"):
        module.build(tmp_path, headers=headers)


def test_a_directory_that_may_not_be_written_to(tmp_path: Path, headers: Path) -> None:
    assert module.build(tmp_path / "good", headers=headers).name == "prism_monitor.ko"
    (tmp_path / "taken").touch()
    result = CliRunner().invoke(
        kmod, ["build", "--headers", str(headers), "-o", str(tmp_path / "taken" / "below")]
    )
    assert isinstance(result.exception, ModuleError)
    assert str(result.exception) == f"cannot write to {tmp_path / 'taken/below'}: Not a directory"


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("Key was rejected by service", r"modules signed \(secure boot\).*docs/kernel\.md"),
        ("Required key not available", r"modules signed \(secure boot\).*docs/kernel\.md"),
        ("Operation not permitted", "not permitted.*lockdown"),
        ("Exec format error", "does not take the module.*Exec format error; dmesg says more"),
    ],
)
def test_why_the_kernel_refuses_the_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, wanted: str
) -> None:
    """The words are modprobe's own; tests/vm has a kernel say the first and the third."""
    line = f"modprobe: ERROR: could not insert 'prism_monitor': {said}"
    command(tmp_path, "modprobe", f'echo "{line}" >&2', "exit 1")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ModuleError, match=wanted):
        module._load()


def test_without_modprobe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ModuleError, match="modprobe is missing: apt-get install kmod"):
        module._load()


def test_a_failing_dkms_is_quoted(
    tmp_path: Path, headers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command(tmp_path, "dkms", "echo Error! $1 went wrong >&2", "exit 10")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ModuleError, match="dkms add failed:\nError! add went wrong"):
        module._run(["dkms", "add", "-m", "prism-monitor"], "dkms add failed")


def test_a_device_of_somebody_else(tmp_path: Path) -> None:
    device = tmp_path / "device"
    device.touch()
    device.chmod(0)
    tmp_path.chmod(0o755)
    with without_privilege():
        problem = module.status(device).problem
    assert "Permission denied; it belongs to root" in problem
    assert "docs/kernel.md" in problem
