"""Relaying small responses: Prism's relay against nginx, both to the same nginx, in turns.

    .venv/bin/python benchmarks/bench_relay.py [--rounds 3] [--seconds 3] [--size 1024]

All processes are on the loopback device; wrk asks with 32 connections. The ratio is the median of
the rounds'; CPU is what the relay's process took, user and system, for each request.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import re
import socket
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import uvloop

from prism.apps.relay import Relay
from prism.flow import Endpoint, Flow
from prism.http.connection import Connection
from prism.http.exchange import App, Exchange
from prism.http.head import HttpError, Limits, RequestHead
from prism.http.stream import PlainStream
from prism.listener import Listener

NGINX = """
user root; daemon off; master_process off; worker_processes 1; pid {root}/pid;
error_log stderr crit; events {{ worker_connections 1024; }}
http {{
  access_log off; sendfile on; keepalive_requests 100000000;
  client_body_temp_path {root}/b; proxy_temp_path {root}/p; fastcgi_temp_path {root}/f;
  uwsgi_temp_path {root}/u; scgi_temp_path {root}/s;
  upstream origin {{ server 127.0.0.1:{origin}; keepalive 64; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{port}; root {root};
    {location}
  }}
}}
"""
PROXY = """location / { proxy_pass http://origin; proxy_http_version 1.1;
  proxy_set_header Connection ""; proxy_set_header Host $host; }"""


class Relaying:
    """Sends every request to one app."""

    limits = Limits()
    body_timeout = 30.0
    server = b"prism"

    def __init__(self, app: App) -> None:
        self.app = app

    def dispatch(self, connection: Connection, head: RequestHead) -> None:
        """Relay it."""
        connection.serve(self.app)

    def bad_request(self, connection: Connection, error: HttpError) -> None:
        """Nothing to count."""

    def answered(self, connection: Connection, exchange: Exchange) -> None:
        """Nothing to count."""

    def closed(self, connection: Connection) -> None:
        """Nothing to forget."""


def prism(port: int, origin: int) -> None:
    async def main() -> None:
        relay = Relay(forwarding="origin")
        relaying = Relaying(relay.to(Endpoint("127.0.0.1", origin)))

        def accepted(sock: socket.socket, client: Endpoint, local: Endpoint) -> None:
            flow = Flow(client, local)
            Connection(PlainStream(sock, flow), flow, b"", relaying, local=local).start()

        listener = Listener(Endpoint("127.0.0.1", port), 1024, accepted)
        await asyncio.Event().wait()
        listener.close()

    uvloop.run(main())


def cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wrk(port: int, seconds: int) -> int:
    out = subprocess.run(
        ["wrk", "-t1", "-c32", f"-d{seconds}s", f"http://127.0.0.1:{port}/object"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    if "Non-2xx" in out or "Socket errors" in out:
        raise SystemExit(out)
    found = re.search(r"(\d+) requests in", out)
    if found is None:
        raise SystemExit(out)
    return int(found[1])


def free_ports(count: int) -> list[int]:
    socks = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in socks]
    for sock in socks:
        sock.close()
    return ports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--size", type=int, default=1024)
    given = parser.parse_args()
    origin, rival, ours = free_ports(3)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        (root / "object").write_bytes(os.urandom(given.size))
        started = []
        for port, location in ((origin, ""), (rival, PROXY)):
            path = root / f"{port}.conf"
            path.write_text(NGINX.format(root=root, origin=origin, port=port, location=location))
            started.append(subprocess.Popen(["nginx", "-c", path, "-e", "stderr"]))
        process = multiprocessing.Process(target=prism, args=(ours, origin))
        process.start()
        time.sleep(1)
        try:
            relays = {"nginx": (rival, started[1].pid), "prism": (ours, process.pid or 0)}
            results: dict[str, list[tuple[float, float]]] = {name: [] for name in relays}
            for _ in range(given.rounds):
                for relay, (port, pid) in relays.items():
                    before = cpu(pid)
                    count = wrk(port, given.seconds)
                    used = (cpu(pid) - before) / count * 1e6
                    results[relay].append((count / given.seconds, used))
        finally:
            process.kill()
            for server in started:
                server.kill()
                server.wait()
    for relay, rounds in results.items():
        rate = statistics.median(rate for rate, _ in rounds)
        used = statistics.median(used for _, used in rounds)
        print(f"{relay}: {rate:,.0f} requests/s, {used:.0f} us of CPU a request")
    ratios = [a[0] / b[0] for a, b in zip(results["prism"], results["nginx"], strict=True)]
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    load = os.getloadavg()[0]
    print(f"ratio {statistics.median(ratios):.2f} ({spread}), load {load:.0f}")


if __name__ == "__main__":
    main()
