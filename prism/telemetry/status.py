"""The status socket: what a process tells about itself to whoever runs it.

HTTP/1.0 on a unix socket that only its owner can open: ``GET /status`` is a JSON document,
``GET /metrics`` the Prometheus text, ``POST /drain?SECONDS`` an action. A TCP listener, for
Prometheus, answers ``/metrics`` alone.
"""

from __future__ import annotations

import asyncio
import errno
import http.client
import json
import os
import socket
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from prism.errors import PrismError
from prism.flow import Endpoint
from prism.telemetry.metrics import Exposition

__all__ = ["StatusServer", "act", "read_status"]

_MAX_REQUEST = 4096
_MAX_NUMBER = 86400
_REQUEST_TIMEOUT = 2.0
_MAX_CLIENTS = 32
_MAX_STATUS = 4 * 1024 * 1024


_Pages = Mapping[str, Callable[[str], tuple[str, bytes]]]


class StatusServer:
    """Serves the status of one process.

    Args:
        status: called for each ``GET /status``; returns what :func:`json.dumps` can write.
        metrics: rendered for ``GET /metrics``.
        actions: by name; called with a number for each ``POST /NAME?NUMBER``.
    """

    def __init__(
        self,
        status: Callable[[], dict[str, Any]],
        metrics: Exposition,
        actions: Mapping[str, Callable[[float], None]] | None = None,
    ) -> None:
        self._status = status
        self._metrics = metrics
        self._actions = actions or {}
        self._path: Path | None = None
        self._servers: list[asyncio.Server] = []
        self._clients = 0

    async def start(self, path: Path | None, listen: Endpoint | None = None) -> None:
        """Listen on a unix socket (mode 0600, replacing a dead one) and, if given, on TCP.

        Raises:
            OSError: an address cannot be had; a live process has the socket (EADDRINUSE).
        """
        if path is not None:
            self._servers.append(await asyncio.start_unix_server(self._local, sock=_bind(path)))
            self._path = path
        if listen is not None:
            self._servers.append(await asyncio.start_server(self._remote, *listen))

    async def close(self) -> None:
        """Stop listening and remove the socket. Idempotent."""
        for server in self._servers:
            server.close()
        self._servers.clear()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._path = None

    async def _local(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pages: _Pages = {"GET /status": self._status_page, "GET /metrics": self._text}
        acts = {f"POST /{name}": partial(self._act, name) for name in self._actions}
        await self._answer(reader, writer, {**pages, **acts})

    async def _remote(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._answer(reader, writer, {"GET /metrics": self._text})

    def _status_page(self, query: str = "") -> tuple[str, bytes]:
        return "application/json", json.dumps(self._status(), default=str).encode()

    def _act(self, name: str, query: str) -> tuple[str, bytes]:
        number = float(query)
        if not 0 <= number <= _MAX_NUMBER:
            raise ValueError("out of bounds")
        self._actions[name](number)
        return self._status_page()

    def _text(self, query: str = "") -> tuple[str, bytes]:
        return "text/plain; version=0.0.4", self._metrics.text()

    async def _answer(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        pages: _Pages,
    ) -> None:
        self._clients += 1
        try:
            if self._clients > _MAX_CLIENTS:
                return
            async with asyncio.timeout(_REQUEST_TIMEOUT):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(_response(head, pages))
                await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # whoever asked has gone, or never asked
        finally:
            self._clients -= 1
            writer.close()


def _response(head: bytes, pages: _Pages) -> bytes:
    method, _, rest = head[:_MAX_REQUEST].decode("latin-1").partition(" ")
    path, _, query = rest.partition(" ")[0].partition("?")
    page = pages.get(f"{method} {path}")
    kind = "text/plain"
    if page is not None:
        try:
            kind, body = page(query)
            status = "200 OK"
        except ValueError:
            status, body = "400 Bad Request", f"{query!r} is no number that can be\n".encode()
    elif any(each.endswith(f" {path}") for each in pages):
        status, body = "405 Method Not Allowed", ("\n".join(pages) + "\n").encode()
    else:
        status, body = "404 Not Found", ("\n".join(pages) + "\n").encode()
    start = f"HTTP/1.0 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return start.encode() + body


def _bind(path: Path) -> socket.socket:
    """A listening unix socket that was never open to others, not even for a moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_socket():
        if _answers(path):
            raise OSError(errno.EADDRINUSE, f"another process answers at {path}")
        path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        os.fchmod(listener.fileno(), 0o600)  # before bind: the file is made with this mode
        listener.bind(str(path))
        listener.listen(_MAX_CLIENTS)
    except OSError:
        listener.close()
        raise
    return listener


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_REQUEST_TIMEOUT)
        return probe.connect_ex(str(path)) == 0


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def read_status(path: str | Path, timeout: float = 2.0) -> dict[str, Any]:
    """Ask a process for its status.

    Raises:
        PrismError: nobody answers at ``path`` within ``timeout`` seconds, or not with a status.
    """
    return _ask(path, "GET", "/status", timeout)


def act(path: str | Path, name: str, number: float, timeout: float = 2.0) -> dict[str, Any]:
    """Have a process do something; its status afterwards.

    Raises:
        PrismError: as for :func:`read_status`.
    """
    return _ask(path, "POST", f"/{name}?{number:g}", timeout)


def _ask(path: str | Path, method: str, target: str, timeout: float) -> dict[str, Any]:
    connection = _UnixConnection(Path(path), timeout)
    try:
        connection.request(method, target)
        document = json.loads(connection.getresponse().read(_MAX_STATUS))
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise PrismError(f"no status from {path}: {error or type(error).__name__}") from None
    finally:
        connection.close()
    if not isinstance(document, dict):
        raise PrismError(f"no status from {path}: not a JSON object")
    return document
