"""The ``[tls]`` section of the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from prism.config_types import HostPort, Seconds, Section

__all__ = ["CertificateConfig", "Suite", "TlsConfig"]

Suite = Literal["AES-128-GCM", "AES-256-GCM", "CHACHA20-POLY1305"]
"""The cipher of a TLS 1.3 suite and of the ECDHE suites of TLS 1.2."""


class CertificateConfig(Section):
    """A certificate and its key."""

    certificate: Path = Field(
        description="PEM file: the certificate, then those of its issuers. Relative to this file."
    )
    key: Path = Field(
        description="PEM file: its private key, unencrypted; must not be readable by others. "
        "Relative to this file."
    )


class TlsConfig(Section):
    """TLS at the frontend, which takes up changed certificates. A backend needs only `offload`."""

    listen: tuple[HostPort, ...] = Field(
        (),
        max_length=64,
        description="Service addresses that speak TLS; the frontend listens on them, too.",
    )
    certificates: tuple[CertificateConfig, ...] = Field(
        (),
        max_length=1024,
        description="Needed where `listen` has addresses. Chosen by the name the client asks for; "
        "the first one is for all other names. Certificates with ECDSA and RSA keys may stand side "
        "by side.",
    )
    min_version: Literal["1.2", "1.3"] = Field("1.2", description="Oldest version spoken.")
    suites: tuple[Suite, ...] = Field(
        ("AES-128-GCM", "AES-256-GCM", "CHACHA20-POLY1305"),
        min_length=1,
        max_length=3,
        description="Ciphers, the preferred one first.",
    )
    client_auth: Literal["none", "request", "require"] = Field(
        "none",
        description="Whether clients show certificates. `request`: they may; a bad one is refused.",
    )
    client_ca: Path | None = Field(
        None,
        description="PEM file: the certificates that clients' certificates are checked against. "
        "Relative to this file.",
    )
    tickets: int = Field(
        2, ge=0, le=2, description="Session tickets for each handshake; 0: no resumption."
    )
    handshake_timeout: Seconds = Field(10.0, description="Seconds a handshake may take.")
    max_handshakes: int = Field(
        1024,
        ge=1,
        le=1_000_000,
        description="Handshakes of one worker at a time; a further one ends the oldest.",
    )
    offload: Literal["auto", "kernel", "user"] = Field(
        "auto",
        description="Who makes the TLS records of large files at a backend; `auto`: the kernel "
        "where it can, `user`: the process, as with everything else. With `kernel` the kernel also "
        "opens those of large uploads, and a backend does not start where it cannot.",
    )

    def with_absolute_paths(self, base: Path) -> Self:
        """The same with its paths made absolute; relative ones are relative to ``base``."""
        certificates = tuple(
            CertificateConfig(
                certificate=base / each.certificate.expanduser(), key=base / each.key.expanduser()
            )
            for each in self.certificates
        )
        client_ca = self.client_ca and base / self.client_ca.expanduser()
        return self.model_copy(update={"certificates": certificates, "client_ca": client_ca})

    @model_validator(mode="after")
    def _plausible(self) -> Self:
        if self.listen and not self.certificates:
            raise ValueError("listen needs certificates: add a [[tls.certificates]] entry")
        if len(set(self.suites)) < len(self.suites):
            raise ValueError("suites has one suite twice")
        if self.client_auth != "none" and self.client_ca is None:
            raise ValueError(f'client_auth = "{self.client_auth}" needs client_ca')
        return self
