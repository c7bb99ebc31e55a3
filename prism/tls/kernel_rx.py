"""Kernel TLS for receiving: the kernel opens the records of a long upload (linux/tls.h).

What the kernel has opened can neither be peeked at nor put back, the octets that wait for the rest
of their record cannot be read at all, and once TLS_RX is set the send queue cannot be peeked at
either. So a connection can leave such a socket only when the kernel keeps nothing of it: both
queues empty, no record begun, none read in part. The first is for
:func:`prism._ext.tcp_repair.export_state` to see; the others follow from what came and went::

    octets received by TCP = plaintext delivered + records opened * overhead of a record

:meth:`KernelRx.settled` compares the two. Padded records (RFC 8446, 5.4) make the left side larger
than can be known here, and a client that has sent one stays where it is.

The kernel opens records of any type with the key that it has. A KeyUpdate among them ends the use
of that key; where the kernel cannot be given the next one (before Linux 6.14), nothing behind it
can be read, by nobody. Whether it can is :attr:`prism.tls.kernel_probe.Support.rekey`.
"""

from __future__ import annotations

import errno
import fcntl
import socket
import struct
import termios
from typing import Final

from prism._ext.tls_record import RX, Tls, TlsError
from prism.tls.kernel import SOL_TLS, add_layer, overhead_of

__all__ = ["KernelRx"]

TLS_RX: Final = 2  # linux/tls.h
TLS_GET_RECORD_TYPE: Final = 2  # linux/tls.h

_DATA: Final = 23  # content type (RFC 8446, B.1)
_BYTES_RECEIVED: Final = struct.Struct("128xQ")  # tcpi_bytes_received in struct tcp_info
_NOTHING: Final = bytes(4)
_CONTROL: Final = socket.CMSG_SPACE(1)
_BAD_RECORD_MAC: Final = 20  # alerts (RFC 8446, 6)
_PROTOCOL_VERSION: Final = 70
_INTERNAL_ERROR: Final = 80
_ALERTS: Final = {
    errno.EBADMSG: (_BAD_RECORD_MAC, "a record that does not authenticate"),
    errno.EMSGSIZE: (22, "a record that is too large"),
    errno.EINVAL: (_PROTOCOL_VERSION, "a record of another version"),
}
_GONE: Final = frozenset({errno.ECONNRESET, errno.ETIMEDOUT, errno.EPIPE, errno.EHOSTUNREACH})


class KernelRx:
    """The receiving half of a connection that the kernel opens. ``Tls`` must not read meanwhile.

    Attributes:
        failed: a record was refused: no more can be read, and what waits cannot be thrown away.
    """

    __slots__ = ("_base", "_delivered", "_first", "_info_size", "_overhead", "_sock", "_tls",
                 "failed")  # fmt: skip

    def __init__(self, sock: socket.socket, tls: Tls) -> None:
        """Hand the receiving keys to the kernel; the next octet in its queue begins a record.

        Raises:
            OSError: the kernel cannot, see :class:`prism.tls.kernel.KernelTx`. The socket can be
                used as before.
            ValueError: a handshake message was read in part.
        """
        if tls.in_message:
            raise ValueError("the kernel cannot go on in the middle of a handshake message")
        self._sock = sock
        self._tls = tls
        self._first = tls.read_seq
        self._overhead = overhead_of(tls)
        add_layer(sock)
        info = tls.crypto_info(RX)
        self._info_size = len(info)  # the kernel wants it exactly
        # Before the keys: the kernel begins to look for records at once.
        self._base = self._read_ever()
        sock.setsockopt(SOL_TLS, TLS_RX, info)
        self._delivered = 0
        self.failed = False

    def _received(self) -> int:
        info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_RECEIVED.size)
        (received,) = _BYTES_RECEIVED.unpack(info)
        return int(received)

    def _unread(self) -> int:
        return int.from_bytes(fcntl.ioctl(self._sock, termios.FIONREAD, _NOTHING), "little")

    def _read_ever(self) -> int:
        """Octets taken from the receive queue so far, from an arbitrary beginning."""
        received = self._received()
        while True:  # each turn is a segment that came just then
            unread = self._unread()
            before, received = received, self._received()
            if received == before:
                return received - unread

    def sync(self) -> None:
        """Take the sequence number over into ``Tls``.

        Raises:
            OSError: the kernel does not tell.
            TlsError: it tells of another connection.
        """
        self._tls.sync(RX, self._sock.getsockopt(SOL_TLS, TLS_RX, self._info_size))

    def settled(self) -> bool:
        """Whether all that came was read, to the end of a record; takes the number over."""
        if self.failed:
            return False
        try:
            self.sync()
            records = self._tls.read_seq - self._first
            opened = self._delivered + records * self._overhead
            return self._received() - self._base == opened
        except (OSError, TlsError, ValueError):
            return False

    def receive(self, n: int) -> bytes:
        """Take up to ``n`` octets of plaintext; empty where the client has ended either layer.

        ``Tls.read_closed`` tells a close_notify from a mere FIN.

        Raises:
            BlockingIOError: no whole record is there.
            TlsError: the client broke the record protocol, or the key cannot be changed.
            OSError: the connection is lost.
        """
        while not self._tls.read_closed:
            try:
                data, control, _, _ = self._sock.recvmsg(n, _CONTROL)
            except BlockingIOError:
                raise
            except OSError as error:
                raise self._refused(error) from None
            kind = next((each[2][0] for each in control if _is_type(each)), _DATA)
            self._delivered += len(data)
            if kind == _DATA:
                return data
            self._take_in(kind, data)
        return b""

    def _take_in(self, kind: int, data: bytes) -> None:
        """Deal with an alert or a handshake message."""
        try:
            self.sync()
            records = self._tls.read_seq - self._first
            self._tls.note(kind, data)
            if self._tls.read_seq == 0:  # a KeyUpdate was complete
                # The next key's numbers begin at 0; what was counted under this one stays counted.
                self._delivered += records * self._overhead
                self._first = 0
                self._sock.setsockopt(SOL_TLS, TLS_RX, self._tls.crypto_info(RX))
        except OSError as error:
            self.failed = True
            raise TlsError(
                _INTERNAL_ERROR, f"TLS: the kernel cannot change the key: {error.strerror}"
            ) from None
        except TlsError:
            self.failed = True
            raise

    def _refused(self, error: OSError) -> Exception:
        """What an error of the kernel's means."""
        if error.errno in _GONE:
            return error
        self.failed = True
        alert, what = _ALERTS.get(error.errno or 0, (_INTERNAL_ERROR, error.strerror))
        # Or the alert could not be sent: the error stands for both directions.
        self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return TlsError(alert, f"TLS: {what} (alert {alert})")


def _is_type(control: tuple[int, int, bytes]) -> bool:
    level, kind, data = control
    return level == SOL_TLS and kind == TLS_GET_RECORD_TYPE and len(data) == 1
