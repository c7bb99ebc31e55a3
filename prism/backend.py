"""The backend: takes connections over, serves its share of the objects, hands the rest on."""

from __future__ import annotations

import asyncio
import logging
import socket
from time import monotonic_ns
from typing import TYPE_CHECKING, Any

from prism._ext.http_scan import answer_ready
from prism.apps.hosted import Hosted, hosted
from prism.apps.objectstore import ObjectStore
from prism.apps.refusal import Refusal
from prism.config import BackendConfig, Config
from prism.errors import ConfigError, ProtocolError
from prism.flow import Endpoint, Flow
from prism.frontend import run_node
from prism.handoff.incoming import Incoming, Replier
from prism.handoff.outgoing import Outgoing
from prism.handoff.wire import Offer, Reason, Refused
from prism.http.connection import Connection, State
from prism.http.exchange import App
from prism.http.head import RequestHead
from prism.http.response import date_line
from prism.http.stream import PlainStream
from prism.listener import Listener
from prism.monitor.choose import monitor_for
from prism.node import Node
from prism.ownership import Ownership
from prism.policy.engine import Route
from prism.process import serve
from prism.renewal import Mirror
from prism.settling import settle
from prism.telemetry.logging import event
from prism.tls.offload import Mode
from prism.tls.offload import check as check_offload

if TYPE_CHECKING:
    from prism.apps.replicated import ReplicatedStore

__all__ = ["Backend", "run"]

log = logging.getLogger(__name__)


