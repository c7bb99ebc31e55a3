"""The active checks of other nodes: their link, and what they serve, again and again."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable

from prism.config_health import CheckConfig
from prism.health import Health
from prism.http.fetch import FetchError, fetch
from prism.placement import Node

__all__ = ["Checker"]


class Checker:
    """Checks nodes, each in a task of its own, and tells :class:`prism.health.Health`."""

    def __init__(self, health: Health) -> None:
        self._health = health
        self._tasks: dict[tuple[Node, CheckConfig], asyncio.Task[None]] = {}

    def use(self, checks: Iterable[tuple[Node, CheckConfig]]) -> None:
        """Check these nodes so from now on, and no others."""
        wanted = {(node, check) for node, check in checks if node.name != self._health.own}
        for key in self._tasks.keys() - wanted:
            self._tasks.pop(key).cancel()
        self._health.keep_checks({check for _, check in wanted})
        loop = asyncio.get_running_loop()
        for key in wanted - self._tasks.keys():
            self._tasks[key] = loop.create_task(self._check_always(*key))

    async def close(self) -> None:
        """End all checks."""
        tasks = list(self._tasks.values())
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _check_always(self, node: Node, check: CheckConfig) -> None:
        while True:
            # Not all at once: many nodes with many workers may check the same one.
            await asyncio.sleep(check.interval * random.uniform(0.9, 1.1))
            self._health.returned()
            self._health.checked(node.name, check, await self._check(node, check))

    async def _check(self, node: Node, check: CheckConfig) -> str:
        """Why a check fails; empty: it is good."""
        if not self._health.is_linked(node.name):
            return "no link"
        if check.path is None:
            return ""
        try:
            status, _ = await fetch(node.relay_endpoint, check.path.encode(), check.timeout)
        except FetchError as error:
            return str(error)
        return "" if 200 <= status < 400 else f"GET {check.path}: {status}"
