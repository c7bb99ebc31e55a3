"""HTTP/1.1 (RFC 9110, RFC 9112) on sockets whose bytes are peeked at before they are read."""