class Backend(Node):
    """One worker of a backend; an asynchronous context manager that starts and drains it.

    Attributes:
        hosted: what answers instead of the object store; ``None``: the store does.
        ownership: the rules that name this worker as the owner.
        taking: handoffs to this worker under way, by packed flow.
        relayed_in: how many of the connections are other nodes', for what they relay.
    """

    role = "backend"
    keeps_rules = True

    def __init__(
        self,
        config: Config,
        worker: int = 0,
        *,
        app: Any = None,
        route: Route | None = None,
    ) -> None:
        """Prepare a worker.

        Args:
            config: with a ``[backend]`` section.
            worker: its number.
            app: an ASGI application to serve, instead of what the section names.
            route: a function that is asked about each request before the policy's rules; the
                same one as the frontends'.

        Raises:
            ConfigError: something is missing.
        """
        if config.backend is None:
            raise ConfigError("the configuration has no [backend] section: add one")
        super().__init__(config, config.backend, worker, route)
        self.backend: BackendConfig = config.backend
        self.taking: dict[bytes, Incoming] = {}
        self.relayed_in = 0
        self.offload: Mode = config.tls.offload if config.tls is not None else "auto"
        self._mirror = Mirror(self)
        self.monitor = monitor_for(config.backend)
        self.ownership = Ownership(
            self.switch,
            self.monitor,
            self.metrics,
            stopping=lambda: self.stopping,
            unsure=self.reconciler.check,
        )
        self.hosted: Hosted | None = hosted(self.backend, app)
        self.replicated: ReplicatedStore | None = None
        self.store = self._open_store() if self.hosted is None else None
        self.listing = self.whole_listing()
        self._listener: Listener | None = None
        self._server_line = b"Server: %b\r\n" % self.server

    def _open_store(self) -> ObjectStore:
        if self.replicas is not None:
            from prism.apps.replicated import ReplicatedStore  # noqa: PLC0415

            self.replicated = ReplicatedStore(
                self.config,
                self.backend,
                self.replicas,
                identity=self.identity,
                relay=self.relay,
                load=lambda: len(self.connections),
            )
            self.replicated.measure(self.metrics)
            return self.replicated
        return ObjectStore(self.backend.store, max_size=self.backend.max_object_size)

    async def start(self) -> None:
        """Join the cluster, then take connections over and accept relayed ones.

        Raises:
            SwitchError: the switch does not answer.
            OSError: an address cannot be bound, the store cannot be used.
            ConfigError: the kernel shall seal TLS records, and cannot; the application cannot be
                loaded, or does not start.
        """
        if self.config.tls is not None:
            check_offload(self.offload)  # now, since it may take long at the first time
        if self.hosted is not None:
            await self.hosted.start()
        await self.monitor.start()
        await super().start()
        if self.replicated is not None:
            await self.replicated.start()
        endpoint = Endpoint(self.backend.address, self.backend.relay_port)
        self._listener = Listener(endpoint, self.backend.backlog, self._accepted)

    async def drain(self) -> None:
        """Let open requests end; long-lived ones are told to."""
        if self.hosted is not None:
            self.hosted.stop()
        if self.replicated is not None:
            await self.replicated.leave(self.config.cluster.lease)
        await super().drain()

    def refuse_new(self, seconds: float) -> None:
        """As :meth:`Node.refuse_new`; other replicas answer from now on."""
        super().refuse_new(seconds)
        if self.replicated is not None:
            self.replicated.begin_leaving(self.config.cluster.lease)

    def accept_again(self) -> None:
        """As :meth:`Node.accept_again`."""
        super().accept_again()
        if self.replicated is not None:
            self.replicated.stay()

    async def close(self) -> None:
        """Close everything at once."""
        if self._listener is not None:
            self._listener.close()
        if self.replicated is not None:
            await self.replicated.stop()
        await super().close()
        await self.monitor.close()
        if self.hosted is not None:
            await self.hosted.close()
        if self.store is not None:
            self.store.close()

    def status(self) -> dict[str, Any]:
        """The status document."""
        own: dict[str, Any] = {"rules_owned": len(self.ownership), "taking": len(self.taking)}
        if self.replicated is not None:
            own["replication"] = self.replicated.status()
        return super().status() | own | {"monitor": self.monitor.name}

    def use(self, serving: Any) -> None:
        """Go by these settings from now on."""
        super().use(serving)
        self.backend = serving

    # -- relayed connections ---------------------------------------------------------------

    def _accepted(self, sock: socket.socket, client: Endpoint, local: Endpoint) -> None:
        """A node relays to this one."""
        # Counted apart: what is not taken over because this worker is full has to be relayed.
        if self.relayed_in >= self.backend.max_connections:
            self.metrics.connections_refused += 1
            sock.close()
            return
        self.relayed_in += 1
        flow = Flow(client, local)
        key = flow.pack()
        connection = Connection(
            PlainStream(sock, flow), flow, key, self, local=local, relayed_in=True
        )
        connection.shortcut = self._answer_ready
        self.connections[key] = connection
        connection.start()

    def _answer_ready(self, connection: Connection) -> bool | None:
        """What another node relays is nearly always a GET of an object that was asked for before.

        It is answered in one call then: no decision is to be made about it any more.
        """
        store, stream = self.store, connection.stream
        if store is None or self.replicas is not None or self.draining.active or stream.pending:
            return None
        try:
            done = answer_ready(
                stream.fileno(), store.ready.entries, self.limits, self._server_line, date_line()
            )
        except OSError:
            connection.close(abort=True)
            return False
        if done is None:
            return None
        octets, rest, more = done
        self.metrics.requests.add("GET", 200)
        self.metrics.bytes_out += octets
        if rest:
            connection.send_rest(rest)
        return more

    def closed(self, connection: Connection) -> None:
        """Forget a connection."""
        if connection.relayed_in and connection.key in self.connections:
            self.relayed_in -= 1
        super().closed(connection)

    @property
    def owned(self) -> int:
        """How many clients' connections this node has; what others relay is theirs."""
        return len(self.connections) - self.relayed_in

    def busy(self) -> bool:
        """Whether there are connections that would be cut if the node ended now."""
        busy = (c for c in self.connections.values() if c.relayed_in and c.state is not State.IDLE)
        return bool(self.owned or self.moving or self.taking or any(busy))

    # -- requests --------------------------------------------------------------------------

    def dispatch(self, connection: Connection, head: RequestHead) -> None:
        """As every node; a connection that has to be given up by the kernel first is waited for."""
        decide = super().dispatch
        if connection.stream.unsettled and self.local_app(connection, head) is None:
            settle(connection, lambda: decide(connection, head))
        else:
            decide(connection, head)

    def local_app(self, connection: Connection, head: RequestHead) -> App | None:
        """What answers wherever it is placed: what another node relays, and listings."""
        lists = self.hosted is None and not head.key and head.method in (b"GET", b"HEAD")
        if connection.relayed_in or lists or head.key == b"*":
            return self.own_app(connection, head)
        return None

    def own_app(self, connection: Connection, head: RequestHead) -> App:
        """What answers a request that belongs to this node."""
        if self.store is None:
            return self.hosted or Refusal(503, "this backend serves nothing")
        if not connection.relayed_in and not head.key and head.method in (b"GET", b"HEAD"):
            return self.listing
        return self.store

    def serve(self, connection: Connection, app: App) -> None:
        """Answer a request, on another socket if this one cannot."""
        head = connection.head
        if head is not None and connection.stream.must_move(
            head.has_body or head.upgrade is not None
        ):
            # Not at once: another handoff of this connection may just be coming to its end.
            asyncio.get_running_loop().call_soon(self._renew, connection)
        else:
            super().serve(connection, app)

    def _renew(self, connection: Connection) -> None:
        """Move a connection to another socket of this worker's; then it asks for its answer again.

        Where that fails, nothing can be said on this socket but good-bye.
        """
        if connection.state is not State.DECIDING:
            return
        connection.place = None
        why = self.placing.why_not_anywhere(connection)
        if why:
            self.serve_here(connection, why)
        else:
            self.hand_over(connection, self._mirror, self.name)

    def serve_here(self, connection: Connection, why: str) -> None:
        """Relay a request whose connection stays here, unless this socket cannot answer it."""
        if connection.place is None:
            log.info("%s is closed unanswered, it cannot be renewed: %s", connection.flow, why)
            connection.decline()
        else:
            super().serve_here(connection, why)

    # -- handoffs in -----------------------------------------------------------------------

    def on_offer(self, offer: Offer, reply: Any) -> None:
        """Take a connection over, unless this worker is stopping, full, or has it already."""
        if self.stopping or self.draining.active:
            reply(Refused(Reason.DRAINING, f"{self.name} is stopping"))
            return
        owned = self.owned + len(self.taking)
        if owned >= self.backend.max_connections:
            reply(Refused(Reason.BUSY, f"{self.name} has {owned} connections"))
            return
        moving = self.moving.get(offer.flow)
        if moving is not None:
            moving.superseded(offer.gen)
        if offer.flow in self.taking or offer.flow in self.connections:
            reply(Refused(Reason.OTHER, f"{self.name} has this flow already"))
            return
        self.take_over(offer, reply)

    def take_over(self, offer: Offer, reply: Replier) -> None:
        """Begin to take a connection over."""
        try:
            handoff = Incoming(self, offer, reply)
        except ProtocolError as error:
            reply(Refused(Reason.OTHER, str(error)))
            return
        self.taking[offer.flow] = handoff
        handoff.start()

    def in_transit(self, flow: bytes) -> bool:
        """Whether a handoff of this flow is under way, in either direction."""
        return super().in_transit(flow) or flow in self.taking

    def import_endpoint(self, flow: Flow) -> Endpoint | None:
        """The own address of the service's family, and the first port to try."""
        address = self.backend.address_for(flow.service.host)
        return Endpoint(address, self.backend.takeover_port) if address else None

    def taken_over(self, handoff: Incoming, stream: PlainStream) -> None:
        """A connection is this worker's now: serve it."""
        if handoff.peer == self.name:
            self.metrics.renewals += 1
        else:
            self.metrics.handoffs_in += 1
        offer = handoff.offer
        key = offer.flow
        connection = Connection(
            stream,
            handoff.flow,
            key,
            self,
            local=handoff.local,
            gen=handoff.gen,
            hops=offer.hops + 1,
        )
        self.connections[key] = connection
        self.teller.changed()
        self.ownership.begin(key, handoff.gen, handoff.local, handoff.flow.client, stream.fileno())
        connection.start()
        if self.trace:
            handoff.steps["served"] = monotonic_ns() - offer.arrived_ns

    def settled(self, handoff: Incoming) -> None:
        """A handoff to this worker has ended, one way or the other."""
        self.taking.pop(handoff.offer.flow, None)
        if self.trace:
            event(
                "handoff-in",
                flow=handoff.flow,
                gen=handoff.gen,
                source=handoff.peer,
                local=handoff.local,
                steps=handoff.steps,
            )

    # -- handoffs out, and the end of connections ------------------------------------------

    def handed_over(self, handoff: Outgoing) -> None:
        """Another node has the connection: its rule is not this worker's any more."""
        connection = handoff.connection
        if handoff.target == self.name:  # the rule is the new socket's
            self.monitor.forget(connection.local, connection.flow.client)
            return
        super().handed_over(handoff)
        self.ownership.end(connection.key, connection.flow.client)

    def rule_changed(self, connection: Connection, gen: int) -> None:
        """The rule has another generation, or is gone."""
        super().rule_changed(connection, gen)
        self.ownership.changed(connection.key, gen)
        if gen:
            return
        # Without a rule the client's packets go to the frontend: nobody can serve it here.
        connection.close(abort=True)

    def alive(self, flow: bytes, gen: int) -> bool:
        """Whether the connection of a flow exists; one in TIME_WAIT does not count."""
        if self.in_transit(flow):
            return True
        known = flow in self.ownership.rules
        if self.ownership.alive(flow):
            return True
        connection = self.connections.get(flow)
        if known and connection is not None:
            connection.close(abort=True)
        return False

    async def restore_rules(self) -> None:
        """Add the rules of all connections again, after the switch has lost its table."""

        def added(flow: bytes, gen: int) -> None:
            connection = self.connections.get(flow)
            if connection is not None:
                connection.gen = gen

        await self.ownership.restore(added)


def run(config: Config) -> int:
    """Run a backend with all its workers; returns the exit code.

    Raises:
        ConfigError: the configuration has no backend.
    """
    if config.backend is None:
        raise ConfigError("the configuration has no [backend] section: add one")
    backend = config.backend

    async def main(worker: int, stop: asyncio.Event) -> None:
        await run_node(Backend(config, worker), stop)

    names = [backend.worker_name(worker) for worker in range(backend.workers)]
    return serve(main, names, config.telemetry, patience=backend.drain_timeout + 5)
