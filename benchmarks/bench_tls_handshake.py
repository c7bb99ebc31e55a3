"""TLS handshakes: what one costs the server, beside nginx with the same certificate.

Everything runs on the loopback device; clients and server share the machine, so that the figure
to compare is the CPU time of one handshake. Rounds of both servers alternate. About a minute:

    python benchmarks/bench_tls_handshake.py [--rounds 5] [--handshakes 400] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import select
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import uvloop

from prism.config_tls import TlsConfig
from prism.flow import Endpoint, Flow
from prism.listener import Listener
from prism.tls.context import TlsContexts
from prism.tls.established import Established
from prism.tls.server import TlsServer

CASES = {
    "TLS 1.3, ECDSA P-256": ("1.3", "ec", False),
    "TLS 1.2, ECDSA P-256": ("1.2", "ec", False),
    "TLS 1.3, RSA 2048": ("1.3", "rsa", False),
    "TLS 1.3, resumed": ("1.3", "ec", True),
}
CLIENTS = 2
NGINX = """\
daemon off; worker_processes 1; error_log {dir}/error.log; pid {dir}/nginx.pid;
events {{ worker_connections 512; }}
http {{ access_log off; server {{
  listen 127.0.0.1:{port} ssl; ssl_certificate {dir}/{key}.pem; ssl_certificate_key {dir}/{key}.key;
  ssl_protocols TLSv1.2 TLSv1.3; return 204;
}} }}
"""


def make_certificates(directory: Path) -> None:
    curve = "ec_paramgen_curve:P-256"
    for name, kind in (("ec", ["ec", "-pkeyopt", curve]), ("rsa", ["rsa:2048"])):
        key, certificate = directory / f"{name}.key", directory / f"{name}.pem"
        command = ["openssl", "req", "-x509", "-nodes", "-newkey", *kind, "-days", "2"]
        command += ["-subj", "/CN=b", "-keyout", str(key), "-out", str(certificate)]
        subprocess.run(command, check=True, capture_output=True)
        key.chmod(0o600)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def nginx(directory: Path, key: str) -> Iterator[tuple[int, int]]:
    """An nginx with one worker: its port, and the worker's process id."""
    port = free_port()
    config = directory / "nginx.conf"
    config.write_text(NGINX.format(dir=directory, port=port, key=key))
    with subprocess.Popen(["nginx", "-c", config, "-p", directory]) as master:
        try:
            wait_for(port)
            children = Path(f"/proc/{master.pid}/task/{master.pid}/children")
            while not children.read_text():
                time.sleep(0.01)
            yield port, int(children.read_text().split()[0])
        finally:
            master.terminate()


@contextlib.contextmanager
def prism(directory: Path, key: str) -> Iterator[tuple[int, int]]:
    """A process that does handshakes and closes: its port and id."""
    port = free_port()
    pid = os.fork()
    if pid == 0:
        try:
            uvloop.run(serve(directory, key, port))
        finally:
            os._exit(0)
    try:
        wait_for(port)
        yield port, pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


async def serve(directory: Path, key: str, port: int) -> None:
    entry = {"certificate": str(directory / f"{key}.pem"), "key": str(directory / f"{key}.key")}
    config = TlsConfig(certificates=[entry])
    server = TlsServer(config, TlsContexts(config))

    def done(sock: socket.socket, established: Established | None) -> None:
        if established is None:
            return
        loop = asyncio.get_running_loop()

        def close() -> None:  # as nginx: when the client has closed
            loop.remove_reader(sock.fileno())
            established.tls.wipe()
            sock.close()

        loop.add_reader(sock.fileno(), close)

    Listener(
        Endpoint("127.0.0.1", port),
        512,
        lambda sock, client, local: server.accept(sock, Flow(client, local), done),
    )
    await asyncio.Event().wait()


def wait_for(port: int) -> None:
    for _ in range(500):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.01)
    raise RuntimeError("the server does not start")


def cpu_us(pid: int) -> float:
    """CPU time that a process has used, microseconds."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1000


def client(port: int, version: str, resume: bool, count: int) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    number = ssl.TLSVersion.TLSv1_3 if version == "1.3" else ssl.TLSVersion.TLSv1_2
    context.minimum_version = context.maximum_version = number
    session = None
    for _ in range(count):
        sock = socket.create_connection(("127.0.0.1", port))
        tls = context.wrap_socket(sock, server_hostname="b.test", session=session)
        if version == "1.3":  # take the tickets, so that the server never writes to nobody
            select.select([tls], [], [], 1)
            tls.settimeout(0.0)
            with contextlib.suppress(ssl.SSLWantReadError):
                tls.recv(1)
        if resume:
            if session is not None and not tls.session_reused:
                raise RuntimeError("the ticket was not accepted")
            session = tls.session
        tls.close()


def load(port: int, version: str, resume: bool, count: int) -> float:
    """Handshakes from several processes; seconds."""
    begun = time.perf_counter()
    children = []
    for _ in range(CLIENTS):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                client(port, version, resume, count // CLIENTS)
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    for pid in children:
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            raise RuntimeError("a client failed")
    return time.perf_counter() - begun


def measure(directory: Path, case: str, rounds: int, count: int) -> dict[str, dict[str, float]]:
    version, key, resume = CASES[case]
    servers = {"prism": prism, "nginx": nginx} if shutil.which("nginx") else {"prism": prism}
    cost: dict[str, list[float]] = {name: [] for name in servers}
    rate: dict[str, list[float]] = {name: [] for name in servers}
    with contextlib.ExitStack() as stack:
        running = {
            name: stack.enter_context(server(directory, key)) for name, server in servers.items()
        }
        for number in range(rounds + 1):
            for name, (port, pid) in running.items():
                before = cpu_us(pid)
                seconds = load(port, version, resume, count)
                if number:  # the first round warms up
                    cost[name].append((cpu_us(pid) - before) / count)
                    rate[name].append(count / seconds)
    return {
        name: {
            "cpu_us": round(statistics.median(cost[name]), 1),
            "cpu_us_min": round(min(cost[name]), 1),
            "per_second": round(statistics.median(rate[name])),
        }
        for name in servers
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--handshakes", type=int, default=400, help="in each round")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        make_certificates(directory)
        for case in CASES:
            results[case] = measure(directory, case, options.rounds, options.handshakes)
            if options.json:
                continue
            for server, values in results[case].items():
                print(
                    f"{case:22} {server}: {values['cpu_us']:.0f} us of CPU each "
                    f"(best {values['cpu_us_min']:.0f}), {values['per_second']} per second"
                )
    if options.json:
        json.dump({"load": os.getloadavg()[0], "cases": results}, sys.stdout, indent=2)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
