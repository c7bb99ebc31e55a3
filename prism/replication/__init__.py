"""Replication: copies of an object on several backends that stay one (docs/replication.md)."""
