"""What frontends and backends have in common: connections, handoffs in both directions, a lease.

A node owns connections. For each request it asks :meth:`Node.home` where the request belongs: it
serves it here, hands the connection over, or, when that is not possible, relays the request.
Frontends add listening sockets, backends an application and connections that are taken over.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from typing import Any

from prism._version import __version__
from prism.apps.listing import Listing
from prism.apps.refusal import Refusal
from prism.apps.relay import Relay
from prism.apps.replicalisting import ReplicaListing
from prism.apps.replicarelay import ReplicaRelay
from prism.config import BackendConfig, Config, FrontendConfig
from prism.draining import Draining, LastAnswer, Teller
from prism.embedding import Embedded
from prism.errors import ConfigError, PrismError
from prism.flow import Endpoint
from prism.handoff.channel import Channel
from prism.handoff.connection import node_of
from prism.handoff.machine import Event, SourceState
from prism.handoff.outgoing import Outgoing, Way
from prism.http.connection import Connection, State
from prism.http.exchange import App, Exchange
from prism.http.head import HttpError, Limits, RequestHead
from prism.peers import Peers
from prism.placement import Replicated
from prism.placing import Placing
from prism.policy.engine import Policy, Route
from prism.reconcile import Reconciler
from prism.relaying import Relaying
from prism.reload import reload_node
from prism.replicas import Replicas
from prism.switch.client import SwitchClient
from prism.telemetry.logging import event, tracing
from prism.telemetry.metrics import Metrics
from prism.telemetry.status import StatusServer
from prism.tls.identity import Identity
from prism.tls.stream import TlsStream
from prism.weighing import Weigher

__all__ = ["Node"]

log = logging.getLogger(__name__)

_COOKIES = (1 << 63) - 1
LINKS_PATIENCE = 1.0  # seconds
# Refusals that speak against the node; what others say, they say of the connection.
_ELSEWHERE = ("timed-out", "link-lost", "link-down", "refused-draining")
_UNFIT = ("refused-busy", "refused-import-failed")
SWEEP = 1.0  # seconds between two looks for connections that wait too long


class Node(Embedded):
    """One worker process of a frontend or a backend.

    Attributes:
        connections: by packed flow, those whose socket is this process's.
        moving: handoffs under way, by packed flow.
    """

    role = "node"
    keeps_rules = False
    listing: Listing | ReplicaListing

    def __init__(
        self,
        config: Config,
        serving: FrontendConfig | BackendConfig,
        worker: int,
        route: Route | None = None,
    ) -> None:
        self.config = config
        self.serving = serving
        self.worker = worker
        self.name = serving.worker_name(worker)
        self.limits = Limits(serving.max_head_size, serving.max_header_fields)
        self.body_timeout = serving.body_timeout
        self.deadline = serving.handoff_deadline_ms / 1000
        self.trace = tracing()
        software = f"prism/{__version__}"
        # The traced node's name in its answers: which node served is then visible to the client.
        self.server = f"{software} ({self.name})".encode() if self.trace else software.encode()
        self.metrics = Metrics()
        self.connections: dict[bytes, Connection] = {}
        self.moving: dict[bytes, Outgoing] = {}
        cluster = config.cluster
        self.switch = SwitchClient(
            self.name,
            cluster.control,
            cluster.control_key(),
            Endpoint(serving.address, 0),
            lease=cluster.lease,
        )
        identity = Identity(serving.name, config.identity_files(serving))
        self.channel = Channel(self.name, cluster.channel_key(), self.on_offer, identity)
        self.peers = Peers(config, self.channel, serving.name, self.metrics)
        self.placing = Placing(self)
        self.teller = Teller(self)
        self.draining = Draining(self)
        self.identity = identity
        placement = self.peers.placement
        self.replicas: Replicas | None = None
        if isinstance(placement, Replicated):
            self.replicas = Replicas(config, placement, identity, serving.name)
        self.route = route
        self.policy = Policy(config.policy, route)
        self.weigher = Weigher(
            serving, self.channel, self.metrics, self.peers.loads, lambda: self.owned
        )
        self.reconciler = Reconciler(self)
        self.relay = Relay(
            connect_timeout=getattr(serving, "connect_timeout", 3.0), forwarding="origin"
        )
        self.peers.on_draining = self._forget_relays
        self.reloads = {"applied": 0, "refused": 0}
        self.stopping = False
        self._cookie = secrets.randbits(63)  # a restarted node must not repeat its last life's
        actions = {"drain": self.draining.begin, "undrain": self._undrain}
        self._status = StatusServer(self.status, self.metrics, actions)
        self._sweeper: asyncio.Task[None] | None = None

    # -- life ------------------------------------------------------------------------------

    async def start(self) -> None:
        """Join the cluster: lease, channel, links, status.

        Raises:
            SwitchError: the switch does not answer.
            OSError: an address cannot be bound.
        """
        self.switch.on_query = self.alive
        self.switch.on_incarnation = self.reconciler.table_lost
        self.switch.on_lapse = self.reconciler.lapsed
        await self.switch.start()
        await self.channel.listen(self.serving.handoff_endpoint(self.worker))
        self.peers.connect()
        if self.replicas is not None:
            self.replicas.start()
        self.reconciler.start()
        self._sweeper = asyncio.get_running_loop().create_task(self._sweep())

    def whole_listing(self) -> Listing | ReplicaListing:
        """What lists the objects of all backends."""
        nodes = self.peers.placement.nodes
        return Listing(nodes) if self.replicas is None else ReplicaListing(self.replicas, nodes)

    async def publish(self) -> None:
        """Answer on the status socket: the sign that the node is ready.

        A cluster that starts has its nodes wait for each other here, so that the first requests
        are handed over already; but a node that is down must not keep the others waiting.
        """
        await self.peers.wait_connected(LINKS_PATIENCE)
        telemetry = self.config.telemetry
        await self._status.start(
            telemetry.status_path(self.worker), telemetry.metrics_endpoint(self.worker)
        )
        log.info("%s %s is ready", self.role, self.name)

    async def drain(self) -> None:
        """Let open requests end, ``drain_timeout`` seconds at most; idle connections close."""
        self.stopping = True
        deadline = time.monotonic() + self.serving.drain_timeout
        while time.monotonic() < deadline:
            for connection in list(self.connections.values()):
                if connection.state is State.IDLE:
                    connection.close()
            if not self.connections and not self.moving:
                return
            await asyncio.sleep(0.02)
        log.warning("%d connections are cut off by the stop", len(self.connections))

    async def retire(self, seconds: float = 30.0) -> None:
        """Have other nodes take the connections, within ``seconds``; then the node may end."""
        self.draining.begin(seconds)
        await self.draining.done.wait()

    def _undrain(self, _: float) -> None:
        self.draining.undo()

    async def close(self) -> None:
        """Close everything at once; the lease ends."""
        self.stopping = True
        self.draining.close()
        self.teller.close()
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in list(self.connections.values()):
            connection.close(abort=connection.state is not State.IDLE)
        self.weigher.close()
        await self.peers.close()
        await self.reconciler.close()
        self.relay.close()
        if self.replicas is not None:
            await self.replicas.close()
        await self.channel.close()
        await self.switch.close()
        await self._status.close()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP)
            idle, head = self.serving.keepalive_timeout, self.serving.head_timeout
            now = time.monotonic()
            overdue = [c for c in self.connections.values() if c.overdue(now, idle=idle, head=head)]
            for connection in overdue:
                self.metrics.heads_timed_out += bool(connection.asked_ns)
                connection.expire()

    def use(self, serving: Any) -> None:
        """Go by these settings of the node's own section from now on."""
        self.serving = serving
        self.weigher.use(serving)

    def reload_certificates(self) -> bool:
        """Use certificate files that have changed; whether there were any."""
        return False

    def reload(self) -> None:
        """Read the configuration file again and apply it; one that is no good changes nothing."""
        try:
            changed = reload_node(self)
        except ConfigError as error:
            self.reloads["refused"] += 1
            log.error("the new configuration is refused, the old one stays:\n%s", error)
            return
        self.reloads["applied"] += 1
        log.info("configuration reloaded; changed: %s", ", ".join(changed) or "nothing")

    def status(self) -> dict[str, Any]:
        """The status document."""
        self.metrics.connections = len(self.connections)
        self.metrics.handoffs_pending = len(self.moving)
        document = {
            "name": self.name,
            "role": self.role,
            "pid": os.getpid(),
            "version": __version__,
            "counters": self.metrics.snapshot(),
            "channel": self.channel.counters.as_dict(),
            "peers": self.peers.status(),
            "switch_reachable": self.switch.reachable,
            "reloads": dict(self.reloads),
            "adaptive": self.weigher.status(),
            "relaying": self.relay.status(),
            "draining": self.draining.active,
            "health": self.peers.health.snapshot(),
            "loads": self.peers.loads.snapshot(),
        }
        return document if self.replicas is None else document | self.replicas.status()

    # -- requests --------------------------------------------------------------------------

    def dispatch(self, connection: Connection, head: RequestHead) -> None:
        """Serve a request here, hand the connection over, or relay the request."""
        connection.place = None
        decision = connection.decision = self.placing.decide(connection, head)
        if decision.answer is not None:
            self.serve(connection, decision.answer)
            return
        if decision.edits is not None:
            head.headers = decision.edits.apply(head.headers)
        app = self.local_app(connection, head)
        if app is None:
            try:
                place = self.placing.place_for(connection, head)
            except PrismError as error:
                self.serve(connection, Refusal(503, str(error)))
                return
            if place.name == self.serving.name:
                app = self.own_app(connection, head)
        if app is not None:
            self.serve(connection, app)
            return
        connection.place = place
        name, link = self.peers.link(place, connection.key)
        why = "link-down" if link is None else self.placing.why_not(connection, place)
        if why or link is None:
            self.serve_here(connection, why)
            return
        self.hand_over(connection, link, name)

    def local_app(self, connection: Connection, head: RequestHead) -> App | None:
        """What answers this request on this node wherever it is placed; ``None``: nothing does."""
        raise NotImplementedError

    def own_app(self, connection: Connection, head: RequestHead) -> App:
        """What answers a request that is placed here."""
        raise NotImplementedError

    def _forget_relays(self, worker: str) -> None:
        """A node is going: let it not be the one to close the connections kept for relaying."""
        place = self.peers.pools.all.node(node_of(worker))
        if place is not None:
            self.relay.close_idle(place.relay_endpoint)

    def serve_here(self, connection: Connection, why: str) -> None:
        """Relay a request whose connection stays here."""
        place = connection.place
        if place is None:
            raise RuntimeError("a request was kept before it was placed")
        self.metrics.relays.add(why)
        if self.replicas is not None:
            self.serve(connection, ReplicaRelay(self.replicas, self.relay, place))
            return
        head = connection.head
        if why in _ELSEWHERE and head is not None:
            other = self.placing.another_place(connection, head, frozenset((place.name,)))
            if other is not None and other.name == self.serving.name:
                connection.place = None
                self.serve(connection, self.own_app(connection, head))
                return
            place = connection.place = other or place
        self.serve(connection, Relaying(self, connection, place))

    def serve(self, connection: Connection, app: App) -> None:
        """Have a request answered on this node."""
        connection.serve(LastAnswer(app) if self.draining.active else app)

    def bad_request(self, connection: Connection, error: HttpError) -> None:
        """Count a request that is none."""
        self.metrics.bad_requests.add(error.status)

    def answered(self, connection: Connection, exchange: Exchange) -> None:
        """Count a response."""
        self.metrics.requests.add(exchange.head.method.decode("ascii"), exchange.status)
        self.metrics.bytes_out += exchange.sent
        self.weigher.answered(connection, exchange)

    def closed(self, connection: Connection) -> None:
        """Forget a connection."""
        if self.connections.get(connection.key) is connection:
            del self.connections[connection.key]
            self.teller.changed()
        stream = connection.stream
        alert = stream.alert if isinstance(stream, TlsStream) else None
        if alert is not None:
            self.metrics.tls_alerts.add(alert)
        elif connection.cut:
            self.metrics.bodies_cut += 1
            ended = isinstance(stream, TlsStream) and stream.truncated
            how = ", and without a close_notify" if ended else ""
            log.info("%s: the connection ended inside a request body%s", connection.flow, how)

    def alive(self, flow: bytes, gen: int) -> bool:
        """Whether this node has the connection of a flow (the agent asks)."""
        return flow in self.connections or flow in self.moving

    def in_transit(self, flow: bytes) -> bool:
        """Whether a handoff of this flow is under way."""
        return flow in self.moving

    @property
    def owned(self) -> int:
        """How many clients' connections this node has."""
        return len(self.connections)

    def busy(self) -> bool:
        """Whether there are connections that would be cut if the node ended now."""
        return bool(self.connections or self.moving)

    def refuse_new(self, seconds: float) -> None:
        """The node is being drained, within ``seconds``: take no new connections."""

    def accept_again(self) -> None:
        """The node stays after all."""

    # -- handoffs out ----------------------------------------------------------------------

    def hand_over(self, connection: Connection, way: Way, target: str) -> None:
        """Begin a handoff."""
        self._cookie = self._cookie + 1 & _COOKIES
        handoff = Outgoing(self, connection, way, target, self._cookie)
        self.moving[connection.key] = handoff
        self.peers.loads.opened(node_of(target))
        handoff.start()

    def handed_over(self, handoff: Outgoing) -> None:
        """Another node has the connection."""
        self.metrics.handoffs_out += 1
        self.weigher.handed_over(handoff.connection)
        self.peers.answered(handoff.target)
        self.peers.loads.handed_over(handoff.target)
        self.peers.health.succeeded(node_of(handoff.target))

    def taken_back(self, handoff: Outgoing) -> None:
        """A handoff went unanswered, and was taken back."""
        self.metrics.take_backs += 1
        self.peers.pause(handoff.target)

    def reconcile(self, flow: bytes) -> None:
        """Look after a rule whose state is unknown."""
        self.reconciler.check(flow)

    def finished(self, handoff: Outgoing) -> None:
        """A handoff has ended, one way or the other."""
        connection = handoff.connection
        self.moving.pop(connection.key, None)
        self.peers.loads.closed(node_of(handoff.target))
        machine = handoff.machine
        if machine.state is SourceState.KEPT_WITH_RULE:
            self.rule_changed(connection, handoff.gen)
        elif machine.state is SourceState.KEPT:
            self.rule_changed(connection, 0)
        # A target that has taken the connection after all was only slow to say so.
        if machine.why in (Event.LINK_LOST, Event.TIMED_OUT) and (
            machine.state is not SourceState.GONE
        ):
            self.peers.pause(handoff.target)
            self.peers.health.failed(node_of(handoff.target), f"handoff: {handoff.why}")
        elif handoff.why in _UNFIT:
            self.peers.health.failed(node_of(handoff.target), f"handoff: {handoff.why}")
        if self.trace:
            event(
                "handoff-out",
                flow=connection.flow,
                gen=handoff.gen,
                target=handoff.target,
                outcome=machine.state.name.lower(),
                why=handoff.why if machine.why is not None else None,
                steps=handoff.steps,
            )

    async def restore_rules(self) -> None:
        """Add this node's rules again, after the switch has lost its table."""
        raise NotImplementedError

    def rule_changed(self, connection: Connection, gen: int) -> None:
        """The connection stayed; its rule has this generation now (0: it has none)."""
        connection.gen = gen

    # -- handoffs in -----------------------------------------------------------------------

    def on_offer(self, offer: Any, reply: Any) -> None:
        """Another node offers a connection."""
        raise NotImplementedError
