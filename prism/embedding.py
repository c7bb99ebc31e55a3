"""What makes a part of the cluster usable as ``async with``."""

from __future__ import annotations

from types import TracebackType
from typing import Self

__all__ = ["Embedded"]


class Embedded:
    """Starts on entry, ends on exit: in peace, or at once where an exception is the reason."""

    async def start(self) -> None:
        """Begin to work."""

    async def publish(self) -> None:
        """Say that it works."""

    async def drain(self) -> None:
        """Let open work end."""

    async def close(self) -> None:
        """End."""

    async def __aenter__(self) -> Self:
        try:
            await self.start()
            await self.publish()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                await self.drain()
        finally:
            await self.close()
