"""System calls of a connection's start, without the objects around them."""

def accept(fd: int, /) -> tuple[int, str, int] | None:
    """Accept a TCP connection: its descriptor and the client's address and port.

    The socket does not block and is closed on exec. An IPv4-mapped address is given as IPv4.
    ``None``: there is none waiting.

    Args:
        fd: a listening socket that does not block.

    Raises:
        OSError: see accept(2); the next connection may be fine.
    """

def cookie_of(fd: int, /) -> int:
    """A socket's cookie (SO_COOKIE, socket(7)), which no other one of this boot has.

    Raises:
        OSError: ``fd`` is not an open socket.
    """
