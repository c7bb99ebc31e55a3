"""Builds, installs and inspects the monitor module: ``prism-proxy kmod``; docs/kernel.md."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from prism.errors import PrismError
from prism.monitor.kmod import DEVICE, Info, device_info

__all__ = ["NAME", "ModuleError", "Status", "build", "install", "sources", "status"]

NAME: Final = "prism_monitor"
_PACKAGE: Final = "prism-monitor"  # in dkms.conf
_VERSION: Final = "2"
_FILES: Final = ("Kbuild", "Makefile", "dkms.conf", "prism_monitor.c", "prism_monitor.h")
_SECURE_BOOT: Final = Path(
    "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
)
_DKMS: Final = Path("/var/lib/dkms", _PACKAGE)
_BUILD_TIME = 300.0  # seconds


class ModuleError(PrismError):
    """The module cannot be built, installed or loaded; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Status:
    """What is known of the module on this machine.

    Attributes:
        kernel: the running kernel's release.
        headers: where its headers are, None if they are not installed.
        installed: the installed module's file, if any.
        loaded: whether it is loaded.
        info: what it says of itself; None if the device cannot be used, see ``problem``.
        problem: why not, in words.
        secure_boot: whether modules have to be signed.
    """

    kernel: str
    headers: Path | None
    installed: Path | None
    loaded: bool
    info: Info | None
    problem: str
    secure_boot: bool


def sources() -> Path:
    """The directory of the module's sources: in the package, or in the checkout it runs from.

    Raises:
        ModuleError: neither has them.
    """
    package = Path(__file__).parents[1]
    for directory in (package / "_kmod", package.parent / "kmod"):
        if all((directory / name).is_file() for name in _FILES):
            return directory
    raise ModuleError("the module's sources are missing: install Prism again")


def status(device: Path = DEVICE) -> Status:
    """What is known of the module on this machine; changes nothing."""
    kernel = platform.release()
    found = _headers(kernel)
    info, problem = _ask(device)
    return Status(
        kernel,
        found if found.is_dir() else None,
        _installed(kernel),
        Path("/sys/module", NAME).is_dir(),
        info,
        problem,
        _secure_boot(),
    )


def build(target: Path, kernel: str | None = None, headers: Path | None = None) -> Path:
    """Build the module.

    Args:
        target: the directory it goes to.
        kernel: the release it is for; the running one by default.
        headers: their directory; that of the release by default.

    Returns:
        The module's file.

    Raises:
        ModuleError: no compiler, no headers, or the compiler's complaint.
    """
    kernel = kernel or platform.release()
    headers = headers or _headers(kernel)
    for tool in ("make", "gcc"):
        if shutil.which(tool) is None:
            raise ModuleError(f"{tool} is missing: apt-get install build-essential")
    if not (headers / "Makefile").is_file():
        raise ModuleError(
            f"the headers of kernel {kernel} are missing: apt-get install linux-headers-{kernel}"
        )
    with tempfile.TemporaryDirectory(prefix="prism-kmod-") as name:
        work = Path(name)
        _copy_sources(work)
        _run(["make", "-C", str(work), f"KDIR={headers}"], "the module does not build")
        try:
            target.mkdir(parents=True, exist_ok=True)
            return Path(shutil.copy(work / f"{NAME}.ko", target))
        except OSError as error:
            raise ModuleError(f"cannot write to {target}: {error.strerror}") from None


def install(kernel: str | None = None) -> str:
    """Install the module for a kernel, with DKMS where that is there, and load it.

    Returns:
        What was done, in words.

    Raises:
        ModuleError: not root, what :func:`build` raises, or the kernel refuses it.
    """
    if os.geteuid() != 0:
        raise ModuleError("installing a module needs root")
    running = kernel in (None, platform.release())
    kernel = kernel or platform.release()
    if running and not Path("/proc/modules").exists():
        raise ModuleError(f"kernel {kernel} is built without loadable modules")
    if shutil.which("dkms") is not None:
        _install_with_dkms(kernel)
        how = "with DKMS, which builds it again for every new kernel"
    else:
        target = Path("/lib/modules", kernel, "updates")
        build(target, kernel)
        _run(["depmod", "-a", kernel], "depmod failed")
        how = f"in {target}; for a new kernel do it again, or install dkms"
    if not running:
        return f"installed {how}"
    _load()
    return f"installed {how}; loaded"


def _install_with_dkms(kernel: str) -> None:
    if not (_headers(kernel) / "Makefile").is_file():
        raise ModuleError(
            f"the headers of kernel {kernel} are missing: apt-get install linux-headers-{kernel}"
        )
    for version in _known_to_dkms():
        command = ["dkms", "remove", "-m", _PACKAGE, "-v", version, "--all"]
        subprocess.run(command, capture_output=True, check=False)
    tree = Path("/usr/src", f"{_PACKAGE}-{_VERSION}")
    try:
        tree.mkdir(parents=True, exist_ok=True)
        _copy_sources(tree)
    except OSError as error:
        raise ModuleError(f"cannot write to {tree}: {error.strerror}") from None
    module = ["-m", _PACKAGE, "-v", _VERSION]
    _run(["dkms", "add", *module], "dkms add failed")
    _run(["dkms", "install", *module, "-k", kernel], "dkms install failed")


def _known_to_dkms() -> list[str]:
    """The versions of the module that DKMS has: this one, and those of older releases."""
    try:
        return [each.name for each in _DKMS.iterdir() if each.name[0].isdigit()]
    except FileNotFoundError:
        return []


def _load() -> None:
    try:
        done = subprocess.run(["modprobe", NAME], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ModuleError("modprobe is missing: apt-get install kmod") from None
    if done.returncode == 0:
        return
    said = done.stderr.strip()
    if "Key was rejected" in said or "Required key not available" in said:
        raise ModuleError(
            f"the kernel wants modules signed (secure boot): {said}; docs/kernel.md says how to "
            "sign it and enrol the key"
        )
    if "Operation not permitted" in said:
        raise ModuleError(f"not permitted: {said}; kernel lockdown, modules_disabled, a container?")
    raise ModuleError(f"the kernel does not take the module: {said}; dmesg says more")


def _copy_sources(target: Path) -> None:
    for name in _FILES:
        shutil.copy(sources() / name, target)


def _run(command: list[str], failure: str) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_BUILD_TIME, check=False
        )
    except FileNotFoundError:
        raise ModuleError(f"{failure}: {command[0]} is missing: apt-get install kmod") from None
    except subprocess.TimeoutExpired:
        raise ModuleError(f"{failure}: no end after {_BUILD_TIME:.0f} s") from None
    if done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise ModuleError("\n".join([f"{failure}:", *lines[-15:]]))


def _headers(kernel: str) -> Path:
    return Path("/lib/modules", kernel, "build")


def _installed(kernel: str) -> Path | None:
    for place in ("updates/dkms", "updates", "extra"):
        for path in Path("/lib/modules", kernel, place).glob(f"{NAME}.ko*"):
            return path
    return None


def _ask(device: Path) -> tuple[Info | None, str]:
    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError as error:
        return None, f"{device}: {error.strerror}; it belongs to root (a udev rule: docs/kernel.md)"
    except OSError as error:
        return None, f"{device}: {error.strerror}"
    try:
        return device_info(fd), ""
    except OSError as error:
        return None, f"{device}: {error.strerror}"
    finally:
        os.close(fd)


def _secure_boot() -> bool:
    try:
        return _SECURE_BOOT.read_bytes()[-1:] == b"\1"
    except OSError:
        return False
