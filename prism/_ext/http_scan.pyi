"""Plain HTTP/1.1 heads read and written in C: second implementations, for the usual shapes only.

What is unusual, wrong or incomplete is left to the full parsers, `prism.http.head` and
`prism.apps.upstream`; the tests hold both against each other. One thread of a process may use
`peek` and `receive_response`: they share a buffer.
"""

from collections.abc import Container, Iterable
from typing import Any

def scan_request(data: bytes, head: Any, limits: tuple[int, int, int], /) -> int:
    """Fill in a `RequestHead` from the head at the beginning of ``data``, if it is a plain one.

    Args:
        data: what was peeked.
        head: its attributes are set.
        limits: octets of a head, fields, octets of a target.

    Returns:
        0: the full parser has to look. 1: done. 2: done, but ``key`` has to be made from ``path``.
    """

def join_fields(headers: Iterable[tuple[bytes, bytes]], dropped: Container[bytes], /) -> bytes:
    """The lines of all fields whose name is not in ``dropped``, each with its line end."""

def peek(fd: int, limit: int, /) -> bytes:
    """What is in a socket's receive queue, at most ``limit`` octets (128 KiB); empty at its end.

    Raises:
        BlockingIOError: nothing is there now.
        OSError: the connection is lost.
    """

def take(fd: int, limit: int, /) -> bytes:
    """As `peek`, and takes it out of the queue."""

def drop(fd: int, n: int, /) -> int:
    """Take up to ``n`` octets out of a TCP socket's receive queue, uncopied; how many that were.

    Raises:
        OSError: the connection is lost.
    """

def quiet(fd: int, /) -> bool:
    """Whether a socket is open and has nothing to read: no octets, no end of file, no error."""

def receive_response(
    fd: int,
    status_lines: dict[int, bytes],
    bodiless: bool,
    date: bytes,
    server: bytes,
    tail: bytes,
    /,
) -> tuple[int, bytes, int, int] | bytes | None:
    """Take what has come of a response out of a socket, and make of it what the client gets.

    Args:
        fd: of the upstream connection.
        status_lines: by status, with their line ends.
        bodiless: the request was HEAD.
        date: the Date line, used where the response has none.
        server: the Server line, in the same way; may be empty.
        tail: further lines, behind Content-Length.

    Returns:
        Status, octets for the client, how many of them are body, octets of body still to come. Or
        the octets as they came, where the head is not whole, not plain, or has more behind it than
        its body (empty: the connection has ended). ``None``: nothing is there now.

    Raises:
        OSError: the connection is lost.
    """

def answer_ready(
    fd: int,
    entries: dict[bytes, Any],
    limits: tuple[int, int, int],
    server: bytes,
    date: bytes,
    /,
) -> tuple[int, bytes, bool] | None:
    """Answer a plain GET at the beginning of a socket's input from objects that are ready.

    Args:
        fd: a connection on which every request is for these objects.
        entries: by key, a tuple: stamp (inode, size, nanoseconds of the last modification and
            change), field lines, body, path; the one used last is put to the end.
        limits: as for `scan_request`.
        server: the Server line; may be empty.
        date: the Date line.

    Returns:
        Octets of the body, what the socket did not take of the response, and whether there was more
        in the input. ``None``: nothing was done, the request is to be looked at in full.

    Raises:
        OSError: the connection is lost; the request was taken out of the input.
    """

def rewrite_response(
    data: bytes,
    status_lines: dict[int, bytes],
    bodiless: bool,
    date: bytes,
    server: bytes,
    tail: bytes,
    /,
) -> tuple[int, bytes, int, int] | bytes:
    """What `receive_response` makes of octets that are here already."""
