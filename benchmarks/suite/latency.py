"""Latency: time to the first octet, stage by stage; handoffs a second; many idle connections."""

from __future__ import annotations

import contextlib
import json
import resource
import select
import socket
import ssl
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from prism.errors import PrismError

from .bed import Bed
from .load import Load
from .pairing import figure
from .results import Result
from .throughput import Context
from .trace import handed_over, stages, steps_in

__all__ = ["first_octet", "handoffs", "idle"]

SIZE = 1024
HANDOFF = "prism, the handoff alone"
_SETTLE = 0.001  # seconds from the handshake to the request: accepting is not what is measured


class Client:
    """Opens connections to one system and times requests."""

    def __init__(self, bed: Bed, system: str, *, tls: bool) -> None:
        self._bed = bed
        url = bed.url(system, tls=tls)
        host, _, port = url.partition("://")[2].partition(":")
        self._to = (host, int(port or (443 if tls else 80)))
        self._context: ssl.SSLContext | None = None
        if tls:
            self._context = ssl.create_default_context(cafile=bed.cluster.ca_file)

    def connect(self) -> socket.socket:
        """A connection whose handshakes are over."""
        sock = self._bed.client.socket()
        sock.settimeout(20)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.connect(self._to)
        if self._context is not None:
            sock = self._context.wrap_socket(sock, server_hostname=self._to[0])
        return sock

    def once(self, path: str) -> float:
        """Seconds from the request to the response's first octet, on a new connection."""
        with contextlib.closing(self.connect()) as sock:
            time.sleep(_SETTLE)
            return ask(sock, path)


def ask(sock: socket.socket, path: str) -> float:
    """One request; seconds to the first octet. The rest is read, unmeasured.

    Raises:
        PrismError: another answer than 200.
    """
    request = f"GET {path} HTTP/1.1\r\nHost: bench\r\n\r\n".encode()
    began = time.perf_counter()
    sock.sendall(request)
    data = sock.recv(65536)
    took = time.perf_counter() - began
    if not data.startswith(b"HTTP/1.1 200"):
        raise PrismError(f"GET {path}: {data[:60]!r}")
    while b"\r\n\r\n" not in data:
        data += _more(sock)
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(
        int(line.partition(b":")[2])
        for line in head.split(b"\r\n")
        if line.lower().startswith(b"content-length:")
    )
    while len(body) < length:
        body += _more(sock)
    return took


def _more(sock: socket.socket) -> bytes:
    data = sock.recv(65536)
    if not data:
        raise PrismError("the connection was closed within a response")
    return data


