"""One client's connection on the node that owns it: peek at a head, decide, serve, repeat.

The connection never reads a request before it is decided who answers it: it *peeks*, so that a
connection that moves takes its whole receive queue along, and the new owner has the request to
read as if it had been sent there (`docs/protocol.md`). Only :meth:`Connection.serve` consumes.

    IDLE --head complete--> DECIDING --serve()--> SERVING --response done--> IDLE
                               |
                               +------detach()--> MOVED (the handoff owns the socket now;
                                                  attach() brings it back to DECIDING)
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Callable, Coroutine
from time import monotonic, monotonic_ns
from typing import Any, Protocol

from prism.flow import Endpoint, Flow
from prism.http.body import ClientGone, IncompleteBody
from prism.http.exchange import App, Exchange, Rest, error_response
from prism.http.head import HttpError, Limits, RequestHead, parse_head
from prism.http.origin import Origin, origin_of, take_origin
from prism.http.response import send_all
from prism.http.stream import Stream, has_unread, linger_close
from prism.placement import Node
from prism.policy.decision import AUTO, Decision

__all__ = ["Connection", "Dispatcher", "State"]

log = logging.getLogger(__name__)

INLINE_REQUESTS = 16  # pipelined requests answered in one go before other connections get a turn
LINGER_OCTETS = 16 << 20  # read and thrown away after an error response, so that it arrives
LINGER_SECONDS = 5.0


class Dispatcher(Protocol):
    """Decides what happens to each request, and hears when a connection has ended."""

    limits: Limits
    body_timeout: float
    server: bytes

    def dispatch(self, connection: Connection, head: RequestHead) -> None:
        """Call ``connection.serve(app)``, or ``connection.detach()`` and hand it over."""

    def bad_request(self, connection: Connection, error: HttpError) -> None:
        """A head was refused; the connection answers it by itself and closes."""

    def answered(self, connection: Connection, exchange: Exchange) -> None:
        """A response is out."""

    def closed(self, connection: Connection) -> None:
        """The connection's socket is closed, or is another node's now; forget it."""


class State(enum.Enum):
    """What the connection is doing."""

    IDLE = "idle"
    DECIDING = "deciding"
    SERVING = "serving"
    MOVED = "moved"
    CLOSED = "closed"


class Connection:
    """A client's connection, from accept or takeover until it is closed or handed over.

    Attributes:
        flow: the connection as the client sees it.
        key: the flow, packed: the switch's and the nodes' key.
        local: the socket's own address and port.
        place: the node the current request belongs to, where that is another one.
        decision: what the policy says about the current request.
        gen: generation of its rule; 0 while there is none.
        hops: owners the current request has passed without being answered.
        cut: the client ended the connection inside a request body.
        asked_ns: CLOCK_MONOTONIC when the current request's head was complete, nanoseconds.
        shortcut: called before a request is read. It may answer it from the socket, and says
            whether there was more input then; ``None``: it has done nothing.
    """

    __slots__ = (
        "_active_at",
        "_exchange",
        "_reading",
        "_starting",
        "_task",
        "_turns",
        "asked_ns",
        "cut",
        "decision",
        "dispatcher",
        "flow",
        "gen",
        "head",
        "hops",
        "key",
        "local",
        "place",
        "relayed_in",
        "requests",
        "shortcut",
        "state",
        "stream",
    )

    def __init__(
        self,
        stream: Stream,
        flow: Flow,
        key: bytes,
        dispatcher: Dispatcher,
        *,
        local: Endpoint,
        gen: int = 0,
        hops: int = 0,
        relayed_in: bool = False,
    ) -> None:
        self.stream = stream
        self.flow = flow
        self.key = key
        self.dispatcher = dispatcher
        self.local = local
        self.place: Node | None = None
        self.decision: Decision = AUTO
        self.gen = gen
        self.hops = hops
        self.relayed_in = relayed_in
        self.state = State.IDLE
        self.head: RequestHead | None = None
        self.requests = 0
        self.cut = False
        self.asked_ns = 0
        self.shortcut: Callable[[Connection], bool | None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._exchange: Exchange | None = None  # being answered
        self._turns = 0
        self._reading = False
        self._starting = False
        self._active_at = monotonic()

    def start(self) -> None:
        """Look for a request now, and wait for one if there is none."""
        # A connection that was taken over has its request with it: answer that first.
        self._starting = True
        try:
            self._on_readable()
        finally:
            self._starting = False
        if self.state is State.IDLE and not self._reading:
            self._reading = True
            self.stream.on_readable(self._on_readable)

    def _stop_reading(self) -> None:
        self._reading = False
        self.stream.off_readable()

    # -- waiting for a head ---------------------------------------------------------------

    def _on_readable(self) -> None:
        if self._exchange is not None:
            self._look_at_client()
            return
        self._turns = 0
        self._next_request()

    def _look_at_client(self) -> None:
        """The client stirs while its answer is waited for.

        A reset ends the wait. An end of file does not: a client may have finished sending and wait
        for its answer. Octets of a next request have to wait.
        """
        try:
            self.stream.peek(1)
        except BlockingIOError:
            return
        except OSError:
            self.close(abort=True)
            return
        self._stop_reading()

    def _next_request(self) -> None:
        """Peek, parse, dispatch; again while requests are there and answered at once."""
        while self.state is State.IDLE:
            more = self._try_shortcut()
            if more is False:
                return
            if more:
                continue
            try:
                data = self.stream.peek()
            except BlockingIOError:
                return
            except OSError:
                self.close()
                return
            if not data:
                self.close()
                return
            try:
                head = parse_head(data, self.dispatcher.limits)
            except HttpError as error:
                self._refuse(error)
                return
            if head is None:
                if self.stream.eof:
                    self.close()
                    return
                if self.head is None and self.asked_ns == 0:
                    self.asked_ns = monotonic_ns()  # the head timeout runs from the first octet
                    self._active_at = monotonic()
                self.stream.await_more(len(data))
                return
            self._turns += 1
            if self._turns > INLINE_REQUESTS:
                self._turns = 0
                self._stop_reading()
                asyncio.get_running_loop().call_soon(self._resume_reading)
                return
            self._decide(head)
            if len(data) == head.length and not self.stream.secure:
                return  # nothing is behind this request; what comes is told by the event loop

    def _try_shortcut(self) -> bool | None:
        """Whether there was more input behind a request that needed no look; ``None``: it does."""
        if self.shortcut is None or self._turns >= INLINE_REQUESTS or self.asked_ns:
            return None
        more = self.shortcut(self)
        if more is not None:
            self._turns += 1
            self.requests += 1
            self._active_at = monotonic()
        return more

    def _resume_reading(self) -> None:
        if self.state is State.IDLE and not self._reading:
            self.start()

    def _decide(self, head: RequestHead) -> None:
        self.stream.reset_lowat()
        self.asked_ns = monotonic_ns()
        self._active_at = monotonic()
        self.head = head
        self.state = State.DECIDING
        self.dispatcher.dispatch(self, head)

    def _refuse(self, error: HttpError) -> None:
        """Answer a head that is no head, and close without the answer being lost."""
        self.dispatcher.bad_request(self, error)
        if self.stream.must_move(False):
            self.decline()
            return
        self.state = State.SERVING
        self._stop_reading()
        self._run(self._say_and_linger(error))

    async def _say_and_linger(self, error: HttpError) -> None:
        self.stream.reset_lowat()
        await error_response(self.stream, error)
        await linger_close(self.stream, LINGER_SECONDS, LINGER_OCTETS)
        self._gone()

    # -- what a dispatcher calls -----------------------------------------------------------

    def serve(self, app: App) -> None:
        """Read the request and have ``app`` answer it, here."""
        head = self.head
        if head is None or self.state is not State.DECIDING:
            raise RuntimeError(f"no request to serve: the connection is {self.state.value}")
        self.state = State.SERVING
        self.requests += 1
        self.hops = 0
        exchange = Exchange(
            head,
            self.stream,
            self._origin(head),
            self.dispatcher.server,
            self.dispatcher.body_timeout,
        )
        exchange.body.limit = self.decision.max_body
        exchange.resume = self._resumed
        self._exchange = exchange
        try:
            self.stream.consume(head.length)
            rest = app.handle(exchange)
        except HttpError as error:
            rest = self._failed(exchange, error)
        except (OSError, ClientGone, ValueError) as error:
            self.cut = isinstance(error, IncompleteBody)
            log.debug("%s: %s", self.flow, error)
            self.close(abort=True)
            return
        except Exception:
            log.exception("a request of %s failed", self.flow.client)
            self.close(abort=True)
            return
        if self.state is State.CLOSED:
            return
        if rest is None and exchange.waits is not None:
            if not self._reading:
                self._reading = True
                self.stream.on_readable(self._on_readable)
        elif rest is None and exchange.settled and exchange.keep_alive:
            self._answered(exchange)
            if not self._reading and not self._starting:  # it was off while a handoff was tried
                asyncio.get_running_loop().call_soon(self._resume_reading)
        else:
            self._stop_reading()
            self._run(self._finish(exchange, rest))

    def _resumed(self, exchange: Exchange, rest: Rest) -> None:
        """What was waited for has come: the response is out, or a coroutine does what is left."""
        if rest is None and exchange.settled and exchange.keep_alive:
            self._answered(exchange)
            if not self._reading:
                self.start()
            elif self.stream.pending:
                self._on_readable()
        else:
            self._stop_reading()
            self._run(self._finish(exchange, rest))

    def _origin(self, head: RequestHead) -> Origin:
        """Where the request came from; a relaying node says it of what it relays."""
        if self.relayed_in:
            origin = take_origin(head)
            if origin is not None:
                return origin
        return origin_of(self.flow, self.stream)

    def _failed(self, exchange: Exchange, error: HttpError) -> Rest:
        if exchange.started:
            self.close(abort=True)
            return None
        return exchange.fail(error)

    def send_rest(self, rest: bytes) -> None:
        """Go on with a response that a shortcut has begun to send."""
        self.state = State.SERVING
        self._stop_reading()
        self._run(self._send_rest(rest))

    async def _send_rest(self, rest: bytes) -> None:
        await send_all(self.stream, rest, self.dispatcher.body_timeout)
        self.state = State.IDLE
        self._active_at = monotonic()
        self._task = None
        self.start()

    def decline(self) -> None:
        """Close without an answer to the request, and without a reset: the client may try again."""
        self.state = State.SERVING
        self._stop_reading()
        self._run(self._linger())

    async def _linger(self) -> None:
        await linger_close(self.stream, LINGER_SECONDS, LINGER_OCTETS)
        self._gone()

    def detach(self) -> Stream:
        """Stop watching the socket: a handoff owns it now."""
        self._stop_reading()
        self.state = State.MOVED
        return self.stream

    def attach(self) -> None:
        """The handoff failed and the socket is alive again: the request is still to be served."""
        self.state = State.DECIDING

    def stay(self) -> None:
        """The handoff failed, and there was no request yet: wait for one as before."""
        self.state = State.IDLE
        self.start()

    def moved(self) -> None:
        """The handoff succeeded and its socket is closed: nothing is left here."""
        self._gone()

    # -- the response ----------------------------------------------------------------------

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self._task = asyncio.get_running_loop().create_task(coroutine)
        self._task.add_done_callback(self._task_done)

    async def _finish(self, exchange: Exchange, rest: Rest) -> None:
        try:
            if rest is not None:
                await rest
        except HttpError as error:
            if exchange.started:
                raise
            failure = exchange.fail(error)
            if failure is not None:
                await failure
        if not exchange.settled:
            await exchange.finish()
        if not exchange.keep_alive:
            self.dispatcher.answered(self, exchange)
            # A TLS client answers our close_notify with its own: a closed socket would reset it.
            done = exchange.body.complete and not self.stream.secure
            if done and not has_unread(self.stream):
                self.close()
            else:
                await linger_close(self.stream, LINGER_SECONDS, LINGER_OCTETS)
                self._gone()
            return
        self._answered(exchange)
        self._task = None
        self.start()

    def _task_done(self, task: asyncio.Task[None]) -> None:
        if self._task is task:
            self._task = None
        if task.cancelled():
            self.close(abort=True)
        elif (error := task.exception()) is not None:
            if isinstance(error, OSError | ClientGone | HttpError):
                self.cut = isinstance(error, IncompleteBody)
                log.debug("%s: %s", self.flow, error)
            else:
                log.error("a request of %s failed", self.flow.client, exc_info=error)
            self.close(abort=True)

    def _answered(self, exchange: Exchange) -> None:
        """The response is out, and the connection waits for its next request."""
        self.dispatcher.answered(self, exchange)
        self._exchange = None
        self.state = State.IDLE
        self.head = None
        self.asked_ns = 0
        self._active_at = monotonic()

    def close(self, *, abort: bool = False) -> None:
        """Close the socket: with a FIN, or with a reset where the response is cut short."""
        if self.state is State.CLOSED:
            return
        exchange, self._exchange = self._exchange, None
        if exchange is not None and exchange.waits is not None:
            exchange.waits.cancel()
        task, self._task = self._task, None
        if task is not None and task is not asyncio.current_task():
            task.cancel()
        if abort:
            self.stream.abort()
        else:
            self.stream.close()
        self._gone()

    def _gone(self) -> None:
        if self.state is not State.CLOSED:
            self.state = State.CLOSED
            self._exchange = None
            self.dispatcher.closed(self)

    def overdue(self, now: float, *, idle: float, head: float) -> bool:
        """Whether it waits for a request for too long; times in seconds, ``now`` monotonic."""
        if self.state is not State.IDLE:
            return False
        return now - self._active_at > (head if self.asked_ns else idle)

    def expire(self) -> None:
        """Close a connection that is :meth:`overdue`: 408 where a head has begun."""
        if self.asked_ns:
            self._refuse(HttpError(408, "the request head did not come in time"))
        elif self.stream.secure:
            self.decline()  # its client has a close_notify to say
        else:
            self.close()
