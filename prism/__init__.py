"""Prism: an HTTP(S) proxy that hands live connections over to the backends."""

from prism._version import __version__

__all__ = ["__version__"]
