"""Load: wrk with a list of requests to draw from, in the client's namespace."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prism.errors import PrismError
from prism.lab.netns import Namespace

__all__ = ["Load", "Sample", "drive"]

_PATIENCE = 60.0  # seconds beyond the run itself until a stuck wrk is killed

# wrk calls request() for each request, setup() and done() once. Drawing from a list keeps the
# distribution of keys out of the hot path: skew is the list's business.
_SCRIPT = """\
local paths = {paths}
local method, size = {method}, {size}
local body = size > 0 and string.rep("x", size) or nil
local threads = 0
local prepared = {{}}

function setup(thread)
  threads = threads + 1
  thread:set("number", threads)
end

function init()
  math.randomseed({seed} + number)
  for i, path in ipairs(paths) do
    prepared[i] = wrk.format(method, path, {headers}, body)
  end
end

function request()
  return prepared[math.random(#prepared)]
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '\\nRESULT {{"requests": %d, "bytes": %d, "duration": %d, ' ..
    '"p50": %f, "p99": %f, "failed": %d}}\\n',
    summary.requests, summary.bytes, summary.duration,
    latency:percentile(50), latency:percentile(99),
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
"""


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked for.

    Attributes:
        paths: request targets to draw from, uniformly: skewed loads repeat some.
        method: ``GET`` or ``PUT``.
        size: octets of a PUT's body.
        connections: kept-alive connections, all busy.
        close: whether each request has a connection of its own.
    """

    paths: Sequence[str]
    method: str = "GET"
    size: int = 0
    connections: int = 64
    close: bool = False


@dataclass(frozen=True, slots=True)
class Sample:
    """What one run of wrk has measured.

    Attributes:
        requests: answered, a second.
        octets: received, a second, heads and bodies not complete at the end included.
        p50, p99: seconds from request to the end of the response.
        failed: requests with another answer than 2xx or none.
    """

    requests: float
    octets: float
    p50: float
    p99: float
    failed: int


def drive(
    namespace: Namespace, url: str, load: Load, seconds: float, directory: Path, seed: int = 1
) -> Sample:
    """Run wrk for ``seconds``.

    Raises:
        PrismError: wrk is missing, failed, or got no answer at all.
    """
    script = directory / "load.lua"
    script.write_text(
        _SCRIPT.format(
            paths="{" + ",".join(json.dumps(path) for path in load.paths) + "}",
            method=json.dumps(load.method),
            size=load.size,
            seed=seed,
            headers='{["Connection"]="close"}' if load.close else "{}",
        )
    )
    threads = 1 if load.connections < 2 else 2
    command = ["wrk", f"-t{threads}", f"-c{load.connections}", f"-d{max(1, round(seconds))}s"]
    command += ["--timeout", "60s", "-s", str(script), url]
    try:
        done = namespace.run(command, capture_output=True, text=True, timeout=seconds + _PATIENCE)
    except FileNotFoundError:
        raise PrismError("wrk is missing: apt-get install wrk") from None
    except subprocess.TimeoutExpired:
        raise PrismError(f"wrk against {url} did not end") from None
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return _sample(json.loads(line[7:]), url, load)
    raise PrismError(f"wrk against {url} failed: {(done.stderr or done.stdout).strip()[-500:]}")


def _sample(result: dict[str, float], url: str, load: Load) -> Sample:
    seconds = result["duration"] / 1e6
    # Of large uploads, none may be complete yet; their octets are counted on the links.
    silent = load.method != "PUT" and not result["bytes"] and not result["requests"]
    if silent or not seconds:
        raise PrismError(f"wrk got no answer from {url}")
    return Sample(
        requests=result["requests"] / seconds,
        octets=result["bytes"] / seconds,
        p50=result["p50"] / 1e6,
        p99=result["p99"] / 1e6,
        failed=int(result["failed"]),
    )
