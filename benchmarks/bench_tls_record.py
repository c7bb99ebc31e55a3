"""Sealing and opening TLS records, side by side with ``openssl speed``.

    python benchmarks/bench_tls_record.py [--rounds N] [--suite NAME] [--json]

Both take turns, so that what else the machine does hurts both alike, and both count processor time
(``openssl speed`` its user time, we user and system time). The table gives the best round of each
in MB/s at records of 16384 octets, and the ratio of ours to OpenSSL's bare cipher, which has no
headers, nonces or tags to see to. A call gets 256 KiB of plaintext where nothing else is said.

The second table is what a handoff pays: microseconds (wall clock, median).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable

from prism._ext.tls_record import Tls

RECORD = 16384
CALL = 16 * RECORD
SUITES = {
    "TLS 1.3 AES-128-GCM": ("aes-128-gcm", 0x1301),
    "TLS 1.3 AES-256-GCM": ("aes-256-gcm", 0x1302),
    "TLS 1.3 ChaCha20-Poly1305": ("chacha20-poly1305", 0x1303),
    "TLS 1.2 AES-128-GCM": ("aes-128-gcm", 0xC02F),
    "TLS 1.2 AES-256-GCM": ("aes-256-gcm", 0xC030),
    "TLS 1.2 ChaCha20-Poly1305": ("chacha20-poly1305", 0xCCA8),
}


def make(suite: int, is_server: bool) -> Tls:
    if suite >> 8 == 0x13:
        size = 48 if suite == 0x1302 else 32
        return Tls.from_traffic_secrets(suite, b"c" * size, b"s" * size, is_server=is_server)
    return Tls.from_master_secret(suite, b"m" * 48, b"c" * 32, b"s" * 32, is_server=is_server)


def openssl_speed(cipher: str) -> float:
    """MB/s of one second of ``openssl speed``."""
    done = subprocess.run(
        ["openssl", "speed", "-mr", "-seconds", "1", "-bytes", str(RECORD), "-evp", cipher],
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"^\+F:.*:([0-9.]+)$", done.stdout, re.MULTILINE)
    if found is None:
        raise SystemExit(f"openssl speed says nothing that is understood: {done.stdout}")
    return float(found[1]) / 1e6


def rate(call: Callable[[], object], octets: int, seconds: float = 0.5) -> float:
    """MB/s of processor time."""
    call()
    times, begin = 0, time.process_time()
    while (spent := time.process_time() - begin) < seconds:
        for _ in range(16):
            call()
        times += 16
    return times * octets / spent / 1e6


def measure_suite(cipher: str, suite: int, rounds: int, fd: int) -> dict[str, float]:
    data = os.pread(fd, CALL, 0)
    record = data[:RECORD]
    one, twin = make(suite, True), make(suite, True)
    client = make(suite, False)
    client.sync(2, make_info(suite, one.write_seq))
    sealed = twin.seal(data)
    first = sealed[: len(sealed) // 16]
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "seal": (lambda: one.seal(data), CALL),
        "seal, call 16k": (lambda: one.seal(record), RECORD),
        "seal_file": (lambda: one.seal_file(fd, 0, CALL), CALL),
        "peek": (lambda: client.peek(sealed), CALL),
        "peek, call 16k": (lambda: client.peek(first), RECORD),
    }
    if client.peek(sealed).data != data:
        raise SystemExit("what was sealed does not come back")
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        found.setdefault("openssl", []).append(openssl_speed(cipher))
        for name, (call, octets) in calls.items():
            found.setdefault(name, []).append(rate(call, octets))
    return {name: max(values) for name, values in found.items()}


def make_info(suite: int, seq: int) -> bytes:
    """What a kernel would tell of the client's reading direction after ``seq`` records."""
    return make(suite, False).crypto_info(2)[:-8] + seq.to_bytes(8, "big")


def micros(call: Callable[[], object], times: int = 3000) -> float:
    spent = []
    for _ in range(times):
        begin = time.perf_counter_ns()
        call()
        spent.append(time.perf_counter_ns() - begin)
    return statistics.median(spent) / 1e3


def measure_handoff() -> dict[str, float]:
    server, client = make(0x1301, True), make(0x1301, False)
    head = client.seal(b"GET /bucket/key HTTP/1.1\r\nHost: objects.example\r\n\r\n")
    state = server.state()
    return {
        "from_traffic_secrets": micros(lambda: make(0x1301, True)),
        "from_master_secret": micros(lambda: make(0xC02F, True)),
        "peek at a request's head": micros(lambda: server.peek(head)),
        "state": micros(server.state),
        "from_state": micros(lambda: Tls.from_state(state)),
        "from_state, and its first peek": micros(lambda: Tls.from_state(state).peek(head)),
        "seal 200 octets": micros(lambda: server.seal(b"x" * 200)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--suite", help="only those whose name holds this")
    parser.add_argument("--json", action="store_true", help="figures for programs")
    options = parser.parse_args()
    with tempfile.TemporaryFile() as file:
        file.write(os.urandom(CALL))
        file.flush()
        bulk = {
            name: measure_suite(cipher, suite, options.rounds, file.fileno())
            for name, (cipher, suite) in SUITES.items()
            if not options.suite or options.suite in name
        }
    handoff = measure_handoff()
    if options.json:
        print(json.dumps({"bulk_mb_s": bulk, "handoff_us": handoff}, indent=1))
        return
    for name, figures in bulk.items():
        reference = figures.pop("openssl")
        print(f"{name}: openssl speed {reference:.0f} MB/s")
        for what, value in figures.items():
            print(f"    {what:<16} {value:6.0f} MB/s  {value / reference:.2f}")
    for name, value in handoff.items():
        print(f"{name:<32} {value:6.2f} us")


if __name__ == "__main__":
    main()
