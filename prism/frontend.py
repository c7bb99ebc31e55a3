"""The frontend: owns the service address, accepts connections, and hands them over.

It answers nothing by itself but listings that span all backends and errors. What cannot be handed
over, it relays.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

from prism.apps.refusal import Refusal
from prism.config import Config, FrontendConfig
from prism.errors import ConfigError
from prism.flow import Endpoint, Flow
from prism.handoff.wire import Reason, Refused
from prism.http.connection import Connection
from prism.http.exchange import App
from prism.http.head import RequestHead
from prism.http.stream import PlainStream, Stream
from prism.listener import Listener
from prism.node import Node
from prism.policy.engine import Route
from prism.process import on_reload, serve
from prism.tls.context import TlsContexts
from prism.tls.established import Established
from prism.tls.peer import Peer, pack_peer
from prism.tls.server import TlsServer
from prism.tls.stream import TlsStream

__all__ = ["Frontend", "run"]

log = logging.getLogger(__name__)


class Frontend(Node):
    """One worker of a frontend; an asynchronous context manager that starts and drains it."""

    role = "frontend"
    keeps_rules = False

    def __init__(
        self,
        config: Config,
        worker: int = 0,
        contexts: TlsContexts | None = None,
        *,
        route: Route | None = None,
    ) -> None:
        """Prepare a worker.

        Args:
            config: with a ``[frontend]`` section.
            worker: its number.
            contexts: TLS contexts made before the workers were forked: a session ticket of one
                is good at the others then. By default each makes its own.
            route: a function that is asked about each request before the policy's rules
                (``docs/policy.md``). Backends need the same one.

        Raises:
            ConfigError: something is missing, or a certificate cannot be used.
        """
        if config.frontend is None:
            raise ConfigError("the configuration has no [frontend] section: add one")
        if not config.listen:
            raise ConfigError("nothing to listen on: set cluster.services or frontend.listen")
        super().__init__(config, config.frontend, worker, route)
        self.frontend: FrontendConfig = config.frontend
        self.listing = self.whole_listing()
        self._listeners: list[Listener] = []
        self._retiring: asyncio.Task[None] | None = None
        self._contexts = contexts
        self._tls: TlsServer | None = None

    async def start(self) -> None:
        """Join the cluster, then listen.

        Raises:
            SwitchError: the switch does not answer.
            OSError: an address cannot be bound.
        """
        await super().start()
        tls = self.config.tls
        if tls is not None and tls.listen:
            self._tls = TlsServer(tls, self._contexts)
        self._listen()

    def _listen(self) -> None:
        secure = self.config.tls_listen
        for endpoint in self.config.listen:
            on_accept = self._accepted_tls if endpoint in secure else self._accepted
            self._listeners.append(Listener(endpoint, self.frontend.backlog, on_accept))

    def stop_listening(self) -> None:
        """Accept no more connections; those in the queue are taken still. Idempotent."""
        if self._retiring is not None and self._retiring is not asyncio.current_task():
            self._retiring.cancel()
        self._retiring = None
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()

    def refuse_new(self, seconds: float) -> None:
        """The node is being drained: clients are to connect to another frontend.

        Those that are connected already, and have said nothing yet, come in first.
        """
        self._retiring = asyncio.get_running_loop().create_task(self._retire(seconds))

    async def _retire(self, seconds: float) -> None:
        try:
            await asyncio.gather(*(listener.retire(seconds) for listener in self._listeners))
        except OSError as error:
            log.error("some clients may be reset: %s", error)
        self.stop_listening()

    def accept_again(self) -> None:
        """The node stays after all."""
        if self._retiring is not None:
            self._retiring.cancel()
            self._retiring = None
        try:
            for listener in self._listeners:
                listener.resume()
            if not self._listeners:
                self._listen()
        except OSError as error:
            self.stop_listening()
            log.error("cannot listen again, restart %s: %s", self.name, error)

    def busy(self) -> bool:
        """Whether there are connections that would be cut if the node ended now."""
        handshakes = self._tls is not None and len(self._tls)
        return super().busy() or bool(handshakes) or self._retiring is not None

    async def drain(self) -> None:
        """Accept no more, and let open requests end."""
        self.stop_listening()
        await super().drain()

    async def close(self) -> None:
        """Close everything at once."""
        self.stop_listening()
        if self._tls is not None:
            self._tls.close()
        await super().close()

    def status(self) -> dict[str, Any]:
        """The status document."""
        document = super().status()
        if self._tls is not None:
            document["tls"] = self._tls.snapshot()
        return document

    def _has_room(self, sock: socket.socket) -> bool:
        """Count a new connection; one too many is closed."""
        self.metrics.accepted += 1
        handshakes = len(self._tls) if self._tls is not None else 0
        if len(self.connections) + handshakes < self.frontend.max_connections:
            return True
        self.metrics.connections_refused += 1
        sock.close()
        return False

    def _accepted(self, sock: socket.socket, client: Endpoint, service: Endpoint) -> None:
        if self._has_room(sock):
            flow = Flow(client, service)
            self._begin(PlainStream(sock, flow), flow)

    def _accepted_tls(self, sock: socket.socket, client: Endpoint, service: Endpoint) -> None:
        if self._tls is None or not self._has_room(sock):
            return
        flow = Flow(client, service)

        def done(sock: socket.socket, established: Established | None) -> None:
            if established is not None:
                self._begin(_tls_stream(sock, established, flow), flow)

        self._tls.accept(sock, flow, done)

    def _begin(self, stream: Stream, flow: Flow) -> None:
        key = flow.pack()
        connection = Connection(stream, flow, key, self, local=flow.service)
        self.connections[key] = connection
        connection.start()

    def use(self, serving: Any) -> None:
        """Go by these settings from now on."""
        super().use(serving)
        self.frontend = serving

    def reload_certificates(self) -> bool:
        """Use certificate files that have changed; whether there were any."""
        return self._tls is not None and self._tls.reload()

    # -- requests --------------------------------------------------------------------------

    def local_app(self, connection: Connection, head: RequestHead) -> App | None:
        """Listings of objects are made here; all else is the backends'."""
        if self.config.cluster.serves != "objects":
            return None
        if head.key == b"*":
            return Refusal(501, "OPTIONS is not supported for the server as a whole")
        if not head.key and head.method in (b"GET", b"HEAD"):
            return self.listing
        return None

    def serve_here(self, connection: Connection, why: str) -> None:
        """Relay, unless the configuration forbids it."""
        if self.frontend.relay:
            super().serve_here(connection, why)
        else:
            self.metrics.relays.add(why)
            connection.serve(Refusal(503, "the connection cannot be handed over now"))

    def on_offer(self, offer: Any, reply: Any) -> None:
        """Frontends take no connections over."""
        reply(Refused(Reason.OTHER, f"{self.name} is a frontend"))

    async def restore_rules(self) -> None:
        """A frontend's own connections have no rules."""


