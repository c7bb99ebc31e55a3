"""Agent and switch talk TLS, each with a certificate that the other checks."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from e2e_bed import Bed
from e2e_http import digest

from prism.tls import pki


def test_handoffs_with_tls_to_the_switch(make_bed: Callable[..., Bed], tmp_path: Path) -> None:
    pki.init(tmp_path)
    pki.issue(tmp_path, pki.Request("switch", addresses=("127.0.0.1",)))
    files = {"ca": "ca.pem", "certificate": "switch.pem", "key": "switch.key"}
    settings = {f"switch.p4runtime_{key}": str(tmp_path / name) for key, name in files.items()}
    bed = make_bed(backends=2, switch="p4runtime", settings=settings)
    for node in bed.backends:
        key = bed.key(node, "tls")
        data = bed.store(key, 50_000)
        answer = bed.client.once("GET", key)
        assert (answer.sha256, answer.node) == (digest(data), f"{node}/0")
    assert bed.switch("handoffs") >= 4
    # Who does not speak TLS is told so.
    config = bed.cluster.node("switch").config
    text = config.read_text()
    for key, name in files.items():
        line = f"p4runtime_{key} = {json.dumps(str(tmp_path / name))}"
        assert line in text
        text = text.replace(line, "")
    other = config.with_name("other.toml")
    other.write_text(text)
    for path, good in ((config, True), (other, False)):
        command = [sys.executable, "-m", "prism", "switch", "rules", "-c", str(path)]
        done = bed.cluster.exec("switch", command, capture_output=True, text=True)
        assert (done.returncode == 0) is good, done.stderr
    assert "cannot be reached" in done.stderr and "does it want TLS" in done.stderr, done.stderr
