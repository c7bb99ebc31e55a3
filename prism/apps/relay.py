"""The relay: passes an exchange on to an upstream server and its response back.

For requests that are not handed over. Bodies are streamed both ways, never held; whoever reads
slowly slows the other side down. Field names and values are passed as they are, except what
speaks of one connection only (RFC 9110, section 7.6.1); framing is made anew on both sides.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any, Final

from prism.apps.forwarding import Forwarding, request_head, wants_upgrade
from prism.apps.passing import SPLICE_FROM, can_splice, splice, tunnel
from prism.apps.pool import Pool
from prism.apps.proxy_protocol import proxy_header
from prism.apps.quick import Follower, Quick, Waiting
from prism.apps.upstream import (
    Address,
    ResponseHead,
    Upstream,
    UpstreamError,
    UpstreamFailed,
)
from prism.http.body import ClientGone
from prism.http.exchange import Exchange, Headers, Rest
from prism.http.head import HttpError
from prism.http.response import send_all, status_line
from prism.http.stream import Stream

__all__ = ["Relay", "RelayTo"]

_IDEMPOTENT = frozenset(b"GET HEAD PUT DELETE OPTIONS PROPFIND SEARCH REPORT".split())
_CONTINUE_WAIT: Final = 1.0  # seconds; after that the body is sent unasked (RFC 9110, 10.1.1)
_MAX_INTERIM = 16


class Relay:
    """Relays exchanges to any number of upstream servers, with a pool of connections to each.

    Args:
        connect_timeout: seconds.
        response_timeout: seconds for the first octet of a response after the request is sent,
            and between two pieces of its body.
        max_connections: to each upstream server.
        forwarding: how the server hears of the client.
        proxy_protocol: begin each connection with a PROXY header, and share it between no clients.

    Attributes:
        waiting: requests that went the quick way.
    """

    def __init__(
        self,
        *,
        connect_timeout: float = 2.0,
        response_timeout: float = 60.0,
        max_connections: int = 128,
        forwarding: Forwarding = "x-forwarded",
        proxy_protocol: bool = False,
    ) -> None:
        self._connect_timeout = connect_timeout
        self._timeout = response_timeout
        self._max_connections = max_connections
        self._forwarding: Forwarding = forwarding
        self._proxy_protocol = proxy_protocol
        self._tunnels: set[Upstream] = set()
        self._pools: dict[Address, Pool] = {}
        self._apps: dict[Address, RelayTo] = {}
        self.waiting = Waiting(response_timeout)

    def to(self, address: Address) -> RelayTo:
        """An app that relays everything to one upstream server."""
        app = self._apps.get(address)
        if app is None:
            app = self._apps[address] = RelayTo(self, address)
        return app

    def status(self) -> dict[str, int]:
        """How many connections there are, in use and kept for the next request."""
        sizes = [pool.sizes for pool in self._pools.values()]
        return {"busy": sum(busy for busy, _ in sizes), "idle": sum(idle for _, idle in sizes)}

    def close(self) -> None:
        """Closes all idle connections."""
        self.waiting.close()
        for pool in self._pools.values():
            pool.close_idle()

    def close_idle(self, address: Address) -> None:
        """Closes the idle connections to one upstream server."""
        if address in self._pools:
            self._pools[address].close_idle()

    def end_tunnels(self) -> None:
        """Closes the connections that have been switched to other protocols."""
        for upstream in list(self._tunnels):
            upstream.stream.close()

    async def relay(self, exchange: Exchange, address: Address, extra: Headers = ()) -> None:
        """Relays one exchange.

        Args:
            exchange: not started yet.
            address: the upstream server: a TCP endpoint or the path of a unix socket.
            extra: fields to add to the request.

        Raises:
            HttpError: nothing was sent to the client yet: 502, 503 or 504 for the upstream's
                failures; 4xx for what is wrong with the request's body.
            ClientGone: the client is lost, or the response was cut off upstream. The stream is
                to be aborted.
        """
        pool = self._pool(address)
        request = request_head(exchange, address, self._forwarding, extra)
        if self._proxy_protocol:
            request = proxy_header(exchange.origin) + request
        upstream = await pool.acquire()
        attempt = self._attempt(exchange, upstream, request)
        await self.see_through(exchange, pool, upstream, request, attempt)

    def quick(
        self, exchange: Exchange, address: Address, follower: Follower | None = None
    ) -> Quick | None:
        """The quick way for an exchange, where there is one now: ``ask`` is to be called next."""
        if self._proxy_protocol or not Quick.suits(exchange):
            return None
        pool = self._pool(address)
        upstream = pool.take()
        if upstream is None:
            return None
        request = request_head(exchange, address, self._forwarding)
        return Quick(self, exchange, pool, upstream, request, follower=follower)

    def _pool(self, address: Address) -> Pool:
        pool = self._pools.get(address)
        if pool is None:
            pool = self._pools[address] = Pool(
                address, limit=self._max_connections, connect_timeout=self._connect_timeout
            )
        return pool

    async def see_through(
        self,
        exchange: Exchange,
        pool: Pool,
        upstream: Upstream,
        request: bytes,
        attempt: Coroutine[Any, Any, None],
    ) -> None:
        """Brings an attempt to its end, and makes another one if its connection was stale.

        Args:
            exchange: as in :meth:`relay`, which tells what is raised, too.
            pool: gets ``upstream`` back.
            upstream: the attempt's.
            request: the head to repeat.
            attempt: raises UpstreamError.
        """
        try:
            await attempt
            return
        except UpstreamError as error:
            if not _can_repeat(exchange, upstream, error):
                raise _failure(exchange, error) from None
        finally:
            pool.release(upstream)
        upstream = await pool.acquire(fresh=True)
        try:
            await self._attempt(exchange, upstream, request)
        except UpstreamError as error:
            raise _failure(exchange, error) from None
        finally:
            pool.release(upstream)

    async def _attempt(self, exchange: Exchange, upstream: Upstream, request: bytes) -> None:
        """Sends the request and passes the response on; raises UpstreamError."""
        try:
            await self._exchange(exchange, upstream, request)
        finally:
            upstream.reusable &= not self._proxy_protocol

    async def _exchange(self, exchange: Exchange, upstream: Upstream, request: bytes) -> None:
        if exchange.body.complete:
            await self.ask_and_respond(exchange, upstream, request)
            return
        await upstream.send(request, self._timeout)
        asked = asyncio.Event() if exchange.body.awaited else None
        sender = asyncio.create_task(self._send_body(exchange, upstream, asked))
        try:
            await self._respond(exchange, upstream, sender, asked)
        except (UpstreamError, HttpError):
            # The client's failure ends the upstream connection, and is the one to tell.
            if sender.done() and not sender.cancelled() and (cause := sender.exception()):
                raise cause from None
            raise
        finally:
            sender.cancel()
            await asyncio.wait((sender,))
            if sender.cancelled() or sender.exception() is not None or not sender.result():
                upstream.reusable = False

    async def ask_and_respond(self, exchange: Exchange, upstream: Upstream, request: bytes) -> None:
        """An attempt for a request without a body, of which ``request`` is still to be sent."""
        await upstream.send(request, self._timeout)
        await self.watch_response(exchange, upstream)

    async def watch_response(self, exchange: Exchange, upstream: Upstream) -> None:
        """An attempt whose request was sent: passes the response on, to its end."""
        watch = _Watch(exchange.stream, upstream)
        try:
            await self._respond(exchange, upstream, None, None, watch)
        except UpstreamError:
            if watch.gone:
                raise ClientGone("the client went away before the response") from None
            raise
        finally:
            watch.end()

    async def _send_body(
        self, exchange: Exchange, upstream: Upstream, asked: asyncio.Event | None
    ) -> bool:
        """Passes the request's body on; an upstream that stops reading may still answer.

        Returns:
            Whether the upstream took all of it.
        """
        body = exchange.body
        try:
            if asked is not None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_CONTINUE_WAIT):
                        await asked.wait()
            chunked = body.length is None
            while piece := await body.read():
                data = b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece
                await upstream.send(data, self._timeout)
            if chunked:
                await upstream.send(b"0\r\n\r\n", self._timeout)
        except UpstreamError:
            return False
        except (ClientGone, HttpError):
            upstream.stream.abort()  # not a close: the request must not look complete
            raise
        return True

    async def _respond(
        self,
        exchange: Exchange,
        upstream: Upstream,
        sender: asyncio.Task[bool] | None,
        asked: asyncio.Event | None,
        watch: _Watch | None = None,
    ) -> None:
        head = await self._final_head(exchange, upstream, sender, asked)
        if watch is not None and head.status == 101:
            watch.end()  # a tunnel reads for itself
        exchange.status = head.status
        if head.status == 101:
            await self._switch(exchange, upstream, head)
            return
        bodiless = exchange.bodiless
        upstream.begin_body(head, bodiless=bodiless)
        try:
            exchange.start(head.status, head.headers, head.length)
        except ValueError:
            raise UpstreamError("the upstream's response has malformed fields") from None
        await self._pass_body(exchange, upstream)
        delimited = bodiless or head.chunked or head.length is not None
        upstream.reusable = head.keep_alive and delimited and upstream.drained

    async def pass_rest(self, exchange: Exchange, upstream: Upstream, rest: Rest) -> None:
        """An attempt whose response has begun to go out: the rest, of a length that is known."""
        if rest is not None:
            await rest
        await self._pass_body(exchange, upstream)
        upstream.reusable = upstream.drained

    async def _pass_body(self, exchange: Exchange, upstream: Upstream) -> None:
        while True:
            try:
                piece = await upstream.read_body(self._timeout)
            except TimeoutError:
                raise UpstreamError("the upstream's response stands still") from None
            if not piece:
                break
            rest = exchange.write_now(piece)
            if rest is not None:
                await rest
            if upstream.left >= SPLICE_FROM and can_splice(exchange.stream, upstream.stream):
                await self._splice(exchange, upstream)
        await exchange.end()

    async def _splice(self, exchange: Exchange, upstream: Upstream) -> None:
        """Pass the rest of a response's body on without copying it."""
        due = upstream.left
        try:
            passed = await splice(upstream.stream, exchange.stream, due, self._timeout)
        except TimeoutError:
            raise UpstreamError("the upstream's response stands still") from None
        except OSError as error:
            raise UpstreamError(f"the upstream's connection broke: {error}") from None
        upstream.passed(passed)
        exchange.passed(passed)

    async def _switch(self, exchange: Exchange, upstream: Upstream, head: ResponseHead) -> None:
        """Both sides have agreed on another protocol: pass its octets on, until they end."""
        if not wants_upgrade(exchange.head):
            raise UpstreamError("the upstream switched protocols without being asked to")
        lines = [*head.headers, (b"Connection", b"Upgrade"), (b"Upgrade", head.upgrade)]
        fields = b"".join(b"%b: %b\r\n" % field for field in lines)
        exchange.give_away()
        self._tunnels.add(upstream)
        try:
            response = status_line(101) + fields + b"\r\n"
            await send_all(exchange.stream, response, exchange.timeout)
            await tunnel(exchange.stream, upstream.stream, upstream.take_rest())
        finally:
            self._tunnels.discard(upstream)

    async def _final_head(
        self,
        exchange: Exchange,
        upstream: Upstream,
        sender: asyncio.Task[bool] | None,
        asked: asyncio.Event | None,
    ) -> ResponseHead:
        """The response's head; interim ones are passed on before it."""
        interim = 0
        while interim <= _MAX_INTERIM:
            try:
                head = await upstream.read_head(self._timeout)
            except TimeoutError:
                if sender is not None and not sender.done():
                    continue  # the request is still on its way; its sender has its own time-outs
                raise UpstreamFailed(504, "the upstream took too long to respond") from None
            if head.status >= 200 or head.status == 101:
                return head
            interim += 1
            if head.status == 100:
                if asked is not None:
                    asked.set()  # reading the body then asks the client for it
            elif (rest := exchange.inform(head.status, head.headers)) is not None:
                await rest
        raise UpstreamError(f"the upstream sent over {_MAX_INTERIM} interim responses")


