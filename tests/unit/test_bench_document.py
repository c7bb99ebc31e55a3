"""Results become a page: goals, tables and plots between the marks, all else as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
from suite.document import refresh
from suite.pairing import Figure
from suite.results import Result, save
from suite.throughput import COLUMNS

from prism.errors import PrismError

MARKS = "top\n<!-- goals: begin -->\nold\n<!-- goals: end -->\nmiddle\n"
MARKS += "<!-- results: begin -->\nold\n<!-- results: end -->\nbottom\n"
FACTS = {"prism": "abc", "kernel": "6.1", "cores": "2", "load before": "0.1 0.2 0.3"}


def row(what: str, ratio: float) -> tuple[object, ...]:
    figure = Figure(ratio, ratio - 0.1, ratio + 0.1)
    cells = {"what": what, "system": "prism", "of nginx": figure}
    return tuple(cells.get(column, 1.0) for column in COLUMNS)


def test_a_page_is_refreshed(tmp_path: Path) -> None:
    page, results = tmp_path / "docs/performance.md", tmp_path / "results"
    page.parent.mkdir()
    page.write_text(MARKS)
    with pytest.raises(PrismError, match="no results yet"):
        refresh(results, page, ["get"])
    result = Result("get", "GET by object size", COLUMNS)
    sizes = (("1 MiB", 4.1), ("16 MiB", 3.95), ("64 KiB", 3.4))
    result.rows += [row(f"GET {size} TCP", ratio) for size, ratio in sizes]
    save(result, FACTS, results)
    (results / "get-tcp.svg").write_text("<svg/>")
    (results / "get.md").write_text((results / "get.md").read_text() + "![x](get-tcp.svg)\n")
    for _ in range(2):  # again is the same
        assert refresh(results, page, ["put", "get"]) == [
            page,
            page.parent / "performance/get-tcp.svg",
        ]
        text = page.read_text()
        assert "| GET 1 MiB and up, TCP | 3.95x | 3.90x | yes |" in text
        assert "| GET 64 KiB, TCP | 3.40x | 3.50x | no |" in text
        assert "| PUT 1 MiB and up, TLS | - | 3.90x | - |" in text
        assert "![x](performance/get-tcp.svg)" in text
        assert "old" not in text
        assert (text[:4], text[-7:]) == ("top\n", "bottom\n")
    page.write_text("no marks")
    with pytest.raises(PrismError, match="no marks"):
        refresh(results, page, ["get"])
