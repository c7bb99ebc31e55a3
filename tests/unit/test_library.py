"""What ``import prism`` offers, and parts of a cluster on a program's own event loop."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

import prism
from prism.embedding import Embedded

CONFIG = """
[cluster]
key = "000102030405060708090a0b0c0d0e0f"
control = "127.0.0.1:{port}"

[switch]
kind = "userspace"

[telemetry]
status_socket = "{path}"
"""


def test_everything_that_is_offered_is_there():
    for name in prism.__all__:
        assert getattr(prism, name) is not None
    assert set(prism.__all__) <= set(dir(prism))
    with pytest.raises(AttributeError, match="no attribute 'Frontent'"):
        prism.Frontent  # type: ignore[attr-defined]  # noqa: B018


def test_importing_it_is_cheap():
    code = "import sys, prism; prism.__version__; print([m for m in sys.modules if 'prism.' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['prism._version']\n"


def _config(tmp_path: Path) -> prism.Config:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return prism.parse(CONFIG.format(port=port, path=tmp_path / "switch.sock"), base=tmp_path)


async def test_a_switch_in_a_program(tmp_path):
    config = _config(tmp_path)
    for _ in range(2):  # everything is given back at the end
        async with prism.Switch(config) as switch:
            assert switch.status()["counters"]["rules"] == 0
            assert (tmp_path / "switch.sock").is_socket()
        assert not (tmp_path / "switch.sock").exists()


async def test_a_start_that_fails_leaves_nothing(tmp_path):
    config = _config(tmp_path)
    async with prism.Switch(config):
        with pytest.raises((OSError, prism.PrismError)):
            async with prism.Switch(config):
                pass
        assert (tmp_path / "switch.sock").is_socket()


@pytest.mark.parametrize("part", [prism.Frontend, prism.Backend, prism.Switch])
def test_a_section_that_is_missing_is_named(part):
    config = prism.parse(CONFIG.format(port=4760, path="x.sock").replace("[switch]\n", "[x]\n", 0))
    if part is prism.Switch:
        config = config.model_copy(update={"switch": None})
    with pytest.raises(prism.ConfigError, match=rf"no \[{part.__name__.lower()}\] section"):
        part(config)


async def test_what_happens_on_the_way_in_and_out():
    class Part(Embedded):
        def __init__(self, fails: str = "") -> None:
            self.steps: list[str] = []
            self.fails = fails

        async def _step(self, name: str) -> None:
            self.steps.append(name)
            if name == self.fails:
                raise OSError(name)

        async def start(self) -> None:
            await self._step("start")

        async def publish(self) -> None:
            await self._step("publish")

        async def drain(self) -> None:
            await self._step("drain")

        async def close(self) -> None:
            await self._step("close")

    async with Part() as part:
        assert part.steps == ["start", "publish"]
    assert part.steps == ["start", "publish", "drain", "close"]
    for fails, steps in (
        ("start", ["start", "close"]),
        ("publish", ["start", "publish", "close"]),
        ("drain", ["start", "publish", "drain", "close"]),
    ):
        part = Part(fails)
        with pytest.raises(OSError, match=fails):
            async with part:
                pass
        assert part.steps == steps
    part = Part()
    with pytest.raises(ValueError):
        async with part:
            raise ValueError
    assert part.steps == ["start", "publish", "close"]
