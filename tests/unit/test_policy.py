"""The policy: a table of requests and decisions, tricks with paths, limits, explanations."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism.cli import main
from prism.config import Config, parse
from prism.config_policy import PolicyConfig
from prism.errors import ConfigError
from prism.http.head import HttpError, RequestHead, parse_head
from prism.policy.decision import Action, Decision
from prism.policy.engine import Policy
from prism.policy.limits import MAX_NETWORKS, RateLimit
from prism.tls.peer import Peer, pack_peer

CLUSTER = f"""
[cluster]
key = "{"0" * 64}"
control = "10.0.0.1:4760"
services = ["10.0.0.80:80"]
"""
NODES = """
[[nodes]]
name = "be1"
address = "10.0.0.11"

[[nodes]]
name = "be2"
address = "10.0.0.12"
"""

RULES = """
[policy]

[[policy.rules]]
name = "no-admin"
path_prefix = ["/admin"]
path_glob = ["*/.git/*"]
action = "deny"

[[policy.rules]]
name = "partners"
client_certificate = ["CN=partner,*", "DNS:*.partner.example"]
action = "handoff"

[[policy.rules]]
name = "moved"
host = ["old.example", "*.old.example"]
action = "respond"
status = 301
location = "https://new.example/"

[[policy.rules]]
name = "health"
method = ["GET", "HEAD"]
path = ["/healthz"]
action = "respond"
body = "well"

[[policy.rules]]
name = "uploads"
method = ["PUT"]
path_prefix = ["/uploads"]
client = ["10.1.0.0/16", "fd00::/8"]
action = "relay"
max_body = 1000
set_headers = { X-From = "prism" }
remove_headers = ["Cookie"]

[[policy.rules]]
name = "images"
path_regex = ['\\.(png|jpe?g)$']
header = { Accept = ["image/*"] }
query = { size = ["large", "huge"] }
pool = "fast"
action = "handoff"

[[policy.rules]]
name = "by-sni"
tls_server_name = ["sni.example"]
action = "relay"

[[pools]]
name = "fast"
nodes = ["be2"]
"""


def configured(text: str = RULES) -> Config:
    return parse(CLUSTER + NODES + text)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy(configured().policy)


def request(line: str, *fields: str) -> RequestHead:
    lines = [f"{line} HTTP/1.1", *fields]
    if not any(field.lower().startswith("host:") for field in fields):
        lines.append("Host: store.example")
    head = parse_head("\r\n".join((*lines, "", "")).encode())
    assert head is not None
    return head


def decide(policy: Policy, line: str, *fields: str, client: str = "192.0.2.1", **peer: object):
    facts = pack_peer(Peer(**peer)) if peer else b""  # type: ignore[arg-type]
    return policy.decide(request(line, *fields), client, facts)


@pytest.mark.parametrize(
    ("line", "fields", "client", "peer", "rule", "action"),
    [
        ("GET /admin", (), "192.0.2.1", {}, "no-admin", Action.DENY),
        ("GET /admin/users", (), "192.0.2.1", {}, "no-admin", Action.DENY),
        ("GET /administration", (), "192.0.2.1", {}, "", Action.AUTO),
        ("GET /x/.git/config", (), "192.0.2.1", {}, "no-admin", Action.DENY),
        ("GET /a", ("Host: www.old.example:80",), "192.0.2.1", {}, "moved", Action.RESPOND),
        ("GET /a", ("Host: OLD.example.",), "192.0.2.1", {}, "moved", Action.RESPOND),
        ("GET /a", ("Host: veryold.example",), "192.0.2.1", {}, "", Action.AUTO),
        ("HEAD /healthz", (), "192.0.2.1", {}, "health", Action.RESPOND),
        ("POST /healthz", (), "192.0.2.1", {}, "", Action.AUTO),
        ("PUT /uploads/1", (), "10.1.2.3", {}, "uploads", Action.RELAY),
        ("PUT /uploads/1", (), "::ffff:10.1.2.3", {}, "uploads", Action.RELAY),
        ("PUT /uploads/1", (), "fd12::1", {}, "uploads", Action.RELAY),
        ("PUT /uploads/1", (), "10.2.0.1", {}, "", Action.AUTO),
        (
            "GET /a.png?size=huge",
            ("Accept: image/png",),
            "192.0.2.1",
            {},
            "images",
            Action.HANDOFF,
        ),
        ("GET /a.png?size=small", ("Accept: image/png",), "192.0.2.1", {}, "", Action.AUTO),
        ("GET /a.png?size=huge", (), "192.0.2.1", {}, "", Action.AUTO),
        (
            "GET /a",
            (),
            "192.0.2.1",
            {"server_name": "sni.example"},
            "by-sni",
            Action.RELAY,
        ),
        (
            "GET /a",
            (),
            "192.0.2.1",
            {"subject": "CN=partner,O=x", "fingerprint": "00"},
            "partners",
            Action.HANDOFF,
        ),
        (
            "GET /a",
            (),
            "192.0.2.1",
            {"names": ("DNS:a.partner.example",), "fingerprint": "00"},
            "partners",
            Action.HANDOFF,
        ),
        ("GET /a", (), "192.0.2.1", {"subject": "CN=partner,O=x"}, "", Action.AUTO),
    ],
)
def test_table(policy, line, fields, client, peer, rule, action) -> None:
    decision = decide(policy, line, *fields, client=client, **peer)
    assert (decision.rule, decision.action) == (rule, action)


@pytest.mark.parametrize(
    "target",
    [
        "//admin",
        "/./admin",
        "/x/../admin",
        "/%61dmin",
        "/ADMIN",
        "/Admin/x",
        "/admin;v=1",
        "/admin;v=1/x",
        "/x/..;/admin",
        "/x/%2e%2e/admin",
        "/x%2f..%2fadmin",
        "/%2561dmin",
        "/x/%252e%252e/admin",
        "/x/%25252e%25252e/admin",
        "/x/..%5cadmin",
        "/admin/../x",
        "/admin%2fx",
        "/admin/",
        "/x//../admin",
        "/%2e/admin",
        "http://store.example//admin",
    ],
)
def test_no_reading_of_a_path_gets_around_a_refusal(policy: Policy, target: str) -> None:
    try:
        decision = decide(policy, f"GET {target}")
    except HttpError as error:
        assert error.status == 400
        return
    assert decision.rule == "no-admin"
    assert decision.answer is not None
    assert decision.answer.status == 403


@pytest.mark.parametrize("target", ["/public/..;/secret", "/public/%252e%252e/secret", "/public/x"])
def test_what_is_allowed_is_so_in_every_reading(target: str) -> None:
    rules = """
