"""``prism-proxy switch``: the switch as a process of its own."""

from __future__ import annotations

import asyncio

from prism.config import Config
from prism.errors import ConfigError
from prism.process import serve
from prism.switch.agent import Agent
from prism.switch.embedded import Switch, agent_settings, need_p4

__all__ = ["agent_settings", "need_p4", "remove", "run"]


def run(config: Config) -> int:
    """Run the switch until it is told to stop; returns the exit code.

    The data plane outlives it: rules go on forwarding, and the next start adopts them.

    Raises:
        ConfigError: the configuration has no switch, or packages are missing for it.
    """
    if config.switch is None:
        raise ConfigError("the configuration has no [switch] section: add one")

    if config.switch.kind == "p4runtime" or config.switch.p4runtime_listen:
        need_p4()

    async def worker(_: int, stop: asyncio.Event) -> None:
        async with Switch(config):
            await stop.wait()

    return serve(worker, ["switch"], config.telemetry)


def remove(config: Config) -> None:
    """Take the data plane and every rule away; connections that were handed over break.

    Raises:
        ConfigError: the configuration has no eBPF switch.
        SwitchError: an agent is running, or the kernel refuses.
    """
    switch = config.switch
    if switch is None or switch.kind != "ebpf":
        raise ConfigError("the configuration has no [switch] section of kind ebpf")
    settings = agent_settings(config, switch)

    async def flush() -> None:
        agent = Agent(settings)
        await agent.start()
        await agent.flush()

    asyncio.run(flush())
