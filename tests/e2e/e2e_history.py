"""Clients that write and read numbered values, and the check of what they have seen.

Each key has one writer, which writes 1, 2, 3, ... and now and then deletes the key instead; that
has a number, too. Whatever fails, a read must find

- no number less than one that was acknowledged, or read, before the read began;
- no number that was not begun before the read ended.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from e2e_http import Client, Conn, Cut

DELETE_EACH = 7  # one of so many writes is a deletion
PAUSE = 0.01  # seconds between two requests of a client


class Write(NamedTuple):
    number: int
    began: float
    ended: float
    status: int  # 0: no answer


class Read(NamedTuple):
    number: int  # 0: there was no object
    began: float
    ended: float
    status: int
    node: str


@dataclass
class History:
    """What has happened to one key."""

    key: str
    writes: list[Write] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    begun: dict[int, float] = field(default_factory=dict)

    def acknowledged(self) -> list[Write]:
        return [write for write in self.writes if write.status in (200, 201, 204)]

    def good(self) -> list[Read]:
        return [read for read in self.reads if read.status in (200, 404)]

    def check(self, *, late: bool = False) -> None:
        """Raises AssertionError for the first read that must not have been.

        ``late``: a write that was not answered may come into effect at any later time (a node that
        stood still has it in its socket), so reads of its number say nothing.
        """
        unknown = set(self.begun) - {write.number for write in self.acknowledged()}
        finished = sorted((write.ended, write.number) for write in self.acknowledged())
        seen: list[tuple[float, int]] = []
        for read in sorted(self.good(), key=lambda read: read.ended):
            before = [number for ended, number in finished if ended < read.began]
            before += [number for ended, number in seen if ended < read.began]
            floor = max(before, default=0)
            begun = [number for number, began in self.begun.items() if began < read.ended]
            if late and (read.number in unknown or (read.status == 404 and unknown)):
                continue
            if read.status == 404:
                # Any deletion that can be in effect; the oldest of them is the least that was seen.
                fits = [n for n in (0, *begun) if n >= floor and (n == 0 or n % DELETE_EACH == 0)]
                assert fits, f"{self.key}: {read} finds nothing, {floor} was there before"
                number = min(fits)
            else:
                number = read.number
                assert number >= floor, f"{self.key}: {read}, {floor} was there before"
                assert number in begun, f"{self.key}: {read} finds what nobody has written yet"
            seen.append((read.ended, number))


class Load:
    """Writers and readers of some keys, until stopped; a context manager."""

    def __init__(self, client: Client, keys: list[str], readers: int = 2) -> None:
        self.client = client
        self.histories = [History(key) for key in keys]
        self.stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(work, history))
            for history in self.histories
            for work in (self._write, *[self._read] * readers)
        ]
        self.faults: list[BaseException] = []

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self._threads:
            thread.join(40)
            assert not thread.is_alive()
        if self.faults:
            raise self.faults[0]

    def check(self, *, late: bool = False) -> None:
        for history in self.histories:
            history.check(late=late)

    def count(self, since: float, until: float) -> tuple[int, int]:
        """Good reads, and acknowledged writes, that began and ended in between."""
        reads = [each for history in self.histories for each in history.good()]
        writes = [each for history in self.histories for each in history.acknowledged()]
        return _within(reads, since, until), _within(writes, since, until)

    def _run(self, work: Callable[[History, Conn | None], Conn | None], history: History) -> None:
        """Repeat ``work`` on one connection as long as that lives, then on another."""
        conn: Conn | None = None
        try:
            while not self.stop.is_set():
                conn = work(history, conn)
                self.stop.wait(PAUSE)
        except BaseException as error:
            self.faults.append(error)
        finally:
            if conn is not None:
                conn.close()

    def _ask(self, conn: Conn | None, method: str, key: str, body: bytes = b""):
        """One request; the connection, or ``None`` when it is lost, and the answer or ``None``."""
        try:
            if conn is None:
                conn = self.client.connect(timeout=15.0)
            answer = conn.request(method, key, body)
        except (Cut, OSError):
            if conn is not None:
                conn.close()
            return None, None
        if answer.headers.get("connection", "") == "close":
            conn.close()
            conn = None
        return conn, answer

    def _write(self, history: History, conn: Conn | None) -> Conn | None:
        number = len(history.begun) + 1
        delete = number % DELETE_EACH == 0
        began = history.begun[number] = time.monotonic()
        method, body = ("DELETE", b"") if delete else ("PUT", b"%d" % number)
        conn, answer = self._ask(conn, method, history.key, body)
        status = 0 if answer is None else answer.status
        if delete and status == 404:
            status = 0  # a PUT of unknown outcome before it has not come into effect, or will yet
        history.writes.append(Write(number, began, time.monotonic(), status))
        return conn

    def _read(self, history: History, conn: Conn | None) -> Conn | None:
        began = time.monotonic()
        conn, answer = self._ask(conn, "GET", history.key)
        if answer is not None:
            number = int(answer.body) if answer.status == 200 else 0
            now = time.monotonic()
            history.reads.append(Read(number, began, now, answer.status, answer.node))
        return conn


def _within(entries: Sequence[Read | Write], since: float, until: float) -> int:
    return sum(since <= entry.began and entry.ended <= until for entry in entries)
