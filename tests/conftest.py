"""Fixtures for all tests: network namespaces that are always cleaned up."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator

import hypothesis
import pytest

from prism.lab.netns import Namespace

# On a busy machine an example may take any time; pytest's own time-outs bound the tests.
hypothesis.settings.register_profile("prism", deadline=None)
hypothesis.settings.load_profile("prism")

# scripts/test names its run, so that it can remove what an interrupted run leaves behind.
RUN = os.environ.get("PRISM_TEST_TAG", "")


@pytest.fixture
def lab_name() -> Iterator[str]:
    """A unique name for a lab or topology, which is taken down at the end of the test."""
    from prism.lab.cluster import Cluster

    if os.geteuid() != 0:
        pytest.fail("this test makes network namespaces and needs root")
    name = f"pt-{RUN}{uuid.uuid4().hex[:6]}"
    yield name
    Cluster.remove(name)


@pytest.fixture
def make_namespace() -> Iterator[Callable[[str], Namespace]]:
    """Makes namespaces with unique names, removed at the end of the test."""
    if os.geteuid() != 0:
        pytest.fail("this test makes network namespaces and needs root")
    made: list[Namespace] = []
    tag = RUN + uuid.uuid4().hex[:6]

    def make(role: str) -> Namespace:
        made.append(Namespace.create(f"pt-{tag}-{role}"))
        return made[-1]

    yield make
    for namespace in made:
        namespace.remove()
