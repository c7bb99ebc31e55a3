"""What a backend can serve instead of its object store: an ASGI application or another server."""

from __future__ import annotations

from typing import Any, Protocol

from prism.config_nodes import BackendConfig
from prism.errors import ConfigError
from prism.http.exchange import Exchange, Rest

__all__ = ["Hosted", "hosted"]


class Hosted(Protocol):
    """An app (:class:`prism.http.exchange.App`) with a life of its own."""

    async def start(self) -> None:
        """Make ready, before the backend joins the cluster.

        Raises:
            ConfigError: it cannot be loaded, or does not start; the message says why.
        """

    def handle(self, exchange: Exchange) -> Rest:
        """Answer a request."""

    def stop(self) -> None:
        """The backend is about to stop: end what would go on for ever (WebSockets, tunnels)."""

    async def close(self) -> None:
        """End everything, in bounded time."""


def hosted(backend: BackendConfig, app: Any = None) -> Hosted | None:
    """What the configuration names, or an ASGI application; ``None``: the object store.

    Raises:
        ConfigError: it needs something that is not installed.
    """
    if app is None and backend.upstream is not None:
        from prism.apps.server import UnmodifiedServer  # noqa: PLC0415

        return UnmodifiedServer(backend)
    if app is None and backend.app is None:
        return None
    try:
        from prism.apps.asgi import AsgiApp  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            f"backend.app needs {error.name}: pip install 'prism-proxy[asgi]'"
        ) from None
    return AsgiApp(app or backend.app, backend.app_dir)
