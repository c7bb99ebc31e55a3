"""Frames between nodes that replicate: a length, a JSON document, and perhaps a file's octets.

::

    length of the document (4, big-endian) | document (UTF-8) | file ("size" octets of it)

A document has at most 4 MiB. Anything else than a frame, or one that comes too slowly, ends the
connection.
"""

from __future__ import annotations

import asyncio
import json
import struct
from typing import Any, Final

from prism.errors import PrismError, ProtocolError
from prism.replication.rules import Outcome, Reply, Stage
from prism.replication.views import Version, View

__all__ = [
    "MAX_DOCUMENT",
    "Failed",
    "key_of",
    "reply_of",
    "send",
    "stage_of",
    "take",
    "text_of",
    "version_of",
]

MAX_DOCUMENT: Final = 4 << 20
_LENGTH = struct.Struct("!I")

Document = dict[str, Any]


class Failed(PrismError):
    """A node does not answer, or says that it cannot do what it is asked."""


async def take(reader: asyncio.StreamReader) -> Document | None:
    """The next document; ``None``: the connection has ended between two.

    Raises:
        ProtocolError: this is no document.
        OSError: the connection is lost.
    """
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if length > MAX_DOCUMENT:
            raise ProtocolError(f"a document of {length} octets")
        document = json.loads(await reader.readexactly(length))
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise ConnectionResetError("the connection was cut") from None
        return None
    except (ValueError, RecursionError):
        raise ProtocolError("a document that is no JSON") from None
    if not isinstance(document, dict):
        raise ProtocolError("a document that is no object")
    return document


def send(writer: asyncio.StreamWriter, document: Document) -> None:
    """Queue a document; the caller waits for ``writer.drain()`` or looks at what is queued."""
    data = json.dumps(document, separators=(",", ":")).encode()
    if len(data) > MAX_DOCUMENT:
        raise ProtocolError(f"a document of {len(data)} octets")
    writer.write(_LENGTH.pack(len(data)) + data)


def text_of(key: bytes) -> str:
    """A key as it stands in documents."""
    return key.decode("utf-8", "surrogateescape")


def key_of(document: Document) -> bytes:
    """The key that a document is about; raises ``ValueError``, ``KeyError``."""
    return str(document["key"]).encode("utf-8", "surrogateescape")


def version_of(value: Any) -> Version:
    """A version; raises ``ValueError``, ``TypeError``."""
    epoch, serial = value
    return Version(int(epoch), int(serial))


def view_of(value: Any) -> View:
    """A view; raises ``ValueError``, ``TypeError``."""
    epoch, serving, joining = value
    return View(int(epoch), tuple(map(str, serving)), tuple(map(str, joining)))


def stage_of(document: Document) -> Stage:
    """A write on its way; raises ``ValueError``, ``KeyError``, ``TypeError``."""
    return Stage(
        view_of(document["view"]),
        key_of(document),
        version_of(document["version"]),
        tuple(map(str, document["chain"])),
    )


def reply_of(document: Document) -> Reply:
    """What has become of it; raises ``ValueError``, ``KeyError``, ``TypeError``."""
    view = document.get("view")
    return Reply(
        Outcome(document["outcome"]),
        int(document.get("status", 0)),
        str(document.get("detail", "")),
        None if view is None else view_of(view),
    )
