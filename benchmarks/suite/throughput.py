"""Throughput by size, operation, number of backends, skew and mixture."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .bed import RATE, Bed, Measured
from .load import Load
from .pairing import Figure, figure, ratio, rounds
from .results import Plot, Result, size_name

__all__ = ["Context", "cost", "get", "mixed", "put", "scaling", "skew", "small"]

KIB, MIB = 1 << 10, 1 << 20
SIZES = (KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB)
QUICK_SIZES = (KIB, 16 * KIB, 64 * KIB, MIB)
LINK = 200e6 / 8  # octets a second of one link
COLUMNS = (
    "what",
    "system",
    "MB/s",
    "requests/s",
    "of nginx",
    "p50 ms",
    "p99 ms",
    "frontend CPU s/GB",
    "failed",
)


@dataclass(frozen=True, slots=True)
class Context:
    """How thorough a run is.

    Attributes:
        count: rounds of each comparison.
        seconds: of each run.
        quick: whether only a few sizes are measured.
        say: tells the user what is being done.
    """

    count: int
    seconds: float
    quick: bool
    say: Callable[[str], None]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Object sizes."""
        return QUICK_SIZES if self.quick else SIZES


def connections(size: int) -> int:
    """64, and half as many for large objects, of which too few would be whole at the end."""
    return 64 if size <= MIB else 32


def _mb(run: Measured) -> float:
    return run.octets / 1e6


def _requests(run: Measured) -> float:
    return run.sample.requests


def _cost(run: Measured) -> float:
    """Seconds of frontend processor time for each GB delivered."""
    return run.frontend / (run.octets * run.seconds / 1e9)


def compare(
    context: Context,
    bed: Bed,
    what: str,
    systems: Sequence[str],
    load: Load,
    *,
    tls: bool = False,
    result: Result,
) -> dict[str, list[Measured]]:
    """One comparison: a row for each system."""
    context.say(f"{what}: {', '.join(systems)}")
    for system in systems:  # connections to origins, caches, learned sizes
        bed.run(system, load, 2, tls=tls and system != "direct")
    found = rounds(
        systems,
        context.count,
        lambda system, number: bed.run(
            system, load, context.seconds, tls=tls and system != "direct", seed=number
        ),
    )
    rival = found.get("nginx") or found.get("nginx-store")
    for system, runs in found.items():
        result.rows.append(
            (
                what,
                system,
                figure([_mb(run) for run in runs]),
                figure([run.sample.requests for run in runs]),
                ratio(runs, rival, _mb) if rival and rival is not runs else "1",
                figure([run.sample.p50 * 1e3 for run in runs]),
                figure([run.sample.p99 * 1e3 for run in runs]),
                figure([_cost(run) for run in runs]) if system != "direct" else "-",
                sum(run.sample.failed for run in runs),
            )
        )
    return found


def _lines(points: Iterable[tuple[str, dict[str, list[Measured]]]]) -> dict[str, list]:
    lines: dict[str, list[tuple[str, Figure]]] = {}
    for label, found in points:
        for system, runs in found.items():
            lines.setdefault(system, []).append((label, figure([_mb(run) for run in runs])))
    return lines


def _sweep(context: Context, name: str, title: str, method: str) -> Result:
    result = Result(name, title, COLUMNS)
    systems = ("prism", "nginx", "haproxy")
    limit = 4 * LINK / 1e6
    with Bed(4, rivals_wanted=("nginx", "haproxy")) as bed:
        bed.fill(context.sizes)
        for tls in (False, True):
            points = []
            for size in context.sizes:
                what = f"{method} {size_name(size)} {'TLS' if tls else 'TCP'}"
                paths = bed.keys(size)
                body = size if method == "PUT" else 0
                load = Load(paths, method, body, connections=connections(size))
                among = systems if tls or method == "PUT" else (*systems, "direct")
                points.append(
                    (
                        size_name(size),
                        compare(context, bed, what, among, load, tls=tls, result=result),
                    )
                )
            kind = "HTTPS" if tls else "HTTP"
            result.plots.append(
                Plot(
                    f"{name}-{'tls' if tls else 'tcp'}",
                    f"{method} over {kind}, 4 backends on 200 Mbit/s",
                    "MB/s",
                    _lines(points),
                    limit,
                )
            )
    result.notes += [
        "4 backends and one frontend, each link 200 Mbit/s, wrk with 64 kept-alive connections "
        "(32 above 1 MiB) and random keys, as many at each backend.",
        "Medians of the rounds (least-greatest).",
        f"The links together carry {limit:.0f} MB/s of frames, about 0.96 of it HTTP.",
        "nginx and HAProxy relay to nginx file servers; Prism serves from its own stores and hands "
        "over what pays (adaptive).",
    ]
    return result


def get(context: Context) -> Result:
    """Throughput of GET by object size."""
    return _sweep(context, "get", "GET by object size", "GET")


def put(context: Context) -> Result:
    """Throughput of PUT by object size."""
    return _sweep(context, "put", "PUT by object size", "PUT")


def small(context: Context) -> Result:
    """The smallest objects, with the rival before the very same stores too."""
    result = Result("small", "GET 1 KiB", COLUMNS)
    with Bed(4, rivals_wanted=("nginx", "nginx-store")) as bed:
        bed.fill((KIB,))
        for tls in (False, True):
            what = f"GET 1 KiB {'TLS' if tls else 'TCP'}"
            compare(
                context,
                bed,
                what,
                ("prism", "nginx-store", "nginx"),
                Load(bed.keys(KIB)),
                tls=tls,
                result=result,
            )
    result.notes.append("nginx-store: nginx relaying to the Prism stores that Prism uses itself.")
    return result


