"""TLS streams that have the kernel seal large files.

Sealing in the kernel saves copying a file into the process and back (sendfile(2)); asking for it
costs three system calls for each connection. So a stream begins with the userspace record layer,
and goes over at the first file of which ``KERNEL_FROM`` octets are to be sent. It does not go back
on the same socket: until Linux 6.14 the key cannot be changed there. Where it has to be, since
the client asks for a KeyUpdate (RFC 8446, 4.6.3) or the key has sealed enough,
:meth:`KernelTlsStream.must_move` says so, and the connection is handed over, if need be to this
very node; the new owner begins with the userspace record layer again.

Receiving is never left to the kernel: what it has opened cannot be peeked at nor put back, so a
connection could not be handed over with a request in its queue.
"""

from __future__ import annotations

import logging
import socket
from typing import Final, Literal

from prism._ext.tls_record import Tls, TlsError
from prism.errors import ConfigError
from prism.flow import Flow
from prism.tls.kernel import KernelTx
from prism.tls.kernel_probe import Support, probe
from prism.tls.stream import TlsBroken, TlsStream

__all__ = ["KERNEL_FROM", "KernelTlsStream", "Mode", "check", "stream"]

log = logging.getLogger(__name__)

Mode = Literal["auto", "kernel", "user"]
"""Who seals large files: the kernel where it can, or must, or never."""

KERNEL_FROM: Final = 64 * 1024
"""Octets of a file from which on the kernel seals."""

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
    kind = TlsStream if mode == "user" else KernelTlsStream
    return kind(sock, tls, flow, pending, skip=skip, facts=facts)


class KernelTlsStream(TlsStream):
    """A TLS stream whose large files the kernel seals, where it can; see the module's text."""

    __slots__ = ("_tried", "_tx")

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

    @property
    def in_kernel(self) -> bool:
        """Whether the kernel seals."""
        return self._tx is not None

    # -- travelling ------------------------------------------------------------------------

    @property
    def movable(self) -> bool:
        """As for every TLS stream, and the kernel keeps nothing back either."""
        return super().movable and (self._tx is None or self._tx.settled())

    def must_move(self, body: bool) -> bool:
        """Whether a request cannot be answered on this socket; see :meth:`Stream.must_move`."""
        if self._tx is None or self._broken:
            return False
        if body and self.tls.version == _TLS_1_3:
            return True  # a KeyUpdate may be among its records: too late to move then
        # The request came in records that are looked at, not committed.
        ends = self._opened.ends[self._done :] if self._opened is not None else ()
        if any(kind == _HANDSHAKE for kind, _, _ in ends):
            return True
        try:
            self._tx.sync()
            return self.tls.sealed_size(0) > 0  # something is due in front of the next record
        except (OSError, TlsError):
            return False  # it is lost, or no more may be sealed with this key on any socket

    def export_tls(self) -> bytes:
        """As for every TLS stream, with the kernel's sequence number.

        Raises:
            OSError: the kernel does not tell it.
            TlsError: what it tells cannot be.
        """
        if self._tx is not None:
            self._tx.sync()
        return super().export_tls()

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
        except (OSError, TlsError) as error:
            log.debug("%s: the kernel does not seal for it: %s", self._flow, error)
            return False
        return True

    def _flush_owed(self) -> None:
        if self._tx is None:
            super()._flush_owed()
        # Else with the next request, by moving: until then there is nothing to say.

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
