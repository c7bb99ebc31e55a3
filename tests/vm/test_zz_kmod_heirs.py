"""What goes last: the module stays loaded for good, and the kernel takes no other any more."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from kmod_device import Device, load_module, settled_references, unload_module
from monitor_conformance import pair, reset

from prism.monitor import module as installer


def test_nothing_of_all_tests_before_is_left(module):
    """Sockets in whatever state, of whatever process, went with their namespaces."""
    assert settled_references(seconds=60.0) == 0
    unload_module()
    load_module()


def test_a_registered_socket_that_becomes_a_listener(module, make_namespace):
    """What it accepts inherits the hook but no reference to the module."""
    with (
        make_namespace("heirs").entered(),
        Device() as device,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        client, ours = pair(listener)
        device.register(ours, 1)
        libc_disconnect(ours)
        ours.bind(("127.0.0.1", 0))
        ours.listen()
        heir_client, heir = pair(ours)
        device.register(heir, 2)  # an heir may be registered itself
        other_client, other = pair(ours)  # or not
        ours.close()
        assert device.wait()[0].cookie == 1
        assert settled_references(3) == 3  # the descriptor, the heir, and for good
        heir_client.close()
        heir.close()
        assert device.wait()[0].cookie == 2
        reset(other)
        other_client.close()
        client.close()
    assert settled_references(1) == 1
    with pytest.raises(subprocess.CalledProcessError, match="rmmod"):
        unload_module()


def test_a_kernel_that_wants_modules_signed(module, tmp_path, monkeypatch):
    """What secure boot brings along, and what ``prism-proxy kmod install`` makes of it."""
    directory = tmp_path / "lib/modules" / os.uname().release
    directory.mkdir(parents=True)
    shutil.copy(module, directory / "prism_other.ko")  # that one is loaded
    subprocess.run(["depmod", "-b", tmp_path, directory.name], check=True, capture_output=True)
    monkeypatch.setenv("MODPROBE_OPTIONS", f"-d {tmp_path}")
    monkeypatch.setattr(installer, "NAME", "prism_other")
    Path("/sys/module/module/parameters/sig_enforce").write_text("1\n")
    with pytest.raises(installer.ModuleError, match=r"wants modules signed \(secure boot\)"):
        installer._load()
    Path("/proc/sys/kernel/modules_disabled").write_text("1\n")
    with pytest.raises(installer.ModuleError, match="not permitted"):
        installer._load()


def libc_disconnect(sock: socket.socket) -> None:
    """connect(2) to AF_UNSPEC, which Python has no way to say."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.connect(sock.fileno(), bytes(16), 16) == 0, ctypes.get_errno()
