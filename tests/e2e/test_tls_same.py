"""The tests of plain HTTP once more, over TLS: what a client can do it can do over HTTPS."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import test_bodies
import test_lock
import test_memory
from e2e_bed import Bed
from e2e_tls import tls_bed, tls_client
from openssl_peer import TLS1_2
from test_basic import (  # noqa: F401 - they run here with this module's fixtures
    test_put_get_head_list_range_delete,
    test_several_workers,
    test_two_thousand_requests_are_answered_by_their_owners,
)
from test_bodies import (  # noqa: F401
    test_body_that_stalls,
    test_clients_that_disappear_in_mid_handoff,
    test_expect_continue,
    test_half_close,
    test_half_close_in_mid_request,
    test_handoff_in_mid_body,
    test_large_head,
    test_one_octet_at_a_time,
    test_pipelined_requests_for_different_owners,
    test_slow_readers,
    test_upload_of_256_mebibytes,
    test_uploads,
)
from test_broken_http import (  # noqa: F401
    test_broken_request_on_a_connection_that_moved,
    test_broken_requests,
)
from test_crash import (  # noqa: F401
    pool,
    test_agent_dies,
    test_backend_dies,
    test_backend_dies_with_a_frozen_connection,
    test_frontend_dies,
    test_kill_in_mid_handoff,
)
from test_fallback import (  # noqa: F401
    test_backend_that_cannot_import,
    test_backend_that_is_full,
    test_backend_that_never_answers,
    test_handoffs_forbidden,
    test_rule_table_full,
    test_switch_that_does_not_answer,
)


@pytest.fixture(scope="module")
def shared() -> Iterator[Bed]:
    """A cluster that speaks TLS, and its clients too."""
    with tls_bed(**test_bodies.CLUSTER) as found:
        yield found


@pytest.fixture
def make_bed() -> Iterator[Callable[..., Bed]]:
    with contextlib.ExitStack() as stack:

        def make(**options: Any) -> Bed:
            return stack.enter_context(tls_bed(**options))

        yield make


def test_idle_connections(make_bed: Callable[..., Bed], monkeypatch: pytest.MonkeyPatch) -> None:
    """As without TLS; fewer of them, since each has a handshake to make."""
    monkeypatch.setattr(test_memory, "COUNT", 400)
    monkeypatch.setattr(test_memory, "WARM", 100)
    test_memory.test_idle_connections(make_bed)


def test_hold_against_drop(make_bed: Callable[..., Bed]) -> None:
    """Held as without TLS. A drop costs less here, but it does cost.

    Behind a handshake the service acknowledges late, so the request's head is under way, too, when
    the body is lost, and the client sends a probe after two round trips (RFC 8985, 7.2) instead
    of waiting for its time-out. TLS 1.2, because an acknowledgement of TLS 1.3's tickets would meet
    the lock, and be counted, in place of the body.
    """

    def make(**options: Any) -> Bed:
        found = make_bed(**options)
        found.client = tls_client(found, TLS1_2)
        return found

    held, dropped = test_lock.compare(make)
    assert dropped > held + 0.001
