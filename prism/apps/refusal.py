"""The application that refuses."""

from __future__ import annotations

from prism.http.exchange import Exchange, Rest
from prism.http.head import HttpError

__all__ = ["Refusal"]


class Refusal:
    """An application that answers every request with the same error."""

    def __init__(self, status: int, detail: str, *, close: bool = False) -> None:
        self._error = HttpError(status, detail)
        self._close = close

    def handle(self, exchange: Exchange) -> Rest:
        """Answer with the error."""
        if self._close:
            exchange.keep_alive = False
        return exchange.fail(self._error)
