"""Compiled parts: everything that is hot or has to be a system call."""
