"""What every long-running process of Prism does alike: start, supervise workers, stop.

A role is a coroutine function ``main(worker, stop)``: it serves until the event ``stop`` is set,
then lets open work end and returns. One worker runs in the process itself; several are forked
from a supervisor that starts a dead one again (not one that returned by itself) and passes SIGTERM
on.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import uvloop

from prism.config import TelemetryConfig
from prism.errors import PrismError
from prism.telemetry.logging import configure

__all__ = ["Main", "harden", "on_reload", "serve", "start_time"]

Main = Callable[[int, asyncio.Event], Awaitable[None]]

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_STOPPING = (signal.SIGTERM, signal.SIGINT)
_on_reload: list[Callable[[], None]] = []
_SETTLED = 2.0  # seconds after which a worker counts as started
_BACK_OFF = (0.1, 5.0)  # first and longest pause before a dead worker is started again, seconds
_LAST_WORD = 2.0  # seconds from cancellation, or SIGTERM's end of patience, to the hard end
# Objects made and not given up between two looks for cycles of garbage. Neither requests nor
# handoffs leave any, and a look costs: with Python's own 700 up to a tenth of a relay's time.
GARBAGE = 50_000
_FINISHED = 77  # exit code of a worker that nobody has asked to stop
_libc = ctypes.CDLL(None, use_errno=True)
_log = logging.getLogger(__name__)


def harden() -> None:
    """Make secrets stay out of core dumps, and allow as many descriptors as the system grants."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def on_reload(call: Callable[[], None]) -> None:
    """Have ``call`` run in this process's event loop at each SIGHUP, instead of what did so far."""
    _on_reload[:] = [call]


def _reload() -> None:
    if not _on_reload:
        _log.warning("SIGHUP: nothing here can be reloaded; restart to apply a new configuration")
    for call in _on_reload:
        call()


def start_time(pid: int) -> int | None:
    """When a process started (clock ticks since boot, proc(5)); ``None``: there is none.

    Pid and start time together name a process for good; a pid alone may be reused.
    """
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:  # noqa: PTH123
            fields = stat.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def serve(
    main: Main, names: Sequence[str], telemetry: TelemetryConfig, *, patience: float = 10.0
) -> int:
    """Run a role until SIGTERM or SIGINT; returns the exit code. SIGHUP: see :func:`on_reload`.

    Args:
        main: the role; called with the worker's number and the event that asks it to stop.
        names: the workers' names (``fe1/0``), for the log; one process each.
        telemetry: how to log.
        patience: seconds ``main`` has to return after it was asked to; then it is cancelled.

    Raises:
        OSError: the log file cannot be opened.
    """
    harden()
    configure(telemetry, names[0] if len(names) == 1 else names[0].partition("/")[0])
    if len(names) == 1:
        code = _work(main, 0, patience)
        return 0 if code == _FINISHED else code
    return _Supervisor(main, names, telemetry, patience).run()


def _work(main: Main, worker: int, patience: float) -> int:
    """One worker's life; the exit code."""
    gc.set_threshold(GARBAGE, 10, 10)
    gc.freeze()  # what is loaded by now stays: the collector need not look at it again
    try:
        asked = uvloop.run(_until_stopped(main, worker, patience))
    except PrismError as error:
        _log.error("%s", error)
        return 1
    except OSError as error:
        _log.error("cannot go on: %s", error, exc_info=_log.isEnabledFor(logging.DEBUG))
        return 1
    except Exception:
        _log.critical("a fault in Prism itself", exc_info=True)
        return 70
    return 0 if asked else _FINISHED


