"""TLS of P4Runtime connections: PEM files for gRPC, looked at before they are given to it.

gRPC takes any octets as a certificate, and tells of what is wrong with them at the first
handshake, if at all.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc

from prism.config_switch import SwitchConfig
from prism.errors import ConfigError, SwitchError

__all__ = ["NO_TLS", "TlsFiles", "tls_files", "unreachable"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """PEM files of one end.

    Attributes:
        ca: what the other end's certificate is checked against.
        certificate: this end's, then its issuers'.
        key: its private key.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def controller(self) -> Any | None:
        """Channel credentials; ``None`` without a CA: in the clear.

        Raises:
            ConfigError: a file cannot be used.
        """
        if self.ca is None:
            return None
        self._check()
        return grpc.ssl_channel_credentials(*map(_content, (self.ca, self.key, self.certificate)))

    def switch(self) -> Any | None:
        """Server credentials, with a CA such that controllers have to show a certificate.

        ``None`` without a certificate: in the clear.

        Raises:
            ConfigError: a file cannot be used.
        """
        if self.certificate is None:
            return None
        self._check()
        pair = (_content(self.key), _content(self.certificate))
        return grpc.ssl_server_credentials([pair], _content(self.ca), self.ca is not None)

    def _check(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if self.ca is not None:
            try:
                context.load_verify_locations(self.ca)
            except OSError as error:
                raise ConfigError(f"{self.ca}: {_why(error, 'certificate')}") from None
        if self.certificate is not None:
            try:
                context.load_cert_chain(self.certificate, self.key, "")
            except OSError as error:
                names = f"{self.certificate} and {self.key}"
                raise ConfigError(f"{names}: {_why(error, 'certificate with its key')}") from None


NO_TLS: Final = TlsFiles()


def tls_files(switch: SwitchConfig) -> TlsFiles:
    """Those that the ``[switch]`` section names."""
    return TlsFiles(
        ca=switch.p4runtime_ca, certificate=switch.p4runtime_certificate, key=switch.p4runtime_key
    )


def _content(path: Path | None) -> bytes | None:
    return None if path is None else path.read_bytes()


def _why(error: OSError, wanted: str) -> str:
    if isinstance(error, ssl.SSLError):
        mismatch = "KEY_VALUES_MISMATCH" in str(error)
        return "the key is another's" if mismatch else f"not a PEM {wanted}"
    return f"cannot be read: {error.strerror}"


def unreachable(address: str, files: TlsFiles, details: str) -> SwitchError:
    """What to tell when no connection comes about.

    Args:
        address: of the switch.
        files: those of this end.
        details: gRPC's own words.
    """
    host = address.rpartition(":")[0]
    if "CERTIFICATE_VERIFY_FAILED" in details:
        why = f"{files.ca} does not vouch for its certificate: is it the CA of this switch?"
    elif "Hostname Verification" in details or "not in peer certificate" in details:
        why = f"its certificate is not for {host}: use the name that it is for"
    elif "WRONG_VERSION_NUMBER" in details:
        why = "it does not speak TLS: give it a certificate, or leave p4runtime_ca out"
    elif "andshake" in details or "CERTIFICATE" in details or "ocket closed" in details:
        certificate = "another certificate" if files.certificate else "a certificate"
        why = f"it ends the connection: does it want TLS, or {certificate} of its controllers?"
        why += f" ({details})"
    else:
        why = details.rpartition(": ")[2]
    return SwitchError(f"the P4Runtime switch at {address} cannot be reached: {why}")
