"""The handoff protocol: who owns a connection, and how ownership moves."""
