"""A TLS connection after its handshake, as a stream whose input can be peeked at.

The kernel's receive queue holds the client's records as they came. :meth:`TlsStream.peek` decrypts
a copy; a record leaves the queue, and the connection's read sequence moves on, only when all of
its plaintext was consumed. So a connection can be handed over between any two requests with
nothing but its keys, sequence numbers and the number of octets that were consumed of the record in
front (RFC 8446, section 5; RFC 5246, section 6)::

    kernel's queue   | record           | record   | rec...
    plaintext        |--used--|--skip-->|
                              ^ the next octet to be read: `skip` octets into the first record

Where the kernel's receive memory is full of an incomplete record, as after an upload that came in
one piece, what is there of it is taken out and kept here, encrypted; until it is whole and read,
the connection is not moved.

What is sent goes through :mod:`prism.tls.sending`.
"""

from __future__ import annotations

import logging
import socket
import struct
from typing import Final, NoReturn

from prism._ext.tls_record import Opened, Tls, TlsError
from prism.errors import ProtocolError
from prism.flow import Flow
from prism.http.stream import PEEK_LIMIT
from prism.tls.sending import SealedStream, TlsBroken

__all__ = ["TlsBroken", "TlsStream"]

log = logging.getLogger(__name__)

_RAW_EXTRA: Final = 17 * 1024  # so that a whole record fits behind PEEK_LIMIT octets of plaintext
_PULL: Final = 32 * 1024  # octets of records in the queue from which on they are taken out of it
_DROPPED: Final = 256 * 1024  # octets of input dropped at once
_DROPS: Final = 16  # pieces of input dropped after a bad record
_STATE: Final = struct.Struct("!BxHI")  # version, octets of the peer's facts, skip
_VERSION: Final = 1


