"""Which event loop unit tests run on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop

BOTH_LOOPS = frozenset(
    (
        "test_http_body.py",
        "test_objectstore.py",
        "test_relay.py",
        "test_tls_handshake.py",
        "test_tls_server.py",
    )
)
"""Files whose tests run on both loops, which differ in when they notice input and errors."""


def pytest_asyncio_loop_factories(
    item: pytest.Item,
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Tells pytest-asyncio; sockets and files behave the same, timing and order do not."""
    if item.path.name in BOTH_LOOPS:
        return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}
