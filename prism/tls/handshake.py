"""One TLS handshake on a non-blocking socket, which leaves the rest in the kernel's queue.

OpenSSL is fed through memory, record by record, and nothing behind the client's Finished is taken
out of the socket: who owns the connection later finds its first application record there. Records
are peeked at, fed one at a time, and taken out of the queue when they were::

    kernel's queue   | CCS | Finished | application data ...
    peeked           |-------------------...
    fed, then taken  |----------------|

What OpenSSL puts out once the handshake is done are session tickets: with TLS 1.3 they are the
first records under the application keys and count for the sequence number (RFC 8446, 4.6.1 and
5.3). With TLS 1.2 each side's Finished was record 0 (RFC 5246, 6.1).
"""

from __future__ import annotations

import asyncio
import logging
import select
import socket
from collections.abc import Callable
from typing import Final, NoReturn

from OpenSSL import SSL

from prism._ext.http_scan import drop, peek
from prism._ext.tls_record import MAX_FRAGMENT, flight
from prism.flow import Flow
from prism.tls.context import NoProtocol, TlsContexts, reason
from prism.tls.established import (
    Established,
    Unusable,
    establish,
    fragment_limit,
    limit_tickets,
)
from prism.tls.openssl import feed, output, shake

__all__ = ["Handshake"]

log = logging.getLogger(__name__)

