"""Logs, metrics and the status socket."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import stat
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from prism.config import TelemetryConfig
from prism.errors import PrismError
from prism.flow import Endpoint, Flow
from prism.telemetry import (
    LabelledCounter,
    Metrics,
    StatusServer,
    act,
    configure,
    event,
    read_status,
    tracing,
)
from prism.telemetry.metrics import Sampled

FLOW = Flow(Endpoint("192.0.2.1", 4242), Endpoint("198.51.100.1", 80))


@pytest.fixture(autouse=True)
def quiet_afterwards():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    configure(TelemetryConfig(), stream=io.StringIO())
    root.handlers[:] = handlers
    root.setLevel(level)


def logged(config: TelemetryConfig, log) -> str:
    stream = io.StringIO()
    configure(config, "fe1/0", stream)
    log()
    return stream.getvalue()


def test_json_lines_carry_time_level_process_and_message() -> None:
    text = logged(
        TelemetryConfig(log_format="json"), lambda: logging.getLogger("prism.x").warning("a %s", 1)
    )
    entry = json.loads(text)
    assert (entry["level"], entry["logger"], entry["process"]) == ("warning", "prism.x", "fe1/0")
    assert entry["message"] == "a 1"
    assert entry["time"].endswith("Z")
    assert len(entry["time"]) == len("2026-01-02T03:04:05.678901Z")


def test_traces_are_off_unless_asked_for() -> None:
    assert logged(TelemetryConfig(), lambda: event("handoff", flow=FLOW)) == ""
    assert not tracing()


def test_a_trace_event_carries_its_fields() -> None:
    text = logged(
        TelemetryConfig(trace=True, log_format="json"),
        lambda: event("handoff", flow=FLOW, gen=7, node="be1/0", steps={"lock": 9100}),
    )
    entry = json.loads(text)
    assert entry["event"] == "handoff"
    assert entry["flow"] == "192.0.2.1:4242->198.51.100.1:80"
    assert (entry["gen"], entry["node"], entry["steps"]) == (7, "be1/0", {"lock": 9100})


def test_a_terminal_gets_steps_in_microseconds() -> None:
    text = logged(
        TelemetryConfig(trace=True, log_format="human"),
        lambda: event("handoff", steps={"lock": 9100, "export": 13_000}),
    )
    assert "lock=9.1us export=13.0us" in text


def test_no_peer_can_forge_a_log_line() -> None:
    hostile = "GET /\n12:00:00.000 info fe1/0: all is well\x1b[2J"
    for kind in ("human", "json"):
        text = logged(
            TelemetryConfig(log_format=kind),
            lambda: logging.getLogger("prism").error("bad request: %s", hostile),
        )
        assert text.count("\n") == 1
        assert "\x1b" not in text


def test_a_log_file_is_reopened_after_rotation(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "fe1.log"
    configure(TelemetryConfig(log_file=path))
    logging.getLogger("prism").error("before")
    path.rename(path.with_suffix(".1"))
    logging.getLogger("prism").error("after")
    assert "before" in path.with_suffix(".1").read_text()
    assert "after" in path.read_text()


def test_metrics_are_what_prometheus_reads() -> None:
    metrics = Metrics()
    metrics.handoffs_out += 3
    metrics.connections = 2
    metrics.relays.add("draining")
    metrics.requests.add("GET", 200)
    metrics.requests.add("GET", 200)
    metrics.handoff_time.observe_us(120)
    metrics.handoff_time.observe_us(10**6)
    metrics.sample("rules", "Rules in the switch", lambda: 42)
    found = {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
    }
    assert found["prism_handoffs_out_total", ()] == 3
    assert found["prism_connections", ()] == 2
    assert found["prism_relays_total", ("draining",)] == 1
    assert found["prism_requests_total", ("GET", "200")] == 2
    assert found["prism_rules", ()] == 42
    assert found["prism_handoff_seconds_bucket", ("0.0001",)] == 0
    assert found["prism_handoff_seconds_bucket", ("0.00015",)] == 1
    assert found["prism_handoff_seconds_bucket", ("+Inf",)] == 2
    assert found["prism_handoff_seconds_sum", ()] == pytest.approx(1.00012)


def test_nested_numbers_from_elsewhere_become_gauges() -> None:
    numbers = {"rules": 2, "hold": {"octets": 3}}
    text = Sampled("prism_switch", lambda: numbers).text().decode()
    numbers["rules"] = 5
    assert "prism_switch_rules 2.0" in text
    assert "prism_switch_hold_octets 3.0" in text


def test_labels_from_clients_cannot_grow_without_bound() -> None:
    counter = LabelledCounter("method", "status")
    for number in range(1000):
        counter.add(f"METHOD{number}", 400)
    assert len(list(counter.items())) <= 65
    assert counter.total == 1000
    assert counter.snapshot()["other other"] == 1000 - 64


async def test_the_status_socket_answers_its_owner_only(tmp_path: Path) -> None:
    metrics = Metrics()
    server = StatusServer(lambda: {"role": "frontend", "counters": metrics.snapshot()}, metrics)
    path = tmp_path / "run" / "fe1-0.sock"
    await server.start(path)
    try:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        metrics.handoffs_in += 1
        status = await asyncio.to_thread(read_status, path)
        assert status["role"] == "frontend"
        assert status["counters"]["handoffs_in"] == 1
        with pytest.raises(OSError, match="another process answers"):
            await StatusServer(dict, metrics).start(path)
    finally:
        await server.close()
    assert not path.exists()
    with pytest.raises(PrismError, match="no status from"):
        read_status(path)


async def test_a_process_does_what_it_is_asked_to(tmp_path: Path) -> None:
    path, seconds = tmp_path / "x.sock", []
    server = StatusServer(lambda: {"asked": len(seconds)}, Metrics(), {"drain": seconds.append})
    await server.start(path)
    try:
        assert await asyncio.to_thread(act, path, "drain", 2.5) == {"asked": 1}
        assert seconds == [2.5]
        for name, number in (("drain", -1), ("drain", float("nan")), ("status", 0), ("other", 0)):
            with pytest.raises(PrismError, match="no status from"):
                await asyncio.to_thread(act, path, name, number)
        assert seconds == [2.5]
    finally:
        await server.close()


async def test_a_dead_process_s_socket_is_replaced(tmp_path: Path) -> None:
    metrics, path = Metrics(), tmp_path / "x.sock"
    dead = StatusServer(dict, metrics)
    await dead.start(path)
    left = path.with_suffix(".left")
    path.rename(left)
    await dead.close()
    left.rename(path)
    server = StatusServer(lambda: {"alive": True}, metrics)
    await server.start(path)
    try:
        assert await asyncio.to_thread(read_status, path) == {"alive": True}
    finally:
        await server.close()


async def test_tcp_serves_metrics_and_nothing_else(unused_tcp_port: int) -> None:
    metrics = Metrics()
    server = StatusServer(lambda: {"secret": 1}, metrics)
    await server.start(None, Endpoint("127.0.0.1", unused_tcp_port))
    base = f"http://127.0.0.1:{unused_tcp_port}"

    def fetch(path: str) -> bytes:
        with urllib.request.urlopen(base + path, timeout=5) as answer:
            return answer.read()

    try:
        assert b"prism_handoffs_out_total 0.0" in await asyncio.to_thread(fetch, "/metrics")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            await asyncio.to_thread(fetch, "/status")
    finally:
        await server.close()


async def test_a_client_that_says_nothing_or_rubbish_is_let_go(tmp_path: Path) -> None:
    server, path = StatusServer(dict, Metrics()), tmp_path / "x.sock"
    await server.start(path)
    try:
        for rubbish in (b"", b"x" * 200_000, b"POST /status HTTP/1.0\r\n\r\n", b"\r\n\r\n"):
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(rubbish)
            if not rubbish:
                writer.write_eof()
            try:
                answer = await asyncio.wait_for(reader.read(), 5)
            except ConnectionError:
                answer = b""
            assert b"200 OK" not in answer
            writer.close()
        assert await asyncio.to_thread(read_status, path) == {}
    finally:
        await server.close()
