"""The sending half of a TLS stream: seals, and keeps what the socket does not take at once.

That stays here encrypted; the call that follows must go on at the same place, as all callers do
anyway.
"""

from __future__ import annotations

import logging
import socket
from typing import Final

from prism._ext.tls_record import Tls, TlsError
from prism.flow import Flow
from prism.http.stream import PlainStream

__all__ = ["SealedStream", "TlsBroken"]

log = logging.getLogger(__name__)

_PIECE: Final = 256 * 1024  # octets sealed at once
_CLOSE_NOTIFY: Final = 0


class TlsBroken(ConnectionAbortedError):
    """The client broke the record protocol, or nothing can be sealed any more."""


class SealedStream(PlainStream):
    """A connected TCP socket to which records are written.

    Args:
        sock: connected; made non-blocking. The stream owns it from now on.
        tls: the record layer's state, owned too.
        flow: the connection's name; by default the socket's own two ends.
        pending: plaintext that was consumed before, to be read first.

    Attributes:
        tls: the record layer.
    """

    __slots__ = ("_broken", "_out", "_out_plain", "tls")

    def __init__(
        self, sock: socket.socket, tls: Tls, flow: Flow | None = None, pending: bytes = b""
    ) -> None:
        super().__init__(sock, flow, pending)
        self.tls = tls
        self._broken = False
        self._out = b""  # sealed, not yet taken by the socket
        self._out_plain = 0  # octets of plaintext in it that the caller was not told of

    def send(self, data: bytes | memoryview, more: bool = False) -> int:
        """Seals and sends; see :meth:`Stream.send`. What follows must begin where this ended."""
        if self._out_plain:
            return self._finish_sending()
        piece = data if len(data) <= _PIECE else memoryview(data)[:_PIECE]
        return self._emit(self._seal(piece), len(piece), more)

    def send_file(self, fd: int, offset: int, n: int) -> int:
        """Seals and sends a file's octets; see :meth:`Stream.send_file`."""
        if self._out_plain:
            return self._finish_sending()
        try:
            sealed, taken = self.tls.seal_file(fd, offset, min(n, _PIECE))
        except (TlsError, ValueError) as error:
            raise TlsBroken(str(error)) from None
        return self._emit(sealed, taken, False) if taken else 0

    def _seal(self, data: bytes | memoryview) -> bytes:
        try:
            return self.tls.seal(data)
        except (TlsError, ValueError) as error:
            raise TlsBroken(str(error)) from None

    def _emit(self, sealed: bytes, plain: int, more: bool) -> int:
        if self._out:
            self._out += sealed
            self._out_plain = plain
            return self._finish_sending()
        try:
            sent = self.sock.send(sealed, socket.MSG_MORE if more else 0)
        except BlockingIOError:
            sent = 0
        if sent == len(sealed):
            return plain
        self._out = sealed[sent:]
        self._out_plain = plain
        raise BlockingIOError("not all of a record was taken")

    def _finish_sending(self) -> int:
        """Send on; tells of the plaintext when all of it is with the kernel."""
        sent = self.sock.send(self._out)
        self._out = self._out[sent:]
        if self._out:
            raise BlockingIOError("not all of a record was taken")
        plain, self._out_plain = self._out_plain, 0
        return plain

    def _flush_owed(self) -> None:
        """Answer a request for a KeyUpdate soon, even if there is nothing else to say."""
        try:
            self._out += self.tls.key_update()
            sent = self.sock.send(self._out)
            self._out = self._out[sent:]
        except (OSError, TlsError, ValueError) as error:
            log.debug("%s: a KeyUpdate is late: %s", self._flow, error)

    def unsent(self) -> int:
        """Octets not acknowledged by the client, or not even with the kernel."""
        return super().unsent() + len(self._out)

    def shutdown_write(self) -> None:
        """Ends our sending side with a close_notify."""
        self._say_goodbye()
        super().shutdown_write()

    def _say_goodbye(self) -> None:
        if self._broken or self.tls.write_closed:
            return
        try:
            if self._out:
                self.sock.send(self._out)  # if not all of it goes, the client sees a cut
                self._out = b""
            self._alert(_CLOSE_NOTIFY)
        except (OSError, TlsError, ValueError):
            pass  # the client has gone, or takes nothing: it sees the connection cut

    def _alert(self, description: int) -> None:
        """Send an alert that ends the connection; if it does not fit, it is lost."""
        self.sock.send(self.tls.alert(description, description != _CLOSE_NOTIFY))