def _tls_stream(sock: socket.socket, established: Established, flow: Flow) -> TlsStream:
    """The stream of a finished handshake."""
    identity = established.client_identity
    peer = Peer(established.server_name)
    if identity is not None:
        peer = Peer(established.server_name, identity.subject, identity.names, identity.fingerprint)
    stream = TlsStream(sock, established.tls, flow, facts=pack_peer(peer))
    stream.watch()  # as the handshake did
    return stream


async def run_node(node: Node, stop: asyncio.Event) -> None:
    """Serve until told to stop, or drained, then let open requests end."""
    on_reload(node.reload)
    async with node:
        waiting = [asyncio.ensure_future(each.wait()) for each in (stop, node.draining.done)]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waiting:
                each.cancel()


def run(config: Config) -> int:
    """Run a frontend with all its workers; returns the exit code.

    Raises:
        ConfigError: the configuration has no frontend.
    """
    if config.frontend is None:
        raise ConfigError("the configuration has no [frontend] section: add one")
    frontend = config.frontend
    contexts = TlsContexts(config.tls) if config.tls is not None and config.tls.listen else None

    async def main(worker: int, stop: asyncio.Event) -> None:
        await run_node(Frontend(config, worker, contexts), stop)

    names = [frontend.worker_name(worker) for worker in range(frontend.workers)]
    return serve(main, names, config.telemetry, patience=frontend.drain_timeout + 5)
