"""The lab's life: up, status, exec, crash, down; and that nothing of it stays behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from prism.errors import ConfigError, PrismError
from prism.lab import files
from prism.lab.cluster import Cluster
from prism.lab.sweep import sweep
from prism.lab.topology import namespaces_of
from prism.process import start_time

pytestmark = pytest.mark.e2e


def prism(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "prism", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def wait_for(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def assert_nothing_is_left(name: str) -> None:
    assert namespaces_of(name) == []
    assert not files.directory(name).exists()
    assert f"/run/prism-lab/{name}/" not in Path("/proc/self/mountinfo").read_text()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            assert f"/run/prism-lab/{name}/".encode() not in command


def test_a_detached_lab_through_the_command_line(lab_name: str) -> None:
    up = prism("lab", "up", "--name", lab_name, "--backends", "1", "--detach")
    assert up.returncode == 0, up.stderr
    assert "http://10.77.0.80" in up.stdout

    status = json.loads(prism("lab", "status", "--name", lab_name, "--json").stdout)
    assert status["url"] == "http://10.77.0.80"
    assert status["ca_file"] is None
    assert set(status["nodes"]) == {"switch", "fe1", "be1"}
    node = status["nodes"]["be1"]
    assert node["namespace"] == f"{lab_name}-be1"
    assert node["address"] == "10.77.101.2"
    assert all(start_time(pid) is not None for pid in node["pids"])
    assert Path(node["log"]).is_file()
    assert set(status["counters"]) == {
        "handoffs",
        "take_backs",
        "refusals",
        "relays",
        "held_packets",
        "dropped_packets",
    }

    url = f"{status['url']}/hello"
    run = ["lab", "exec", "--name", lab_name, "client", "--", "curl", "-sSf", "--max-time", "10"]
    assert prism(*run, "--data-binary", "@/etc/hostname", "-X", "PUT", url).returncode == 0
    assert prism(*run, url).stdout == Path("/etc/hostname").read_text()
    after = json.loads(prism("lab", "status", "--name", lab_name, "--json").stdout)
    assert after["counters"]["handoffs"] == 2
    assert prism("lab", "exec", "--name", lab_name, "be7", "--", "true").returncode == 2
    assert prism("lab", "exec", "--name", lab_name, "be1", "--", "false").returncode == 1

    second = prism("lab", "up", "--name", lab_name)
    assert second.returncode == 1
    assert f"lab {lab_name} is up already" in second.stderr
    assert "be1" in prism("lab", "status", "--name", lab_name).stdout

    down = prism("lab", "down", "--name", lab_name)
    assert (down.returncode, down.stdout) == (0, f"lab {lab_name} is down\n")
    assert_nothing_is_left(lab_name)


def test_a_lab_with_tls_has_a_certificate_that_its_ca_file_is_good_for(lab_name: str) -> None:
    """And plain HTTP as well; what nodes trust each other by is not what clients trust."""
    options = {"tls.min_version": "1.3"}
    with Cluster(lab_name, backends=1, tls=True, settings=options) as cluster:
        assert (cluster.url, cluster.url6) == ("https://10.77.0.80", "https://[fd77::80]")
        status = Cluster.attach(lab_name).status()
        assert (status["url"], status["ca_file"]) == (cluster.url, str(cluster.ca_file))
        backend = cluster.config("be1").tls
        assert backend is not None
        assert not backend.certificates  # the service's key is none of theirs
        tls = cluster.config("fe1").tls
        assert tls is not None
        assert tls.listen == cluster.topology.services(443)
        assert tls.min_version == backend.min_version == "1.3"
        assert cluster.config("switch").tls is None

        client = ssl.create_default_context(cafile=cluster.ca_file)
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(tls.certificates[0].certificate, tls.certificates[0].key)
        for name in ("10.77.0.80", "fd77::80", "prism.lab"):
            one, two = ssl.MemoryBIO(), ssl.MemoryBIO()
            ends = (
                client.wrap_bio(one, two, server_hostname=name),
                server.wrap_bio(two, one, server_side=True),
            )
            for end in ends * 2:
                with contextlib.suppress(ssl.SSLWantReadError):
                    end.do_handshake()
            assert ends[0].getpeercert()
        assert (cluster.dir / "pki/ca.pem").read_bytes() != cluster.ca_file.read_bytes()

        plain = ["curl", "-sSf", "--max-time", "10", "http://10.77.0.80/"]
        assert cluster.exec("client", plain, capture_output=True).returncode == 0
    assert_nothing_is_left(lab_name)
    with pytest.raises(ConfigError, match="for a lab with --tls"):
        Cluster(lab_name, settings=options).up()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_lab_in_the_foreground_ends_with_its_command(
    lab_name: str, number: signal.Signals
) -> None:
    command = [sys.executable, "-m", "prism", "lab", "up", "--name", lab_name, "--backends", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as up:
        assert up.stdout is not None
        assert "is up" in up.stdout.readline()
        up.send_signal(number)
        assert up.wait(timeout=20) == 0
    assert_nothing_is_left(lab_name)


def test_interrupted_while_coming_up_it_leaves_nothing(lab_name: str) -> None:
    command = [sys.executable, "-m", "prism", "lab", "up", "--name", lab_name, "--backends", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as up:
        wait_for(lambda: namespaces_of(lab_name))
        up.send_signal(signal.SIGINT)
        try:
            assert up.wait(timeout=60) == 130
        finally:
            up.kill()
    assert_nothing_is_left(lab_name)


def test_down_ends_a_lab_in_the_foreground(lab_name: str) -> None:
    command = [sys.executable, "-m", "prism", "lab", "up", "--name", lab_name, "--backends", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as up:
        assert up.stdout is not None
        assert "is up" in up.stdout.readline()
        assert prism("lab", "down", "--name", lab_name).returncode == 0
        assert up.wait(timeout=20) == 0
    assert_nothing_is_left(lab_name)


def test_after_a_crash_down_and_up_both_clean(lab_name: str) -> None:
    command = [sys.executable, "-m", "prism", "lab", "up", "--name", lab_name, "--backends", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as up:
        assert up.stdout is not None
        assert "is up" in up.stdout.readline()
        up.kill()
        up.wait()
    assert len(namespaces_of(lab_name)) == 4
    assert prism("lab", "up", "--name", lab_name).returncode == 1  # its nodes still run
    assert prism("lab", "down", "--name", lab_name).returncode == 0
    assert_nothing_is_left(lab_name)

    cluster = Cluster(lab_name, backends=1)
    cluster.up()
    for name in cluster.nodes:
        cluster.kill(name)
    with Cluster(lab_name, backends=1) as again:  # only leftovers: no reason to refuse
        assert all(node.alive for node in again.nodes.values())
    assert_nothing_is_left(lab_name)


def test_nodes_can_be_killed_and_restarted(lab_name: str) -> None:
    fetch = ["curl", "-sS", "--max-time", "10", "-o", "/dev/null", "-w", "%{http_code}"]
    with Cluster(lab_name, backends=1, workers=2) as cluster:
        node = cluster.node("be1")
        before = node.pid
        workers = {status["pid"] for status in cluster.statuses("be1")}
        assert len(workers) == 2
        assert before not in workers
        assert set(cluster.status()["nodes"]["be1"]["pids"]) == workers | {before}
        cluster.kill("be1")
        assert not node.alive
        assert cluster.status()["nodes"]["be1"]["pids"] == []
        wait_for(lambda: all(start_time(pid) is None for pid in workers))
        cluster.restart("be1")
        assert node.alive
        assert node.pid != before
        answer = cluster.exec("client", [*fetch, f"{cluster.url}/x"], capture_output=True)
        assert answer.stdout == b"404"
        with pytest.raises(ConfigError, match="there are: switch, fe1, be1"):
            cluster.node("be2")
    assert_nothing_is_left(lab_name)


def test_secrets_are_root_s_alone(lab_name: str) -> None:
    with Cluster(lab_name, backends=1) as cluster:
        assert stat.S_IMODE(cluster.dir.stat().st_mode) == 0o700
        assert stat.S_IMODE((cluster.dir / "cluster.key").stat().st_mode) == 0o600
        key = (cluster.dir / "cluster.key").read_text().strip()
        for node in cluster.nodes.values():
            assert key not in node.log.read_text()
            assert key not in node.config.read_text()
            assert key.encode() not in Path(f"/proc/{node.pid}/cmdline").read_bytes()
            for path in cluster.status_sockets(node.name):
                assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_node_that_cannot_start_is_told_with_its_log_and_nothing_stays(lab_name: str) -> None:
    cluster = Cluster(lab_name, backends=1, settings={"frontend.listen": ["192.0.2.1:80"]})
    with pytest.raises(PrismError, match=r"(?s)fe1 ended while starting:.*192\.0\.2\.1"):
        cluster.up()
    assert_nothing_is_left(lab_name)


def test_a_setting_nobody_knows_is_refused_before_anything_is_built(lab_name: str) -> None:
    done = prism("lab", "up", "--name", lab_name, "--set", "frontend.wrkers=2")
    assert done.returncode == 2
    assert "did you mean 'workers'?" in done.stderr
    assert_nothing_is_left(lab_name)


def test_an_attached_lab_is_the_same_lab(lab_name: str, tmp_path: Path) -> None:
    with Cluster(lab_name, backends=2, store=tmp_path, rate="100mbit", lock="drop") as cluster:
        other = Cluster.attach(lab_name)
        assert other.options == cluster.options
        assert other.status()["nodes"] == cluster.status()["nodes"]
        assert (tmp_path / "be2").is_dir()
        other.kill("be2", signal.SIGTERM)
        wait_for(lambda: not cluster.node("be2").alive)
    with pytest.raises(PrismError, match="is not up"):
        Cluster.attach(lab_name)


def test_sweeping_hits_what_begins_with_the_prefix_only(lab_name: str) -> None:
    cluster = Cluster(lab_name, backends=1)
    cluster.up()
    keeper = os.getpid()
    assert sweep(f"{lab_name}x") == []
    assert cluster.node("fe1").alive
    assert len(sweep(lab_name)) == 4
    assert start_time(keeper) is not None
    assert_nothing_is_left(lab_name)
    with pytest.raises(ConfigError, match="at least 5"):
        sweep("p")


def test_the_switch_outlives_its_agent_and_can_be_removed(lab_name: str) -> None:
    def filters() -> str:
        show = ["tc", "filter", "show", "dev", "client", "ingress"]
        return cluster.exec("switch", show, capture_output=True, text=True).stdout

    with Cluster(lab_name, backends=1) as cluster:
        config = str(cluster.node("switch").config)
        remove = [sys.executable, "-m", "prism", "switch", "-c", config, "--remove"]
        refused = cluster.exec("switch", remove, capture_output=True, text=True)
        assert refused.returncode == 1
        assert "another agent" in refused.stderr
        cluster.kill("switch", signal.SIGTERM)
        assert "prism_switch" in filters()
        assert cluster.exec("switch", remove).returncode == 0
        assert filters() == ""
        assert not (cluster.dir / "bpf/prism").exists()


def test_several_frontends_and_workers_serve_both_families(lab_name: str) -> None:
    put = ["curl", "-sSf", "--max-time", "10", "-T", "/etc/hostname"]
    get = ["curl", "-sSf", "--max-time", "10"]
    expected = Path("/etc/hostname").read_text()
    with Cluster(lab_name, backends=2, frontends=2, workers=2, rate="200mbit") as cluster:
        for number in range(12):
            here, there = (cluster.url, cluster.url6)[:: 1 if number % 2 else -1]
            assert cluster.exec("client", [*put, f"{here}/k{number}"]).returncode == 0
            fetched = cluster.exec(
                "client", [*get, f"{there}/k{number}"], capture_output=True, text=True
            )
            assert fetched.stdout == expected
        wait_for(lambda: cluster.status()["counters"]["handoffs"] == 24)
        accepted = {
            name: [status["counters"]["accepted"] for status in cluster.statuses(name)]
            for name in ("fe1", "fe2")
        }
        assert sum(map(sum, accepted.values())) == 24
        assert all(sum(counts) for counts in accepted.values())
