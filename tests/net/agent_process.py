"""A switch agent in a process of its own, which obeys lines on its standard input.

``status`` prints one line of JSON, ``flush`` takes the data plane away; at the end of the input it
stops. Started with the settings as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import uvloop

from prism.flow import Endpoint
from prism.switch.agent import Agent, AgentSettings


def settings_from(text: str) -> AgentSettings:
    values: dict[str, Any] = json.loads(text)
    values["control"] = tuple(Endpoint(*each) for each in values["control"])
    values["key"] = bytes.fromhex(values["key"])
    values["interfaces"] = tuple(values["interfaces"])
    values["pin_dir"] = Path(values["pin_dir"])
    return AgentSettings(**values)


async def main() -> None:
    agent = Agent(settings_from(sys.argv[1]))
    await agent.start()
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    print("ready", flush=True)
    while line := await reader.readline():
        if line == b"status\n":
            print(json.dumps(agent.status()), flush=True)
        elif line == b"flush\n":
            await agent.flush()
            print("flushed", flush=True)
    await agent.stop()


uvloop.run(main())  # as prism-proxy does
