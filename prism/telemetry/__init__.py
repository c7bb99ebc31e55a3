"""Logs, metrics and the status that ``prism-proxy`` reports."""
