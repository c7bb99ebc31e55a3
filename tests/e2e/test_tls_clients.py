"""HTTPS with the clients that people use, and every version and suite with bulk in both ways."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_bed import Bed
from e2e_http import digest, payload
from e2e_tls import SUITES, TLS1_2, TLS1_3, VERSIONS, tls_bed, tls_client, tls_counters

SIZE = 64 << 20
REQUESTS = 200
NAMES = [pytest.param(v, s, id=s) for v, suites in SUITES.items() for s in suites]


@pytest.fixture(scope="module")
def shared() -> Iterator[Bed]:
    with tls_bed(backends=3) as found:
        yield found


def _run(bed: Bed, *command: str, data: bytes | None = None, seconds: float = 30) -> bytes:
    """A program at the client's place; what it says."""
    done = bed.cluster.exec(
        "client", list(command), input=data, capture_output=True, timeout=seconds
    )
    assert done.returncode == 0, (done.stdout + done.stderr).decode(errors="replace")[-3000:]
    return bytes(done.stdout)


def _curl(bed: Bed, *arguments: str, data: bytes | None = None) -> bytes:
    trust = ("--cacert", str(bed.cluster.ca_file))
    return _run(bed, "curl", "-sSf", "--max-time", "30", *trust, *arguments, data=data)


def _python(bed: Bed, program: str) -> dict[str, object]:
    """A Python client in a process of its own; the JSON it prints."""
    paths = {f"{node} {n}": key for node in bed.backends for n, key in enumerate(_keys(bed, node))}
    known = {"url": bed.cluster.url, "ca": str(bed.cluster.ca_file), "paths": paths}
    head = "import hashlib, json\nknown = json.loads(input())\n"
    command = [sys.executable, "-W", "error", "-c", head + program]
    said: dict[str, object] = json.loads(_run(bed, *command, data=json.dumps(known).encode()))
    return said


def _keys(bed: Bed, node: str) -> list[str]:
    return bed.keys(node, 2, "bucket")


def test_curl(shared: Bed) -> None:
    """Certificate verified; one connection for objects of all backends; no other CA will do."""
    url = shared.cluster.url
    bodies = {shared.key(node, "curl"): payload(node, 300_000) for node in shared.backends}
    handoffs = shared.switch("handoffs")
    for path, body in bodies.items():
        _curl(shared, "-T", "-", "-H", "Expect: 100-continue", url + path, data=body)
    for path, body in bodies.items():
        assert _curl(shared, "-r", "5-1004", url + path) == body[5:1005]
    several = _curl(shared, "-w", "%{num_connects}", *(url + path for path in list(bodies) * 3))
    connects = ["1"] + ["0"] * 8
    whole = [b + n.encode() for b, n in zip(list(bodies.values()) * 3, connects, strict=True)]
    assert several == b"".join(whole)
    assert shared.switch("handoffs") - handoffs == 6 + 9
    for command in (["curl", "-sS", url], ["curl", "-sS", "--cacert", _node_ca(shared), url]):
        done = shared.cluster.exec("client", command, capture_output=True)
        assert done.returncode == 60, done.stderr  # CURLE_PEER_FAILED_VERIFICATION


def _node_ca(bed: Bed) -> str:
    return str(bed.cluster.dir / "pki/ca.pem")


def test_openssl_s_client(shared: Bed) -> None:
    """OpenSSL's own client, strict about the certificate, with two owners on one connection."""
    paths = [shared.key(node, "s_client") for node in ("be1", "be2")]
    bodies = [payload(path, 20).hex().encode() for path in paths]
    for path, body in zip(paths, bodies, strict=True):
        assert shared.client.once("PUT", path, body).status in (201, 204)
    host = shared.client.service.host
    asked = "".join(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n" for path in paths)
    asked += f"GET {paths[0]} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    said = _run(
        shared,
        *("openssl", "s_client", "-connect", f"{host}:443", "-CAfile"),
        *(str(shared.cluster.ca_file), "-verify_return_error", "-verify_ip", host, "-ign_eof"),
        data=asked.encode(),
    )
    assert b"Verify return code: 0 (ok)" in said
    found = re.findall(rb"\(be(\d)/0\)", said)
    assert found == [b"1", b"2", b"1"]
    assert said.count(bodies[0]) == 2
    assert said.count(bodies[1]) == 1
    assert b"closed" in said


def test_requests(shared: Bed) -> None:
    """Python's requests, one session with all backends; a wrong CA is refused."""
    handoffs = shared.switch("handoffs")
    said = _python(
        shared,
        """
import requests
body = {path: hashlib.sha256(path.encode()).digest() * 4000 for path in known["paths"].values()}
with requests.Session() as session:
    session.trust_env = False  # a CA named in the environment would come before ours
    session.verify = known["ca"]
    puts = [session.put(known["url"] + p, data=d).status_code for p, d in body.items()]
    same = [session.get(known["url"] + p).content == d for p, d in body.items()]
    nodes = [session.get(known["url"] + p).headers["Server"] for p in body]
    p = list(body)[-1]
    stream = session.put(known["url"] + p, data=iter([b"x" * 70000] * 5)).status_code
    same.append(session.get(known["url"] + p).content == b"x" * 350000)
session.verify = True
try:
    refused = session.get(known["url"] + p).status_code
except requests.exceptions.SSLError:
    refused = "SSLError"
print(json.dumps([puts, same, nodes, stream, refused]))
""",
    )
    puts, same, nodes, stream, refused = said
    assert set(puts) <= {201, 204}
    assert stream == 204
    assert all(same)
    assert len(same) == 7
    assert [node.split("(")[1][:3] for node in nodes] == ["be1"] * 2 + ["be2"] * 2 + ["be3"] * 2
    assert refused == "SSLError"
    assert shared.switch("handoffs") - handoffs >= 6


