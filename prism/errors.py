"""The errors Prism raises on purpose; each message says what is wrong and how to mend it."""

from __future__ import annotations

__all__ = ["ConfigError", "HandoffError", "PrismError", "ProtocolError", "SwitchError"]


class PrismError(Exception):
    """Base of every error that Prism raises on purpose."""


class ConfigError(PrismError):
    """A configuration file or command line that cannot be used."""


class ProtocolError(PrismError):
    """Bytes from a peer that do not follow Prism's own protocols."""


class SwitchError(PrismError):
    """The switch could not be reached, loaded or programmed."""


class HandoffError(PrismError):
    """A connection could not be handed over; it stays where it was."""
