"""Relaying what is small and plain without a task: the quick way through :mod:`prism.apps.relay`.

A GET or HEAD goes out on a kept connection in one call, and its response comes back in another
one, made by :mod:`prism._ext.http_scan`. Whatever is not plain goes on as the coroutine that it
would have been from the beginning, from the very octet where it stands:

    ask --sent--> waiting --whole response--> done
     |               |
     +---------------+--anything else--> Relay.see_through(...)
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

from prism._ext.http_scan import receive_response, take
from prism.apps.passing import SPLICE_FROM
from prism.apps.pool import Pool
from prism.apps.upstream import Upstream, UpstreamError, UpstreamFailed
from prism.http.body import ClientGone
from prism.http.exchange import Exchange, Rest
from prism.http.response import STATUS_LINES, date_line

if TYPE_CHECKING:
    from prism.apps.relay import Relay

__all__ = ["Follower", "Quick", "Waiting"]

_METHODS = frozenset((b"GET", b"HEAD"))


class Follower(Protocol):
    """Hears what becomes of a request; one of the three is called, once."""

    def whole(self) -> None:
        """The response went the quick way, to its end."""
        ...

    def slowly(self, rest: Coroutine[Any, Any, None]) -> Coroutine[Any, Any, None]:
        """What is to be run instead of ``rest``, which goes on with the request and may raise."""
        ...

    def lost(self) -> None:
        """The client has gone."""
        ...


class Quick:
    """One request on its way; what an exchange waits for."""

    __slots__ = (
        *("_bodiless", "_exchange", "_follower", "_left", "_pool", "_relay", "_request", "_rest"),
        "_upstream",
    )

    def __init__(
        self,
        relay: Relay,
        exchange: Exchange,
        pool: Pool,
        upstream: Upstream,
        request: bytes,
        *,
        follower: Follower | None = None,
    ) -> None:
        self._follower = follower
        self._left = 0  # octets of the response's body to come
        self._relay = relay
        self._exchange = exchange
        self._pool = pool
        self._upstream = upstream
        self._request = request
        self._bodiless = exchange.head.method == b"HEAD"
        self._rest: Coroutine[Any, Any, None] | None = None

    @staticmethod
    def suits(exchange: Exchange) -> bool:
        """Whether a request can go this way, if a kept connection is there for it."""
        head = exchange.head
        return (
            exchange.resume is not None
            and head.method in _METHODS
            and head.version == 11
            and head.upgrade is None
            and exchange.body.complete
        )

    def ask(self) -> Rest:
        """Sends the request; returns what is left to do if that is not just waiting."""
        upstream, request = self._upstream, self._request
        self._exchange.waits = self
        try:
            sent = upstream.stream.send(request)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            lost = UpstreamError(f"sending upstream failed: {error}", silent=True)
            return self._by_coroutine(_raise(lost))
        upstream.sent = sent > 0
        if sent < len(request):
            rest = self._relay.ask_and_respond(self._exchange, upstream, request[sent:])
            return self._by_coroutine(rest)
        upstream.stream.on_readable(self._readable)
        self._relay.waiting.add(self)
        return None

    def cancel(self) -> None:
        """The client has gone: nobody waits for the response."""
        self._stop_waiting()
        self._exchange.waits = None
        if self._rest is not None:
            self._rest.close()
        self._upstream.stream.abort()
        self._pool.release(self._upstream)
        if self._follower is not None:
            self._follower.lost()

    def expire(self) -> None:
        """The response has not come, or not gone on, in time."""
        if self._exchange.started:
            self._go_on(_raise(UpstreamError("the upstream's response stands still")))
        else:
            self._go_on(_raise(UpstreamFailed(504, "the upstream took too long to respond")))

    def _readable(self) -> None:
        exchange, upstream = self._exchange, self._upstream
        server, tail = exchange.framing_lines()
        try:
            got = receive_response(
                upstream.stream.fileno(), STATUS_LINES, self._bodiless, date_line(), server, tail
            )
        except OSError as error:
            lost = UpstreamError(f"the upstream's connection broke: {error}", silent=True)
            self._go_on(_raise(lost))
            return
        if got is None:
            return
        if isinstance(got, bytes):
            if got:
                upstream.give_back(got)
                self._go_on(self._relay.watch_response(exchange, upstream))
            else:
                detail = "the upstream closed the connection without a response"
                self._go_on(_raise(UpstreamError(detail, silent=True)))
            return
        status, data, octets, left = got
        try:
            rest = exchange.pass_on(status, data, octets, left)
        except ClientGone as error:
            self._go_on(_raise(error))
            return
        self._passed(left, rest)

    def _more(self) -> None:
        """More of a body that did not come all at once."""
        exchange, upstream = self._exchange, self._upstream
        try:
            data = take(upstream.stream.fileno(), self._left)
            lost = "" if data else f"the upstream's body ends {self._left} octets early"
        except BlockingIOError:
            return
        except OSError as error:
            lost = f"the upstream's connection broke: {error}"
        if lost:
            self._go_on(_raise(UpstreamError(lost)))
            return
        try:
            rest = exchange.write_now(data)
        except ClientGone as error:
            self._go_on(_raise(error))
            return
        self._passed(self._left - len(data), rest)

    def _passed(self, left: int, rest: Rest) -> None:
        """Some of the response is out; ``left`` octets are to come, or ``rest`` is to be done."""
        exchange, upstream = self._exchange, self._upstream
        if rest is not None or left >= SPLICE_FROM:
            upstream.expect(left)
            self._go_on(self._relay.pass_rest(exchange, upstream, rest))
            return
        if left:
            self._left = left
            self._relay.waiting.add(self)  # from now on anew
            upstream.stream.on_readable(self._more)
            return
        if not exchange.finished:
            exchange.end_now()
        upstream.reusable = True
        self._stop_waiting()
        exchange.waits = None
        self._pool.release(upstream)
        if self._follower is not None:
            self._follower.whole()
        if exchange.resume is not None:
            exchange.resume(exchange, None)

    def _stop_waiting(self) -> None:
        self._relay.waiting.remove(self)
        self._upstream.stream.off_readable()

    def _go_on(self, attempt: Coroutine[Any, Any, None]) -> None:
        self._stop_waiting()
        rest = self._by_coroutine(attempt)
        if self._exchange.resume is not None:
            self._exchange.resume(self._exchange, rest)

    def _by_coroutine(self, attempt: Coroutine[Any, Any, None]) -> Coroutine[Any, Any, None]:
        """The slow way from here on; until it runs, :meth:`cancel` is still what ends it."""
        self._rest = attempt
        return self._see_through(attempt)

    async def _see_through(self, attempt: Coroutine[Any, Any, None]) -> None:
        self._exchange.waits = None
        self._rest = None
        rest = self._relay.see_through(
            self._exchange, self._pool, self._upstream, self._request, attempt
        )
        await (rest if self._follower is None else self._follower.slowly(rest))


async def _raise(error: Exception) -> None:
    raise error


class Waiting:
    """Requests that wait for their responses, so that one timer does for all of them.

    Args:
        seconds: for which each may wait.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since: dict[Quick, float] = {}  # oldest first
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._since)

    def add(self, quick: Quick) -> None:
        """One more, from now on; or one that was there already, anew."""
        self._since.pop(quick, None)
        self._since[quick] = monotonic()
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._seconds, self._look)

    def remove(self, quick: Quick) -> None:
        """One has its response, or is given up."""
        self._since.pop(quick, None)

    def close(self) -> None:
        """No more time-outs."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        now = monotonic()
        for quick, since in list(self._since.items()):
            if now < since + self._seconds:
                loop = asyncio.get_running_loop()
                self._timer = loop.call_later(since + self._seconds - now, self._look)
                return
            quick.expire()
