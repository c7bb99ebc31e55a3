"""A minimal server for tests: one connection after the other, no handing over."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable

from prism.http.body import ClientGone
from prism.http.exchange import App, Exchange, error_response
from prism.http.head import HttpError, parse_head
from prism.http.origin import origin_of
from prism.http.stream import PlainStream, has_unread, linger_close

Hook = Callable[[Exchange], None]


async def serve(sock: socket.socket, app: App, hook: Hook | None = None) -> None:
    """Serves one connection to its end."""
    stream = PlainStream(sock)
    try:
        while True:
            try:
                data = stream.peek()
                head = parse_head(data)
            except BlockingIOError:
                await stream.readable(30)
                continue
            except HttpError as error:
                await error_response(stream, error)
                await linger_close(stream)
                return
            if head is None:
                if stream.eof:
                    return
                stream.await_more(len(data))
                await stream.readable(30)
                continue
            stream.reset_lowat()
            stream.consume(head.length)
            exchange = Exchange(head, stream, origin_of(stream.flow, stream), b"test", timeout=5)
            if hook is not None:
                hook(exchange)
            try:
                rest = app.handle(exchange)
                if rest is not None:
                    await rest
                if not exchange.settled:
                    await exchange.finish()
            except HttpError as error:
                if exchange.started:
                    stream.abort()
                    return
                rest = exchange.fail(error)
                if rest is not None:
                    await rest
                await exchange.finish()
            except ClientGone:
                stream.abort()
                return
            if not exchange.keep_alive:
                if not exchange.body.complete or has_unread(stream):
                    await linger_close(stream)
                return
    except OSError:
        pass
    finally:
        stream.close()


@contextlib.asynccontextmanager
async def serving(app: App, hook: Hook | None = None) -> AsyncIterator[int]:
    """Listens on loopback and yields the port."""
    loop = asyncio.get_running_loop()
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    listener.setblocking(False)
    tasks: set[asyncio.Task[None]] = set()

    async def accept() -> None:
        while True:
            sock, _ = await loop.sock_accept(listener)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task = loop.create_task(serve(sock, app, hook))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    acceptor = loop.create_task(accept())
    try:
        yield listener.getsockname()[1]
    finally:
        for task in (acceptor, *tasks):
            task.cancel()
        await asyncio.gather(acceptor, *tasks, return_exceptions=True)
        listener.close()
