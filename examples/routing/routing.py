"""Routing by a Python function: some go to the beta servers, some are turned away.

Named in the configuration (all nodes need the same)::

    [policy]
    route = "routing:route"
    route_dir = "examples/routing"

    [[pools]]
    name = "beta"
    nodes = ["be2"]

or in a program of one's own, as this file is when it is run: ``python routing.py prism.toml`` is a
frontend or a backend, whichever the file has a section for.
"""

from __future__ import annotations

import asyncio
import signal
import sys

import prism

BETA = prism.Decision(pool="beta", rule="beta")
GONE = prism.Decision.deny(410, "this version of the interface is gone", rule="v1")


def route(request: prism.RequestHead) -> prism.Decision | None:
    """Decide about a request; ``None`` leaves it to the rules of the configuration.

    It is called for each request on the event loop, so it must be quick, and on frontends and
    backends, so it must say the same on all of them. ``request.key`` is the path as Prism itself
    understands it: decoded, without dot segments, without the leading slash.
    """
    if request.key.startswith(b"v1/"):
        return GONE
    if request.get(b"x-beta") is not None or b"beta=1" in (request.get_all(b"cookie") or b""):
        return BETA
    return None


async def main(path: str) -> None:
    """Run the node that the file describes until told to stop."""
    config = prism.load(path)
    node: prism.Frontend | prism.Backend
    if config.frontend is not None:
        node = prism.Frontend(config, route=route)
    else:
        node = prism.Backend(config, route=route)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with node:
        print(f"{node.name} is ready", flush=True)
        await stop.wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