_HEADER_SIZE: Final = 5
_HANDSHAKE: Final = 22
_TYPES: Final = range(20, 24)
_MAX_RECORD: Final = MAX_FRAGMENT + 256  # of ciphertext (RFC 8446, 5.2)
_PEEK: Final = _MAX_RECORD + 4096
_MAX_OCTETS: Final = 160 * 1024  # of all handshake records; certificates may be 100 KiB
_METHOD: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ /*"
_HTTPS_ONLY: Final = b"This port speaks HTTPS: use https:// in place of http://\n"
_NO_TLS: Final = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(_HTTPS_ONLY), _HTTPS_ONLY)
)


class _Failed(Exception):
    """The handshake cannot go on; the argument is a short, fixed text."""


class Handshake:
    """A handshake under way.

    Args:
        sock: connected and non-blocking.
        flow: the connection's name.
        contexts: what handshakes have in common.
        tickets: how many session tickets the client gets at most.
        on_end: called once, maybe inside :meth:`advance`, with this object, what was established
            or ``None``, and why not. The socket is the callee's from then on, still open. Where
            something was established, the loop may watch it still: see ``TlsServer.accept``.
        loop: the running one; asking for it takes a system call.

    Attributes:
        deadline: for the owner's use.
        said: something was sent that the client should be able to read, an alert mostly.
    """

    __slots__ = (
        "_answer",
        "_base",
        "_complete",
        "_connection",
        "_fd",
        "_hello",
        "_loop",
        "_lowat",
        "_on_end",
        "_out",
        "_secrets",
        "_taken",
        "_tickets",
        "_watched",
        "_write_seq",
        "deadline",
        "flow",
        "said",
        "sock",
    )

    def __init__(
        self,
        sock: socket.socket,
        flow: Flow,
        contexts: TlsContexts,
        tickets: int,
        on_end: Callable[[Handshake, Established | None, str], None],
        *,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.sock = sock
        self._fd = sock.fileno()
        self.flow = flow
        self.said = False
        self.deadline = 0.0
        self._on_end: Callable[[Handshake, Established | None, str], None] | None = on_end
        self._tickets = tickets
        self._base = contexts.base  # its callbacks must live as long as the connection
        self._loop = loop
        self._connection: SSL.Connection | None = None  # none before there is a whole record
        self._secrets: list[bytes] = []  # of the key log
        self._hello = b""
        self._answer = b""
        self._out = b""
        self._taken = 0
        self._lowat = 1
        self._write_seq = 0
        self._watched = False
        self._complete = False

    def advance(self) -> None:
        """Go on with what has been received."""
        if self._on_end is None:
            self._unwatch()  # nobody has taken the watch over
            return
        try:
            data = peek(self._fd, _PEEK)
        except BlockingIOError:
            self._watch()
            return
        except OSError:
            self._end(None, "connection lost")
            return
        if not data:
            self._end(None, "closed by the client")
            return
        try:
            wanted = self._feed(data)
            self._flush()
            if self._complete or self._out:
                return
            if len(data) < self._lowat and self._fin_received():
                raise _Failed("closed by the client")
            self._wake_at(wanted)
            self._watch()
        except _Failed as failure:
            self._fail(str(failure))
        except OSError:
            self._end(None, "connection lost")

    def abandon(self, why: str) -> None:
        """Give up: too slow, or there are too many."""
        self._end(None, why)

    # -- input -----------------------------------------------------------------------------

    def _feed(self, data: bytes) -> int:
        """Feed whole records; how many octets have to be there for more: 1 if none are left."""
        ends, wanted, bad = flight(data, self._connection is not None)
        used = 0
        for end in ends:
            self._step(data[used:end])
            used = end
            if self._complete:
                break
        else:
            if bad >= 0:
                self._reject(data[used:], bad - used)
        if used:
            self._taken += used
            drop(self._fd, used)  # in the kernel, not copied
        if self._taken > _MAX_OCTETS:
            raise _Failed("too much data")
        return wanted - used if len(data) > used else 1

    def _step(self, records: bytes) -> None:
        """Feed one record, or those that belong to it."""
        connection = self._connection
        if connection is None:
            if records[0] != _HANDSHAKE:
                raise _Failed("not TLS")
            self._hello = records
            connection = self._connection = self._connect()
        feed(connection, records)
        self._shake(connection)

    def _connect(self) -> SSL.Connection:
        connection = SSL.Connection(self._base, None)
        connection.set_accept_state()
        return connection

    def _shake(self, connection: SSL.Connection) -> None:
        try:
            self._complete = shake(connection, self._secrets)
        except NoProtocol:
            raise _Failed("no application protocol") from None
        except SSL.Error as error:
            raise _Failed(reason(error)) from None
        except Exception:
            log.exception("%s: a fault in a TLS handshake", self.flow)
            raise _Failed("fault") from None

    def _reject(self, data: bytes, at: int) -> NoReturn:
        """Not a TLS record. OpenSSL says so to the client, unless that speaks HTTP.

        Args:
            data: what was not fed yet.
            at: where in it the bad record starts.
        """
        if self._connection is None:
            if all(octet in _METHOD for octet in data[:5]):
                self._answer = _NO_TLS
                raise _Failed("plain HTTP")
            self._connection = self._connect()
        feed(self._connection, data[: at + _HEADER_SIZE])
        try:
            self._shake(self._connection)
        except _Failed:
            pass
        is_tls = data[at] in _TYPES and data[at + 1] == 3
        raise _Failed("record too long" if is_tls else "not TLS")

    def _fin_received(self) -> bool:
        """Whether the client has ended its side: below the mark, nothing else wakes (tcp(7))."""
        poll = select.poll()
        poll.register(self.sock, select.POLLRDHUP)
        return bool(poll.poll(0))

    def _wake_at(self, octets: int) -> None:
        """Be woken for whole records only, and not by each octet."""
        if octets != self._lowat:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, octets)
            self._lowat = octets

    def _watch(self) -> None:
        if not self._watched:
            self._watched = True
            self._loop.add_reader(self.sock.fileno(), self.advance)

    def _unwatch(self) -> None:
        if self._watched:
            self._watched = False
            self._loop.remove_reader(self.sock.fileno())

    # -- output ----------------------------------------------------------------------------

    def _flush(self) -> None:
        """Send what OpenSSL has put out; the end is when all of it is with the kernel.

        Raises:
            OSError: the connection is lost.
        """
        out = b"" if self._connection is None else output(self._connection)
        if self._complete:
            out, self._write_seq = limit_tickets(out, self._tickets)
        if out:
            try:
                out = out[self.sock.send(out) :]
            except BlockingIOError:
                pass
        if out:
            self._out = out
            self._unwatch()
            self._loop.add_writer(self.sock.fileno(), self._send_on)
        elif self._complete:
            self._succeed()

    def _send_on(self) -> None:
        """The socket takes more of what is left to send."""
        try:
            self._out = self._out[self.sock.send(self._out) :]
        except BlockingIOError:
            return
        except OSError:
            self._end(None, "connection lost")
            return
        if self._out:
            return
        self._loop.remove_writer(self.sock.fileno())
        if self._complete:
            self._succeed()
        else:
            self.advance()

    # -- the end ---------------------------------------------------------------------------

    def _succeed(self) -> None:
        if self._connection is None:
            raise RuntimeError("a handshake without a connection cannot be complete")
        limit = fragment_limit(self._hello)
        try:
            established = establish(self._connection, self._secrets, self._write_seq, limit)
        except Unusable as failure:
            self._answer = failure.last_words
            self._fail(str(failure))
            return
        try:
            self._wake_at(1)
        except OSError:
            established.tls.wipe()
            self._end(None, "connection lost")
            return
        self._end(established, "")

    def _fail(self, why: str) -> None:
        """Send what there is to say, an alert mostly; a client that takes nothing misses it."""
        last_words = self._answer
        if not last_words and self._connection is not None:
            last_words = output(self._connection)
        if last_words:
            try:
                self.sock.send(last_words)
                self.said = True
            except OSError:
                pass
        self._end(None, why)

    def _end(self, established: Established | None, why: str) -> None:
        if self._on_end is None:
            return
        if established is None:
            self._unwatch()
        if self._out:
            self._loop.remove_writer(self.sock.fileno())
        self._out = b""
        self._connection = None
        self._secrets.clear()
        on_end, self._on_end = self._on_end, None
        on_end(self, established, why)
