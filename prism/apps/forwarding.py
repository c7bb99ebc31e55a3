"""The head of a relayed request, and what it says of the client and of who relays it."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Final, Literal
from urllib.parse import quote_from_bytes, unquote_to_bytes

from prism._ext.http_scan import join_fields
from prism.apps.upstream import HOP_BY_HOP, Address, connection_options
from prism.http.exchange import Exchange, Headers
from prism.http.head import RequestHead
from prism.http.origin import FIELD, Origin, origin_field

__all__ = ["DROPPED", "FORWARDING", "Forwarder", "Forwarding", "request_head", "wants_upgrade"]

Forwarding = Literal["origin", "x-forwarded", "forwarded", "none"]
"""``origin``: to another node, which says the rest. The others are for the server that answers."""

Forwarder = Callable[[RequestHead, Origin | None], bytes]
"""Makes the lines, with their line ends."""

_NOT_COPIED = HOP_BY_HOP | {b"host", b"content-length", b"expect"}
_PLAIN_OPTIONS = frozenset((b"close", b"keep-alive"))
_VIA: Final = b"1.1 prism"

DROPPED: Final[dict[Forwarding, frozenset[bytes]]] = {
    "origin": frozenset((FIELD,)),
    "x-forwarded": frozenset((FIELD, b"via", b"x-forwarded-for", b"x-forwarded-proto")),
    "forwarded": frozenset((FIELD, b"via", b"forwarded")),
    "none": frozenset((FIELD, b"via")),
}
"""Names, in lower case, of the client's fields that the lines replace."""


def _origin(head: RequestHead, origin: Origin | None) -> bytes:
    return b"" if origin is None else _origin_line(origin)


@lru_cache(maxsize=4096)
def _origin_line(origin: Origin) -> bytes:
    """The same for all requests of a connection."""
    return b"%b: %b\r\n" % origin_field(origin)


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


_DROPPED = {forwarding: names | _NOT_COPIED for forwarding, names in DROPPED.items()}


def request_head(
    exchange: Exchange, address: Address, forwarding: Forwarding, extra: Headers = ()
) -> bytes:
    """The head to send upstream: the client's, without what was for this connection alone."""
    head = exchange.head
    values = [value for name, value in head.headers if name == b"connection"]
    options = connection_options(values) if values else frozenset()
    dropped = _DROPPED[forwarding]
    if extra or options - _PLAIN_OPTIONS:
        dropped = dropped | options | {name.lower() for name, _ in extra}
    host = head.host or _host_of(address)
    parts = [b"%b %b HTTP/1.1\r\nHost: %b\r\n" % (head.method, _target(head), host)]
    parts.append(join_fields(head.headers, dropped))
    if head.chunked:
        parts.append(b"Transfer-Encoding: chunked\r\n")
    elif head.content_length is not None:
        parts.append(b"Content-Length: %d\r\n" % head.content_length)
    if wants_upgrade(head):
        parts.append(b"Connection: Upgrade\r\nUpgrade: %b\r\n" % (head.upgrade or b""))
    if head.expect_continue:
        parts.append(b"Expect: 100-continue\r\n")
    parts.append(FORWARDING[forwarding](head, exchange.origin))
    parts += [b"%b: %b\r\n" % field for field in extra]
    parts.append(b"\r\n")
    return b"".join(parts)


def wants_upgrade(head: RequestHead) -> bool:
    """Whether a request's wish for another protocol is passed on.

    Only WebSockets': what speaks HTTP inside (``h2c``) would get requests past the policy.
    """
    upgrade = head.upgrade
    return (
        upgrade is not None
        and upgrade.lower() == b"websocket"
        and head.method == b"GET"
        and not head.has_body
    )


def _host_of(address: Address) -> bytes:
    return b"localhost" if isinstance(address, str) else str(address).encode()


def _target(head: RequestHead) -> bytes:
    """The target in origin form: as sent, unless there are tricks in its path.

    Where normalising did more than decode, the upstream gets the normalised path, so that it
    serves what was decided about.
    """
    path = head.path
    if path[1:] != head.key and path != b"*" and unquote_to_bytes(path)[1:] != head.key:
        path = b"/" + quote_from_bytes(head.key, safe="/!$&'()*+,;=:@~").encode()
    return path + b"?" + head.query if head.query else path
