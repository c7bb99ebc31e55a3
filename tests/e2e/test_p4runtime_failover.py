"""kill -9 of the agent that drives a P4Runtime switch, with a backup beside it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from e2e_bed import Bed, wait_for
from e2e_http import Sink, digest

from prism.errors import PrismError
from prism.lab.files import tail
from prism.telemetry.status import read_status

CLIENTS = 8
SIZE = 3 << 20
PACE = 0.6e6  # octets a second: a download takes 5 s


class Backup:
    """A second agent in the switch's namespace, of lower priority."""

    def __init__(self, bed: Bed) -> None:
        directory = bed.cluster.dir
        text = bed.cluster.node("switch").config.read_text()
        assert "run/switch.sock" in text
        assert "[switch]\n" in text
        text = text.replace("run/switch.sock", "run/backup.sock")
        text = text.replace("[switch]\n", "[switch]\np4runtime_priority = 0\n")
        self.config, self.log = directory / "conf/backup.toml", directory / "log/backup.log"
        self.socket = directory / "run/backup.sock"
        self.config.write_text(text)
        with self.log.open("ab") as log:
            self.process = bed.cluster.popen(
                "switch",
                [sys.executable, "-m", "prism", "switch", "-c", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def status(self) -> dict[str, Any]:
        with contextlib.suppress(PrismError):
            return read_status(self.socket)
        return {}

    def standing(self, wanted: str) -> None:
        found = wait_for(lambda: self.status().get("standing") == wanted, 20)
        assert found, f"not {wanted}: {self.status()}\n{tail(self.log)}"


@contextlib.contextmanager
def backup(bed: Bed) -> Iterator[Backup]:
    found = Backup(bed)
    try:
        yield found
    finally:
        found.process.terminate()
        found.process.wait(20)


def rules(bed: Bed, config: Path) -> dict[str, dict[str, Any]]:
    """The unlocked rules that ``prism-proxy switch rules`` lists, by flow."""
    command = [sys.executable, "-m", "prism", "switch", "rules", "--json", "-c", str(config)]
    done = bed.cluster.exec("switch", command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return {
        rule["flow"]: {name: rule[name] for name in ("owner", "owner_endpoint", "generation")}
        for rule in found
        if rule["state"] == "active"
    }


def download(bed: Bed, path: str, begun: threading.Barrier) -> str:
    with bed.client.open(rcvbuf=16_384) as conn:
        conn.send(conn.start("GET", path))
        head = conn.response_head()
        begun.wait(30)
        assert head.status == 200
        sink = Sink()
        conn.take(int(head.headers["content-length"]), sink, PACE)
        return sink.hash.hexdigest()


def test_a_backup_takes_over(make_bed: Callable[..., Bed]) -> None:
    """Rules stay as they are, no connection is cut, and the backup answers the next handoffs."""
    bed = make_bed(backends=2, switch="p4runtime")
    paths = [bed.key(bed.backends[number % 2], f"failover-{number}") for number in range(CLIENTS)]
    hashes = [digest(bed.store(path, SIZE)) for path in paths]
    small = bed.key("be1", "small")
    wanted = digest(bed.store(small, 1000))
    begun, stop = threading.Barrier(CLIENTS + 1), threading.Event()
    served = 0

    def keep_asking() -> None:
        """New connections, each handed over, before, during and after."""
        nonlocal served
        while not stop.is_set():
            answer = bed.client.once("GET", small)
            assert (answer.status, answer.sha256) == (200, wanted)
            served += 1

    with backup(bed) as second, ThreadPoolExecutor(CLIENTS + 1) as pool:
        second.standing("backup")
        long = [pool.submit(download, bed, path, begun) for path in paths]
        begun.wait(30)
        asking = pool.submit(keep_asking)
        try:
            assert wait_for(lambda: served >= 5, 20)
            before = rules(bed, second.config)
            killed = time.monotonic()
            bed.cluster.kill("switch")
            second.standing("primary")
            took = time.monotonic() - killed
            after = rules(bed, second.config)
            seen = served
            assert wait_for(lambda: served >= seen + 20 or asking.done(), 30)
            print(f"primary after {took:.2f} s, {served - seen} answers in the next")
        finally:
            stop.set()
        asking.result(30)
        assert [future.result(60) for future in long] == hashes
        kept = {flow for flow in before if after.get(flow) == before[flow]}
        assert len(kept) >= CLIENTS  # the others are of short connections
        assert second.status()["counters"]["p4runtime"]["take_overs"] == 1
        handoffs = bed.switch("handoffs")
        answer = bed.client.once("GET", small)
        assert (answer.sha256, answer.node) == (wanted, "be1/0")
        assert bed.switch("handoffs") == handoffs + 1
        assert wait_for(lambda: second.status()["rules"] == 0, 10)
