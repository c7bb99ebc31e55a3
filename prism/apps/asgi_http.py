"""One HTTP request of an ASGI application: its scope, what it receives, what it sends.

The application may go on after its response is out (background tasks); the connection does not
wait for that. It may read and write at the same time, and it hears of a client that has gone when
it asks (``http.disconnect``) or when it sends (:class:`OSError`). A client that has only finished
sending counts as gone for ``http.disconnect``, as in other servers, but can still be answered.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any, Final
from urllib.parse import unquote

from prism.http.body import ClientGone
from prism.http.exchange import Exchange, Rest
from prism.http.head import HttpError, RequestHead
from prism.http.origin import FIELD

__all__ = ["Cycle", "Disconnected", "scope_of"]

log = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Application = Callable[
    [Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]],
    Coroutine[Any, Any, None],
]

_OURS: Final = frozenset((b"content-length", b"transfer-encoding", b"connection"))


class Disconnected(OSError):
    """The client has gone: what an application gets that sends all the same."""


def scope_of(exchange: Exchange, state: dict[str, Any]) -> dict[str, Any]:
    """The connection scope of a request (ASGI HTTP 2.4)."""
    head, origin = exchange.head, exchange.origin
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1" if head.version == 11 else "1.0",
        "method": head.method.decode("ascii"),
        "scheme": origin.scheme if origin is not None else "http",
        "path": unquote(head.path.decode("ascii")),
        "raw_path": head.path,
        "query_string": head.query,
        "root_path": "",
        "headers": headers_of(head),
        "client": tuple(origin.client) if origin is not None else None,
        "server": tuple(origin.service) if origin is not None else None,
        "state": state.copy(),
        "extensions": {"http.response.pathsend": {}},
    }


def headers_of(head: RequestHead) -> list[tuple[bytes, bytes]]:
    """The fields for an application."""
    return [field for field in head.headers if field[0] != FIELD]


class Cycle:
    """One request and its response.

    The exchange is this object's until :meth:`answered` returns, and nobody's but the
    connection's from then on, whatever the application still does.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._over = asyncio.get_running_loop().create_future()
        self._start: Message | None = None  # held back until the body tells more
        self._failure: BaseException | None = None
        self._told_body = False
        self._ended = False
        self._waiter: asyncio.Task[Any] | None = None

    async def answered(self) -> None:
        """Return when the response is out.

        Raises:
            HttpError: nothing was sent, and this is to be.
            ClientGone: the client has gone, or the response was cut short by the application.
        """
        try:
            await self._over
        finally:
            self._ended = True
            if self._waiter is not None:  # the input is the next request's from now on
                self._waiter.cancel()
                await asyncio.wait((self._waiter,))
        if self._failure is not None:
            raise self._failure

    async def run(self, app: Application, scope: dict[str, Any]) -> None:
        """Run the application; whatever it does, :meth:`answered` returns."""
        failure: BaseException | None = None
        try:
            await app(scope, self.receive, self.send)
        except Disconnected:
            failure = ClientGone("the client went away")
        except asyncio.CancelledError:
            failure = ClientGone("the application was cut short")
        except Exception as error:
            if not self._client_gone(error):
                log.exception("%s %s failed in the application", scope["method"], scope["path"])
            failure = HttpError(500, "the application failed")
        else:
            if not self._over.done():
                log.error("%s %s: the application gave no whole response", scope["method"],
                          scope["path"])  # fmt: skip
                failure = HttpError(500, "the application gave no answer")
        self._finish(failure)

    def _client_gone(self, error: BaseException) -> bool:
        """Whether an error is only what the application made of a client's disappearance."""
        while error is not None:
            if isinstance(error, Disconnected):
                return True
            error = error.__cause__ or error.__context__  # type: ignore[assignment]
        return self._failure is not None

    def _finish(self, failure: BaseException | None = None) -> None:
        if self._over.done():
            return
        if self._failure is None:
            self._failure = failure
        if self._exchange.started and isinstance(self._failure, HttpError):
            self._failure = ClientGone("the response was cut short by the application")
        self._over.set_result(None)

    # -- what the application receives -------------------------------------------------------

    async def receive(self) -> Message:
        """The next piece of the request's body; then, when that is so, that the client has gone."""
        if self._ended or self._failure is not None:
            return {"type": "http.disconnect"}
        body = self._exchange.body
        if not self._told_body:
            try:
                piece = body.read_now()
            except BlockingIOError:
                piece = await self._wait(body.read())
            except (ClientGone, HttpError) as error:
                return self._lost(error)
            if isinstance(piece, bytes):
                self._told_body = body.complete
                return {"type": "http.request", "body": piece, "more_body": not body.complete}
            return self._lost(piece)
        if not self._client_left():  # at once: who asks may have no time to wait (is_disconnected)
            await self._wait(self._disconnect())
        return {"type": "http.disconnect"}

    async def _wait(self, waiting: Coroutine[Any, Any, Any]) -> Any:
        """What a wait for input gives, or its error; it ends with the exchange."""
        if self._waiter is not None:
            waiting.close()
            raise RuntimeError("receive() is being awaited already")
        task = self._waiter = asyncio.get_running_loop().create_task(waiting)
        try:
            await asyncio.wait((task,))
            if task.cancelled():
                return None
            error = task.exception()
            return error if isinstance(error, ClientGone | HttpError) else task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait((task,))
            self._waiter = None

    def _lost(self, error: Any) -> Message:
        """The body cannot be had; a response to that, if one is due, comes in the end."""
        if isinstance(error, Exception):
            self._failure = error
        return {"type": "http.disconnect"}

    async def _disconnect(self) -> None:
        """Return when the client has ended the connection, or its sending."""
        stream = self._exchange.stream
        while not (left := self._client_left()):
            if left is None:
                await asyncio.get_running_loop().create_future()
            try:
                await stream.readable(None)
            except OSError:
                return

    def _client_left(self) -> bool | None:
        """Whether the client has ended the connection, or its sending; ``None``: cannot be known.

        That is so when its next request is there already, or when reading could be the end of
        this socket (:meth:`Stream.must_move`); then sending will tell.
        """
        stream = self._exchange.stream
        if stream.must_move(True):
            return None
        try:
            return True if not stream.peek(1) or stream.eof else None
        except BlockingIOError:
            return False
        except OSError:
            return True

    # -- what it sends -----------------------------------------------------------------------

    async def send(self, message: Message) -> None:
        """Send a part of the response; waits while the client does not read.

        Raises:
            Disconnected: the client has gone.
            RuntimeError: this is not what has to come next.
        """
        kind = message["type"]
        if self._failure is not None:  # of a bad body, too: the answer to that is not its affair
            raise Disconnected("the client has gone")
        if self._ended or self._over.done():
            if not self._exchange.finished:
                raise Disconnected("the client has gone")
            raise RuntimeError(f"{kind!r} after the response was complete")
        try:
            if kind == "http.response.start":
                self._begin(message)
            elif kind == "http.response.body":
                await self._body(message.get("body", b""), message.get("more_body", False))
            elif kind == "http.response.pathsend":
                await self._file(message["path"])
            else:
                raise RuntimeError(f"{kind!r} is not a message of an HTTP response")
        except ClientGone as error:
            self._failure = error
            self._finish()
            raise Disconnected(str(error)) from None

    def _begin(self, message: Message) -> None:
        if self._start is not None or self._exchange.started:
            raise RuntimeError("'http.response.start' came twice")
        if not 200 <= message["status"] <= 999:
            raise RuntimeError(f"{message['status']} is no status of a final response")
        self._start = message

    def _head(self, length: int | None) -> tuple[int, list[tuple[bytes, bytes]], int | None]:
        """Status, fields without those of the framing, and the body's length."""
        start, self._start = self._start, None
        if start is None:
            raise RuntimeError("'http.response.start' has to come first")
        fields = []
        for field, content in start.get("headers", ()):
            name, value = bytes(field), bytes(content)
            lower = name.lower()
            if lower not in _OURS:
                fields.append((name, value))
            elif lower == b"content-length":
                length = int(value)
            elif lower == b"connection" and b"close" in value.lower():
                self._exchange.keep_alive = False
        return start["status"], fields, length

    async def _body(self, data: bytes, more: bool) -> None:
        exchange = self._exchange
        if not exchange.started:
            # A body that comes in one piece has a known length, whether it was declared or not.
            exchange.start(
                *self._head(None if more or exchange.head.method == b"HEAD" else len(data))
            )
        rest = exchange.write_now(bytes(data))
        if rest is not None:
            await rest
        if not more:
            await exchange.end()
            self._finish()

    async def _file(self, path: str) -> None:
        """A whole body from a file, by sendfile(2) where the stream can (the extension's text)."""
        if self._exchange.started or self._start is None:
            raise RuntimeError("'http.response.pathsend' has to follow 'http.response.start'")
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            status, fields, length = self._head(os.fstat(fd).st_size)
            rest: Rest = self._exchange.send_file(status, fields, os.dup(fd), 0, length or 0)
        finally:
            os.close(fd)
        if rest is not None:
            await rest
        self._finish()
