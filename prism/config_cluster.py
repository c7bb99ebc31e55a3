"""The ``[cluster]`` section of the configuration, and the keys that are made from its secret."""

from __future__ import annotations

import base64
import binascii
import hashlib
from pathlib import Path
from typing import Literal

from pydantic import Field, PrivateAttr, SecretStr

from prism.config_types import HostPort, Section

__all__ = ["ClusterConfig"]

_MIN_KEY = 16


class ClusterConfig(Section):
    """What all members of the cluster have in common. Required."""

    key: SecretStr | None = Field(
        None, description="Cluster key: at least 16 octets in hexadecimal or Base64. Or `key_file`."
    )
    key_file: Path | None = Field(
        None,
        description="File that holds the cluster key; must not be readable by others. "
        "Relative to this file.",
    )
    control: HostPort = Field(
        description="Where the switch answers control datagrams (UDP).",
        examples=["10.77.0.1:4760"],
    )
    services: tuple[HostPort, ...] = Field(
        (),
        max_length=64,
        description="Service addresses the clients connect to; the default of `frontend.listen`.",
    )
    serves: Literal["objects", "application"] = Field(
        "objects",
        description="What the backends serve: `objects`, with `GET /` listing those of all "
        "backends, or an `application` (`backend.app` or `backend.upstream`), with `GET /` a "
        "request like any other.",
    )
    lease: float = Field(
        2.0, ge=0.1, le=60, description="Seconds without renewal after which a node counts as dead."
    )

    pki_dir: Path = Field(
        Path("/etc/prism/pki"),
        description="Directory with `ca.pem` and each node's `NAME.pem` and `NAME.key`, as "
        "`prism-proxy pki` makes them. Relative to this file.",
    )
    ca: Path | None = Field(
        None,
        description="Certificate of the CA that nodes trust each other by; default: `ca.pem` in "
        "`pki_dir`.",
    )

    _secret: bytes = PrivateAttr(b"")

    def control_key(self) -> bytes:
        """The 16-octet key of the control datagrams' SipHash (docs/protocol.md)."""
        return self._derive(b"prism control", 16)

    def channel_key(self) -> bytes:
        """The 32-octet key that authenticates handoff channels."""
        return self._derive(b"prism channel", 32)

    def _derive(self, purpose: bytes, size: int) -> bytes:
        # One secret, one key for each use: what one protocol leaks is no use in the other.
        return hashlib.blake2b(self._secret, digest_size=size, person=purpose).digest()

    def read_key(self, base: Path) -> None:
        """Take the key from where the file says it is.

        Raises:
            ValueError: there is none, or it cannot be used; the message is safe to show.
        """
        if (self.key is None) == (self.key_file is None):
            raise ValueError("give exactly one of key_file and key")
        if self.key is not None:
            text = self.key.get_secret_value()
        else:
            path = base / Path(str(self.key_file)).expanduser()
            try:
                mode = path.stat().st_mode & 0o777
                text = path.read_text("ascii", errors="replace")
            except OSError as error:
                raise ValueError(f"cannot read {path}: {error.strerror}") from None
            if mode & 0o077:
                raise ValueError(f"{path} is open to others (mode {mode:o}): chmod 600 {path}")
        self._secret = _decode_key(text.strip())


def _decode_key(text: str) -> bytes:
    try:
        secret = bytes.fromhex(text)
    except ValueError:
        try:
            secret = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            secret = b""
    if not _MIN_KEY <= len(secret) <= 1024:
        raise ValueError(
            f"a key of at least {_MIN_KEY} octets in hexadecimal or Base64 is wanted; "
            "make one with: openssl rand -hex 32"
        )
    return secret
