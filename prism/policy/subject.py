"""What a policy looks at: one request, its client, and the readings of its path."""

from __future__ import annotations

import re
from urllib.parse import unquote_to_bytes

from prism.http.head import RequestHead
from prism.tls.peer import Peer, unpack_peer

__all__ = ["Subject", "readings"]

_DECODINGS = 3  # how often servers that decode too often may decode
_PARAMETERS = re.compile(r";[^/]*")


class Subject:
    """One request, as rules see it.

    Attributes:
        head: the request.
        client: the client's address, text.
        facts: what its TLS handshake told, packed (:mod:`prism.tls.peer`).
        host: the host asked for: lower case, without port and final dot.
        path: the decoded, normalised path, with its leading slash.
    """

    __slots__ = ("_peer", "_readings", "client", "facts", "head", "host", "path")

    def __init__(self, head: RequestHead, client: str, facts: bytes = b"") -> None:
        self.head = head
        self.client = client
        self.facts = facts
        self.host = _host(head.host)
        self.path = _text(head.key if head.key == b"*" else b"/" + head.key)
        self._readings: tuple[str, ...] | None = None
        self._peer: Peer | None = None

    @property
    def peer(self) -> Peer:
        """What the TLS handshake told of the client."""
        if self._peer is None:
            self._peer = unpack_peer(self.facts)
        return self._peer

    @property
    def readings(self) -> tuple[str, ...]:
        """Every path that some server might take this one for; the first is :attr:`path`."""
        if self._readings is None:
            self._readings = readings(self.path, _text(self.head.path))
        return self._readings


def _text(octets: bytes) -> str:
    return octets.decode("utf-8", "surrogateescape")


def _host(authority: bytes) -> str:
    host = authority.decode("latin-1").lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].removesuffix(".")


def _normal(path: str) -> str:
    """Without empty and dot segments; climbing above the root ends there."""
    kept: list[str] = []
    for segment in path.split("/"):
        if segment == "..":
            if kept:
                kept.pop()
        elif segment not in ("", "."):
            kept.append(segment)
    tail = "/" if kept and path.endswith(("/", "/.", "/..")) else ""
    return "/" + "/".join(kept) + tail


def readings(path: str, raw: str) -> tuple[str, ...]:
    """The ways to read a path.

    Prism reads it once: escapes decoded, empty and dot segments removed (RFC 3986, section 5.2.4).
    Servers behind it may stop short of that, go on and decode again, drop what follows a semicolon
    in a segment, or take a backslash for a slash.

    Args:
        path: decoded and normalised, as Prism reads it.
        raw: as the client has sent it.
    """
    if raw == path and not _ODD.search(path):
        return (path,)
    found = dict.fromkeys((path, raw))
    latest = raw
    for _ in range(_DECODINGS):
        decoded = _text(unquote_to_bytes(latest.encode("utf-8", "surrogateescape")))
        for form in (decoded, decoded.replace("\\", "/")):
            found[form] = None
            found[_normal(form)] = None
            stripped = _PARAMETERS.sub("", form)
            found[stripped] = None
            found[_normal(stripped)] = None
        if decoded == latest:
            break
        latest = decoded
    return tuple(found)


_ODD = re.compile(r"[%;\\]|//|/\.")
