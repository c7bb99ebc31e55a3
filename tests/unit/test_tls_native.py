"""The record layer's C core by itself: under the sanitizers, and searched for keys left behind."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "prism/_ext/src"
CORE = ("tls_keys.c", "tls_message.c", "tls_open.c", "tls_seal.c", "tls_state.c")
SANITIZERS = (
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
)


def build(target: Path, *flags: str) -> Path:
    compiler = os.environ.get("CC", "gcc")
    assert shutil.which(compiler), f"{compiler} not found: install a C compiler, or set CC"
    sources = [ROOT / "tests/native/tls_record_driver.c", *(SOURCES / name for name in CORE)]
    subprocess.run(
        [
            *(compiler, "-std=gnu11", "-g", "-Wall", "-Wextra", "-Werror", *flags),
            *(f"-I{SOURCES}", "-o", str(target), *map(str, sources), "-lcrypto"),
        ],
        check=True,
    )
    return target


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("native") / "sanitized", "-O1", *SANITIZERS)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_streams_and_states_under_the_sanitizers(sanitized: Path, seed: int) -> None:
    done = run(sanitized, "fuzz", "300", str(seed))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = re.fullmatch(r"opened (\d+) refused (\d+) states (\d+) good (\d+) bad\n", done.stdout)
    assert found, done.stdout
    assert all(int(number) > 300 for number in found.groups()), done.stdout


def test_no_key_is_left_in_memory(tmp_path: Path) -> None:
    # The dynamic linker's lazy binding saves the vector registers on the stack, keys included.
    # Python loads extensions with RTLD_NOW, so it is not done there either.
    done = run(build(tmp_path / "driver", "-O2", "-Wl,-z,now"), "wipe")
    assert (done.returncode, done.stdout) == (0, "wiped 9 suites\n"), done.stderr
