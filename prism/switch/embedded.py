"""A switch of whatever kind the configuration names, as an object: start it, ask it, close it."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Protocol

from prism.config import Config, SwitchConfig
from prism.embedding import Embedded
from prism.errors import ConfigError
from prism.switch.agent import Agent, AgentSettings
from prism.switch.server import SwitchServer
from prism.telemetry.metrics import Sampled
from prism.telemetry.status import StatusServer

__all__ = ["Switch", "agent_settings", "need_p4"]


class _Running(Protocol):
    """What each kind of switch is."""

    async def start(self) -> Any: ...
    async def stop(self) -> None: ...
    def status(self) -> dict[str, Any]: ...


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


class Switch(Embedded):
    """The switch; an asynchronous context manager.

    The data plane of an eBPF switch outlives it: rules go on forwarding, and the next start adopts
    them.

    Args:
        config: with a ``[switch]`` section.

    Raises:
        ConfigError: there is no such section, or packages are missing for it.
    """

    def __init__(self, config: Config) -> None:
        if config.switch is None:
            raise ConfigError("the configuration has no [switch] section: add one")
        self.config = config
        self._running = _make(config, config.switch)
        self._started = False
        self._status = StatusServer(
            self.status, Sampled("prism_switch", lambda: self.status()["counters"])
        )

    def status(self) -> dict[str, Any]:
        """The status document."""
        return self._running.status()

    async def start(self) -> None:
        """Load or adopt the data plane, and answer nodes.

        Raises:
            SwitchError: the kernel or the other switch refuses.
            OSError: an address cannot be bound.
        """
        await self._running.start()
        self._started = True

    async def publish(self) -> None:
        """Answer on the status socket, where the configuration names one."""
        telemetry = self.config.telemetry
        await self._status.start(telemetry.status_path(None), telemetry.metrics_endpoint(None))

    async def close(self) -> None:
        """Stop; the data plane goes on."""
        await self._status.close()
        if self._started:
            self._started = False
            await self._running.stop()


def _make(config: Config, switch: SwitchConfig) -> _Running:
    """The switch of the kind that is wanted; the P4 ones need more packages."""
    if switch.kind == "userspace":
        return _Userspace(config)
    if switch.kind == "ebpf" and not switch.p4runtime_listen:
        return Agent(agent_settings(config, switch))
    need_p4()
    if switch.kind == "p4runtime":
        from prism.switch.p4runtime_agent import P4Agent  # noqa: PLC0415

        return P4Agent(config, switch)
    from prism.switch.p4runtime_tls import tls_files  # noqa: PLC0415
    from prism.switch.p4service_agent import ServedAgent  # noqa: PLC0415

    if switch.p4runtime_listen is None:
        raise ConfigError("switch.p4runtime_listen is missing")
    settings = agent_settings(config, switch)
    return ServedAgent(
        settings, switch.p4runtime_listen, switch.p4runtime_device, tls_files(switch)
    )


def need_p4() -> None:
    """Look for what P4Runtime needs.

    Raises:
        ConfigError: the extra is not installed.
    """
    try:
        import grpc  # noqa: F401, PLC0415

        import prism.switch.p4runtime_messages  # noqa: F401, PLC0415
    except ImportError as error:
        raise ConfigError(
            f"P4Runtime needs more packages ({error}): pip install 'prism-proxy[p4]'"
        ) from None


class _Userspace:
    """The rule table alone."""

    def __init__(self, config: Config) -> None:
        self._server = SwitchServer(config.cluster.control, config.cluster.control_key())

    async def start(self) -> None:
        await self._server.start()

    async def stop(self) -> None:
        await self._server.close()

    def status(self) -> dict[str, Any]:
        rules = len(self._server.table)
        counters = dataclasses.asdict(self._server.counters) | {"rules": rules}
        return {"name": "switch", "role": "switch", "pid": os.getpid(), "counters": counters}
