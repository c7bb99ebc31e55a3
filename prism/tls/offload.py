"""TLS streams that have the kernel seal large files, and open large uploads where it has to.

Sealing in the kernel saves copying a file into the process and back (sendfile(2)); asking for it
costs three system calls for each connection. So a stream begins with the userspace record layer,
and goes over at the first file of which ``KERNEL_FROM`` octets are to be sent. It does not go back
on the same socket. Until Linux 6.14 the key cannot be changed there either; where it has to be,
since the client asks for a KeyUpdate (RFC 8446, 4.6.3) or the key has sealed enough,
:meth:`KernelTlsStream.must_move` says so, and the connection is handed over, if need be to this
very node; the new owner begins with the userspace record layer again.

Receiving goes over, with ``tls.offload = "kernel"``, at a request's body whose declared length is
``RECEIVE_FROM`` or more. From then on everything is read as soon as it is seen, the heads of the
next requests included: they are ``pending``, and travel so. The connection can leave the socket
when the kernel keeps nothing of it (:meth:`KernelRx.settled`, and all that was sent acknowledged),
which mostly comes to pass with the next request's head, and is waited for where it has not
(:attr:`KernelTlsStream.unsettled`). TLS 1.3 is received only where the kernel can be given the key
behind a KeyUpdate, which would cost the connection otherwise.
"""

from __future__ import annotations

import errno
import logging
import socket
from typing import Final, Literal

from prism._ext.tls_record import Tls, TlsError
from prism.errors import ConfigError
from prism.flow import Flow
from prism.http.stream import PEEK_LIMIT
from prism.tls.kernel import KernelTx
from prism.tls.kernel_probe import Support, probe
from prism.tls.kernel_rx import KernelRx
from prism.tls.stream import TlsBroken, TlsStream

__all__ = ["KERNEL_FROM", "RECEIVE_FROM", "KernelTlsStream", "Mode", "check", "stream"]

log = logging.getLogger(__name__)

Mode = Literal["auto", "kernel", "user"]
"""Who seals large files: the kernel where it can, or must, or never."""

KERNEL_FROM: Final = 64 * 1024
"""Octets of a file from which on the kernel seals."""

RECEIVE_FROM: Final = 1024 * 1024
"""Octets of a request's body from which on the kernel opens its records, where it shall."""

_HANDSHAKE: Final = 22  # content type (RFC 8446, B.1)
_TLS_1_3: Final = 0x0304


def check(mode: Mode, support: Support | None = None) -> None:
    """See to it that the kernel can what ``mode`` asks for.

    Args:
        mode: as configured.
        support: what the kernel can; by default it is asked, unless nobody wants to know.

    Raises:
        ConfigError: it has to, and cannot.
    """
    if mode == "user":
        return
    support = support or probe()
    if support.why and mode == "kernel":
        raise ConfigError(
            f'tls.offload = "kernel", but the kernel cannot seal TLS records ({support.why}): '
            'modprobe tls, on a kernel with CONFIG_TLS and the ciphers; or set tls.offload = "auto"'
        )
    log.info(
        "the kernel seals TLS records with %s", ", ".join(sorted(support.ciphers)) or "nothing"
    )


def stream(
    mode: Mode,
    sock: socket.socket,
    tls: Tls,
    flow: Flow | None = None,
    pending: bytes = b"",
    *,
    skip: int = 0,
    facts: bytes = b"",
) -> TlsStream:
    """A stream of the class that ``mode`` asks for; the arguments are those of TlsStream."""
    if mode == "user":
        return TlsStream(sock, tls, flow, pending, skip=skip, facts=facts)
    found = KernelTlsStream(sock, tls, flow, pending, skip=skip, facts=facts)
    found.receives = mode == "kernel"
    return found


