"""Kernel TLS for sending: the kernel seals what is written to the socket (linux/tls.h).

As long as receiving stays with the userspace record layer (kernel_rx.py says when it does not), the
receive queue holds records as they came. The send queue holds ciphertext, and both can be peeked
at in repair mode: such a connection can be handed over at any moment at which the kernel has put
everything into the queue. It keeps back what the queue has no room for, and what was sent with
MSG_MORE; how much, it does not tell. But that can
be worked out::

    octets put into the queue = plaintext accepted + records sealed * overhead of a record

:meth:`KernelTx.settled` compares the two. A socket never gets rid of the TLS layer again, and
before Linux 6.14 its key cannot be changed either. Both are mended by moving the connection to a
new socket, where the userspace record layer goes on.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import termios
from typing import Final

from prism._ext.tls_record import MAX_FRAGMENT, TX, Tls, TlsError

__all__ = ["KernelTx", "add_layer", "overhead_of", "record_message"]

SOL_TLS: Final = 282  # linux/socket.h
TCP_ULP: Final = 31  # linux/tcp.h
TLS_TX: Final = 1  # linux/tls.h
TLS_SET_RECORD_TYPE: Final = 1  # linux/tls.h
ALERT: Final = 21  # content types (RFC 8446, B.1)
_HANDSHAKE: Final = 22
_KEY_UPDATE: Final = bytes((24, 0, 0, 1, 0))  # update_not_requested (RFC 8446, 4.6.3)

_BYTES_ACKED: Final = struct.Struct("120xQ")  # tcpi_bytes_acked in struct tcp_info
_NOTHING: Final = bytes(4)
_TLS_1_3: Final = 0x0304
_RECORDS: Final = 23726566 - 1024  # that AES-GCM may seal with one key (RFC 8446, 5.5), and a rest
CIPHERS: Final = {
    0x1301: "AES-128-GCM",
    0xC02B: "AES-128-GCM",
    0xC02F: "AES-128-GCM",
    0x1302: "AES-256-GCM",
    0xC02C: "AES-256-GCM",
    0xC030: "AES-256-GCM",
    0x1303: "CHACHA20-POLY1305",
    0xCCA8: "CHACHA20-POLY1305",
    0xCCA9: "CHACHA20-POLY1305",
}


def record_message(kind: int) -> list[tuple[int, int, bytes]]:
    """The control message for sendmsg(2) that makes its octets one record of this content type."""
    return [(SOL_TLS, TLS_SET_RECORD_TYPE, bytes((kind,)))]


def add_layer(sock: socket.socket) -> None:
    """Have the TLS layer on a socket, whose octets stay what they are until there are keys.

    Raises:
        OSError: the kernel has none (ENOENT), or the connection is not established (ENOTCONN).
    """
    try:
        sock.setsockopt(socket.IPPROTO_TCP, TCP_ULP, b"tls")
    except OSError as error:
        if error.errno != errno.EEXIST:
            raise


def overhead_of(tls: Tls) -> int:
    """Octets of a record beside its plaintext: header, explicit nonce, tag, content type."""
    if tls.version == _TLS_1_3:
        return 5 + 16 + 1
    return 5 + 16 + (0 if CIPHERS[tls.suite] == "CHACHA20-POLY1305" else 8)


class KernelTx:
    """The sending half of a connection that the kernel seals. ``Tls`` must not seal meanwhile.

    Attributes:
        closed: an alert that ends the connection was sent.
    """

    __slots__ = (
        "_accepted",
        "_base",
        "_first",
        "_info_size",
        "_overhead",
        "_room",
        "_sock",
        "_tls",
        "closed",
    )

    def __init__(self, sock: socket.socket, tls: Tls) -> None:
        """Hand the sending keys to the kernel.

        Raises:
            OSError: the kernel cannot: ENOENT (no TLS, or not this cipher), ENOTCONN (the client
                has finished sending). The socket can be used as before.
        """
        add_layer(sock)
        info = tls.crypto_info(TX)
        sock.setsockopt(SOL_TLS, TLS_TX, info)
        self._sock = sock
        self._tls = tls
        self._info_size = len(info)  # the kernel wants it exactly
        self._first = tls.write_seq
        self._overhead = overhead_of(tls)
        self._base = self._queued_ever()
        self._accepted = 0
        self._room = 0  # records that may be sealed before the kernel is asked how many it has
        self.closed = False

    def _queued_ever(self) -> int:
        """Octets put into the send queue so far, from an arbitrary beginning."""
        acked = self._acknowledged()
        while True:  # each turn is an acknowledgement that came just then
            queued = fcntl.ioctl(self._sock, termios.TIOCOUTQ, _NOTHING)
            before, acked = acked, self._acknowledged()
            if acked == before:
                return acked + int.from_bytes(queued, "little")

    def _acknowledged(self) -> int:
        info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED.size)
        (acked,) = _BYTES_ACKED.unpack(info)
        return int(acked)

    def sync(self) -> None:
        """Take the sequence number over into ``Tls``.

        Raises:
            OSError: the kernel does not tell.
            TlsError: it tells of another connection.
        """
        self._tls.sync(TX, self._sock.getsockopt(SOL_TLS, TLS_TX, self._info_size))

    def settled(self) -> bool:
        """Whether all that was sent is in the queue, sealed; takes the sequence number over."""
        try:
            self.sync()
        except (OSError, TlsError):
            return False
        sealed = self._accepted + (self._tls.write_seq - self._first) * self._overhead
        return self._queued_ever() - self._base == sealed

    def send(self, data: bytes | memoryview, more: bool) -> int:
        """Send what fits; ``more``: more of the record follows.

        Raises:
            BlockingIOError: nothing fits.
            OSError: the connection is lost.
            TlsError: the key is used up.
        """
        self._count(len(data))
        try:
            sent = self._sock.send(data, socket.MSG_MORE if more else 0)
        except BlockingIOError:
            self._push()
            raise
        self._accepted += sent
        return sent

    def send_file(self, fd: int, offset: int, n: int) -> int:
        """Send of a file what fits (sendfile(2)); raises like :meth:`send`."""
        self._count(n)
        try:
            sent = os.sendfile(self._sock.fileno(), fd, offset, n)
        except BlockingIOError:
            self._push()
            raise
        self._accepted += sent
        return sent

    def _push(self) -> None:
        """Have TCP send what is in its queue.

        The TLS layer gives it records with word that more is to come, and refuses more by itself
        when the queue is full: TCP would wait for more, and the socket never be writable again
        (seen on 6.1; TCP on its own pushes in this case). Setting the option pushes.
        """
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def alert(self, description: int) -> None:
        """Send an alert that ends the connection, 0 for close_notify; raises like :meth:`send`."""
        level = 2 if description else 1
        self.closed = True
        message = [bytes((level, description))]
        self._accepted += self._sock.sendmsg(message, record_message(ALERT))

    def update(self) -> None:
        """Send a KeyUpdate (RFC 8446, 4.6.3) and go on with the next key, where the kernel can.

        Raises:
            OSError: it does not take it: nothing more can be sent.
            TlsError: the key is used up.
        """
        self.sync()
        records = self._tls.write_seq + 1 - self._first
        self._tls.key_update()  # for the new key; the record itself is the kernel's
        self._accepted += self._sock.sendmsg([_KEY_UPDATE], record_message(_HANDSHAKE))
        self._sock.setsockopt(SOL_TLS, TLS_TX, self._tls.crypto_info(TX))
        self._accepted += records * self._overhead
        self._first = 0
        self._room = 0

    def _count(self, octets: int) -> None:
        """See to it that no key seals more records than it may."""
        records = octets // MAX_FRAGMENT + 2
        self._room -= records
        if self._room < 0:
            self.sync()
            self._room = _RECORDS - self._tls.write_seq - records
            if self._room < 0:
                raise TlsError(80, "the key has sealed as many records as it may")
