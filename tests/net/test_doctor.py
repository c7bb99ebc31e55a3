"""What doctor finds is what is there; what it cannot have it says, and it leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import prism.switch
from prism.doctor import CHECKS, Check, Missing, examine

pytestmark = pytest.mark.net
DOCTOR = [sys.executable, "-m", "prism", "doctor"]


def mounts() -> list[str]:
    return Path("/proc/self/mountinfo").read_text().splitlines()


def test_everything_required_is_here_and_nothing_is_left_behind() -> None:
    before, threads = len(mounts()), threading.active_count()
    findings = examine()
    assert [finding.name for finding in findings] == [check.name for check in CHECKS]
    assert [f"{f.name}: {f.detail}" for f in findings if f.required and not f.ok] == []
    assert len(mounts()) == before
    assert threading.active_count() == threads
    assert "prism-doctor" not in Path("/proc/net/dev").read_text()


def test_json_for_machines() -> None:
    done = subprocess.run(
        [*DOCTOR, "--json"], capture_output=True, text=True, timeout=60, check=False
    )
    document = json.loads(done.stdout)
    assert (done.returncode, document["ok"]) == (0, True)
    entry = next(entry for entry in document["checks"] if entry["name"] == "TCP_REPAIR")
    assert entry["ok"]
    assert entry["required"]


def test_without_privileges_it_says_what_is_missing_and_exits_with_1() -> None:
    bare = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--", *DOCTOR, "--json"]
    done = subprocess.run(bare, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    document = json.loads(done.stdout)
    missing = {entry["name"]: entry for entry in document["checks"] if not entry["ok"]}
    assert not document["ok"]
    assert {"CAP_NET_ADMIN", "CAP_BPF", "TCP_REPAIR", "classifier", "TUN"} <= missing.keys()
    assert all(entry["cost"] and entry["remedy"] for entry in missing.values())


def test_a_probe_that_fails_or_hangs_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prism.doctor._PATIENCE", 0.05)

    def fail() -> str:
        raise Missing("gone fishing")

    release = threading.Event()
    checks = [
        Check("fails", fail, "all", "a cost", "a remedy"),
        Check("hangs", lambda: str(release.wait(5)), "all", "time", "wait", required=False),
    ]
    first, second = examine(checks)
    release.set()
    assert (first.ok, first.detail, first.cost, first.remedy) == (
        False,
        "gone fishing",
        "a cost",
        "a remedy",
    )
    assert (second.ok, second.detail) == (False, "did not come to an end")


def test_it_says_whether_the_packages_for_p4runtime_are_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (check,) = (check for check in CHECKS if check.name == "P4Runtime packages")
    (finding,) = examine([check])
    assert finding.ok, finding.detail
    assert "p4runtime " in finding.detail
    monkeypatch.delitem(sys.modules, "prism.switch.p4runtime_session", raising=False)
    monkeypatch.delattr(prism.switch, "p4runtime_session", raising=False)
    monkeypatch.setitem(sys.modules, "grpc", None)
    (finding,) = examine([check])
    assert not finding.ok
    assert not finding.required
    assert "grpc" in finding.detail
    assert finding.remedy == "pip install 'prism-proxy[p4]'"
