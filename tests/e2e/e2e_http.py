"""An HTTP/1.1 client over plain blocking sockets that can also misbehave.

Its sockets are made inside the client's namespace, so tests run in their own process and threads.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import socket
import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from prism.flow import Endpoint
from prism.lab.netns import Namespace

KEEP = 4 << 20  # octets of a body that a Response keeps; of longer ones only the hash
TIMEOUT = 20.0


class Cut(Exception):
    """The connection ended inside a response."""


@dataclass
class Response:
    status: int
    reason: str
    headers: dict[str, str]
    length: int = 0
    sha256: str = ""
    body: bytes = b""
    interim: list[int] = field(default_factory=list)

    @property
    def node(self) -> str:
        """The worker that says it has answered: ``be1/0`` in ``Server: prism/1.0 (be1/0)``."""
        return self.headers.get("server", "").partition("(")[2].rstrip(")")


def payload(seed: int | str, size: int) -> bytes:
    """Octets that are the same each time and nothing like any other seed's."""
    return random.Random(seed).randbytes(size)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Client:
    """Makes connections to the service from a namespace."""

    def __init__(self, namespace: Namespace, service: Endpoint) -> None:
        self.namespace = namespace
        self.service = service

    def connect(
        self,
        *,
        source_port: int = 0,
        rcvbuf: int = 0,
        timeout: float = TIMEOUT,
        to: Endpoint | None = None,
    ) -> Conn:
        to = to or self.service
        sock = self.namespace.socket(to.family)
        try:
            sock.settimeout(timeout)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if rcvbuf:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
            if source_port:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind(("::" if to.family == socket.AF_INET6 else "0.0.0.0", source_port))
            sock.connect((to.host, to.port))
        except BaseException:
            sock.close()
            raise
        return Conn(sock, f"{to.host}:{to.port}" if ":" not in to.host else str(to))

    @contextlib.contextmanager
    def open(self, **options: object) -> Iterator[Conn]:
        """A connection that is closed at the end, whatever happens."""
        conn = self.connect(**options)  # type: ignore[arg-type]
        try:
            yield conn
        finally:
            conn.close()

    def once(
        self, method: str, target: str, body: bytes | None = None, **options: object
    ) -> Response:
        """One request on a connection of its own, which the client closes first."""
        with self.open() as conn:
            return conn.request(method, target, body, **options)  # type: ignore[arg-type]


class Conn:
    """One connection."""

    def __init__(self, sock: socket.socket, host: str) -> None:
        self.sock = sock
        self.host = host
        self._data = bytearray()
        self.local = sock.getsockname()[:2]

    # -- sending ------------------------------------------------------------------------------

    def head(self, method: str, target: str, headers: Iterable[tuple[str, str]] = ()) -> bytes:
        lines = [f"{method} {target} HTTP/1.1", f"Host: {self.host}"]
        lines += [f"{name}: {value}" for name, value in headers]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def send_slowly(self, data: bytes, pause: float = 0.0005, step: int = 1) -> None:
        """A few octets at a time, each in a segment of its own."""
        for at in range(0, len(data), step):
            self.sock.sendall(data[at : at + step])
            time.sleep(pause)

    def start(
        self,
        method: str,
        target: str,
        body: bytes | None = None,
        *,
        headers: Iterable[tuple[str, str]] = (),
        chunked: int = 0,
    ) -> bytes:
        """The octets of a request; ``chunked``: the size of its chunks, 0 for Content-Length."""
        extra = list(headers)
        if body is None:
            return self.head(method, target, extra)
        if not chunked:
            return self.head(method, target, [*extra, ("Content-Length", str(len(body)))]) + body
        pieces = [self.head(method, target, [*extra, ("Transfer-Encoding", "chunked")])]
        for at in range(0, len(body), chunked):
            part = body[at : at + chunked]
            pieces.append(b"%x\r\n%b\r\n" % (len(part), part))
        return b"".join((*pieces, b"0\r\n\r\n"))

    def request(
        self, method: str, target: str, body: bytes | None = None, **options: object
    ) -> Response:
        self.send(self.start(method, target, body, **options))  # type: ignore[arg-type]
        return self.response(method)

    # -- receiving ----------------------------------------------------------------------------

    def _more(self, limit: int = 65536) -> None:
        data = self.sock.recv(limit)
        if not data:
            raise Cut("the connection ended")
        self._data += data

    def _line(self) -> bytes:
        while (end := self._data.find(b"\r\n")) < 0:
            self._more()
        line = bytes(self._data[:end])
        del self._data[: end + 2]
        return line

    def take(self, n: int, sink: Sink, pace: float = 0.0) -> None:
        """``n`` octets into the sink; ``pace``: octets a second, 0 for no limit."""
        while n > 0:
            if not self._data:
                self._more(min(n, 262144) if not pace else min(n, 8192))
            piece = self._data[:n]
            del self._data[: len(piece)]
            sink.add(piece)
            n -= len(piece)
            if pace:
                time.sleep(len(piece) / pace)

    def response(self, method: str = "GET", pace: float = 0.0) -> Response:
        """The next response, interim ones noted; raises Cut where it is not whole."""
        interim: list[int] = []
        while True:
            answer = self.response_head()
            if answer.status >= 200:
                break
            interim.append(answer.status)
        answer.interim = interim
        sink = Sink()
        headers = answer.headers
        if method == "HEAD" or answer.status in (204, 304):
            pass
        elif headers.get("transfer-encoding") == "chunked":
            while (size := int(self._line().split(b";")[0], 16)) > 0:
                self.take(size, sink, pace)
                if self._line():
                    raise Cut("a chunk without its end")
            while self._line():
                pass
        elif "content-length" in headers:
            self.take(int(headers["content-length"]), sink, pace)
        else:
            with contextlib.suppress(Cut):
                while True:
                    self.take(1, sink, pace)
        answer.length, answer.sha256, answer.body = sink.length, sink.hash.hexdigest(), sink.kept
        return answer

    def response_head(self) -> Response:
        """Status line and fields only; the body is left."""
        version, status, reason = (self._line().decode("latin-1") + " ").split(" ", 2)
        if version != "HTTP/1.1":
            raise Cut(f"not a status line: {version}")
        headers = {}
        while line := self._line():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        return Response(int(status), reason.strip(), headers)

    def at_end(self, timeout: float = 5.0) -> bool:
        """Whether the server closes without sending more; raises on a reset."""
        self.sock.settimeout(timeout)
        return not self._data and self.sock.recv(1) == b""

    # -- ending -------------------------------------------------------------------------------

    def half_close(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Close with an RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def vanish(self) -> None:
        """Close without a word: the peer must find out by itself (TCP_REPAIR, tcp(7))."""
        self.sock.setsockopt(socket.IPPROTO_TCP, 19, 1)
        self.sock.close()

    def close(self) -> None:
        self.sock.close()


class Sink:
    """Where a body goes: hashed, and kept while it is short."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self.length = 0
        self._kept = bytearray()

    def add(self, data: bytes | bytearray) -> None:
        self.hash.update(data)
        self.length += len(data)
        if self.length <= KEEP:
            self._kept += data

    @property
    def kept(self) -> bytes:
        return bytes(self._kept) if self.length <= KEEP else b""
