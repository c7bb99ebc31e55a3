"""TLS: handshakes at the frontend, records wherever the connection is, certificates of nodes."""
