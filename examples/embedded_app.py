"""A backend inside an ASGI program of one's own: ``python embedded_app.py prism.toml``.

The file needs a ``[backend]`` section, and ``serves = "application"`` in ``[cluster]``.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import prism

Message = dict[str, Any]


async def app(
    scope: Message,
    receive: Callable[[], Awaitable[Message]],
    send: Callable[[Message], Awaitable[None]],
) -> None:
    """Tell clients where they come from; any ASGI application does."""
    if scope["type"] != "http":
        return
    text = f"{scope['path']} asked for by {scope['client'][0]}\n".encode()
    fields = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(text))]
    await send({"type": "http.response.start", "status": 200, "headers": fields})
    await send({"type": "http.response.body", "body": text})


async def main(path: str) -> None:
    """Run until told to stop."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with prism.Backend(prism.load(path), app=app) as backend:
        print(f"{backend.name} is ready", flush=True)
        await stop.wait()
        print(f"answered: {backend.status()['counters']['requests']}", flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
