"""Passing octets from one connection to another: by splice(2) where both are plain sockets.

What is spliced is never copied into the process; a pipe holds what one side has given and the
other has not taken yet.
"""

from __future__ import annotations

import asyncio
import os
from typing import Final

from prism.http.response import send_all, wait_writable
from prism.http.stream import PlainStream, Stream

__all__ = ["SPLICE_FROM", "can_splice", "splice", "tunnel"]

SPLICE_FROM: Final = 256 * 1024
"""Octets from which on a body is spliced: below, making a pipe costs more than it saves."""

_PIECE: Final = 1 << 20
_COPY: Final = 64 * 1024
_FLAGS: Final = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
_IDLE: Final = 60.0  # seconds that half a tunnel may be silent after the other half has ended


def can_splice(*streams: Stream) -> bool:
    """Whether all are sockets whose octets need no work and of which nothing was read ahead."""
    return all(type(stream) is PlainStream and not stream.pending for stream in streams)


async def splice(source: Stream, sink: Stream, n: int, seconds: float) -> int:
    """Pass ``n`` octets on; the number is less only when the source ends before that.

    Args:
        source: plain, with nothing pending (:func:`can_splice`).
        sink: the same.
        n: octets.
        seconds: that either side may stand still.

    Raises:
        TimeoutError: nothing came from the source for so long.
        ClientGone: the sink is lost, or takes nothing.
        OSError: the source is lost.
    """
    left = n
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        while left:
            try:
                held = os.splice(source.fileno(), writer, min(left, _PIECE), flags=_FLAGS)
            except BlockingIOError:
                await source.readable(seconds)
                continue
            if not held:
                break
            left -= held
            await _empty(reader, sink, held, seconds)
    finally:
        os.close(reader)
        os.close(writer)
    return n - left


async def _empty(reader: int, sink: Stream, held: int, seconds: float) -> None:
    while held:
        try:
            held -= os.splice(reader, sink.fileno(), held, flags=_FLAGS)
        except BlockingIOError:
            await wait_writable(sink, seconds)


async def tunnel(client: Stream, server: Stream, first: bytes = b"") -> None:
    """Pass everything both ways until both sides have ended, or one is lost.

    Args:
        client: the client's connection.
        server: the upstream server's.
        first: octets of the server's that were read already.
    """
    down = asyncio.ensure_future(_pass(server, client, first))
    up = asyncio.ensure_future(_pass(client, server, b""))
    try:
        _, running = await asyncio.wait((down, up), return_when=asyncio.FIRST_COMPLETED)
        if running and not _failed(down) and not _failed(up):
            await asyncio.wait(running, timeout=_IDLE)
    finally:
        for task in (down, up):
            task.cancel()
        await asyncio.gather(down, up, return_exceptions=True)


def _failed(task: asyncio.Future[None]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)


async def _pass(source: Stream, sink: Stream, first: bytes) -> None:
    """One direction, to its end, which is passed on too."""
    data = first
    while True:
        if data:
            await send_all(sink, data, _IDLE)
        try:
            data = source.receive(_COPY)
        except BlockingIOError:
            data = b""
            await source.readable(None)
            continue
        if not data:
            sink.shutdown_write()
            return
