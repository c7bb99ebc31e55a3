"""The switch by itself: operations on rules a second, with an empty and with a full table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from prism.errors import PrismError

from .results import Result
from .throughput import Context

__all__ = ["p4runtime", "rules"]

_PROGRAM = Path(__file__).parents[1] / "bench_switch.py"
_P4_PROGRAM = Path(__file__).parents[1] / "bench_p4runtime.py"
_PATIENCE = 600.0  # seconds


def rules(context: Context) -> Result:
    """Operations of one control client, one at a time, and the cost of packets and rules."""
    count = 100_000 if context.quick else 1_000_000
    context.say(f"{count:,} rules")
    found = _run(_PROGRAM, "--rules", str(count))
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


def p4runtime(context: Context) -> Result:
    """Rules and handoffs through P4Runtime, against the eBPF table directly, in turns."""
    rounds, connections = ("3", "100") if context.quick else ("20", "400")
    found = _run(_P4_PROGRAM, "--rounds", rounds, "--connections", connections)
    columns = ("what", "eBPF us", "P4Runtime us", "ratio", "eBPF rules/s", "P4Runtime rules/s")
    result = Result("p4runtime", "Rules over P4Runtime", columns)
    for name, value in found.items():
        if isinstance(value, dict):
            result.rows.append(
                (
                    name,
                    value["ebpf_median_us"],
                    value["p4runtime_median_us"],
                    value["ratio"],
                    value.get("ebpf_rules_per_second", "-"),
                    value.get("p4runtime_rules_per_second", "-"),
                )
            )
    result.notes += [
        "Medians of a whole batch. Over P4Runtime the switch has it when the call returns.",
        "The switch is the soft switch's own service: the same kernel table behind both.",
    ]
    return result


def _run(program: Path, *arguments: str) -> dict[str, Any]:
    """What a benchmark that is a program of its own tells."""
    command = [sys.executable, str(program), *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PATIENCE)
    if done.returncode:
        raise PrismError(f"{program.name} failed: {done.stderr.strip()[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found
