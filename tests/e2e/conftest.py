"""Clusters for the end-to-end tests: one for each module that shares it, or one for a test."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.register_assert_rewrite("e2e_bed")

from e2e_bed import Bed, bed  # noqa: E402
from e2e_selection import brief  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--brief", action="store_true", help="of tests/e2e only what e2e_selection.py says"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("brief", False):  # not known where tests/e2e is not among the arguments
        chosen = set(
            brief([i for i in items if "/e2e/" in str(i.path)], whole=not config.getoption("lf"))
        )
        left = [item for item in items if "/e2e/" in str(item.path) and item not in chosen]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]
    for item in items:
        if "/e2e/" in str(item.path):
            item.add_marker(pytest.mark.e2e)
            if item.get_closest_marker("timeout") is None:
                # By an exception, not by the process's end: clusters must be taken down.
                item.add_marker(pytest.mark.timeout(120, method="signal"))


@pytest.fixture(scope="module")
def shared(request: pytest.FixtureRequest) -> Iterator[Bed]:
    """A cluster for the whole module, made with the module's ``CLUSTER`` options."""
    _need_root()
    with bed(**getattr(request.module, "CLUSTER", {})) as found:
        yield found


@pytest.fixture
def make_bed() -> Iterator[Callable[..., Bed]]:
    """Makes clusters of a test's own."""
    _need_root()
    with contextlib.ExitStack() as stack:

        def make(**options: Any) -> Bed:
            return stack.enter_context(bed(**options))

        yield make


@pytest.fixture(autouse=True)
def _no_faults(request: pytest.FixtureRequest) -> Iterator[None]:
    """On the shared cluster, no test may make a process log an error."""
    if "shared" not in request.fixturenames:
        yield
        return
    found: Bed = request.getfixturevalue("shared")
    before = len(found.no_unexpected_errors())
    yield
    new = found.no_unexpected_errors()[before:]
    if new:
        pytest.fail("errors in the logs:\n" + "\n".join(new))


def _need_root() -> None:
    if os.geteuid() != 0:
        pytest.fail("this test brings a cluster up in network namespaces and needs root")