[policy]
default = "deny"
[[policy.rules]]
name = "public"
path_prefix = ["/public"]
"""
    decision = decide(Policy(configured(rules).policy), f"GET {target}")
    assert decision.rule == ("public" if target == "/public/x" else "default")


@given(
    method=st.sampled_from(["GET", "PUT", "HEAD", "POST", "DELETE"]),
    target=st.lists(
        st.sampled_from([*"/.%2eEfF5cC;admin~x?=&\\+", "%2f", "%00", "é"]), max_size=40
    ).map("".join),
    host=st.text(st.sampled_from("aold.exmp:0[]"), max_size=12),
    client=st.one_of(st.ip_addresses().map(str), st.just("nonsense")),
)
def test_never_fails_and_says_the_same_everywhere(
    policy: Policy, method: str, target: str, host: str, client: str
) -> None:
    data = f"{method} /{target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    try:
        head = parse_head(data)
    except HttpError:
        return
    assert head is not None
    another = Policy(configured().policy)  # another node's, made from the same file
    first = policy.decide(head, client)
    again = parse_head(data)
    assert again is not None
    assert (first.rule, first.action) == (
        another.decide(again, client).rule,
        another.decide(again, client).action,
    )
    steps, explained = policy.explain(head, client)
    assert explained.rule == first.rule
    assert not first.rule or steps[-1].rule == first.rule


def test_bodies_over_the_limit(policy: Policy) -> None:
    fields = ("Content-Length: 1001",)
    decision = decide(policy, "PUT /uploads/1", *fields, client="10.1.0.1")
    assert decision.answer is not None
    assert decision.answer.status == 413
    chunked = decide(policy, "PUT /uploads/1", "Transfer-Encoding: chunked", client="10.1.0.1")
    assert chunked.max_body == 1000  # counted as it comes


def test_edits(policy: Policy) -> None:
    decision = decide(policy, "PUT /uploads/1", client="10.1.0.1")
    assert decision.edits is not None
    fields = [(b"cookie", b"a"), (b"x-from", b"client"), (b"accept", b"*/*")]
    assert decision.edits.apply(fields) == ((b"accept", b"*/*"), (b"x-from", b"prism"))


def test_redirect(policy: Policy) -> None:
    answer = decide(policy, "GET /", "Host: old.example").answer
    assert answer is not None
    assert answer.status == 301
    assert (b"Location", b"https://new.example/") in answer.headers


def test_rate() -> None:
    limit = RateLimit(2.0, 3, prefix4=24)
    assert [limit.take("192.0.2.1", 0.0) for _ in range(4)] == [0, 0, 0, 1]
    assert limit.take("192.0.2.99", 0.0) == 1  # the same network
    assert limit.take("198.51.100.1", 0.0) == 0
    assert limit.take("192.0.2.1", 0.5) == 0
    assert limit.take("192.0.2.1", 0.5) == 1


def test_rate_table_is_bounded() -> None:
    limit = RateLimit(1.0, 1)
    for number in range(MAX_NETWORKS + 100):
        limit.take(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", 0.0)
    assert len(limit) == MAX_NETWORKS


def test_too_many_requests() -> None:
    rules = '[policy]\n[[policy.rules]]\nname = "slow"\nrate = 0.5\nburst = 1\n'
    policy = Policy(configured(rules).policy)
    assert decide(policy, "GET /").answer is None
    answer = decide(policy, "GET /").answer
    assert answer is not None
    assert answer.status == 429
    assert (b"Retry-After", b"2") in answer.headers
    assert decide(policy, "GET /", client="192.0.2.2").answer is None


def test_no_policy_costs_nothing() -> None:
    assert Policy(PolicyConfig()).trivial


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ('path_regex = ["("]', "RE2"),
        ('path_regex = ["(?=x)"]', "RE2"),
        ('pool = "none"', "no [[pools]] entry"),
        ('client = ["10.0.0.1/8"]', "network"),
        ('action = "deny"\nbody = "x"', "body is for"),
        ('action = "respond"\nlocation = "/x"\nstatus = 200', "300 to 399"),
        ("burst = 3", "without rate"),
        ('set_headers = { "Content-Length" = "1" }', "leave it to Prism"),
        ('header = { "a b" = ["x"] }', "not the name"),
        ('path = ["x"]', "pattern"),
        ('acton = "deny"', "action"),
    ],
)
def test_bad_rules_are_explained_with_their_line(rule: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configured(f'[policy]\n[[policy.rules]]\nname = "r"\n{rule}\n')
    assert says in str(caught.value)
    assert "policy.rules[0]" in str(caught.value)


ROUTE = """
from prism.policy import Decision

