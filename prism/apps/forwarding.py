"""What a relayed request says of the client and of who relays it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

from prism.http.head import RequestHead
from prism.http.origin import FIELD, Origin, origin_field

__all__ = ["DROPPED", "FORWARDING", "Forwarder", "Forwarding"]

Forwarding = Literal["origin", "x-forwarded", "forwarded", "none"]
"""``origin``: to another node, which says the rest. The others are for the server that answers."""

Forwarder = Callable[[RequestHead, Origin | None], bytes]
"""Makes the lines, with their line ends."""

_VIA: Final = b"1.1 prism"

DROPPED: Final[dict[Forwarding, frozenset[bytes]]] = {
    "origin": frozenset((FIELD,)),
    "x-forwarded": frozenset((FIELD, b"via", b"x-forwarded-for", b"x-forwarded-proto")),
    "forwarded": frozenset((FIELD, b"via", b"forwarded")),
    "none": frozenset((FIELD, b"via")),
}
"""Names, in lower case, of the client's fields that the lines replace."""


def _origin(head: RequestHead, origin: Origin | None) -> bytes:
    return b"" if origin is None else b"%b: %b\r\n" % origin_field(origin)


def _x_forwarded(head: RequestHead, origin: Origin | None) -> bytes:
    via = _none(head, origin)
    if origin is None:
        return via
    clients = _append(head, b"x-forwarded-for", origin.client.host.encode())
    scheme = origin.scheme.encode()
    return b"%bX-Forwarded-For: %b\r\nX-Forwarded-Proto: %b\r\n" % (via, clients, scheme)


def _forwarded(head: RequestHead, origin: Origin | None) -> bytes:
    """RFC 7239; an IPv6 address stands in brackets and quotes."""
    via = _none(head, origin)
    if origin is None:
        return via
    host = origin.client.host
    node = f'"[{host}]"' if ":" in host else host
    element = f"for={node};proto={origin.scheme}".encode()
    return b"%bForwarded: %b\r\n" % (via, _append(head, b"forwarded", element))


def _none(head: RequestHead, origin: Origin | None) -> bytes:
    """A gateway always says that it is there (RFC 9110, section 7.6.3)."""
    return b"Via: %b\r\n" % _append(head, b"via", _VIA)


def _append(head: RequestHead, name: bytes, value: bytes) -> bytes:
    before = head.get_all(name)
    return value if before is None else before + b", " + value


FORWARDING: Final[dict[Forwarding, Forwarder]] = {
    "origin": _origin,
    "x-forwarded": _x_forwarded,
    "forwarded": _forwarded,
    "none": _none,
}
