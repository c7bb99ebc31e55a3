"""The command line: exit codes, and one clear line where something is wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from channel_bed import pki_directory

from prism import __version__
from prism.cli import main
from prism.commands.lab import _interruptible, _settings
from prism.errors import ConfigError

GOOD = f"""
[cluster]
key = "00112233445566778899aabbccddeeff"
pki_dir = "{pki_directory()}"
control = "10.77.0.1:4760"
[[nodes]]
name = "be1"
address = "10.77.101.2"
[backend]
name = "be1"
"""


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


Prism = Callable[..., Done]


@pytest.fixture
def prism(capsys: pytest.CaptureFixture[str]) -> Prism:
    def run(*arguments: str) -> Done:
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        return Done(int(ended.value.code or 0), *capsys.readouterr())

    return run


def test_version_and_help(prism: Prism) -> None:
    assert prism("--version").stdout == f"prism-proxy {__version__}\n"
    for arguments in (["--help"], ["lab", "--help"], ["lab", "up", "-h"], ["frontend", "-h"]):
        done = prism(*arguments)
        assert done.returncode == 0
        assert "Usage: prism-proxy" in done.stdout


def test_check_says_which_roles_a_file_serves(prism: Prism, tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(GOOD)
    done = prism("check", "-c", str(path))
    assert (done.returncode, done.stderr) == (0, "")
    assert "roles: backend; nodes: 1" in done.stdout


@pytest.mark.parametrize("command", ["check", "frontend", "backend", "switch", "status"])
def test_a_bad_file_is_a_line_and_exit_code_2(prism: Prism, tmp_path: Path, command: str) -> None:
    path = tmp_path / "p.toml"
    path.write_text(GOOD + "wrkers = 2\n")
    done = prism(command, "-c", str(path))
    assert done.returncode == 2
    assert done.stderr == (
        f"prism-proxy: {path}:11: backend.wrkers: unknown key; did you mean 'workers'?\n"
    )
    assert prism(command, "-c", str(tmp_path / "none")).returncode == 2


@pytest.mark.parametrize("command", ["frontend", "switch"])
def test_a_role_without_its_section_is_refused(prism: Prism, tmp_path: Path, command: str) -> None:
    path = tmp_path / "p.toml"
    path.write_text(GOOD)
    done = prism(command, "-c", str(path))
    assert done.returncode == 2
    assert f"has no [{command}] section" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["switch"], "Missing option '-c'"),
        (["switch", "rules"], "Missing option '-c'"),
        (["switch", "-c", "FILE", "rules"], "options go behind 'rules'"),
        (["switch", "--remove", "rules", "-c", "FILE"], "options go behind 'rules'"),
        (["switch", "rules", "-c", "FILE"], "has no [switch] section"),
        (["switch", "nonsense"], "No such command"),
    ],
)
def test_how_the_switch_command_is_used(
    prism: Prism, tmp_path: Path, arguments: list[str], text: str
) -> None:
    path = tmp_path / "p.toml"
    path.write_text(GOOD)
    done = prism(*(str(path) if word == "FILE" else word for word in arguments))
    assert done.returncode == 2
    assert text in done.stderr


def test_the_address_of_a_p4_switch_goes_with_it(prism: Prism) -> None:
    done = prism("lab", "up", "--name", "pt-none", "--p4runtime-address", "127.0.0.1:9559")
    assert done.returncode == 2
    assert "--switch p4runtime" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["lab", "up", "--backends", "0"], 2, "--backends"),
        (["lab", "up", "--name", "../etc"], 2, "lab name"),
        (["lab", "up", "--name", "pt-none", "--rate", "much"], 2, "200mbit"),
        (["lab", "up", "--name", "pt-none", "--set", "nonsense"], 2, "SECTION.KEY=VALUE"),
        (["lab", "status", "--name", "pt-none"], 1, "is not up"),
        (["lab", "exec", "--name", "pt-none", "client", "--", "true"], 1, "is not up"),
        (["lab", "down", "--name", "../etc"], 2, "lab name"),
        (["lab", "nonsense"], 2, "No such command"),
    ],
)
def test_wrong_usage(prism: Prism, arguments: list[str], code: int, text: str) -> None:
    done = prism(*arguments)
    assert done.returncode == code, done.stderr
    assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_down_of_nothing_is_fine(prism: Prism) -> None:
    done = prism("lab", "down", "--name", "pt-none")
    assert (done.returncode, done.stdout) == (0, "there is no lab pt-none\n")


def test_a_lab_without_privilege_is_refused_with_a_remedy() -> None:
    drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--"] if os.geteuid() == 0 else []
    command = [*drop, sys.executable, "-m", "prism", "lab", "up", "--name", "pt-nopriv"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "root" in done.stderr or "doctor" in done.stderr
    assert "Traceback" not in done.stderr


def test_settings_are_toml_values_or_text() -> None:
    given = ("frontend.workers=2", "frontend.handoff=never", 'backend.store="/x"', "a.b=[1, 2]")
    assert _settings(given) == {
        "frontend.workers": 2,
        "frontend.handoff": "never",
        "backend.store": "/x",
        "a.b": [1, 2],
    }
    with pytest.raises(ConfigError):
        _settings(("workers=2",))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_a_destructor_swallows_is_not_lost(number: signal.Signals) -> None:
    class Interrupted:
        def __del__(self) -> None:
            signal.raise_signal(number)

    with _interruptible() as interrupts:
        interrupts.check()
        Interrupted()
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
        interrupts.enough = True
        signal.raise_signal(number)