def scaling(context: Context) -> Result:
    """GET 1 MiB with one to six backends."""
    result = Result("scaling", "GET 1 MiB by number of backends", COLUMNS)
    points = []
    for backends in (1, 2, 4) if context.quick else (1, 2, 3, 4, 5, 6):
        with Bed(backends) as bed:
            bed.fill((MIB,))
            what = f"{backends} backend{'s' * (backends > 1)}"
            load = Load(bed.keys(MIB))
            points.append(
                (
                    str(backends),
                    compare(context, bed, what, ("prism", "nginx"), load, result=result),
                )
            )
    result.plots.append(Plot("scaling", "GET 1 MiB over HTTP by backends", "MB/s", _lines(points)))
    return result


def zipf(paths: Sequence[str], exponent: float = 0.99, draws: int = 4000) -> list[str]:
    """Paths repeated in proportion to 1/rank**exponent."""
    weights = [1 / math.pow(rank, exponent) for rank in range(1, len(paths) + 1)]
    scale = draws / sum(weights)
    return [
        path
        for path, weight in zip(paths, weights, strict=True)
        for _ in range(max(1, round(weight * scale)))
    ]


def skew(context: Context) -> Result:
    """GET 1 MiB, uniform, Zipf 0.99 and all on one backend; partitioned and replicated."""
    result = Result("skew", "GET 1 MiB under skew", COLUMNS)
    for placement in ("partitioned", "replicated"):
        with Bed(4, rivals_wanted=("nginx-store",), placement=placement, replicas=4) as bed:
            bed.fill((MIB,))
            paths = bed.keys(MIB)
            hot = [path for path in paths if bed.place(path) == "be1"] or paths[:1]
            for name, drawn in (("uniform", paths), ("Zipf 0.99", zipf(paths)), ("one", hot)):
                what = f"{placement}, {name}"
                compare(context, bed, what, ("prism", "nginx-store"), Load(drawn), result=result)
    result.notes += [
        "one: only keys whose first home is one backend; the link of that one is the limit where "
        "it alone has them.",
        "replicated: each object is on all four backends.",
        "nginx-store relays to the same stores by the same placement (replicated: in turn).",
    ]
    return result


def cost(context: Context) -> Result:
    """Frontend processor time for each GB, GET 1 MiB."""
    result = Result("cost", "Frontend processor time, GET 1 MiB", COLUMNS)
    with Bed(4, rivals_wanted=("nginx", "haproxy")) as bed:
        bed.fill((MIB,))
        for tls in (False, True):
            found = compare(
                context,
                bed,
                f"GET 1 MiB {'TLS' if tls else 'TCP'}",
                ("prism", "nginx", "haproxy"),
                Load(bed.keys(MIB)),
                tls=tls,
                result=result,
            )
            share = ratio(found["nginx"], found["prism"], _cost)
            result.notes.append(
                f"{'TLS' if tls else 'TCP'}: nginx needs {share.median:.0f} times the frontend "
                f"processor time of Prism for each GB ({share.low:.0f} to {share.high:.0f})."
            )
    return result


def mixed(context: Context) -> Result:
    """Half 1 KiB, half 4 MiB: adaptive handoff against always and never."""
    result = Result("mixed", "Half 1 KiB, half 4 MiB", COLUMNS)
    for rate, name in ((RATE, "links of 200 Mbit/s"), (None, "links without a limit")):
        found = _mixed(context, rate, name)
        for mode, runs in found.items():
            result.rows.append(
                (
                    name,
                    mode,
                    figure([_mb(run) for run in runs]),
                    figure([run.sample.requests for run in runs]),
                    ratio(runs, found["nginx"], _mb) if mode != "nginx" else "1",
                    figure([run.sample.p50 * 1e3 for run in runs]),
                    figure([run.sample.p99 * 1e3 for run in runs]),
                    figure([_cost(run) for run in runs]),
                    sum(run.sample.failed for run in runs),
                )
            )
        for other in ("always", "never"):
            for what, of in (("requests a second", _requests), ("octets", _mb)):
                gain = ratio(found["adaptive"], found[other], of)
                result.notes.append(
                    f"{name}: adaptive against {other}: {gain.median:.2f} of the {what} "
                    f"({gain.low:.2f} to {gain.high:.2f})."
                )
    result.notes.append(
        "Every connection draws from both kinds. Full links carry what they carry, however the "
        "requests are handled; without a limit the processors decide."
    )
    return result


def _mixed(context: Context, rate: str | None, name: str) -> dict[str, list[Measured]]:
    """The runs of each mode, and of nginx, which take turns."""
    modes = ("adaptive", "always", "never")
    beds: dict[str, Bed] = {}
    with contextlib.ExitStack() as stack:
        for mode in modes:
            bed = Bed(4, rivals_wanted=("nginx",), rate=rate, settings={"frontend.handoff": mode})
            beds[mode] = stack.enter_context(bed)
            bed.fill((KIB, 4 * MIB))
        small, large = (beds["adaptive"].keys(size) for size in (KIB, 4 * MIB))
        load = Load([*small, *(large * (len(small) // len(large)))])
        context.say(f"mixed sizes, {name}: " + ", ".join(modes))
        for bed in beds.values():
            bed.run("prism", load, 2)
        return rounds(
            [*modes, "nginx"],
            context.count,
            lambda mode, number: (
                beds["adaptive"].run("nginx", load, context.seconds, seed=number)
                if mode == "nginx"
                else beds[mode].run("prism", load, context.seconds, seed=number)
            ),
        )
