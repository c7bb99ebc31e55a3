"""The tests' HTTP client over TLS: OpenSSL on a blocking socket, and a client without manners.

OpenSSL is driven through memory (``tests/unit/openssl_peer.py``), which Python's ssl module cannot
do as well: choose a TLS 1.3 suite, send KeyUpdates, tell the secrets, end one direction only.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from typing import Any

from e2e_bed import Bed, bed
from e2e_http import Client, Conn
from openssl_peer import TLS1_2, TLS1_3, Failed, Peer

from prism._ext.tls_record import Tls
from prism.flow import Endpoint
from prism.lab.netns import Namespace

SUITES = {
    TLS1_3: ("TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"),
    TLS1_2: (
        "ECDHE-ECDSA-AES128-GCM-SHA256",
        "ECDHE-ECDSA-AES256-GCM-SHA384",
        "ECDHE-ECDSA-CHACHA20-POLY1305",
    ),
}
VERSIONS = {TLS1_3: "1.3", TLS1_2: "1.2"}
_PIECE = 256 * 1024


class TlsSocket:
    """What :class:`e2e_http.Conn` needs of a socket, with TLS in between.

    Attributes:
        raw: the TCP socket.
        peer: OpenSSL.
        truncated: the server ended the connection without a close_notify.
    """

    def __init__(self, raw: socket.socket, peer: Peer) -> None:
        self.raw = raw
        self.peer = peer
        self.truncated = False
        self.setsockopt = raw.setsockopt
        self.settimeout = raw.settimeout
        self.getsockname = raw.getsockname
        self._plain = b""
        self._ended = False

    def handshake(self) -> None:
        while not self.peer.handshake():
            self.raw.sendall(self.peer.output())
            data = self.raw.recv(65536)
            if not data:
                raise ConnectionResetError("closed in the handshake")
            self.peer.input(data)
        self.raw.sendall(self.peer.output())

    def sendall(self, data: bytes) -> None:
        for at in range(0, len(data), _PIECE):
            self.raw.sendall(self.peer.write(data[at : at + _PIECE]))

    def key_update(self, kind: int) -> None:
        """A KeyUpdate, on its own on the wire."""
        self.peer.key_update(kind)
        self.peer.handshake()
        self.raw.sendall(self.peer.output())

    def recv(self, n: int) -> bytes:
        while not self._plain and not self._ended:
            plain = self.peer.read()
            if plain == b"":
                data = self.raw.recv(_PIECE)
                if not data:
                    self._ended = self.truncated = True
                    break
                plain = self.peer.read(data)
            answers = self.peer.output()
            if answers:
                with contextlib.suppress(OSError):  # the server may have closed by now
                    self.raw.sendall(answers)
            if plain is None:
                self._ended = True
            else:
                self._plain = plain
        data, self._plain = self._plain[:n], self._plain[n:]
        return data

    def shutdown(self, how: int) -> None:
        """Ends our direction, of TLS and of TCP."""
        assert how == socket.SHUT_WR
        self.raw.send(self.peer.shutdown(), socket.MSG_MORE)  # one segment: no answer in between
        self.raw.shutdown(how)

    def close(self) -> None:
        """In order: our close_notify, the server's, and only then the socket.

        A client that does not wait for the server's has its kernel answer it with a reset.
        """
        if self.raw.fileno() < 0:
            return
        with contextlib.suppress(OSError, Failed):
            if not self._ended and self.raw.gettimeout() != 0:
                self.shutdown(socket.SHUT_WR)
                self.raw.settimeout(2)
                while self.raw.recv(_PIECE):
                    pass
        self.raw.close()


class TlsConn(Conn):
    """A connection over TLS; ``sock`` is a :class:`TlsSocket`."""

    sock: Any

    @property
    def peer(self) -> Peer:
        return self.sock.peer

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.raw.close()

    def vanish(self) -> None:
        self.sock.setsockopt(socket.IPPROTO_TCP, 19, 1)
        self.sock.raw.close()

    def cut(self) -> None:
        """The end of the TCP connection without a close_notify; what comes can still be read."""
        self.sock.raw.shutdown(socket.SHUT_WR)

    def take_over(self) -> tuple[socket.socket, Tls]:
        """The TCP socket, and our record layer as OpenSSL would go on with it.

        Only for the beginning of a connection: nothing was sent, and nothing but session tickets
        has come, which are still unread.
        """
        log, suite = self.peer.log, self.peer.suite
        if "CLIENT_TRAFFIC_SECRET_0" in log:
            tls = Tls.from_traffic_secrets(
                suite,
                log["CLIENT_TRAFFIC_SECRET_0"],
                log["SERVER_TRAFFIC_SECRET_0"],
                is_server=False,
            )
        else:
            master, randoms = log["CLIENT_RANDOM"], self.peer.randoms
            tls = Tls.from_master_secret(suite, master, *randoms, is_server=False)
        return self.sock.raw, tls


class TlsClient(Client):
    """Makes TLS connections to the service; certificates are not its concern."""

    def __init__(
        self,
        namespace: Namespace,
        service: Endpoint,
        version: int = TLS1_3,
        suite: str = "",
    ) -> None:
        super().__init__(namespace, service)
        self.version = version
        self.suite = suite or SUITES[version][0]

    def connect(self, **options: Any) -> TlsConn:
        conn = super().connect(**options)
        sock = TlsSocket(conn.sock, Peer(self.version, self.suite))
        try:
            sock.handshake()
        except BaseException:
            conn.sock.close()
            raise
        return TlsConn(sock, conn.host)  # type: ignore[arg-type]


def tls_client(found: Bed, version: int = TLS1_3, suite: str = "", family: int = 0) -> TlsClient:
    """A client of a cluster with ``tls=True``."""
    namespace = found.cluster.topology.namespace("client")
    return TlsClient(namespace, found.cluster.topology.services(443)[family], version, suite)


@contextlib.contextmanager
def tls_bed(**options: Any) -> Iterator[Bed]:
    """A cluster that speaks TLS, whose clients do too; ``plain`` is one for port 80."""
    with bed(tls=True, **options) as found:
        found.plain = found.client  # type: ignore[attr-defined]
        found.client = tls_client(found)
        found.client6 = tls_client(found, family=1)
        yield found


def tls_counters(found: Bed, node: str = "fe1") -> dict[str, dict[str, int]]:
    """What a frontend tells of its handshakes, added up over its workers."""
    total: dict[str, dict[str, int]] = {"handshakes": {}, "failures": {}}
    for status in found.cluster.statuses(node):
        for kind, counts in total.items():
            for label, number in status["tls"][kind].items():
                counts[label] = counts.get(label, 0) + number
    return total
