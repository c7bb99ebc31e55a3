"""What receiving an upload costs with the record layer in the process and in the kernel.

    scripts/vm .venv/bin/python benchmarks/bench_tls_receive.py [--megabytes N] [--rounds N]

Processor time (user and system) of the receiving process for each megabyte, over loopback, both in
turns; the client is another process. Needs a kernel with TLS, see scripts/vm. An emulator is no
real processor: it has no AES instructions, and weighs others differently; only the ratio is worth
anything, and that not much.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import statistics
import time

from prism._ext.tls_record import Tls
from prism.tls import offload
from prism.tls.kernel_probe import Support, probe
from prism.tls.offload import RECEIVE_FROM, KernelTlsStream

SUITES = {
    "AES-128-GCM": 0xC02F,
    "ChaCha20-Poly1305": 0xCCA8,
    "ChaCha20-Poly1305, TLS 1.3": 0x1303,
}
RECORD = 16384


def make(suite: int, is_server: bool) -> Tls:
    if suite >> 8 == 0x13:
        return Tls.from_traffic_secrets(suite, b"c" * 32, b"s" * 32, is_server=is_server)
    return Tls.from_master_secret(suite, b"m" * 48, b"c" * 32, b"s" * 32, is_server=is_server)


def client(port: int, suite: int, octets: int) -> int:
    """Another process that uploads; its pid."""
    pid = os.fork()
    if pid:
        return pid
    sealed = make(suite, False).seal(bytes(octets))
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(sealed)
        sock.recv(1)
    os._exit(0)


def measure(suite: int, octets: int, kernel: bool) -> float:
    """Seconds of processor time for a megabyte."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pid = client(listener.getsockname()[1], suite, octets)
        sock, _ = listener.accept()
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        return asyncio.run(receive(sock, suite, octets, kernel, sink)) / (octets / 1e6)
    finally:
        os.close(sink)
        os.waitpid(pid, 0)


async def receive(sock: socket.socket, suite: int, octets: int, kernel: bool, sink: int) -> float:
    """Seconds of processor time for all of it."""
    stream = KernelTlsStream(sock, make(suite, True))
    stream.receives = kernel
    stream.expect(max(octets, RECEIVE_FROM))
    if stream.opened_by_kernel != kernel:
        raise SystemExit(f"the kernel does not open records: {probe()}")
    left, began = octets, time.process_time()
    while left:
        try:
            left -= os.write(sink, stream.receive(65536))
        except BlockingIOError:
            await stream.readable(60)
    spent = time.process_time() - began
    stream.close()
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found = probe()
    # No KeyUpdate comes here, so every kernel can receive TLS 1.3.
    offload.probe = lambda: Support(found.ciphers, found.why, True)
    for name, suite in SUITES.items():
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(options.rounds):
            for kernel, values in times.items():
                values.append(measure(suite, options.megabytes * 1_000_000, kernel))
        inside, process = (statistics.median(times[kernel]) * 1e3 for kernel in (True, False))
        print(
            f"{name:<28} kernel {inside:7.1f} ms/MB, process {process:7.1f} ms/MB: "
            f"{inside / process:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
