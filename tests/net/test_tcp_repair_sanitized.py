"""The C core under AddressSanitizer and UndefinedBehaviorSanitizer, on real connections."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.net

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "prism/_ext/src"
CORE = ("tcp_state.c", "tcp_repair.c", "tcp_import.c", "tcp_fin.c", "tcp_window.c")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("native") / "tcp_repair_driver"
    compiler = os.environ.get("CC", "gcc")
    assert shutil.which(compiler), f"{compiler} not found: install a C compiler, or set CC"
    subprocess.run(
        [compiler, "-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror"]
        + ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
        + [f"-I{SOURCES}", "-o", str(target), str(ROOT / "tests/native/tcp_repair_driver.c")]
        + [str(SOURCES / source) for source in CORE],
        check=True,
    )
    return target


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_cycles_and_damaged_states(driver: Path, seed: int) -> None:
    done = subprocess.run(
        [str(driver), "150", "3000", str(seed)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cycles 300 mutations 6000 imported ")
    assert "runtime error" not in done.stderr
