"""Nodes inside other programs: the examples, on asyncio's own loop, in a cluster of real nodes."""

from __future__ import annotations

import contextlib
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from e2e_bed import Bed, wait_for
from e2e_http import digest

from prism.lab.cluster import Cluster

EXAMPLES = Path(__file__).parents[2] / "examples"
POLICY = f"""
[policy]
route = "routing:route"
route_dir = "{EXAMPLES / "routing"}"

[[pools]]
name = "beta"
nodes = ["be2"]
"""


@contextlib.contextmanager
def running(bed: Bed, node: str, program: Path) -> Iterator[subprocess.Popen[str]]:
    """A node's place taken by a program, which must end well when it is told to."""
    bed.cluster.kill(node, signal.SIGTERM)
    command = [sys.executable, str(program), str(bed.cluster.node(node).config)]
    process = bed.cluster.popen(node, command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == f"{node}/0 is ready\n"
        yield process
    finally:
        process.terminate()
        code = process.wait(20)
    assert code == 0


def test_examples(make_bed: Callable[..., Bed]) -> None:
    """A frontend that routes by a function, and a backend with an application of its own."""
    bed = make_bed(backends=2, settings={"cluster.serves": "application"})
    for name in bed.nodes:
        path = bed.cluster.node(name).config
        path.write_text(path.read_text() + POLICY)
    bed.cluster.restart("be1")
    bed.cluster.restart("be2")
    with running(bed, "fe1", EXAMPLES / "routing/routing.py"):
        _routed(bed)
        with running(bed, "be1", EXAMPLES / "embedded_app.py") as backend:
            assert wait_for(lambda: _linked(bed), 10)
            handoffs = bed.total("handoffs_in")
            path = bed.key("be1", "app")
            with bed.client.open() as conn:
                for _ in range(2):
                    answer = conn.request("GET", path)
                    assert answer.body == f"{path} asked for by {conn.local[0]}\n".encode()
            assert bed.total("handoffs_in") == handoffs + 1
            backend.terminate()
            assert backend.stdout is not None
            assert backend.stdout.read() == "answered: {'GET 200': 2}\n"


def _linked(bed: Bed) -> bool:
    """The frontend can offer connections to all backends, and finds them fit."""
    (status,) = bed.cluster.statuses("fe1")
    fit = all(node["state"] == "fit" for node in status["health"].values())
    return fit and all(status["peers"].values())


def _routed(bed: Bed) -> None:
    """The function decides on the frontend, and on the backends the same."""
    assert wait_for(lambda: _linked(bed), 10)
    path = bed.key("be1", "route")
    handoffs = bed.total("handoffs_in")
    with bed.client.open() as conn:
        assert conn.request("PUT", path, b"stable").status == 201
        answer = conn.request("PUT", path, b"new", headers=[("X-Beta", "1")])
        assert (answer.status, answer.node) == (201, "be2/0")
        for headers, node, body in (
            ([], "be1/0", b"stable"),
            ([("Cookie", "a=b; beta=1")], "be2/0", b"new"),
        ):
            answer = conn.request("GET", path, headers=headers)
            assert (answer.status, answer.node, answer.sha256) == (200, node, digest(body))
        assert conn.request("GET", "/v1/" + path).status == 410  # at be2, which has the connection
    assert bed.total("handoffs_in") == handoffs + 4
    assert bed.client.once("GET", "/%76%31//x").status == 410  # at the frontend


def documented(path: Path) -> list[str]:
    """The commands in a program's docstring."""
    text = path.read_text().split('"""')[1]
    return [line.strip() for line in text.splitlines() if line.startswith("    ")]


def test_the_key_value_store_as_documented(lab_name: str) -> None:
    """Each command of its docstring, in a lab of another name."""
    path = EXAMPLES / "kv/kv.py"
    assert len(path.read_text().splitlines()) <= 60
    outputs = []
    for line in documented(path):
        if line.startswith("cd "):
            assert EXAMPLES.parent / line[3:] == path.parent
            continue
        words = shlex.split(line)
        assert words[:3] == ["sudo", "prism-proxy", "lab"]
        if words[3] == "down":
            _sharded(Cluster.attach(lab_name))
        command = [sys.executable, "-m", "prism", "lab", words[3], "--name", lab_name, *words[4:]]
        ran = subprocess.run(
            command, check=True, capture_output=True, text=True, cwd=path.parent, timeout=60
        )
        outputs.append(ran.stdout)
    assert outputs[1:-1] == ["", "red", "5", "7"]


def _sharded(cluster: Cluster) -> None:
    """Every key is at one backend, the same for all clients, and at no other."""
    bed = Bed(cluster)
    keys = [path for node in bed.backends for path in bed.keys(node, 3, "shard")]
    for key in keys:
        assert bed.client.once("PUT", key, key.encode()).status == 204
    with bed.client.open() as conn:
        for key in keys:
            answer = conn.request("GET", key)
            assert (answer.status, answer.body) == (200, key.encode())
            assert answer.node.partition("/")[0] == bed.owner(key)
        assert conn.request("DELETE", keys[0]).status == 200
        assert conn.request("GET", keys[0]).status == 404
        assert conn.request("POST", keys[1], b"1").status == 409
    bed.cluster.kill(bed.backends[0])
    lost = [bed.client.once("GET", key).status for key in bed.keys(bed.backends[0], 3, "shard")]
    assert set(lost) == {502}, "no other backend says that there is no such key"