class TlsStream(SealedStream):
    """A connected TCP socket whose octets are TLS records.

    Args:
        sock: connected; made non-blocking. The stream owns it from now on.
        tls: the record layer's state, owned too: it is wiped when the stream is closed.
        flow: the connection's name; by default the socket's own two ends.
        pending: plaintext that was consumed before, to be read first.
        skip: octets of the first record's plaintext that were consumed already.
        facts: what the handshake told of the client, see :func:`prism.tls.peer.pack_peer`.

    Attributes:
        facts: as given; :func:`prism.tls.peer.unpack_peer` reads them.
        tls: the record layer.
        alert: what was sent to the client because its records were bad.
        truncated: the client ended the TCP connection without a close_notify.
    """

    __slots__ = (
        "_base",
        "_done",
        "_opened",
        "_part",
        "_raw",
        "_skip",
        "alert",
        "facts",
        "truncated",
    )

    def __init__(
        self,
        sock: socket.socket,
        tls: Tls,
        flow: Flow | None = None,
        pending: bytes = b"",
        *,
        skip: int = 0,
        facts: bytes = b"",
    ) -> None:
        super().__init__(sock, tls, flow, pending)
        self.facts = facts
        self.alert: int | None = None
        self.truncated = False
        self._skip = skip
        self._opened: Opened | None = None  # what was decrypted and not wholly consumed
        self._base = 0  # octets of its plaintext that were consumed
        self._done = 0  # its records that were committed
        self._raw = 0  # octets of its input that are not taken as read
        self._part = b""  # the first of these, if the kernel had no room for more

    def __repr__(self) -> str:
        return f"<TlsStream fd={self._fd} {self._flow or ''} {self.tls!r}>"

    # -- travelling ------------------------------------------------------------------------

    @property
    def secure(self) -> bool:
        """It does."""
        return True

    @property
    def movable(self) -> bool:
        """Nothing that was sealed waits here, neither to be sent nor to be opened."""
        return not self._out and not self._part and not self._broken

    def export_tls(self) -> bytes:
        """What another node needs besides the TCP state: secret, to be sent encrypted only."""
        head = _STATE.pack(_VERSION, len(self.facts), self._skip)
        return head + self.facts + self.tls.state()

    @classmethod
    def parse_tls(cls, state: bytes) -> tuple[Tls, int, bytes]:
        """The record layer, ``skip`` and ``facts`` of an exported state.

        Raises:
            ProtocolError: it is not the state of a TLS connection.
        """
        try:
            version, length, skip = _STATE.unpack_from(state)
            if version != _VERSION:
                raise ProtocolError(f"a TLS stream's state of version {version}, not {_VERSION}")
            rest = _STATE.size + length
            return Tls.from_state(state[rest:]), skip, state[_STATE.size : rest]
        except (struct.error, TlsError) as error:
            raise ProtocolError(f"not a TLS stream's state: {error}") from None

    # -- reading ---------------------------------------------------------------------------

    def peek(self, limit: int = PEEK_LIMIT) -> bytes:
        """The plaintext received and not consumed; see :meth:`Stream.peek`.

        Raises:
            TlsBroken: what comes next is no good record.
        """
        pending = self._pending
        if len(pending) >= limit:
            return pending[:limit]
        try:
            data = self._decrypted(limit - len(pending))
        except BlockingIOError:
            if not pending:
                raise
            data = b""
        return pending + data if pending else data

    def _decrypted(self, limit: int) -> bytes:
        """Plaintext that is in the kernel's queue, behind what is pending; empty at the end."""
        while True:
            opened = self._open()
            if opened is None:
                return b""
            data = opened.data[self._base : self._base + limit]
            if data and self._awaiting and opened.error is not None:
                self._fail(opened.error)  # what is there was seen, and no more can come
            if data:
                if opened.closed and self._base + len(data) == len(opened.data):
                    self._end_of_tls()  # now, since nobody should wait for more
                whole = self._base + len(data) == len(opened.data)
                if whole and (self._raw >= _PULL or self._cramped):
                    self._pull(opened)
                return data
            if opened.error is not None:
                self._fail(opened.error)
            if opened.closed:
                # Not left unread: closing would reset the connection.
                self._commit(opened, opened.records)
                self._end_of_tls()
                return b""
            if not opened.records - self._done:
                self._wait_for_more()
                return b""
            self._commit(opened, opened.records)  # nothing but messages to the record layer

    def _open(self) -> Opened | None:
        """Look at the queue again; what was decrypted before is kept if nothing has come."""
        if self._broken:
            raise TlsBroken("the connection was given up")
        if self.tls.read_closed:  # taken as read, maybe together with the data in front of it
            self._end_of_tls()
            return None
        raw = self._received()
        if not raw:
            return None
        if self._opened is None or len(raw) != self._raw:
            self._opened = self.tls.peek(raw)
            self._base = self._skip
            self._done = 0
            self._raw = len(raw)
        return self._opened

    def _received(self) -> bytes:
        """The records there are, as far as one look goes; empty at the end."""
        part = self._part
        room = PEEK_LIMIT + _RAW_EXTRA - len(part)
        if room <= 0:
            return part
        try:
            fresh = self.sock.recv(room, socket.MSG_PEEK)
        except BlockingIOError:
            if not part:
                raise
            return part
        if not fresh:
            self._end_of_tcp()
        elif len(fresh) < self._lowat and self._lowat > 1:
            # Below the mark, the kernel wakes for a FIN, and when it has no room for more.
            if self._fin_received():
                self._end_of_tcp()
            else:
                self._vain += 1
        return part + fresh if part else fresh

    @property
    def _cramped(self) -> bool:
        """The kernel has no room for more; one look in vain may be due to something else."""
        return self._vain > 1

    def _end_of_tls(self) -> None:
        self._eof = True
        self.truncated = False

    def _end_of_tcp(self) -> None:
        if not self._eof:
            self._eof = True
            self.truncated = not self.tls.read_closed

    def _wait_for_more(self) -> None:
        """A record is incomplete: wake only when more of it is there."""
        if self._eof:
            return
        if self._cramped:
            self._part += self.sock.recv(self._raw - len(self._part))
        self._set_lowat(self._raw - len(self._part) + 1)
        raise BlockingIOError("an incomplete record")

    def _fail(self, error: TlsError) -> NoReturn:
        """Tell the client what is wrong with its records, and give the connection up."""
        self._broken = True
        self._opened = None
        self.alert = error.alert
        log.info("%s: %s", self._flow, error)
        try:
            if not self._out:
                self._alert(error.alert)
            # Not left unread: closing would reset the connection, and the alert might be lost.
            for _ in range(_DROPS):
                self.sock.recv(_DROPPED, socket.MSG_TRUNC)
        except (OSError, TlsError):
            pass  # it was worth a try
        self.tls.wipe()
        raise TlsBroken(str(error))

    def consume(self, n: int) -> None:
        """Takes ``n`` octets of plaintext; see :meth:`Stream.consume`."""
        if self._pending:
            taken = min(n, len(self._pending))
            self._pending = self._pending[taken:]
            n -= taken
        if not n:
            return
        opened = self._opened
        if opened is None or self._base + n > len(opened.data):
            raise ValueError(f"{n} octets to consume are not there")
        self._base += n
        if self._base == len(opened.data):
            self._commit(opened, opened.records)
            return
        records, _, end = opened.cut(self._base)
        self._commit(opened, records if end == self._base else records - 1)

    def _commit(self, opened: Opened, records: int) -> None:
        """Take whole records out of the queue."""
        if records > self._done:
            self._discard(self.tls.commit(opened, records))
            self._done = records
        committed = opened.ends[records - 1][1] if records else 0
        self._skip = self._base - max(committed, 0) if records else self._base
        if records == opened.records:
            self._skip = 0
            self._opened = None
            if self.tls.owes:
                self._flush_owed()
        self.reset_lowat()

    def _discard(self, octets: int) -> None:
        self._raw -= octets
        if self._part:
            taken = min(octets, len(self._part))
            self._part = self._part[taken:]
            octets -= taken
        while octets > 0:
            octets -= len(self.sock.recv(octets, socket.MSG_TRUNC))

    def _pull(self, opened: Opened) -> None:
        """Take all records out, so that tiny ones cannot fill the queue before a head is whole."""
        self._pending += opened.data[self._base :]
        self._base = len(opened.data)
        self._commit(opened, opened.records)

    def receive(self, n: int) -> bytes:
        """Takes up to ``n`` octets of plaintext; see :meth:`Stream.receive`."""
        if self._broken:
            return self.sock.recv(n)  # for whoever lingers until the client has read the alert
        data = self.peek(n)
        if data:
            self.consume(len(data))
        return data

    def await_more(self, n: int) -> None:
        """Readable only when more records are there than those peeked at."""
        self._awaiting = True
        hopeless = self._opened is not None and self._opened.error is not None
        if self._raw and not hopeless:
            self._set_lowat(self._raw - len(self._part) + 1)

    def _set_lowat(self, mark: int) -> None:
        if mark != self._lowat:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, mark)
            self._lowat = mark
            self._vain = 0

    def reset_lowat(self) -> None:
        """Undoes :meth:`await_more`."""
        self._vain = 0
        super().reset_lowat()

    # -- the end ---------------------------------------------------------------------------

    def abort(self) -> None:
        """Closes with a reset and no close_notify: the client sees that something is missing.

        A client that was sent an alert knows, and a reset might take the alert away from it.
        """
        self._broken = True
        if self.alert is None:
            super().abort()
        else:
            self.close()

    def close(self) -> None:
        """Closes with a close_notify; the keys are wiped."""
        if self._fd >= 0:
            self._say_goodbye()
        super().close()
        self._forget()

    def release(self) -> int:
        """Gives the descriptor away; the keys are wiped."""
        descriptor = super().release()
        self._forget()
        return descriptor

    def _forget(self) -> None:
        self._broken = True
        self._opened = None
        self._out = b""
        self.tls.wipe()
