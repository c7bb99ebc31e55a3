"""What the kernel's TLS can, found out by trying."""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass
from functools import cache
from typing import Final

from prism._ext.tls_record import MAX_FRAGMENT, Tls
from prism.tls.kernel import CIPHERS, TCP_ULP, KernelTx
from prism.tls.kernel_rx import KernelRx

__all__ = ["Support", "probe"]

_PATIENCE: Final = 2.0  # seconds
_TLS_1_3: Final = 0x0304
_PROBES: Final = {0x1301: 32, 0x1302: 48, 0x1303: 32}  # suite: octets of a secret


@dataclass(frozen=True, slots=True)
class Support:
    """What the kernel seals and opens.

    Attributes:
        ciphers: by their names in the configuration.
        why: why it is not all; empty: it is.
        rekey: a TLS 1.3 key can be changed on the socket (Linux 6.14 and later).
    """

    ciphers: frozenset[str]
    why: str
    rekey: bool = False

    def covers(self, tls: Tls) -> bool:
        """Whether the kernel can seal for this connection: it knows full-sized records only."""
        return CIPHERS.get(tls.suite) in self.ciphers and tls.max_fragment == MAX_FRAGMENT

    def receives(self, tls: Tls) -> bool:
        """Whether the kernel can open for this connection, whatever the client does meanwhile.

        In TLS 1.3 the client may send a KeyUpdate at any time.
        """
        return self.covers(tls) and (self.rekey or tls.version != _TLS_1_3)


@cache
def probe() -> Support:
    """Find out, once for each process, by sealing for connections over the loopback device.

    It may take some milliseconds: the kernel loads the modules, and tests the ciphers, on demand.
    Where the loopback device is down, all ciphers are taken to be there if kernel TLS is.
    """
    if why := _missing_layer():
        return Support(frozenset(), why)
    found, problems = set(), []
    rekey = False
    for suite, length in _PROBES.items():
        try:
            rekey = _try_cipher(suite, length)
        except OSError as error:
            problems.append(f"{CIPHERS[suite]}: {error.strerror}")
        else:
            found.add(CIPHERS[suite])
    return Support(frozenset(found), "; ".join(problems), rekey)


def _missing_layer() -> str:
    """Why sockets cannot have the TLS layer; empty: they can."""
    with socket.socket() as bare:
        try:
            bare.setsockopt(socket.IPPROTO_TCP, TCP_ULP, b"tls")
        except OSError as error:
            # Only a layer that is there minds that there is no connection.
            return "" if error.errno == errno.ENOTCONN else f"TCP_ULP: {error.strerror}"
    return ""


def _try_cipher(suite: int, length: int) -> bool:
    """Seal and open with it in the kernel; whether the key can be changed.

    Raises:
        OSError: it cannot.
    """
    secret = bytes(length)
    tls = Tls.from_traffic_secrets(suite, secret, secret, is_server=True)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        try:
            client = socket.create_connection(listener.getsockname(), _PATIENCE)
        except OSError:
            return False  # nothing to try it with
        with client, listener.accept()[0] as server:
            tx = KernelTx(server, tls)
            KernelRx(server, tls)
            try:
                tx.update()
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                return False
    return True
