"""Tells a node when the kernel has forgotten a connection."""
