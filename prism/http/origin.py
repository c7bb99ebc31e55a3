"""Where a request came from, also when another node has relayed it.

A node that relays a request to another tells it of the client in one field, ``Prism-Origin``. It
is believed on relayed connections only, replaced on the way out, and never shown to an
application: a client that sends one achieves nothing.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple

from prism.flow import Endpoint, Flow
from prism.http.head import RequestHead
from prism.http.stream import Stream

__all__ = ["FIELD", "Origin", "origin_field", "origin_of", "take_origin"]

FIELD: Final = b"prism-origin"


class Origin(NamedTuple):
    """The ends of the client's connection, as the client sees them, and whether it is TLS."""

    client: Endpoint
    service: Endpoint
    secure: bool

    @property
    def scheme(self) -> str:
        """``https`` or ``http``."""
        return "https" if self.secure else "http"


def origin_of(flow: Flow, stream: Stream) -> Origin:
    """The origin of a request that came on ``stream``."""
    return Origin(flow.client, flow.service, stream.secure)


def origin_field(origin: Origin) -> tuple[bytes, bytes]:
    """The field that tells another node."""
    client, service = str(origin.client), str(origin.service)
    return b"Prism-Origin", f"{client} {service} {origin.scheme}".encode()


def take_origin(head: RequestHead) -> Origin | None:
    """Take the field out of a relayed request's head; ``None``: there is none, or none that is one.

    Where there are several, none is believed; all are taken out.
    """
    values = [value for name, value in head.headers if name == FIELD]
    if not values:
        return None
    head.headers = tuple(field for field in head.headers if field[0] != FIELD)
    return _parse(values[0]) if len(values) == 1 else None


@lru_cache(maxsize=4096)
def _parse(value: bytes) -> Origin | None:
    """The same for all requests of a connection."""
    try:
        client, service, scheme = value.decode("ascii").split(" ")
        return Origin(_endpoint(client), _endpoint(service), scheme == "https")
    except ValueError:
        return None


def _endpoint(text: str) -> Endpoint:
    host, colon, port = text.rpartition(":")
    if not colon or not host:
        raise ValueError(f"{text!r} is no endpoint")
    return Endpoint(host.strip("[]"), int(port))
