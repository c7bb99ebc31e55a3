"""The stages of handoffs, from the nodes' own traces (``telemetry.trace``)."""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

__all__ = ["Steps", "handed_over", "stages", "steps_in"]

Steps = dict[str, dict[str, int]]
"""By flow, nanoseconds from the request's arrival to each step."""

_OURS = ("add", "export")  # steps of the former owner that come before the new one's first


def steps_in(log: Path, event: str) -> Steps:
    """The steps of each handoff in a log: ``handoff-out`` or ``handoff-in``."""
    found = {}
    for line in log.read_text().splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if entry.get("event") == event:
                found[str(entry["flow"])] = entry["steps"]
    return found


def handed_over(flows: Iterable[str], ins: Steps) -> list[float]:
    """Seconds from the former owner having read the request to the new one's live socket."""
    return [ins[flow]["activate"] / 1e9 for flow in flows if "activate" in ins.get(flow, {})]


def stages(seen: Mapping[str, float], outs: Steps, ins: Steps) -> dict[str, list[float]]:
    """Seconds of each stage, in order, of the flows that both sides have traced.

    The new owner may be at work before the former one's send has returned: there is no mark
    between them.

    Args:
        seen: by flow, seconds from request to first octet as the client saw them.
        outs: of the former owner.
        ins: of the new one.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for flow, total in seen.items():
        if flow not in outs or flow not in ins:
            continue
        inside = dict(ins[flow])
        received = inside.pop("received")
        steps = {name: outs[flow][name] for name in _OURS if name in outs[flow]}
        last = 0
        for name, at in (steps | {"offer sent and received": received} | inside).items():
            found[name].append((at - last) / 1e9)
            last = at
        found["client, wires, wake-up of the frontend"].append(total - last / 1e9)
        found["request to first octet"].append(total)
    return found
