"""What a policy says about one request."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from prism.http.exchange import Exchange, Rest
from prism.http.head import HttpError
from prism.http.response import error_message

__all__ = ["AUTO", "Action", "Answer", "Decision", "Edits"]


class Action(enum.Enum):
    """What to do with a request."""

    AUTO = "auto"
    """Hand the connection over or relay the request, whichever pays (``frontend.handoff``)."""
    HANDOFF = "handoff"
    """Hand the connection over whenever that is possible."""
    RELAY = "relay"
    """Relay the request; the connection stays where it is."""
    RESPOND = "respond"
    """Answer on the node that has the connection."""
    DENY = "deny"
    """Refuse, on the node that has the connection."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A response that is made from the policy alone; an application for one request.

    Attributes:
        status: of the response.
        headers: of the response, without Content-Length.
        body: of the response.
        close: whether the connection ends with it.
    """

    status: int
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""
    close: bool = False

    def handle(self, exchange: Exchange) -> Rest:
        """Answer the request."""
        if self.close:
            exchange.keep_alive = False
        return exchange.respond(self.status, self.headers, self.body)


@dataclass(frozen=True, slots=True)
class Edits:
    """Changes of a request's header fields, made before it is relayed or given to an application.

    Attributes:
        add: fields to put in; they replace what the client has sent under these names.
        remove: names of fields to leave out, in lower case.
    """

    add: tuple[tuple[bytes, bytes], ...] = ()
    remove: frozenset[bytes] = frozenset()

    def apply(self, headers: Iterable[tuple[bytes, bytes]]) -> tuple[tuple[bytes, bytes], ...]:
        """The fields after the change; names are in lower case."""
        gone = self.remove.union(name for name, _ in self.add)
        return (*(field for field in headers if field[0] not in gone), *self.add)


@dataclass(frozen=True, slots=True)
class Decision:
    """What shall become of one request. Made once on each node that meets the request.

    Attributes:
        action: what to do.
        pool: the pool of nodes the request is placed in; empty: all nodes.
        placement: a placement other than the pool's own, by name; empty: the pool's own.
        node: the name of the node it belongs to; empty: the placement chooses.
        answer: the response of ``RESPOND`` and ``DENY``.
        edits: changes of the request's fields.
        max_body: octets the request's body may have; more is answered 413.
        rule: name of the rule that decided, for counters and logs.
    """

    action: Action = Action.AUTO
    pool: str = ""
    placement: str = ""
    node: str = ""
    answer: Answer | None = None
    edits: Edits | None = None
    max_body: int | None = None
    rule: str = ""

    @classmethod
    def deny(cls, status: int = 403, detail: str = "", **more: Any) -> Decision:
        """Refuse with an error status and a JSON document, as all of Prism's errors are."""
        body = error_message(HttpError(status, detail or "refused by policy"))
        answer = Answer(status, ((b"Content-Type", b"application/json"),), body)
        return cls(Action.DENY, answer=answer, **more)

    @classmethod
    def respond(
        cls,
        status: int = 200,
        body: bytes = b"",
        headers: Iterable[tuple[bytes, bytes]] = (),
        **more: Any,
    ) -> Decision:
        """Answer with this response."""
        return cls(Action.RESPOND, answer=Answer(status, tuple(headers), body), **more)


AUTO = Decision()
"""No policy: every node may serve it, by the cluster's own placement."""