def route(request):
    if request.path == b"/none":
        return None
    if request.path == b"/fault":
        raise LookupError("secret")
    if request.path == b"/nonsense":
        return 7
    return Decision.respond(204, rule="mine")
"""


def test_routing_function(tmp_path: Path) -> None:
    (tmp_path / "my_routes.py").write_text(ROUTE)
    rules = f'[policy]\nroute = "my_routes:route"\nroute_dir = "{tmp_path}"\ndefault = "deny"\n'
    policy = Policy(configured(rules).policy)
    mine, none, fault, nonsense = (
        decide(policy, f"GET {path}") for path in ("/x", "/none", "/fault", "/nonsense")
    )
    assert mine.rule == "mine"
    assert none.rule == "default"
    for refused in (fault, nonsense):
        assert refused.answer is not None
        assert refused.answer.status == 500
        assert b"secret" not in refused.answer.body
    assert policy.faults == 2


@pytest.mark.parametrize("route", ["nowhere:route", "prism.policy:nothing", "prism.flow:__name__"])
def test_routing_function_that_is_none(route: str) -> None:
    with pytest.raises(ConfigError, match=r"policy\.route"):
        Policy(configured(f'[policy]\nroute = "{route}"\n').policy)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "prism.toml"
    path.write_text(CLUSTER + NODES + RULES)
    return path


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


def test_route_command(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("route", "-c", str(file), "GET", "http://store.example/x/../admin") == 0
    said = capsys.readouterr().out
    assert "no-admin" in said
    assert "decides: path is below /admin" in said
    assert "action: deny" in said
    assert "status: 403" in said


def test_check_loads_the_functions_that_place(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = '[placement]\nname = "callable"\nfunction = "by_nobody:place"\nfunction_dir = "."\n'
    file.write_text(file.read_text() + keys)
    assert run("check", "-c", str(file)) == 2
    assert "placement.function: by_nobody:place cannot be imported" in capsys.readouterr().err
    (tmp_path / "by_nobody.py").write_text("def place(key, nodes):\n    return 'be2'\n")
    assert run("check", "-c", str(file)) == 0
    assert run("route", "-c", str(file), "GET", "http://a.example/x") == 0
    assert "backend: be2" in capsys.readouterr().out


def test_route_command_says_why_not_and_where(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    accept = ("-H", "Accept: image/png")
    assert run("route", "-c", str(file), "GET", "https://a.example/a.png?size=large", *accept) == 0
    said = capsys.readouterr().out
    assert "host is old.example or *.old.example" in said
    assert "pool:   fast; backend: be2" in said


def test_route_command_refuses_what_nodes_refuse(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("route", "-c", str(file), "GET", "http://store.example/a%00b") == 1
    assert "no node takes this request" in capsys.readouterr().err


def test_decision_of_the_api() -> None:
    assert Decision.deny(451, "not here").answer is not None