@contextlib.contextmanager
def _load(bed: Bed, seconds: float) -> Iterator[None]:
    """Four connections that fetch 1 MiB objects in the background."""
    script = bed.dir / "background.lua"
    paths = ",".join(json.dumps(path) for path in bed.keys(1 << 20))
    script.write_text(
        f"local p = {{{paths}}}\nfunction request()\n"
        "  return wrk.format('GET', p[math.random(#p)])\nend\n"
    )
    command = ["wrk", "-t1", "-c4", f"-d{round(seconds)}s", "-s", str(script), bed.url("prism")]
    process = bed.client.popen(command, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(10)


def _time_turns(clients: dict[str, Client], path: str, count: int) -> dict[str, list[float]]:
    """One request to each in turn."""
    found: dict[str, list[float]] = {name: [] for name in clients}
    for _ in range(count):
        for name, client in clients.items():
            found[name].append(client.once(path))
    return found


def first_octet(context: Context) -> Result:
    """Time to first octet of a new connection's first request, against the relays; by stage."""
    columns = ("what", "system", "median us", "best tenth us", "p99 us", "of nginx")
    result = Result("latency", "Request to first octet, new connection", columns)
    count = 100 if context.quick else 400
    settings = {"frontend.handoff": "always"}
    with (
        Bed(2, rivals_wanted=("nginx", "haproxy"), rate=None, settings=settings) as bed,
        Bed(2, rivals_wanted=(), rate=None, settings={"frontend.handoff": "never"}) as relaying,
        Bed(2, rivals_wanted=(), rate=None, settings=settings, trace=True) as traced,
    ):
        for each in (bed, relaying, traced):
            each.fill((SIZE, 1 << 20))
        path = bed.keys(SIZE)[0]
        for tls in (False, True):
            kind = "TLS" if tls else "TCP"
            clients = {
                "prism": Client(bed, "prism", tls=tls),
                "prism, relaying": Client(relaying, "prism", tls=tls),
                "nginx": Client(bed, "nginx", tls=tls),
                "haproxy": Client(bed, "haproxy", tls=tls),
            }
            if not tls:
                clients["direct"] = Client(bed, "direct", tls=False)
            context.say(f"first octet, {kind}, idle")
            _time_turns(clients, path, 30)
            _latency_rows(result, f"{kind}, idle", _time_turns(clients, path, count))
            context.say(f"first octet, {kind}, under load")
            with _load(bed, 120):
                _latency_rows(result, f"{kind}, loaded", _time_turns(clients, path, count))
            context.say(f"stages, {kind}")
            _stages(result, traced, path, count, tls=tls)
    result.notes.append(
        f"{HANDOFF}: from the frontend having read the request to the backend having the live "
        "connection; traced, one after the other."
    )
    result.notes.append("loaded: four connections fetch 1 MiB objects through Prism meanwhile.")
    return result


def _latency_rows(result: Result, what: str, found: dict[str, list[float]]) -> None:
    reference = statistics.median(found["nginx"])
    for name, values in found.items():
        ratio = f"{statistics.median(values) / reference:.2f}"
        result.rows.append((what, name, *_spread(values), ratio))


def _spread(values: list[float]) -> tuple[int, int, int]:
    """Median, best tenth and 99th percentile, in microseconds."""
    cuts = statistics.quantiles(values, n=100)
    return round(statistics.median(values) * 1e6), round(cuts[9] * 1e6), round(cuts[98] * 1e6)


def _stages(result: Result, bed: Bed, path: str, count: int, *, tls: bool) -> None:
    """A row for the handoff alone, a note with its stages, from the nodes' own traces."""
    client = Client(bed, "prism", tls=tls)
    seen: dict[str, float] = {}
    for _ in range(count):
        with contextlib.closing(client.connect()) as sock:
            time.sleep(_SETTLE)
            host, port = sock.getsockname()[:2]
            service = f"{bed.service}:{443 if tls else 80}"
            seen[f"{host}:{port}->{service}"] = ask(sock, path)
    time.sleep(0.3)
    sites = bed.cluster.nodes
    outs = steps_in(sites["fe1"].log, "handoff-out")
    ins = steps_in(sites["be1"].log, "handoff-in") | steps_in(sites["be2"].log, "handoff-in")
    found = stages(seen, outs, ins)
    parts = [f"{name} {statistics.median(took) * 1e6:.0f}" for name, took in found.items()]
    whole = statistics.median(seen.values()) * 1e6
    kind = "TLS" if tls else "TCP"
    handed = handed_over(seen, ins)
    result.rows.append((f"{kind}, idle", HANDOFF, *_spread(handed), "-"))
    result.notes.append(
        f"Stages, {kind}, medians in us (traced, {whole:.0f} in all): " + "; ".join(parts)
    )


# -- handoffs a second -----------------------------------------------------------------------


def handoffs(context: Context) -> Result:
    """Handoffs a second with every part on this machine: new connections, and between backends."""
    columns = ("what", "handoffs/s", "requests/s", "p50 ms", "p99 ms", "frontend CPU us", "failed")
    result = Result("handoffs", "Handoffs a second, 1 KiB objects", columns)
    with Bed(2, rivals_wanted=(), rate=None, settings={"frontend.handoff": "always"}) as bed:
        bed.fill((SIZE,))
        for what, load, tls in (
            ("a new connection for each request, TCP", Load(bed.keys(SIZE), close=True), False),
            ("kept-alive, random keys, TCP", Load(bed.keys(SIZE)), False),
            ("kept-alive, random keys, TLS", Load(bed.keys(SIZE)), True),
        ):
            context.say(what)
            bed.run("prism", load, 1, tls=tls)
            runs = [
                bed.run("prism", load, context.seconds, tls=tls, seed=number)
                for number in range(context.count)
            ]
            result.rows.append(
                (
                    what,
                    figure([run.counters["handoffs"] / run.seconds for run in runs]),
                    figure([run.sample.requests for run in runs]),
                    figure([run.sample.p50 * 1e3 for run in runs]),
                    figure([run.sample.p99 * 1e3 for run in runs]),
                    figure([1e6 * run.frontend / max(1, run.counters["handoffs"]) for run in runs]),
                    sum(run.sample.failed for run in runs),
                )
            )
    result.notes.append("The client, the frontend, two backends and the switch share the cores.")
    return result


# -- many connections ------------------------------------------------------------------------


def idle(context: Context) -> Result:
    """Idle handed-off connections: memory of the backends and the frontend, and latency then."""
    columns = ("connections", "backends kB each", "frontend kB each", "kernel kB each", "first us")
    result = Result("idle", "Idle kept-alive connections after a handoff", columns)
    wanted = 2_000 if context.quick else 10_000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < wanted + 1000:
        raise PrismError(f"needs {wanted + 1000} descriptors: raise the hard limit (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, wanted + 1000), hard))
    settings = {"frontend.handoff": "always", "backend.keepalive_timeout": 600}
    socks: list[socket.socket] = []
    try:
        with Bed(2, rivals_wanted=(), rate=None, settings=settings) as bed:
            bed.fill((SIZE,))
            client, paths = Client(bed, "prism", tls=False), bed.keys(SIZE)
            for path in paths * 20:  # what the processes grow by at first is not the connections'
                client.once(path)
            before, kernel = _memory(bed), _kernel_memory()
            first = statistics.median(client.once(paths[0]) for _ in range(100))
            result.rows.append((0, "-", "-", "-", round(first * 1e6)))
            context.say(f"opening {wanted} connections")
            for number in range(wanted):
                sock = client.connect()
                ask(sock, paths[number % len(paths)])
                socks.append(sock)
            after, grown = _memory(bed), _kernel_memory() - kernel
            first = statistics.median(client.once(paths[0]) for _ in range(100))
            held = sum(_open(sock) for sock in socks)
            result.rows.append(
                (
                    held,
                    round((after["backends"] - before["backends"]) / wanted / 1024, 2),
                    round((after["frontend"] - before["frontend"]) / wanted / 1024, 2),
                    round(grown / wanted / 1024, 2),
                    round(first * 1e6),
                )
            )
    finally:
        for sock in socks:
            sock.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    result.notes += [
        "kB each: growth of the processes' memory (proportional set size) by connection; kernel: "
        "of the machine's slab, which has both ends' sockets and the rule.",
        "first us: median time to first octet of a further new connection.",
    ]
    return result


def _open(sock: socket.socket) -> bool:
    """Whether the peer has not closed it."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return not poll.poll(0)


def _memory(bed: Bed) -> dict[str, int]:
    """Octets of proportional set size by kind of node."""
    found = {"backends": 0, "frontend": 0}
    nodes = bed.cluster.status()["nodes"]
    for name, node in nodes.items():
        role = {"be": "backends", "fe": "frontend"}.get(name[:2])
        for pid in node["pids"] if role else ():
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            kib = next(int(line.split()[1]) for line in text.splitlines() if line[:4] == "Pss:")
            found[str(role)] += kib * 1024
    return found


def _kernel_memory() -> int:
    """Octets of slab."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Slab:"):
            return int(line.split()[1]) * 1024
    raise PrismError("/proc/meminfo does not tell the slab's size")
