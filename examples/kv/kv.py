"""A sharded key-value store: each backend keeps its share of the keys, Prism finds it.

    cd examples/kv
    sudo prism-proxy lab up --backends 3 --app kv:app --set health.failover=false --detach
    sudo prism-proxy lab exec client -- curl -s -X PUT -d red http://10.77.0.80/colour
    sudo prism-proxy lab exec client -- curl -s http://10.77.0.80/colour
    sudo prism-proxy lab exec client -- curl -s -X POST -d 5 http://10.77.0.80/visits
    sudo prism-proxy lab exec client -- curl -s -X POST -d 2 http://10.77.0.80/visits
    sudo prism-proxy lab down

A key has one home (rendezvous hashing; a backend has one worker unless told otherwise), so adding
to a number needs no lock; without ``failover`` a key whose backend is gone is no other's. Nothing
here knows of Prism.
"""

from collections.abc import Awaitable, Callable
from typing import Any

VALUES: dict[str, bytes] = {}
LONGEST = 1 << 20  # octets of a value


async def body_of(receive: Callable[[], Awaitable[dict[str, Any]]]) -> bytes:
    """The request's body; what is beyond the longest value is cut off."""
    body, more = b"", True
    while more:
        message = await receive()
        body = (body + message.get("body", b""))[: LONGEST + 1]
        more = message.get("more_body", False)
    return body


def answer(method: str, key: str, body: bytes) -> tuple[int, bytes]:
    """Status and body for a request: GET, PUT, DELETE, or POST, which adds to a number."""
    if len(body) > LONGEST:
        return 413, b"a value has at most 1 MiB\n"
    if method == "POST":
        try:
            body = b"%d" % (int(VALUES.get(key, b"0")) + int(body))
        except ValueError:
            return 409, b"not a number\n"
    if method in ("PUT", "POST"):
        VALUES[key] = body
        return (200, body) if method == "POST" else (204, b"")
    if method not in ("GET", "HEAD", "DELETE"):
        return 405, b"GET, PUT, POST or DELETE\n"
    value = VALUES.pop(key, None) if method == "DELETE" else VALUES.get(key)
    return (404, b"no such key\n") if value is None else (200, value)


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """The store as an ASGI application."""
    if scope["type"] == "http":
        status, body = answer(scope["method"], scope["path"], await body_of(receive))
        fields = [] if status == 204 else [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": fields})
        await send({"type": "http.response.body", "body": body})