class RelayTo:
    """The app that relays to one upstream server."""

    def __init__(self, relay: Relay, address: Address) -> None:
        self._relay = relay
        self._address = address

    def handle(self, exchange: Exchange) -> Rest:
        """Answers one request; see :class:`prism.http.exchange.App`."""
        quick = self._relay.quick(exchange, self._address)
        return self._relay.relay(exchange, self._address) if quick is None else quick.ask()


class _Watch:
    """Looks out for the client's disappearance while only the upstream is waited for.

    A reset ends the upstream connection. An end of file does not: a client may have finished
    sending and wait for its answer. Octets of a next request end the watch.
    """

    __slots__ = ("_client", "_upstream", "gone")

    def __init__(self, client: Stream, upstream: Upstream) -> None:
        self._client = client
        self._upstream = upstream
        self.gone = False
        client.on_readable(self._look)

    def _look(self) -> None:
        try:
            self._client.peek(1)
        except BlockingIOError:
            return
        except OSError:
            self.gone = True
            self._upstream.stream.abort()
        self._client.off_readable()

    def end(self) -> None:
        self._client.off_readable()


def _can_repeat(exchange: Exchange, upstream: Upstream, error: UpstreamError) -> bool:
    """A kept connection may have been closed just when it was used again (RFC 9112, 9.3.1)."""
    return (
        error.silent
        and upstream.reused
        and not exchange.started
        and exchange.body.received == 0
        and (not upstream.sent or exchange.head.method in _IDEMPOTENT)
    )


def _failure(exchange: Exchange, error: UpstreamError) -> HttpError | ClientGone:
    if exchange.started:
        return ClientGone(f"the response was cut off: {error}")
    return UpstreamFailed(502, str(error))
