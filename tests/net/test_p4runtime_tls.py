"""P4Runtime over TLS, with real certificates: driver and soft switch at its ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from p4_bed import Controller
from p4_served import INSERT, Served, rule, serving

from prism.config import load
from prism.errors import ConfigError, SwitchError
from prism.switch.base import Change
from prism.switch.p4runtime_session import Session, SessionSettings
from prism.switch.p4runtime_tls import NO_TLS, TlsFiles
from prism.tls import pki

pytestmark = pytest.mark.net

CLUSTER = """
[cluster]
control = "10.77.0.1:4760"
key = "000102030405060708090a0b0c0d0e0f"
services = ["10.77.0.80:80"]
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two CAs; of the first a switch's certificate, one for elsewhere, and a controller's."""
    found = tmp_path_factory.mktemp("tls")
    for name in ("ours", "others"):
        pki.init(found / name)
        pki.issue(found / name, pki.Request("agent"))
        pki.issue(found / name, pki.Request("switch", server=True, addresses=("127.0.0.1",)))
        pki.issue(found / name, pki.Request("elsewhere", server=True, dns=("switch.example",)))
    return found


def end(files: Path, name: str | None, ca: str | None = "ours", own: str = "ours") -> TlsFiles:
    return TlsFiles(
        ca=files / ca / "ca.pem" if ca else None,
        certificate=files / own / f"{name}.pem" if name else None,
        key=files / own / f"{name}.key" if name else None,
    )


@pytest.fixture
def mutual(files: Path) -> Iterator[Served]:
    """A switch that wants certificates of its controllers."""
    with serving(end(files, "switch"), end(files, "agent")) as found:
        yield found


def refusal(address: str, tls: TlsFiles) -> str:
    """Why no connection comes about."""
    session = Session(SessionSettings(address=address, tls=tls, timeout=5.0), lambda message: None)
    try:
        with pytest.raises(SwitchError) as caught:
            session.connect()
    finally:
        session.close()
    assert address in str(caught.value)
    return str(caught.value)


async def test_a_driver_programs_the_switch_over_tls(mutual: Served, files: Path) -> None:
    controller = Controller(mutual.address, 20, tls=end(files, "agent"))
    try:
        await controller.ready()
        await controller.change(Change(rule().flow, None, rule()))
        assert mutual.state() == [rule()]
    finally:
        await controller.close()


def test_who_is_not_let_in_is_told_why(mutual: Served, files: Path) -> None:
    told = refusal(mutual.address, end(files, "agent", ca="others"))
    assert f"{files}/others/ca.pem does not vouch for its certificate" in told
    assert "of its controllers?" in refusal(mutual.address, end(files, None))
    assert "of its controllers?" in refusal(mutual.address, end(files, "agent", own="others"))
    assert "does it want TLS" in refusal(mutual.address, NO_TLS)
    name = "switch.example"
    with serving(end(files, "elsewhere", ca=None), end(files, None), name) as elsewhere:
        told = refusal(elsewhere.address, end(files, None))
        assert "its certificate is not for 127.0.0.1" in told
    with serving() as plain:
        assert "it does not speak TLS" in refusal(plain.address, end(files, None))
        assert plain.write(*plain.updates(INSERT, rule()))[0] == (0, "")
    assert "refused" in refusal("127.0.0.1:1", NO_TLS)


async def test_the_log_says_why_once(
    mutual: Served, files: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "prism.switch.p4runtime")
    controller = Controller(mutual.address, 20, tls=end(files, "agent", ca="others"))
    try:
        async with asyncio.timeout(10):
            while not caplog.records:
                await asyncio.sleep(0.02)
        await asyncio.sleep(0.5)
        (record,) = caplog.records
        assert "does not vouch" in record.getMessage()
        assert not controller.driver.ready
    finally:
        await controller.close()


def test_files_that_are_no_certificates_are_named(files: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.pem"
    text.write_text("no certificate")
    good = end(files, "switch")
    with pytest.raises(ConfigError, match=r"text\.pem: not a PEM certificate"):
        TlsFiles(ca=text).controller()
    with pytest.raises(ConfigError, match=r"missing\.pem: cannot be read: No such file"):
        TlsFiles(ca=tmp_path / "missing.pem").controller()
    with pytest.raises(ConfigError, match="the key is another's"):
        TlsFiles(certificate=good.certificate, key=files / "ours/agent.key").switch()
    with pytest.raises(ConfigError, match="not a PEM certificate with its key"):
        TlsFiles(certificate=text, key=good.key).switch()


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ('p4runtime_certificate = "a.pem"', "belong together"),
        (
            'kind = "p4runtime"\np4runtime_certificate = "a.pem"\np4runtime_key = "a.key"',
            "without p4runtime_ca",
        ),
        (
            'p4runtime_listen = "127.0.0.1:9559"\np4runtime_ca = "a.pem"',
            "without p4runtime_certificate",
        ),
    ],
)
def test_half_a_configuration_is_refused(tmp_path: Path, section: str, told: str) -> None:
    path = tmp_path / "prism.toml"
    path.write_text(f"{CLUSTER}[switch]\n{section}\n")
    with pytest.raises(ConfigError, match=told):
        load(path)


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "prism.toml"
    section = 'kind = "p4runtime"\np4runtime_ca = "ca.pem"\np4_device_config = "prism.json"'
    path.write_text(f"{CLUSTER}[switch]\n{section}\n")
    switch = load(path).switch
    assert switch is not None
    assert switch.p4runtime_ca == tmp_path / "ca.pem"
    assert switch.p4_device_config == tmp_path / "prism.json"
