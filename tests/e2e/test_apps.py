"""What people put behind Prism, unchanged: FastAPI, nginx, an S3 server, on three backends."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e_bed import Bed, bed, wait_for
from e2e_http import Cut, Sink, digest, payload
from e2e_tls import tls_client
from openssl_peer import Failed

ROOT = Path(__file__).parents[2]
SIZE = 9_000_000  # more than a socket holds
VARIANTS = pytest.mark.parametrize("secure", [False, True], ids=["http", "https"])


@contextlib.contextmanager
def inside(directory: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def fastapi() -> Iterator[Bed]:
    with inside(ROOT / "tests/unit"), bed(app="asgi_app:app", tls=True) as found:
        yield found


@pytest.fixture(scope="module")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Bed, Path]]:
    root = tmp_path_factory.mktemp("site")
    (root / "small.txt").write_text("hello " * 200)
    (root / "large.bin").write_bytes(os.urandom(6_000_000))
    command = f"SITE={root} exec {ROOT}/examples/static_site/serve"
    with bed(upstream=command, tls=True) as found:
        yield found, root


@pytest.fixture(scope="module")
def s3() -> Iterator[Bed]:
    command = f"PYTHON={shlex.quote(sys.executable)} exec {ROOT}/examples/s3/serve"
    # moto keeps its objects in memory: one backend's server is all there is.
    with bed(upstream=command, backends=1, tls=True) as found:
        yield found


def curl(bed: Bed, role: str, url: str, *options: str) -> tuple[int, dict[str, str], bytes]:
    trust = ["--cacert", str(bed.cluster.ca_file)] if url.startswith("https") else []
    run = bed.cluster.exec(
        role, ["curl", "-sS", "-i", "--raw", "--max-time", "60", *trust, *options, url],
        capture_output=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr.decode()
    head, _, body = run.stdout.partition(b"\r\n\r\n")
    while head.startswith(b"HTTP/1.1 100"):
        head, _, body = body.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    fields = dict(line.split(": ", 1) for line in lines[1:])
    return int(lines[0].split()[1]), fields, body


def base(bed: Bed, secure: bool) -> str:
    url = bed.cluster.url
    return url if secure else url.replace("https:", "http:")


def client(bed: Bed, script: str, *arguments: str) -> dict[str, Any]:
    """Run Python in the client's namespace; what it prints last, as JSON."""
    run = bed.cluster.exec(
        "client", [sys.executable, "-c", script, *arguments], capture_output=True,
        env=os.environ | {"AWS_CA_BUNDLE": str(bed.cluster.ca_file), "NO_PROXY": "*"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr.decode()[-4000:]
    return dict(json.loads(run.stdout.splitlines()[-1]))


# -- ASGI -----------------------------------------------------------------------------------


@VARIANTS
def test_a_fastapi_application_on_three_backends(
    fastapi: Bed, secure: bool, tmp_path: Path
) -> None:
    bed, url = fastapi, base(fastapi, secure)
    handed = bed.total("handoffs_out")
    pids = set()
    for number in range(12):
        status, _, body = curl(bed, "client", f"{url}/whoami?{number}", "-H", "X-User: ada")
        told = json.loads(body)
        assert (status, told["user"], told["scheme"]) == (200, "ada", url.partition(":")[0])
        assert told["client"][0] == bed.cluster.topology.client.address, told
        pids.add(told["pid"])
    data = os.urandom(3_000_000)
    (tmp_path / "up").write_bytes(data)
    for number in range(6):
        source = ("-T", str(tmp_path / "up"))
        status, _, body = curl(bed, "client", f"{url}/upload/{number}", *source)
        assert json.loads(body)["sha256"] == hashlib.sha256(data).hexdigest()
        size = 2_000_000 + number
        out = curl(bed, "client", f"{url}/download/{size}?declared=true")
        assert (out[0], out[2]) == (200, b"x" * size)
    assert curl(bed, "client", f"{url}/whoami")[0] == 401
    assert bed.total("handoffs_out") > handed
    owners = {bed.owner(f"/upload/{number}") for number in range(6)}
    assert len(owners) > 1, "the requests went to more than one backend"


@VARIANTS
def test_one_connection_is_served_by_several_backends(fastapi: Bed, secure: bool) -> None:
    bed, url = fastapi, base(fastapi, secure)
    paths = [path for node in bed.backends for path in bed.keys(node, 2, "upload")]
    assert {bed.owner(path) for path in paths} == set(bed.backends)
    before = bed.total("accepted")
    urls = [f"{url}{path}" for path in (*paths, *paths)]
    trust = ["--cacert", str(bed.cluster.ca_file)]
    run = bed.cluster.exec(
        "client", ["curl", "-sSf", "--max-time", "60", *trust, "-X", "PUT", "-d", "body", *urls],
        capture_output=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr.decode()
    assert run.stdout.count(hashlib.sha256(b"body").hexdigest().encode()) == len(urls)
    assert bed.total("accepted") == before + 1, "one connection for all"


WEBSOCKET = """
import asyncio, json, ssl, sys, websockets
async def main(url, ca):
    context = ssl.create_default_context(cafile=ca) if url.startswith("wss") else None
    async with websockets.connect(url, ssl=context, max_size=None) as socket:
        for message in ("text", b"octets", "x" * 2_000_000):
            await socket.send(message)
            assert await socket.recv() == message
    print(json.dumps({"code": socket.close_code}))
asyncio.run(asyncio.wait_for(main(*sys.argv[1:]), 60))
"""


@VARIANTS
def test_websockets_through_handoff(fastapi: Bed, secure: bool) -> None:
    url = base(fastapi, secure).replace("http", "ws")
    told = client(fastapi, WEBSOCKET, f"{url}/echo", str(fastapi.cluster.ca_file))
    assert told == {"code": 1000}


def test_what_is_relayed_to_an_application_is_answered_alike() -> None:
    options = {"frontend.handoff": "never"}
    with inside(ROOT / "tests/unit"), bed(app="asgi_app:app", tls=True, settings=options) as found:
        for secure in (False, True):
            url = base(found, secure)
            status, _, body = curl(found, "client", f"{url}/whoami", "-H", "X-User: ada")
            told = json.loads(body)
            assert (status, told["scheme"]) == (200, url.partition(":")[0])
            assert told["client"][0] == found.cluster.topology.client.address
            assert not {"prism-origin", "via", "x-forwarded-for"} & set(told["headers"])
            echo = f"{url.replace('http', 'ws')}/echo"
            assert client(found, WEBSOCKET, echo, str(found.cluster.ca_file)) == {"code": 1000}
        assert found.total("handoffs_out") == 0


def test_the_file_server_example(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FILES", str(tmp_path / "files"))
        with inside(ROOT / "examples/fastapi_files"), bed(app="files:app", backends=2) as found:
            data = os.urandom(2_000_000)
            (tmp_path / "f").write_bytes(data)
            url = found.cluster.url
            assert curl(found, "client", f"{url}/files/f", "-T", str(tmp_path / "f"))[0] == 201
            assert curl(found, "client", f"{url}/files/f")[2] == data
            assert curl(found, "client", f"{url}/files/f", "-r", "7-9")[2] == data[7:10]
            status, _, body = curl(found, "client", f"{url}/files")
            assert (status, json.loads(body)) == (200, [{"name": "f", "size": len(data)}])
            assert curl(found, "client", f"{url}/files/f", "-X", "DELETE")[0] == 204
            assert curl(found, "client", f"{url}/files/f")[0] == 404
            assert found.total("handoffs_out") > 0


# -- nginx ----------------------------------------------------------------------------------

ASKED = {
    "whole": (),
    "range": ("-r", "1000-1999"),
    "end": ("-r", "-5"),
    "beyond": ("-r", "99999999-"),
    "gzip": ("-H", "Accept-Encoding: gzip"),
    "unchanged": ("-H", "If-Modified-Since: Fri, 01 Jan 2100 00:00:00 GMT"),
    "head": ("-I",),
    "post": ("-d", "x=y"),
}


@VARIANTS
@pytest.mark.parametrize("asked", ASKED)
def test_nginx_answers_as_it_does_directly(
    nginx: tuple[Bed, Path], secure: bool, asked: str
) -> None:
    bed, _ = nginx
    for name in ("small.txt", "large.bin", "none", "a%20b/../small.txt"):
        options = ("--path-as-is", *ASKED[asked])
        through = curl(bed, "client", f"{base(bed, secure)}/{name}", *options)
        owner = bed.owner(f"/{name}" if ".." not in name else "/small.txt")
        direct = curl(bed, owner, f"http://127.0.0.1:9000/{name}", *options)
        assert through[0] == direct[0], name
        assert comparable(through[1]) == comparable(direct[1]), name
        assert through[2] == direct[2], name
    if asked == "gzip":
        assert gzip.decompress(dechunked(curl(bed, "client", f"{base(bed, secure)}/small.txt",
                                              *ASKED[asked])[2])).startswith(b"hello")  # fmt: skip


def comparable(fields: dict[str, str]) -> dict[str, str]:
    """A response's fields but for time, the connection's, and whom nginx takes for the client."""
    return {k: v for k, v in fields.items() if k not in ("Date", "Connection", "X-Client")}


def dechunked(data: bytes) -> bytes:
    body = b""
    while size := int(data[: data.index(b"\r\n")], 16):
        start = data.index(b"\r\n") + 2
        body += data[start : start + size]
        data = data[start + size + 2 :]
    return body


@VARIANTS
def test_nginx_hears_of_the_client(nginx: tuple[Bed, Path], secure: bool) -> None:
    bed, _ = nginx
    _, fields, _ = curl(bed, "client", f"{base(bed, secure)}/small.txt")
    assert fields["X-Client"] == bed.cluster.topology.client.address
    assert bed.total("handoffs_out") > 0


# -- what holds for every kind of backend ---------------------------------------------------


@pytest.fixture(params=["asgi", "upstream", "store"])
def kind(request: pytest.FixtureRequest) -> tuple[Bed, dict[str, tuple[str, str]]]:
    """A cluster, and for each of its backends a large response: its path, and its digest."""
    found: dict[str, tuple[str, str]] = {}
    if request.param == "asgi":
        bed = request.getfixturevalue("fastapi")
        for size in range(SIZE, SIZE + 100):
            path = f"/download/{size}"
            found.setdefault(bed.owner(path), (path + "?declared=true", digest(b"x" * size)))
    elif request.param == "upstream":
        bed, root = request.getfixturevalue("nginx")
        for number in range(60):
            path = f"/each/{number}"
            if bed.owner(path) not in found:
                data = payload(path, SIZE + number)
                (root / "each").mkdir(exist_ok=True)
                (root / path[1:]).write_bytes(data)
                found[bed.owner(path)] = path, digest(data)
    else:
        bed = request.getfixturevalue("objects")
        for node in bed.backends:
            path = bed.key(node, "each")
            found[node] = path, digest(bed.store(path, SIZE))
    assert set(found) == set(bed.backends)
    return bed, found


@pytest.fixture(scope="module")
def objects() -> Iterator[Bed]:
    with bed(tls=True) as found:
        yield found


@VARIANTS
def test_one_connection_goes_from_backend_to_backend(
    kind: tuple[Bed, dict[str, tuple[str, str]]], secure: bool
) -> None:
    """Whatever answers: whole responses, from the node that each belongs to, on one connection."""
    bed, responses = kind
    asker = tls_client(bed) if secure else bed.client
    handoffs = bed.total("handoffs_in")
    with asker.open() as conn:
        for node in ("be1", "be2", "be3", "be1", "be3"):
            path, expected = responses[node]
            answer = conn.request("GET", path)
            assert (answer.status, answer.sha256) == (200, expected)
            assert answer.node in (f"{node}/0", "")
    assert bed.total("handoffs_in") == handoffs + 5


@VARIANTS
def test_a_backend_that_dies_leaves_nobody_waiting(
    kind: tuple[Bed, dict[str, tuple[str, str]]], secure: bool
) -> None:
    """In the middle of a response: its client is told; the others' do not notice."""
    bed, responses = kind
    asker = tls_client(bed) if secure else bed.client
    path, expected = responses["be2"]
    other, others = responses["be3"]
    with asker.open(rcvbuf=16384) as dying, asker.open() as living:
        assert living.request("GET", other).sha256 == others
        dying.send(dying.start("GET", path))
        assert dying.response_head().status == 200
        bed.cluster.kill("be2")
        with pytest.raises((Cut, OSError, Failed)):
            dying.take(SIZE, Sink())
        assert living.request("GET", other).sha256 == others
    bed.cluster.restart("be2")
    assert wait_for(lambda: asker.once("GET", path).sha256 == expected, 20)


def test_a_server_that_is_down_is_told_of_and_comes_back(nginx: tuple[Bed, Path]) -> None:
    # The last test with nginx: its server at one backend is gone afterwards.
    bed, _ = nginx
    owner = bed.owner("/small.txt")
    pid_file = bed.cluster.dir / f"server/{owner}/nginx.pid"
    reply = curl(bed, "client", f"{base(bed, False)}/small.txt")
    os.kill(int(pid_file.read_text()), signal.SIGTERM)
    config = bed.cluster.dir / f"server/{owner}/nginx.conf"
    down = wait_for(
        lambda: curl(bed, "client", f"{base(bed, False)}/small.txt")[0] == 502, timeout=20
    )
    assert down, "a server that does not listen is a bad gateway"
    again = bed.cluster.popen(owner, ["nginx", "-c", str(config), "-g", "daemon off;"])
    try:
        assert wait_for(
            lambda: curl(bed, "client", f"{base(bed, False)}/small.txt")[0] == 200, timeout=20
        )
        assert curl(bed, "client", f"{base(bed, False)}/small.txt")[2] == reply[2]
    finally:
        again.terminate()
        again.wait()


# -- S3 -------------------------------------------------------------------------------------

PART = 8 << 20  # also in the script
S3 = """
import hashlib, io, json, os, sys, urllib.request, boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import ClientError
url, bucket, size = sys.argv[1:]
s3 = boto3.client("s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="key",
    aws_secret_access_key="secret", config=Config(s3={"addressing_style": "path"},
    signature_version="s3v4", retries={"max_attempts": 1}))
told = {}
s3.create_bucket(Bucket=bucket)
told["buckets"] = sorted(b["Name"] for b in s3.list_buckets()["Buckets"] if b["Name"] == bucket)
data = hashlib.shake_128(b"prism").digest(int(size))
s3.upload_fileobj(io.BytesIO(data), bucket, "large", Config=TransferConfig(
    multipart_threshold=8 << 20, multipart_chunksize=8 << 20, max_concurrency=4))
head = s3.head_object(Bucket=bucket, Key="large")
told["large"] = [head["ContentLength"], head["ETag"]]
got = s3.get_object(Bucket=bucket, Key="large")["Body"].read()
told["same"] = got == data
part = s3.get_object(Bucket=bucket, Key="large", Range="bytes=1000-2999")
told["range"] = [part["ResponseMetadata"]["HTTPStatusCode"], part["ContentRange"],
                 part["Body"].read() == data[1000:3000]]
for number in range(25):
    s3.put_object(Bucket=bucket, Key=f"list/{number:02}", Body=b"%d" % number)
pages = s3.get_paginator("list_objects_v2").paginate(
    Bucket=bucket, Prefix="list/", PaginationConfig={"PageSize": 10})
told["pages"] = [[entry["Key"] for entry in page["Contents"]] for page in pages]
signed = s3.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "list/07"})
import ssl
ca = os.environ.get("AWS_CA_BUNDLE") if url.startswith("https") else None
context = ssl.create_default_context(cafile=ca) if ca else None
told["presigned"] = urllib.request.urlopen(signed, context=context).read().decode()
put = s3.generate_presigned_url("put_object", Params={"Bucket": bucket, "Key": "by-url"})
request = urllib.request.Request(put, data=b"put by url", method="PUT")
told["presigned-put"] = urllib.request.urlopen(request, context=context).status
told["put"] = s3.get_object(Bucket=bucket, Key="by-url")["Body"].read().decode()
s3.delete_object(Bucket=bucket, Key="by-url")
try:
    s3.get_object(Bucket=bucket, Key="by-url")
except ClientError as error:
    told["deleted"] = error.response["Error"]["Code"]
print(json.dumps(told))
"""


def test_boto3_against_an_s3_server(s3: Bed) -> None:
    def run(role: str, url: str, bucket: str, size: int) -> dict[str, Any]:
        ran = s3.cluster.exec(
            role, [sys.executable, "-c", S3, url, bucket, str(size)], capture_output=True,
            env=os.environ | {"AWS_CA_BUNDLE": str(s3.cluster.ca_file), "NO_PROXY": "*"},
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr.decode()[-3000:]
        told = dict(json.loads(ran.stdout.splitlines()[-1]))
        assert told.pop("buckets") == [bucket]
        return told

    # One large object through Prism is enough: it is the S3 server that takes the time.
    small, large = (8 << 20) + 100_000, 64 << 20
    direct = run("be1", "http://127.0.0.1:9000", "direct", small)
    assert direct["same"] is True
    assert direct["deleted"] == "NoSuchKey"
    assert direct["large"] == [small, multipart_tag(small)]
    assert run("client", base(s3, False), "plain", small) == direct
    secure = run("client", base(s3, True), "secure", large)
    assert secure.pop("large") == [large, multipart_tag(large)]
    assert secure.pop("range") == [206, f"bytes 1000-2999/{large}", True]
    assert secure.items() <= direct.items()
    assert len(secure) == len(direct) - 2
    assert s3.total("handoffs_out") > 0


def multipart_tag(size: int) -> str:
    """The ETag of what the script uploads: the MD5 of its parts' MD5s, and how many there are."""
    data = hashlib.shake_128(b"prism").digest(size)
    parts = [hashlib.md5(data[start : start + PART]).digest() for start in range(0, size, PART)]
    return f'"{hashlib.md5(b"".join(parts)).hexdigest()}-{len(parts)}"'
