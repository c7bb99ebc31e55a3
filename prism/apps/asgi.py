"""ASGI 3 applications on connections that arrive by handoff (asgi.readthedocs.io, 3.0).

There is one HTTP server, :mod:`prism.http`: a node looks at each request's head before anybody
consumes it, and a connection's next request may be another node's. So a request comes to the
application by its exchange (:mod:`prism.apps.asgi_http`), and only a WebSocket, whose connection
stays for good, is given to uvicorn's protocol (:mod:`prism.apps.asgi_websocket`). Loading the
application and its lifespan are uvicorn's too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from pathlib import Path
from typing import Any, Final

import uvicorn
from uvicorn.importer import ImportFromStringError, import_from_string
from uvicorn.lifespan.on import LifespanOn

from prism.apps.asgi_http import Cycle, scope_of
from prism.apps.asgi_websocket import WebSockets, wants_websocket
from prism.errors import ConfigError
from prism.http.exchange import Exchange, Rest

__all__ = ["AsgiApp"]

log = logging.getLogger(__name__)

_STARTUP: Final = 60.0  # seconds an application may take to start
_SHUTDOWN: Final = 5.0  # seconds for what it still does when told to stop, and to stop


class AsgiApp:
    """One worker's application; see :class:`prism.apps.hosted.Hosted`.

    Args:
        app: the application, or its name: ``module:attribute``.
        directory: to import it from, before the other places.
    """

    def __init__(self, app: Any, directory: Path) -> None:
        self._given = None if isinstance(app, str) else app
        self._name = app if isinstance(app, str) else getattr(app, "__name__", type(app).__name__)
        self._directory = directory
        self._lifespan: LifespanOn | None = None
        self._app: Any = None
        self._websockets: WebSockets | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Import the application and have it start up (the lifespan protocol).

        Raises:
            ConfigError: it cannot be imported, or its start fails; the message says why.
        """
        config = uvicorn.Config(
            self._load(),
            ws="websockets-sansio",
            http="httptools",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
        )
        config.load()
        self._app = config.loaded_app
        self._lifespan = lifespan = LifespanOn(config)
        try:
            async with asyncio.timeout(_STARTUP):
                await lifespan.startup()
        except TimeoutError:
            text = f"the application {self._name} has not started within {_STARTUP:g} s"
            raise ConfigError(text) from None
        if lifespan.should_exit:
            raise ConfigError(f"the application {self._name} does not start; the log says why")
        self._websockets = WebSockets(config, lifespan.state)

    def _load(self) -> Any:
        if self._given is not None:
            return self._given
        directory = str(self._directory)
        if directory not in sys.path:
            sys.path.insert(0, directory)
        try:
            return import_from_string(self._name)
        except ImportFromStringError as error:
            text = f"backend.app: {error} (looked in {directory} first: backend.app_dir)"
            raise ConfigError(text) from None
        except Exception as error:
            log.exception("importing the application failed")
            what = f"{type(error).__name__}: {error}"
            raise ConfigError(f"backend.app: importing {self._name} failed: {what}") from None

    def handle(self, exchange: Exchange) -> Rest:
        """Give a request to the application; see :class:`prism.http.exchange.App`."""
        lifespan, websockets = self._lifespan, self._websockets
        if lifespan is None or websockets is None:
            raise RuntimeError("the application was not started")
        if wants_websocket(exchange.head):
            return websockets.serve(exchange)
        cycle = Cycle(exchange)
        scope = scope_of(exchange, lifespan.state)
        task = asyncio.get_running_loop().create_task(cycle.run(self._app, scope))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return cycle.answered()

    def stop(self) -> None:
        """Tell WebSockets' clients that the service restarts (close code 1012)."""
        if self._websockets is not None:
            self._websockets.shutdown()

    async def close(self) -> None:
        """Let the application end what it does, then have it shut down; in bounded time."""
        self.stop()
        await self._end_tasks()
        lifespan, self._lifespan = self._lifespan, None
        if lifespan is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SHUTDOWN):
                await lifespan.shutdown()
                return
        log.warning("the application did not shut down within %g s", _SHUTDOWN)

    async def _end_tasks(self) -> None:
        tasks = set(self._tasks)
        if self._websockets is not None:
            tasks |= self._websockets.tasks
        if not tasks:
            return
        _, busy = await asyncio.wait(tasks, timeout=_SHUTDOWN)
        for task in busy:
            task.cancel()
        if busy:
            log.warning("%d requests were cut short in the application", len(busy))
            await asyncio.wait(busy, timeout=_SHUTDOWN)
