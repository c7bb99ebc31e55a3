"""Fixtures for all tests: network namespaces that are always cleaned up."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator

import pytest

from prism.lab.netns import Namespace


@pytest.fixture
def make_namespace() -> Iterator[Callable[[str], Namespace]]:
    """Makes namespaces with unique names, removed at the end of the test."""
    if os.geteuid() != 0:
        pytest.fail("this test makes network namespaces and needs root")
    made: list[Namespace] = []
    tag = uuid.uuid4().hex[:6]

    def make(role: str) -> Namespace:
        made.append(Namespace.create(f"pt-{tag}-{role}"))
        return made[-1]

    yield make
    for namespace in made:
        namespace.remove()