def test_boto3(shared: Bed) -> None:
    """The S3 client: path style, our CA; the store does not ask who signs.

    Checksums behind the body ("aws-chunked", not a transfer coding) it has to leave out.
    """
    said = _python(
        shared,
        """
import io, boto3
from botocore.config import Config
config = Config(s3={"addressing_style": "path"}, retries={"max_attempts": 1},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required")
s3 = boto3.client("s3", endpoint_url=known["url"], verify=known["ca"], region_name="eu-west-1",
                  aws_access_key_id="a", aws_secret_access_key="b", config=config)
answers = []
for path in known["paths"].values():
    _, bucket, key = path.split("/", 2)
    data = hashlib.sha256(path.encode()).digest() * 8000
    s3.put_object(Bucket=bucket, Key=key, Body=data)
    got = s3.get_object(Bucket=bucket, Key=key)
    part = s3.get_object(Bucket=bucket, Key=key, Range="bytes=10-99")["Body"].read()
    size = s3.head_object(Bucket=bucket, Key=key)["ContentLength"]
    answers.append([got["Body"].read() == data, part == data[10:100], size == len(data)])
    s3.delete_object(Bucket=bucket, Key=key)
    try:
        s3.get_object(Bucket=bucket, Key=key)
        answers.append("still there")
    except s3.exceptions.ClientError as error:
        answers.append(error.response["ResponseMetadata"]["HTTPStatusCode"])
print(json.dumps(answers))
""",
    )
    assert said == [[True, True, True], 404] * 6


def test_wrk(shared: Bed) -> None:
    """Twenty connections as fast as they go, for a second, to each owner in turn: no errors."""
    for node in shared.backends:
        path = shared.key(node, "wrk")
        shared.store(path, 2000)
        said = _run(shared, "wrk", "-t2", "-c20", "-d1s", shared.cluster.url + path).decode()
        print(said)
        assert "Socket errors" not in said
        assert "Non-2xx" not in said
        found = re.search(r"(\d+) requests in", said)
        assert found is not None
        assert int(found[1]) >= 200


@pytest.mark.parametrize(("version", "suite"), NAMES)
def test_every_version_and_suite(shared: Bed, version: int, suite: str, tmp_path: Path) -> None:
    """64 MiB up and down, each through a handoff, and 200 requests that alternate."""
    source, copy = tmp_path / "source", tmp_path / "copy"
    block = payload(suite, 1 << 20)
    source.write_bytes(block * (SIZE >> 20))
    choice = ["--tls13-ciphers" if version == TLS1_3 else "--ciphers", suite]
    choice += ["--tls-max", VERSIONS[version], f"--tlsv{VERSIONS[version]}"]
    path, small = shared.key("be1", "bulk"), shared.key("be3", "small")
    shared.store(small, 700)
    label = f"TLSv{VERSIONS[version]} {suite} False"
    before = tls_counters(shared)["handshakes"].get(label, 0)
    handoffs, relays = shared.switch("handoffs"), shared.total("relays")
    url = shared.cluster.url
    # Between the two, the connection goes to another backend and back.
    _curl(shared, *choice, "-T", str(source), url + path)
    _curl(shared, *choice, url + small, url + path, "-o", "/dev/null", "-o", str(copy))
    with copy.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").digest() == _digest(block)
    assert shared.switch("handoffs") - handoffs == 3
    bodies = {shared.key(node, "alternate"): payload(node, 9000) for node in shared.backends}
    for key, body in bodies.items():
        shared.plain.once("PUT", key, body)  # type: ignore[attr-defined]
    handoffs = shared.switch("handoffs")
    with tls_client(shared, version, suite).open() as conn:
        for turn in range(REQUESTS):
            key = list(bodies)[turn % 3]
            answer = conn.request("GET", key)
            assert (answer.status, answer.sha256) == (200, digest(bodies[key]))
            assert answer.node == f"{shared.owner(key)}/0"
    assert shared.switch("handoffs") - handoffs == REQUESTS
    assert shared.total("relays") == relays
    assert tls_counters(shared)["handshakes"][label] - before == 3
    shared.client.once("DELETE", path)


def _digest(block: bytes) -> bytes:
    return hashlib.sha256(block * (SIZE >> 20)).digest()


def test_a_client_without_a_common_suite(shared: Bed) -> None:
    """CBC, RSA key exchange, TLS 1.1: handshake_failure or protocol_version, and counted."""
    failures = sum(tls_counters(shared)["failures"].values())
    host = shared.client.service.host
    for choice in (["-tls1_1"], ["-tls1_2", "-cipher", "AES128-SHA"]):
        cipher = ["-cipher", "DEFAULT@SECLEVEL=0"] if choice == ["-tls1_1"] else []
        command = ["openssl", "s_client", "-connect", f"{host}:443", *choice, *cipher]
        done = shared.cluster.exec("client", command, input=b"", capture_output=True, timeout=10)
        assert done.returncode != 0
        assert b"alert handshake failure" in done.stderr or b"alert protocol version" in done.stderr
    assert sum(tls_counters(shared)["failures"].values()) - failures == 2


def test_the_suites_are_all(shared: Bed) -> None:
    """What is tested above is what the configuration offers."""
    tls = shared.cluster.config("fe1").tls
    assert tls is not None
    assert len(tls.suites) == len(SUITES[TLS1_3]) == len(SUITES[TLS1_2])
