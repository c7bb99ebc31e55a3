"""What rules there are, read from wherever the data plane keeps them, without changing anything.

The kernel's table is read from where it is pinned, that of a P4Runtime switch over a connection
which asks for no election, that of the userspace switch by LIST.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from typing import NamedTuple

from prism._ext.bpf import BpfError, PinnedMap
from prism.config import Config, SwitchConfig
from prism.errors import SwitchError
from prism.flow import Endpoint
from prism.switch.base import Rule
from prism.switch.client import SwitchClient
from prism.switch.control import node_id
from prism.switch.records import RULE, rule_counters_from, rule_from

__all__ = ["ListedRule", "node_names", "read_rules"]


class ListedRule(NamedTuple):
    """A rule and the packets that it has rewritten each way; ``None`` where nothing counts them."""

    rule: Rule
    to_owner: int | None
    to_client: int | None


def read_rules(config: Config, switch: SwitchConfig) -> Iterator[ListedRule]:
    """The rules that the data plane has; those that come or go meanwhile may be missing.

    Args:
        config: the whole configuration.
        switch: its ``[switch]`` section.

    Raises:
        SwitchError: the data plane cannot be read.
    """
    if switch.kind == "ebpf":
        return _pinned(switch)
    if switch.kind == "p4runtime":
        return _programmed(switch)
    return iter(asyncio.run(_asked(config)))


def node_names(config: Config) -> dict[int, str]:
    """The names of the nodes' workers by id, as far as the configuration tells them."""
    found: dict[int, str] = {}
    for node in (*config.nodes, config.frontend, config.backend):
        if node is not None:
            names = (node.worker_name(worker) for worker in range(node.workers))
            found |= {node_id(name): name for name in names}
    return found


def _pinned(switch: SwitchConfig) -> Iterator[ListedRule]:
    path = switch.pin_dir / "rules"
    try:
        table = PinnedMap(path, locked=True)
    except BpfError as error:
        raise SwitchError(
            f"{error.strerror}: is a switch loaded with this pin_dir, and may you read it?"
        ) from None
    with contextlib.closing(table):
        if table.value_size != RULE.size:
            raise SwitchError(f"{path} is of another version of Prism, or none of its tables")
        cursor: bytes | None = None
        while True:
            try:
                entries, cursor = table.batch(cursor)
            except BpfError as error:
                raise SwitchError(f"{path}: {error.strerror}") from None
            for _, value in entries:
                seen = rule_counters_from(value)
                yield ListedRule(rule_from(value), seen.to_owner_packets, seen.to_client_packets)
            if cursor is None:
                return


def _programmed(switch: SwitchConfig) -> Iterator[ListedRule]:
    from prism.switch.p4runtime_pipeline import load  # noqa: PLC0415
    from prism.switch.p4runtime_rules import Codec, Key  # noqa: PLC0415
    from prism.switch.p4runtime_session import Session, SessionSettings  # noqa: PLC0415
    from prism.switch.p4runtime_tls import tls_files  # noqa: PLC0415

    codec = Codec(load(switch.p4info, switch.p4_device_config))
    settings = SessionSettings(
        address=switch.p4runtime_address,
        device_id=switch.p4runtime_device,
        timeout=switch.p4runtime_timeout,
        tls=tls_files(switch),
    )
    rules: list[tuple[Rule, int]] = []
    spoken: dict[Key, int] = {}
    with contextlib.closing(Session(settings, lambda message: None)) as session:
        session.connect()
        for entry in session.read(list(codec.rule_tables), counters=True):
            key, value = codec.parse(entry)
            packets = int(entry.counter_data.packet_count)
            if not codec.is_rule(key):
                spoken[key] = packets
            elif (told := codec.rule_of(key, value)) is not None:
                rules.append((told[0], packets))
    for rule, packets in rules:
        yield ListedRule(rule, packets, spoken.get(codec.speaker(rule), 0))


async def _asked(config: Config) -> list[ListedRule]:
    control = config.cluster.control
    anywhere = Endpoint("::" if ":" in control.host else "0.0.0.0", 0)
    name, key = f"rules/{os.getpid()}", config.cluster.control_key()
    client = SwitchClient(name, control, key, anywhere, mac=bytes(6))
    await client.start(timeout=2.0)
    try:
        return [
            ListedRule(
                Rule(
                    found.flow,
                    found.owner,
                    found.owner_endpoint,
                    found.owner_mac,
                    found.gen,
                    found.locked,
                    found.cookie,
                ),
                None,
                None,
            )
            async for found in client.list()
        ]
    finally:
        await client.close()
