"""The configuration file: what is accepted, and how well an error says what is wrong."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from channel_bed import authority, issue_in_the_past
from hypothesis import given, settings
from hypothesis import strategies as st

from prism.config import Config, load, parse, serving
from prism.config_reference import reference
from prism.config_replication import replication_changed
from prism.errors import ConfigError
from prism.flow import Endpoint
from prism.lab.files import to_toml
from prism.tls import pki
from prism.tomlpos import line_of, positions

ROOT = Path(__file__).parents[2]
KEY = "00112233445566778899aabbccddeeff"
CLUSTER = f"""
[cluster]
key = "{KEY}"
control = "10.77.0.1:4760"
services = ["10.77.0.80:80", "[fd77::80]:80"]
"""
NODES = """
[[nodes]]
name = "be1"
address = "10.77.101.2"
workers = 2
[[nodes]]
name = "be2"
address = "10.77.102.2"
address6 = "fd77:102::2"
handoff_port = 5000
"""
FRONTEND = """
[frontend]
name = "fe1"
address = "10.77.11.2"
"""


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text, source="x.toml")
    return str(caught.value).split("\n")


def test_the_example_is_good(tmp_path: Path) -> None:
    (tmp_path / "prism.toml").write_text((ROOT / "examples/prism.toml").read_text())
    (tmp_path / "cluster.key").touch(mode=0o600)
    (tmp_path / "cluster.key").write_text(KEY + "\n")
    pki.init(tmp_path / "pki")
    for node in ("fe1", "be1"):
        pki.issue(tmp_path / "pki", pki.Request(node))
    config = load(tmp_path / "prism.toml")
    assert config.frontend is not None
    assert config.backend is not None
    assert config.backend.store == tmp_path / "objects"
    assert config.listen == (Endpoint("10.77.0.80", 80), Endpoint("fd77::80", 80))


def test_the_reference_page_is_what_the_models_say() -> None:
    assert (ROOT / "docs/configuration.md").read_text() == reference(), (
        "make it anew: python -m prism.config_reference > docs/configuration.md"
    )


def test_a_backend_takes_its_place_from_its_nodes_entry() -> None:
    config = parse(CLUSTER + NODES + '[backend]\nname = "be2"\n')
    assert config.backend is not None
    assert config.backend.address == "10.77.102.2"
    assert config.backend.address_for("192.0.2.1") == "10.77.102.2"
    assert config.backend.address_for("2001:db8::1") == "fd77:102::2"
    assert config.backend.handoff_endpoint(1) == Endpoint("10.77.102.2", 5001)
    assert config.nodes[0].address_for("2001:db8::1") is None
    assert config.backend.worker_name(1) == "be2/1"


def test_a_backend_that_contradicts_its_entry_is_refused() -> None:
    text = CLUSTER + NODES + '[backend]\nname = "be2"\nhandoff_port = 5001\n'
    line = text.splitlines().index("handoff_port = 5001") + 1
    assert problems(text) == [
        f"x.toml:{line}: backend.handoff_port: differs from its [[nodes]] entry; leave it out here"
    ]


@pytest.mark.parametrize(
    ("text", "line", "key", "remedy"),
    [
        (CLUSTER + NODES + FRONTEND + "wokers = 2", 20, "frontend.wokers", "mean 'workers'?"),
        (CLUSTER + "[frontnd]\n", 6, "frontnd", "mean 'frontend'?"),
        (CLUSTER + "colour = 1", 6, "cluster.colour", "known here: ca, control, key, key_file"),
        (CLUSTER + NODES + FRONTEND + "workers = 0", 20, "frontend.workers", "greater than or"),
        (CLUSTER + NODES + FRONTEND + 'handoff = "no"', 20, "frontend.handoff", "'never'"),
        (
            CLUSTER + NODES + FRONTEND + 'listen = ["a:80"]',
            20,
            "frontend.listen[0]",
            "not an IP address",
        ),
        (CLUSTER + NODES + FRONTEND + 'listen = ["10.0.0.1"]', 20, "frontend.listen[0]", "PORT"),
        (CLUSTER + "[frontend]\nname = 'fe1'", 6, "frontend.address", "is missing"),
        (CLUSTER + NODES + "[frontend]\nname='be1'\naddress='10.0.0.1'", 17, "frontend.name", ""),
        (CLUSTER + FRONTEND, None, "nodes", "[[nodes]] entry for each backend"),
        (CLUSTER + NODES + NODES.replace("be1", "be3"), 22, "nodes[3].name", "its own name"),
        (CLUSTER + '[backend]\nname = "be9"\naddress="10.0.0.1"', 7, "backend.name", "named 'be9'"),
        (CLUSTER + "[switch]", 6, "switch", "interfaces"),
        (
            CLUSTER
            + NODES
            + 'weight = 2\n[[nodes]]\nname = "x"\naddress = "::1"\naddress6 = "1.1.1.1"',
            17,
            "nodes[2]",
            "must be an IPv6",
        ),
    ],
)
def test_an_error_names_line_key_and_remedy(
    text: str, line: int | None, key: str, remedy: str
) -> None:
    (problem,) = problems(text)
    where = "x.toml" if line is None else f"x.toml:{line}"
    if "interfaces" in remedy:
        key = "switch.interfaces"
    assert problem.startswith(f"{where}: {key}: "), problem
    assert remedy in problem


def test_every_problem_is_told_at_once() -> None:
    assert len(problems(CLUSTER + "a = 1\n[frontend]\nb = 2\n[telemetry]\nlog_level = 3")) == 5


def test_a_syntax_error_has_its_line() -> None:
    (problem,) = problems("[cluster]\ncontrol = \n")
    assert problem.startswith("x.toml:2: not valid TOML: ")
    (problem,) = problems("[cluster]\ncontrol = '''\n\n")
    assert problem.startswith("x.toml:")


@pytest.mark.parametrize("key", ["", "z!" * 16, "00" * 15, "not base64 at all!!", "ab" * 15 + "a"])
def test_an_unusable_key_is_refused_and_never_shown(key: str) -> None:
    (problem,) = problems(CLUSTER.replace(KEY, key))
    assert problem.startswith("x.toml:3: cluster.key: ")
    assert "openssl rand -hex 32" in problem
    assert not key or key not in problem


def test_hexadecimal_and_base64_are_the_same_key() -> None:
    import base64

    other = base64.b64encode(bytes.fromhex(KEY)).decode()
    one, two = parse(CLUSTER).cluster, parse(CLUSTER.replace(KEY, other)).cluster
    assert one.control_key() == two.control_key()
    assert (len(one.control_key()), len(one.channel_key())) == (16, 32)
    assert one.control_key() != one.channel_key()[:16]


def test_the_key_is_in_no_text_of_the_configuration() -> None:
    config = parse(CLUSTER)
    shown = f"{config!r} {config} {config.model_dump()} {config.model_dump_json()}"
    assert KEY not in shown
    assert config.cluster.control_key().hex() not in shown


def test_a_wrong_key_s_value_is_not_shown_either() -> None:
    secret = "deadbeef" * 8
    (problem,) = problems(f'[cluster]\nkey = ["{secret}"]\ncontrol = "10.0.0.1:1"\n')
    assert secret not in problem


def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    key = tmp_path / "k"
    text = '[cluster]\nkey_file = "k"\ncontrol = "10.0.0.1:4760"\n'
    with pytest.raises(ConfigError, match=r"t:2: cluster\.key_file: cannot read .*No such file"):
        parse(text, source="t", base=tmp_path)
    key.write_text(KEY)
    key.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        parse(text, base=tmp_path)
    key.chmod(0o600)
    assert parse(text, base=tmp_path).cluster.control_key() == parse(CLUSTER).cluster.control_key()


NODE = CLUSTER + 'pki_dir = "pki"\n' + NODES + FRONTEND
PKI_LINE = NODE.splitlines().index('pki_dir = "pki"') + 1


@pytest.fixture
def node_files(tmp_path: Path) -> Path:
    """Good certificate files of fe1, to be broken; the configuration file beside them."""
    authority(tmp_path / "pki")
    pki.issue(tmp_path / "pki", pki.Request("fe1"))
    (tmp_path / "x.toml").write_text(NODE)
    load(tmp_path / "x.toml")
    return tmp_path / "pki"


def certificate_problem(pki_dir: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load(pki_dir.parent / "x.toml")
    (problem,) = str(caught.value).split("\n")
    return problem.removeprefix(str(pki_dir.parent / "x.toml"))


def _other_ca(pki_dir: Path) -> None:
    pki.init(pki_dir, force=True)


def _other_node(pki_dir: Path) -> None:
    pki.issue(pki_dir, pki.Request("be1"))
    for end in (".pem", ".key"):
        (pki_dir / f"be1{end}").replace(pki_dir / f"fe1{end}")


def _service(pki_dir: Path) -> None:
    pki.issue(pki_dir, pki.Request("fe1", server=True, dns=("fe1",)), force=True)


def _mismatch(pki_dir: Path) -> None:
    pki.issue(pki_dir, pki.Request("be1"))
    (pki_dir / "be1.key").replace(pki_dir / "fe1.key")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "ca.pem").unlink(), r"cannot read .*/ca\.pem: No such file .*pki init"),
        (lambda d: (d / "fe1.pem").unlink(), r"cannot read .*/fe1\.pem: No such .*issue DIR fe1"),
        (lambda d: (d / "fe1.key").unlink(), r"cannot read .*/fe1\.key: No such file"),
        (lambda d: (d / "fe1.key").chmod(0o640), r"open to others \(mode 640\): chmod 600 .*key"),
        (lambda d: (d / "fe1.key").write_text("?"), r"fe1\.key has no private key"),
        (lambda d: (d / "fe1.pem").write_text("?"), r"fe1\.pem has no certificate"),
        (lambda d: issue_in_the_past(d, "fe1", until=-60), r"fe1\.pem expired on .*pki issue"),
        (_other_ca, r"fe1\.pem was not issued by the CA in .*/ca\.pem; issue one with"),
        (_other_node, r"is the certificate of node be1, not of fe1; issue one with"),
        (_service, r"is the certificate of no node, not of fe1"),
        (_mismatch, r"fe1\.key is not the key of .*/fe1\.pem"),
    ],
)
def test_certificates_that_a_node_cannot_use(
    node_files: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(node_files)
    problem = certificate_problem(node_files)
    assert problem.startswith(f":{PKI_LINE}: cluster.pki_dir: ")
    assert re.search(message, problem)


@pytest.mark.parametrize(
    ("section", "option", "file"),
    [
        ("cluster", "ca", "ca.pem"),
        ("frontend", "node_certificate", "fe1.pem"),
        ("frontend", "node_key", "fe1.key"),
    ],
)
def test_certificate_files_elsewhere(
    node_files: Path, tmp_path: Path, section: str, option: str, file: str
) -> None:
    text = NODE.replace(f"[{section}]", f'[{section}]\n{option} = "elsewhere"')
    (tmp_path / "x.toml").write_text(text)
    line = text.splitlines().index(f'{option} = "elsewhere"') + 1
    assert certificate_problem(node_files).startswith(f":{line}: {section}.{option}: cannot read ")
    (node_files / file).replace(tmp_path / "elsewhere")
    config = load(tmp_path / "x.toml")
    assert config.frontend is not None
    assert tmp_path / "elsewhere" in config.identity_files(config.frontend)


def test_a_switch_needs_no_certificate(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(CLUSTER + NODES + '[switch]\ninterfaces = ["eth0"]\n')
    load(tmp_path / "x.toml")


def test_neither_or_both_keys_are_refused() -> None:
    assert "exactly one of" in problems('[cluster]\ncontrol = "10.0.0.1:1"\n')[0]
    assert "exactly one of" in problems(CLUSTER + 'key_file = "k"')[0]


@pytest.mark.parametrize("content", [b"\xff\xfe", None])
def test_a_file_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"x\.toml: "):
        load(path)


def test_status_sockets_and_metrics_ports_of_workers() -> None:
    text = '[telemetry]\nstatus_socket = "/run/p/fe1.sock"\nmetrics_listen = "127.0.0.1:9100"\n'
    telemetry = parse(CLUSTER + text).telemetry
    assert telemetry.status_path(None) == Path("/run/p/fe1.sock")
    assert telemetry.status_path(3) == Path("/run/p/fe1-3.sock")
    assert telemetry.metrics_endpoint(3) == Endpoint("127.0.0.1", 9103)


TRICKY = '''\
# [not.a.table]
top = "a # b"   # c
[a]             # [b]
x = [           # one
  "]", # two
  3,
]
text = """
[inside]
y = 1
"""
"quoted key" = 'it''s'
b.c = { d = "}", e = [1, 2] }
[[t]]
n = 1
[[t]]
n = 2
[t.sub]
k = 1
[a.deep]
z = 1
'''.replace("'it''s'", "'its'")


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("top",), 2),
        (("a",), 3),
        (("a", "x"), 4),
        (("a", "x", 1), 4),
        (("a", "text"), 8),
        (("a", "quoted key"), 12),
        (("a", "b", "c"), 13),
        (("t", 0, "n"), 15),
        (("t", 1), 16),
        (("t", 1, "n"), 17),
        (("t", 1, "sub", "k"), 19),
        (("a", "deep", "z"), 21),
        (("inside",), None),
        (("y",), None),
    ],
)
def test_positions_in_a_tricky_document(path: tuple[str | int, ...], line: int | None) -> None:
    tomllib.loads(TRICKY)
    assert line_of(positions(TRICKY), path) == line


@given(st.text(max_size=300))
def test_positions_never_fail(text: str) -> None:
    positions(text)


SCALARS = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.text(st.characters(blacklist_categories=["Cs"]), max_size=20),
    st.lists(st.integers(0, 9), max_size=3),
)
NAMES = st.text("abcdefgh_-", min_size=1, max_size=6)


@given(st.dictionaries(NAMES, st.dictionaries(NAMES, SCALARS, max_size=5), max_size=5))
def test_every_key_of_a_generated_document_has_its_line(data: dict[str, dict[str, Any]]) -> None:
    lines: list[str] = []
    expected: dict[tuple[str, ...], int] = {}
    for section, table in data.items():
        lines.append(f"[{section}]")
        for key, value in table.items():
            lines.append(f"{key} = {to_toml(value)}")
            expected[section, key] = len(lines)
    text = "\n".join(lines)
    assert tomllib.loads(text) == data
    found = positions(text)
    assert {path: found.get(path) for path in expected} == expected


@settings(deadline=None)
@given(st.recursive(SCALARS, lambda inner: st.dictionaries(NAMES, inner, max_size=4)))
def test_no_value_of_a_section_gets_past_as_a_fault(value: Any) -> None:
    for section in Config.model_fields:
        if section == "cluster":
            continue
        try:
            parse(f"{section} = {to_toml(value)}\n" + CLUSTER)
        except ConfigError as error:
            assert str(error).startswith("<text>")


def test_a_backend_serves_what_the_command_line_says() -> None:
    text = MINIMAL_BACKEND
    config = serving(parse(text), None, "http://localhost:9000/")
    assert config.backend is not None
    assert (str(config.backend.upstream), config.cluster.serves) == (
        "127.0.0.1:9000",
        "application",
    )
    assert serving(parse(text), None, None).cluster.serves == "objects"
    unix = serving(parse(text), None, "unix:/run/a.sock").backend
    assert unix is not None
    assert unix.upstream == "/run/a.sock"
    for app, upstream in (
        ("a:b", "http://127.0.0.1:1"), ("no colon", None), (None, "https://h:1"), (None, "ftp"),
        (None, "http://127.0.0.1:1/path"), (None, "unix:relative"), (None, "http://name:80"),
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            serving(parse(text), app, upstream)


def test_an_application_needs_the_frontends_to_know() -> None:
    text = MINIMAL_BACKEND.replace("[backend]", '[backend]\napp = "a:b"')
    with pytest.raises(ConfigError, match=r'app: needs cluster.serves = "application"'):
        parse(text)
    parse(text.replace("[cluster]", '[cluster]\nserves = "application"'))


MINIMAL_BACKEND = """
[cluster]
key = "00112233445566778899aabbccddeeff"
control = "10.0.0.1:4760"
[[nodes]]
name = "be1"
address = "10.0.0.2"
[backend]
name = "be1"
"""


@pytest.mark.parametrize(
    ("more", "key", "remedy"),
    [
        ("replicas = 3", "placement.replicas", "there are 2 [[nodes]] only"),
        ("replicas = 1", "placement.replicas", "greater than or equal to 2"),
        ('[[pools]]\nname = "p"\nnodes = ["be1"]', "pools", "leave pools out"),
        (
            '[[policy.rules]]\nname = "r"\naction = "relay"\nplacement = "round-robin"',
            "policy.rules[0].placement",
            "leave the rule's placement out",
        ),
    ],
)
def test_what_does_not_go_with_replication_is_refused(more: str, key: str, remedy: str) -> None:
    nodes = "".join(f'[[nodes]]\nname = "be{n}"\naddress = "10.77.101.{n}"\n' for n in range(1, 3))
    (problem,) = problems(CLUSTER + nodes + '[placement]\nname = "replicated"\n' + more)
    assert f": {key}: " in problem and remedy in problem, problem


def test_an_application_and_workers_do_not_go_with_replication() -> None:
    text = CLUSTER + 'serves = "application"\n' + NODES + '[placement]\nname = "replicated"\n'
    found = problems(text)
    assert any("placement.name: only the object store" in problem for problem in found), found
    assert any(".workers: a backend that replicates has one worker" in each for each in found)


def test_replication_does_not_change_while_nodes_run() -> None:
    nodes = "".join(f'[[nodes]]\nname = "be{n}"\naddress = "10.77.101.{n}"\n' for n in range(1, 4))
    text = CLUSTER + nodes + '[placement]\nname = "replicated"\n'
    old = parse(text)
    assert replication_changed(old, parse(text)) == ""
    assert "placement: " in replication_changed(old, parse(text + "replicas = 3"))
    assert "placement: " in replication_changed(old, parse(CLUSTER + nodes))
    moved = text.replace('"be3"', '"be4"')
    assert "nodes: " in replication_changed(old, parse(moved))
    assert replication_changed(parse(CLUSTER + nodes), parse(CLUSTER)) == ""
