"""A pool of connections to one upstream server."""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque

from prism.apps.upstream import Address, NotSent, Upstream
from prism.http.stream import PlainStream

__all__ = ["Pool"]


class Pool:
    """Connections to one upstream server: bounded, kept open for the next request.

    Args:
        address: TCP endpoint, or the path of a unix socket.
        limit: connections at most, busy and idle.
        connect_timeout: seconds, for a free place in the pool and for connecting each.
    """

    def __init__(self, address: Address, *, limit: int, connect_timeout: float) -> None:
        self.address = address
        self._limit = limit
        self._connect_timeout = connect_timeout
        self._busy = 0
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._idle: list[Upstream] = []

    @property
    def sizes(self) -> tuple[int, int]:
        """How many connections there are: in use or being made, and idle."""
        return self._busy, len(self._idle)

    async def acquire(self, *, fresh: bool = False) -> Upstream:
        """A connection to be given back by :meth:`release`; ``fresh``: one never used before.

        Raises:
            NotSent: 503 no place became free in time; 502 the upstream cannot be connected to;
                504 it does not answer.
        """
        await self._place()
        try:
            if fresh:
                self.close_idle()  # what made one stale has likely made all stale
            while self._idle:
                upstream = self._idle.pop()
                upstream.stream.off_readable()
                if upstream.is_quiet():
                    upstream.begin()
                    return upstream
                upstream.stream.close()
            return Upstream(await self._connect())
        except BaseException:
            self._free_place()
            raise

    def take(self) -> Upstream | None:
        """A kept connection, if one is there now; to be given back by :meth:`release`."""
        if self._waiters or self._busy >= self._limit:
            return None
        while self._idle:
            upstream = self._idle.pop()
            upstream.stream.off_readable()
            if upstream.is_quiet():
                upstream.begin()
                self._busy += 1
                return upstream
            upstream.stream.close()
        return None

    async def _place(self) -> None:
        """Waits until one more connection may be in use; first come, first served."""
        if self._busy < self._limit and not self._waiters:
            self._busy += 1
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            async with asyncio.timeout(self._connect_timeout):
                await waiter
        except BaseException as error:
            if waiter.done() and not waiter.cancelled():
                self._free_place()  # it came too late
            elif waiter in self._waiters:
                self._waiters.remove(waiter)
            if isinstance(error, TimeoutError):
                retry = ((b"Retry-After", b"1"),)
                raise NotSent(503, "all connections upstream are busy", retry) from None
            raise

    def _free_place(self) -> None:
        """Gives a place to whoever waits for one."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
        self._busy -= 1

    async def _connect(self) -> PlainStream:
        address = self.address
        unix = isinstance(address, str)
        sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else address.family)
        try:
            sock.setblocking(False)
            if not unix:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            async with asyncio.timeout(self._connect_timeout):
                await asyncio.get_running_loop().sock_connect(sock, address)
            return PlainStream(sock)
        except TimeoutError:
            sock.close()
            raise NotSent(504, "connecting upstream took too long") from None
        except OSError as error:
            sock.close()
            # Not the error's own text: the upstream's address is not for clients.
            reason = os.strerror(error.errno or 0)
            raise NotSent(502, f"cannot connect upstream: {reason}") from None
        except BaseException:
            sock.close()
            raise

    def release(self, upstream: Upstream) -> None:
        """Takes a connection back, and keeps it when it is reusable."""
        self._free_place()
        if not upstream.reusable or self._busy + len(self._idle) >= self._limit:
            upstream.stream.close()
            return
        upstream.reused = True
        self._idle.append(upstream)
        upstream.stream.on_readable(lambda: self._drop(upstream))

    def _drop(self, upstream: Upstream) -> None:
        """An idle connection has something to say: most likely the server closes it."""
        if not upstream.is_quiet():
            if upstream in self._idle:
                self._idle.remove(upstream)
            upstream.stream.close()

    def close_idle(self) -> None:
        """Closes all connections that are not in use."""
        while self._idle:
            self._idle.pop().stream.close()
