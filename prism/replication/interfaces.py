"""What a replicator needs of disk and network, and what it may refuse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from prism.errors import PrismError
from prism.replication.rules import Reply, Stage
from prism.replication.views import Message, Version

__all__ = ["NotHead", "Page", "Refusal", "Settled", "Storage", "Transport", "Unavailable"]


class Unavailable(PrismError):
    """The write's outcome is not known, or it cannot be made now: the client may repeat it."""


class NotHead(Unavailable):
    """Another node is the head of this key's chain, or nobody is just now."""


class Refusal(PrismError):
    """A replica's disk does not take the write; nobody has it.

    Attributes:
        status: the HTTP status to answer.
    """

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class Storage(Protocol):
    """One node's objects.

    A blob is an object's octets, in whatever form storage and transport agree on.
    """

    staged: Mapping[bytes, Version]
    """What is staged, by key; one version of a key at most."""

    async def version(self, key: bytes) -> Version:
        """The installed version, of a deletion too; ``NO_VERSION``: there is none."""

    async def stage(self, key: bytes, version: Version, blob: Any) -> None:
        """Keep durably, invisible, in the place of what is staged; raises :class:`Refusal`."""

    async def install(self, key: bytes) -> None:
        """Make what is staged visible, durably."""

    async def unstage(self, key: bytes) -> None:
        """Throw away what is staged."""

    async def blob(self, key: bytes) -> Any:
        """What is staged, for a transport; it closes it."""

    async def installed(self, key: bytes) -> tuple[Version, Any] | None:
        """What is installed, for a transport; it closes it."""

    async def page(self, after: bytes, limit: int) -> tuple[list[tuple[bytes, Version]], bool]:
        """Up to ``limit`` installed versions behind a key, in order; whether there are more."""

    async def put(self, key: bytes, version: Version, blob: Any) -> None:
        """Install at once, in the place of what is installed; what is staged stays."""

    async def discard(self, blob: Any) -> None:
        """Throw away what came from another node, unless it is kept already."""

    async def remove(self, key: bytes, version: Version) -> None:
        """Forget a key that still has this version, without leaving a mark of deletion."""


class Transport(Protocol):
    """The way to the other nodes. What fails raises :class:`~prism.errors.PrismError`."""

    def tell(self, peer: str, message: Message) -> None:
        """Send a message about views, if possible; it may be lost."""

    async def stage(self, peer: str, stage: Stage, blob: Any) -> Reply:
        """Pass a write on."""

    async def page(self, peer: str, epoch: int, after: bytes) -> Page:
        """A page of the versions that this node should have, as seen by ``peer``."""

    async def fetch(self, peer: str, epoch: int, key: bytes) -> tuple[Version, Any] | None:
        """An installed object."""

    async def settled(self, peer: str, epoch: int, key: bytes) -> Settled:
        """Whether ``peer`` has anything staged from before this epoch."""


class Settled(NamedTuple):
    """Whether a node has nothing staged from before an epoch: of one key, and of all."""

    key: bool
    all: bool


class Page(NamedTuple):
    """Versions in key order; ``end``: the last key looked at, empty when there are no more."""

    entries: list[tuple[bytes, Version]]
    end: bytes
