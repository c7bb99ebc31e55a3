"""What a backend serves: the object store, and the relay to another server."""
