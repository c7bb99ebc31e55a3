"""Starting, supervising and stopping, with real processes."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prism.process import start_time

PROLOGUE = """
import asyncio, os, sys, time
from pathlib import Path
from prism.config import TelemetryConfig
from prism import process
from prism.errors import ConfigError
process._SETTLED = 0.3
here = Path(sys.argv[1])
def note(name):
    (here / name).write_text(str(os.getpid()))
"""
EPILOGUE = """
names = [f"x/{i}" for i in range(int(sys.argv[2]))]
sys.exit(process.serve(main, names, TelemetryConfig(), patience=float(sys.argv[3])))
"""
PATIENCE = 30.0  # seconds for what takes milliseconds on a machine that has nothing else to do

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def start(body: str, workers: int, patience: float = PATIENCE) -> subprocess.Popen[str]:
        program = PROLOGUE + textwrap.dedent(body) + EPILOGUE
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path), str(workers), str(patience)],
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stderr.close()


def wait_for(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def pid_in(path: Path) -> int:
    wait_for(lambda: path.exists() and path.read_text())
    return int(path.read_text())


SERVE = """
async def main(worker, stop):
    note(f"up{worker}")
    await stop.wait()
    note(f"down{worker}")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_signal_stops_every_worker_cleanly(
    start: Start, tmp_path: Path, workers: int, number: signal.Signals
) -> None:
    process = start(SERVE, workers)
    pids = {pid_in(tmp_path / f"up{i}") for i in range(workers)}
    assert len(pids) == workers
    process.send_signal(number)
    assert process.wait(timeout=PATIENCE) == 0
    assert all((tmp_path / f"down{i}").exists() for i in range(workers))
    assert all(start_time(pid) is None for pid in pids)


def test_a_dead_worker_is_started_again_and_the_others_stay(start: Start, tmp_path: Path) -> None:
    process = start(SERVE, 2)
    first, other = pid_in(tmp_path / "up0"), pid_in(tmp_path / "up1")
    time.sleep(0.4)
    (tmp_path / "up0").unlink()
    os.kill(first, signal.SIGKILL)
    again = pid_in(tmp_path / "up0")
    assert again != first
    assert start_time(other) is not None
    process.terminate()
    assert process.wait(timeout=PATIENCE) == 0


@pytest.mark.parametrize("workers", [1, 3])
def test_a_worker_that_has_ended_by_itself_is_left_alone(
    start: Start, tmp_path: Path, workers: int
) -> None:
    body = """
    async def main(worker, stop):
        note(f"up{worker}")
        while not stop.is_set() and not (here / f"end{worker}").exists():
            await asyncio.sleep(0.01)
    """
    process = start(body, workers)
    pids = [pid_in(tmp_path / f"up{i}") for i in range(workers)]
    (tmp_path / "end0").touch()
    wait_for(lambda: start_time(pids[0]) is None)
    if workers > 1:
        time.sleep(0.3)  # longer than the pause before a dead one is started again
        assert all(start_time(pid) is not None for pid in pids[1:])
        assert pid_in(tmp_path / "up0") == pids[0]
    for worker in range(workers):
        (tmp_path / f"end{worker}").touch()
    assert process.wait(timeout=5) == 0


def test_a_worker_that_cannot_start_ends_it_all_with_a_plain_message(start: Start) -> None:
    process = start(
        """
        async def main(worker, stop):
            if worker == 1:
                raise ConfigError("port 80 is taken; choose another")
            await stop.wait()
        """,
        2,
    )
    assert process.wait(timeout=PATIENCE) == 1
    errors = process.stderr.read()
    assert "port 80 is taken; choose another" in errors
    assert "Traceback" not in errors


def test_a_worker_that_will_not_stop_is_cut_short(start: Start, tmp_path: Path) -> None:
    process = start(
        """
        async def main(worker, stop):
            note(f"up{worker}")
            await asyncio.sleep(600)
        """,
        2,
        patience=0.5,
    )
    pid_in(tmp_path / "up0")
    pid_in(tmp_path / "up1")
    began = time.monotonic()
    process.terminate()
    assert process.wait(timeout=PATIENCE) == 0
    assert time.monotonic() - began > 0.4


def test_workers_die_with_their_supervisor(start: Start, tmp_path: Path) -> None:
    process = start(SERVE, 2)
    pids = [pid_in(tmp_path / f"up{i}") for i in range(2)]
    process.kill()
    process.wait()
    wait_for(lambda: all(start_time(pid) is None for pid in pids))


def test_no_core_dumps_and_all_the_descriptors_there_are(start: Start, tmp_path: Path) -> None:
    process = start(SERVE, 1)
    pid = pid_in(tmp_path / "up0")
    assert resource.prlimit(pid, resource.RLIMIT_CORE) == (0, 0)
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    assert soft == hard
    process.terminate()
    assert process.wait(timeout=PATIENCE) == 0


def test_hardened_processes_leave_no_memory_behind() -> None:
    """No core file by limit, and none by PR_SET_DUMPABLE whatever the limit (prctl(2))."""
    script = (
        "import ctypes, resource\n"
        "from prism.process import harden\n"
        "get = lambda: ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)\n"
        "before = get()\n"
        "harden()\n"
        "print(before, get(), *resource.getrlimit(resource.RLIMIT_CORE))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=20
    )
    assert done.stdout.split() == ["1", "0", "0", "0"]