class KernelTlsStream(TlsStream):
    """A TLS stream whose large files the kernel seals, where it can; see the module's text.

    Attributes:
        receives: the kernel shall open large uploads, too.
    """

    __slots__ = ("_rekey", "_rx", "_tried", "_tx", "receives")

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
        super().__init__(sock, tls, flow, pending, skip=skip, facts=facts)
        self._tx: KernelTx | None = None
        self._tried = False
        self._rx: KernelRx | None = None
        self._rekey = False
        self.receives = False

    @property
    def in_kernel(self) -> bool:
        """Whether the kernel seals."""
        return self._tx is not None

    @property
    def opened_by_kernel(self) -> bool:
        """Whether the kernel opens what comes."""
        return self._rx is not None

    # -- travelling ------------------------------------------------------------------------

    @property
    def movable(self) -> bool:
        """As for every TLS stream, and the kernel keeps nothing back either."""
        if not super().movable or not (self._tx is None or self._tx.settled()):
            return False
        return self._rx is None or (not self.unsent() and self._rx.settled())

    @property
    def unsettled(self) -> bool:
        """Not movable because of what the kernel opens; takes in what has become whole."""
        if self._rx is None or self._broken or self._eof or self.movable:
            return False
        try:
            self.peek()
        except OSError:
            pass  # nothing more is whole, or whoever reads next will see
        return len(self._pending) < PEEK_LIMIT and not self._broken and not self._eof

    def must_move(self, body: bool) -> bool:
        """Whether a request cannot be answered on this socket; see :meth:`Stream.must_move`."""
        if self._tx is None or self._broken:
            return False
        if body and self.tls.version == _TLS_1_3 and not self._rekey:
            return True  # a KeyUpdate may be among its records: too late to move then
        # The request came in records that are looked at, not committed.
        ends = self._opened.ends[self._done :] if self._opened is not None else ()
        if not self._rekey and any(kind == _HANDSHAKE for kind, _, _ in ends):
            return True
        if self._rekey:
            self._flush_owed()
        try:
            self._tx.sync()
            return self.tls.sealed_size(0) > 0  # something is due in front of the next record
        except (OSError, TlsError):
            return False  # it is lost, or no more may be sealed with this key on any socket

    def export_tls(self) -> bytes:
        """As for every TLS stream, with the kernel's sequence numbers.

        Raises:
            OSError: the kernel does not tell them, or has begun to read a record.
            TlsError: what it tells cannot be.
        """
        if self._rx is not None and not self._rx.settled():
            raise OSError(errno.EBUSY, "the kernel has a part of a TLS record")
        if self._tx is not None:
            self._tx.sync()
        return super().export_tls()

    # -- reading ---------------------------------------------------------------------------

    def expect(self, n: int) -> None:
        """A body of ``n`` octets comes: have the kernel open it, if that is asked for."""
        if self.receives and self._rx is None and n >= RECEIVE_FROM:
            self.receives = self._receive_in_kernel()

    def _receive_in_kernel(self) -> bool:
        """Have the kernel open what comes from now on; ``False``: it goes on as before."""
        tls = self.tls
        support = probe()
        if self._broken or self._part or not support.receives(tls):
            return False
        try:
            opened = self._open()
        except BlockingIOError:
            opened = None
        if opened is not None:
            if opened.error is not None or opened.closed:
                return False
            self._pull(opened)  # the kernel is to begin with a record
        if self._part or self._eof or self._broken:
            return False
        self.reset_lowat()
        try:
            self._rx = KernelRx(self.sock, tls)
        except (OSError, ValueError) as error:
            log.debug("%s: the kernel does not open for it: %s", self._flow, error)
            return False
        self._rekey = support.rekey
        return True

    def peek(self, limit: int = PEEK_LIMIT) -> bytes:
        """What was received and not consumed; see :meth:`Stream.peek`."""
        if self._rx is None:
            return super().peek(limit)
        missing = limit - len(self._pending)
        if missing > 0 and not self._eof:
            try:
                self._pending += self._read(self._rx, missing)
            except BlockingIOError:
                if not self._pending:
                    raise
        return self._pending[:limit]

    def receive(self, n: int) -> bytes:
        """Takes up to ``n`` octets; see :meth:`Stream.receive`."""
        if self._rx is None or self._broken:
            return super().receive(n)
        if self._pending:
            data, self._pending = self._pending[:n], self._pending[n:]
            return data
        return b"" if self._eof else self._read(self._rx, n)

    def _read(self, rx: KernelRx, n: int) -> bytes:
        if self._broken:
            raise TlsBroken("the connection was given up")
        try:
            data = rx.receive(n)
        except TlsError as error:
            self._fail(error)
        if self.tls.owes:
            self._flush_owed()
        if not data and self.tls.read_closed:
            self._end_of_tls()
        elif not data:
            self._end_of_tcp()
        return data

    # -- writing ---------------------------------------------------------------------------

    def send(self, data: bytes | memoryview, more: bool = False) -> int:
        """Sends; see :meth:`Stream.send`."""
        if self._tx is None:
            return super().send(data, more)
        try:
            return self._allowed(self._tx).send(data, more)
        except TlsError as error:
            raise TlsBroken(str(error)) from None

    def send_file(self, fd: int, offset: int, n: int) -> int:
        """Sends a file's octets, with sendfile(2) from now on if they are many."""
        if self._tx is None and (self._tried or n < KERNEL_FROM or not self._go_over()):
            return super().send_file(fd, offset, n)
        if self._tx is None:
            raise RuntimeError("the kernel was to seal and does not")
        try:
            return self._allowed(self._tx).send_file(fd, offset, n)
        except TlsError as error:
            raise TlsBroken(str(error)) from None

    def _allowed(self, tx: KernelTx) -> KernelTx:
        """No application data before a KeyUpdate that the client waits for."""
        if self._broken or tx.closed or self.tls.owes:
            raise TlsBroken("nothing can be sent on this socket any more")
        return tx

    def _go_over(self) -> bool:
        """Have the kernel seal from now on; ``False``: it goes on as before."""
        tls = self.tls
        if self._out or self._broken:
            return False
        self._tried = True
        try:
            if not probe().covers(tls) or tls.sealed_size(0):
                return False
            self._tx = KernelTx(self.sock, tls)
            self._rekey = probe().rekey
        except (OSError, TlsError) as error:
            log.debug("%s: the kernel does not seal for it: %s", self._flow, error)
            return False
        return True

    def _flush_owed(self) -> None:
        """Answer what is owed; without a new key in the kernel only by moving, a request later."""
        if self._tx is None:
            super()._flush_owed()
        elif self._rekey and not self._tx.closed:
            try:
                self._tx.sync()
                if self.tls.sealed_size(0):
                    self._tx.update()
            except (OSError, TlsError) as error:
                log.debug("%s: a KeyUpdate is late: %s", self._flow, error)

    # -- the end ---------------------------------------------------------------------------

    def _say_goodbye(self) -> None:
        if self._tx is None:
            super()._say_goodbye()
        elif not self._broken and not self._tx.closed:
            try:
                self._tx.alert(0)
            except OSError:
                pass  # the client has gone, or takes nothing: it sees the connection cut

    def _alert(self, description: int) -> None:
        if self._tx is None:
            super()._alert(description)
        else:
            self._tx.alert(description)

    def _forget(self) -> None:
        super()._forget()
        self._tx = None
        self._rx = None
