"""The demo: it succeeds, cleans up, and would say so if something were wrong."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from prism.lab.demo import SIZES, Answer, Handoff, Object, problems
from prism.lab.topology import namespaces_of

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize(("option", "scheme"), [((), "http:"), (("--tls",), "https:")])
def test_the_demo_is_all_good(lab_name: str, option: tuple[str, ...], scheme: str) -> None:
    command = [sys.executable, "-m", "prism.lab.demo", *option, lab_name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All good." in done.stdout
    assert f"the service is {scheme}//" in done.stdout
    assert done.stdout.count(" hands over to ") == len(SIZES)
    assert done.stdout.count("activate") == len(SIZES)
    assert namespaces_of(lab_name) == []


@pytest.fixture
def good(tmp_path: Path) -> tuple[list[Object], list[Answer], list[Handoff]]:
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(b"abc")
    copy.write_bytes(b"abc")
    answers = [
        Answer("PUT", 201, 1, 4242, 0.1, "be1/0"),
        Answer("GET", 200, 0, 4242, 0.1, "be1/0"),
    ]
    return [Object("/k", "be1", source, copy, 3)], answers, [Handoff("fe1/0", "be1/0", 4242, ())]


def test_nothing_wrong_is_no_problem(good: tuple) -> None:
    assert problems(*good) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda o, a, m: o[0].copy.write_bytes(b"abd"), "the copy differs"),
        (lambda o, a, m: o[0].copy.unlink(), "the copy differs"),
        (lambda o, a, m: a.pop(), "1 answers to 2 requests"),
        (lambda o, a, m: a.__setitem__(1, replace(a[1], status=404)), "404 from be1/0"),
        (lambda o, a, m: m.clear(), "0 handoffs instead of 1"),
    ],
)
def test_what_is_wrong_is_told(good: tuple, change, told: str) -> None:
    change(*good)
    assert told in "; ".join(problems(*good))


def test_a_second_connection_or_another_node_is_told(good: tuple) -> None:
    objects, _, moves = good
    answers = [
        Answer("PUT", 201, 1, 4242, 0.1, "be1/0"),
        Answer("GET", 200, 1, 4243, 0.1, "be2/0"),
    ]
    assert problems(objects, answers, moves) == [
        "GET /k: 200 from be2/0",
        "2 connections instead of one",
    ]
