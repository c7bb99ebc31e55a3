"""An unmodified HTTP server on the backend's host answers what the backend takes over."""

from __future__ import annotations

from prism.apps.relay import Relay
from prism.config_nodes import BackendConfig
from prism.errors import ConfigError
from prism.http.exchange import Exchange, Rest

__all__ = ["UnmodifiedServer"]


class UnmodifiedServer:
    """Relays every request to one server; see :class:`prism.apps.hosted.Hosted`.

    Raises:
        ConfigError: the configuration names none.
    """

    def __init__(self, backend: BackendConfig) -> None:
        if backend.upstream is None:
            raise ConfigError("backend.upstream is not set: name the server")
        self._relay = Relay(
            connect_timeout=backend.upstream_connect_timeout,
            response_timeout=backend.upstream_timeout,
            max_connections=backend.upstream_connections,
            forwarding=backend.upstream_forwarded,
            proxy_protocol=backend.upstream_proxy_protocol,
        )
        self._app = self._relay.to(backend.upstream)

    async def start(self) -> None:
        """Nothing to do: the server may come up later than the backend."""

    def handle(self, exchange: Exchange) -> Rest:
        """Relay a request."""
        return self._app.handle(exchange)

    def stop(self) -> None:
        """Idle connections and tunnels end."""
        self._relay.close()
        self._relay.end_tunnels()

    async def close(self) -> None:
        """Close what is open."""
        self.stop()
