"""``prism-proxy switch``: the agent, or the userspace switch, as a process of its own."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Callable
from typing import Any

from prism.config import Config, SwitchConfig
from prism.errors import ConfigError
from prism.process import serve
from prism.switch.agent import Agent, AgentSettings
from prism.switch.server import SwitchServer
from prism.telemetry.metrics import Sampled
from prism.telemetry.status import StatusServer

__all__ = ["agent_settings", "need_p4", "remove", "run"]


def agent_settings(config: Config, switch: SwitchConfig) -> AgentSettings:
    """What the agent is told by a configuration file."""
    return AgentSettings(
        control=() if switch.p4runtime_listen else (config.cluster.control,),
        key=config.cluster.control_key(),
        interfaces=switch.interfaces,
        pin_dir=switch.pin_dir,
        max_rules=switch.max_rules,
        hold=switch.lock == "hold",
        hold_flow_bytes=switch.hold_flow_bytes,
        hold_total_bytes=switch.hold_total_bytes,
        hold_time=switch.hold_time,
    )


def run(config: Config) -> int:
    """Run the switch until it is told to stop; returns the exit code.

    The data plane outlives it: rules go on forwarding, and the next start adopts them.

    Raises:
        ConfigError: the configuration has no switch.
    """
    if config.switch is None:
        raise ConfigError("the configuration has no [switch] section: add one")
    main = {"ebpf": _main_ebpf, "p4runtime": _main_p4, "userspace": _main_userspace}[
        config.switch.kind
    ]
    switch = config.switch
    if switch.kind == "p4runtime" or switch.p4runtime_listen:
        need_p4()

    async def worker(_: int, stop: asyncio.Event) -> None:
        await main(config, switch, stop)

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


def need_p4() -> None:
    """Look for what P4Runtime needs.

    Raises:
        ConfigError: the extra is not installed.
    """
    try:
        import grpc  # noqa: F401, PLC0415
        from p4.v1 import p4runtime_pb2  # noqa: F401, PLC0415
    except ImportError as error:
        raise ConfigError(
            f"P4Runtime needs more packages ({error}): pip install 'prism-proxy[p4]'"
        ) from None


async def _main_ebpf(config: Config, switch: SwitchConfig, stop: asyncio.Event) -> None:
    if switch.p4runtime_listen:
        from prism.switch.p4service_agent import ServedAgent  # noqa: PLC0415

        agent: Agent = ServedAgent(
            agent_settings(config, switch), switch.p4runtime_listen, switch.p4runtime_device
        )
    else:
        agent = Agent(agent_settings(config, switch))
    await agent.start()
    try:
        await _publish_until(config, stop, agent.status)
    finally:
        await agent.stop()


async def _main_p4(config: Config, switch: SwitchConfig, stop: asyncio.Event) -> None:
    from prism.switch.p4runtime_agent import P4Agent  # noqa: PLC0415

    agent = P4Agent(config, switch)
    await agent.start()
    try:
        await _publish_until(config, stop, agent.status)
    finally:
        await agent.stop()


async def _main_userspace(config: Config, switch: SwitchConfig, stop: asyncio.Event) -> None:
    server = SwitchServer(config.cluster.control, config.cluster.control_key())

    def status() -> dict[str, Any]:
        rules = len(server.table)
        counters = dataclasses.asdict(server.counters) | {"rules": rules}
        return {"name": "switch", "role": "switch", "pid": os.getpid(), "counters": counters}

    await server.start()
    try:
        await _publish_until(config, stop, status)
    finally:
        await server.close()


async def _publish_until(
    config: Config, stop: asyncio.Event, status: Callable[[], dict[str, Any]]
) -> None:
    """Answer on the status socket until asked to stop."""
    metrics = Sampled("prism_switch", lambda: status()["counters"])
    server = StatusServer(status, metrics)
    telemetry = config.telemetry
    await server.start(telemetry.status_path(None), telemetry.metrics_endpoint(None))
    try:
        await stop.wait()
    finally:
        await server.close()