async def _until_stopped(main: Main, worker: int, patience: float) -> bool:
    """Run a role to its end; whether that came by a signal."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(main(worker, stop))

    def asked() -> None:
        if stop.is_set():  # asked twice: at once
            task.cancel()
        stop.set()

    for number in _STOPPING:
        loop.add_signal_handler(number, asked)
    loop.add_signal_handler(signal.SIGHUP, _reload)
    asker = asyncio.ensure_future(stop.wait())
    await asyncio.wait((task, asker), return_when=asyncio.FIRST_COMPLETED)
    asker.cancel()
    if not task.done():
        await asyncio.wait((task,), timeout=patience)
    if not task.done():
        _log.warning("still busy %g s after being asked to stop; cut short", patience)
        task.cancel()
        await asyncio.wait((task,), timeout=_LAST_WORD)
    if not task.done():
        _log.error("does not end; exiting all the same")
        sys.stderr.flush()
        os._exit(75)
    with contextlib.suppress(asyncio.CancelledError):
        task.result()
    return stop.is_set()


@dataclass(slots=True)
class _Child:
    pid: int
    since: float
    pause: float = 0.0
    settled: bool = False
    done: bool = False  # it has ended because it wanted to: drained
    due: float = 0.0  # when to start it again; 0: it runs


class _Supervisor:
    """Forks the workers and keeps them running. Single-threaded, no event loop: safe to fork."""

    def __init__(
        self, main: Main, names: Sequence[str], telemetry: TelemetryConfig, patience: float
    ) -> None:
        self._main = main
        self._names = names
        self._telemetry = telemetry
        self._patience = patience
        self._children: list[_Child] = []
        self._signals = {*_STOPPING, signal.SIGHUP, signal.SIGCHLD}

    def run(self) -> int:
        """Until told to stop, or a worker cannot even start; the exit code."""
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        code = 0
        try:
            self._children = [
                _Child(self._fork(worker), time.monotonic()) for worker in range(len(self._names))
            ]
            while not code:
                number = signal.sigtimedwait(self._signals, self._next_due())
                if number is not None and number.si_signo in _STOPPING:
                    break
                if number is not None and number.si_signo == signal.SIGHUP:
                    self._pass_on(signal.SIGHUP)
                code = self._reap()
                if all(child.done for child in self._children):
                    break
                self._restart()
        finally:
            self._stop()
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)
        return code

    def _fork(self, worker: int) -> int:
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            self._live(worker, parent)
        return pid

    def _live(self, worker: int, parent: int) -> NoReturn:
        """The child's whole life."""
        code = 70
        try:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self._signals)
            if os.getppid() == parent:  # it may have died before the line above
                configure(self._telemetry, self._names[worker])
                code = _work(self._main, worker, self._patience)
        except BaseException:
            _log.critical("a fault in Prism itself", exc_info=True)
        finally:
            logging.shutdown()
            os._exit(code)

    def _next_due(self) -> float:
        now = time.monotonic()
        return max(0.0, min((child.due - now for child in self._children if child.due), default=1))

    def _reap(self) -> int:
        """Note the dead; the exit code of a worker that died while starting first, or 0."""
        now = time.monotonic()
        for child, name in zip(self._children, self._names, strict=True):
            if child.due or child.done:
                continue
            child.settled = child.settled or now - child.since > _SETTLED
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if pid == 0:
                continue
            code = os.waitstatus_to_exitcode(status)
            child.pid = 0
            if code == _FINISHED:
                child.done = True
                _log.info("worker %s has ended", name)
                continue
            _log.error("worker %s ended with %d", name, code)
            if not child.settled:
                return code if code > 0 else 70
            # A worker that lived a while starts anew with the shortest pause.
            longer = child.pause * 2 if now - child.since <= _BACK_OFF[1] else 0.0
            child.pause = min(max(longer, _BACK_OFF[0]), _BACK_OFF[1])
            child.due = now + child.pause
        return 0

    def _restart(self) -> None:
        for worker, child in enumerate(self._children):
            if child.due and time.monotonic() >= child.due:
                child.due, child.since = 0.0, time.monotonic()
                child.pid = self._fork(worker)
                _log.info("worker %s started again", self._names[worker])

    def _pass_on(self, number: signal.Signals) -> None:
        for child in self._children:
            if child.pid:
                os.kill(child.pid, number)

    def _stop(self) -> None:
        """SIGTERM to all, SIGKILL to who outlives the patience; all are reaped afterwards."""
        alive = [child for child in self._children if child.pid]
        deadline = time.monotonic() + self._patience + 2 * _LAST_WORD
        for child in alive:
            os.kill(child.pid, signal.SIGTERM)
        while alive:
            alive = [child for child in alive if os.waitpid(child.pid, os.WNOHANG)[0] == 0]
            left = deadline - time.monotonic()
            if alive and left <= 0:
                for child in alive:
                    os.kill(child.pid, signal.SIGKILL)
                    os.waitpid(child.pid, 0)
                return
            if alive:
                signal.sigtimedwait({signal.SIGCHLD}, min(left, 0.2))
