"""The switch by itself: operations on rules a second, with an empty and with a full table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from prism.errors import PrismError

from .results import Result
from .throughput import Context

__all__ = ["rules"]

_PROGRAM = Path(__file__).parents[1] / "bench_switch.py"
_PATIENCE = 600.0  # seconds


def rules(context: Context) -> Result:
    """Operations of one control client, one at a time, and the cost of packets and rules."""
    count = 100_000 if context.quick else 1_000_000
    context.say(f"{count:,} rules")
    command = [sys.executable, str(_PROGRAM), "--rules", str(count), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PATIENCE)
    if done.returncode:
        raise PrismError(f"{_PROGRAM.name} failed: {done.stderr.strip()[-500:]}")
    found = json.loads(done.stdout)
    result = Result("rules", "Rule operations", ("what", "median us", "p99 us", "operations/s"))
    for name, value in found.items():
        if isinstance(value, dict) and "median_us" in value:
            operations = 3 if name.startswith("ADD") else 1
            rate = operations / (value["median_us"] / 1e6)
            result.rows.append((name, value["median_us"], value["p99_us"], rate))
    fill = found["fill"]
    result.rows.append(("ADD by the agent", fill["add_us"], "-", 1e6 / fill["add_us"]))
    result.notes += [
        f"{fill['rules']:,} rules, {fill['octets_per_rule']} octets of kernel memory each.",
        "One client waits for each answer; ADD + CHOWN + DELETE are three operations.",
        "Classifier, packet of an unknown flow: "
        f"{found['packets, no rules']['unknown_flow_ns']} ns with an empty table, "
        f"{found['packets, full table']['unknown_flow_ns']} ns with a full one.",
    ]
    return result
