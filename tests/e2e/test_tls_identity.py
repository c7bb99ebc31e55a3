"""Client certificates on a cluster, and a service certificate that changes while it serves."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_bed import Bed, wait_for
from e2e_http import Conn
from e2e_tls import tls_bed
from test_policy_reload import configure, reload
from tls_world import Pki

from prism.tls import pki

POLICY = """
[policy]

[[policy.rules]]
name = "partners"
client_certificate = ["CN=partner"]

[[policy.rules]]
name = "others"
path_prefix = ["/private"]
action = "deny"
"""


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    """The CA of the clients' certificates."""
    return Pki(tmp_path_factory.mktemp("clients"), "clients")


@pytest.fixture(scope="module")
def shared(clients: Pki) -> Iterator[Bed]:
    settings = {"tls.client_auth": "request", "tls.client_ca": str(clients.file)}
    with tls_bed(backends=2, settings=settings) as found:
        configure(found, POLICY)
        reload(found)
        yield found


@contextlib.contextmanager
def connect(bed: Bed, certificate: dict[str, str] | None = None) -> Iterator[Conn]:
    """With Python's own TLS, which checks the service's certificate."""
    context = ssl.create_default_context(cafile=str(bed.cluster.ca_file))
    if certificate:
        context.load_cert_chain(certificate["certificate"], certificate["key"])
    service = bed.client.service
    raw = bed.client.namespace.socket()
    raw.settimeout(10)
    raw.connect((service.host, service.port))
    with context.wrap_socket(raw, server_hostname=service.host) as sock:
        yield Conn(sock, service.host)


def test_every_owner_knows_who_the_client_is(shared: Bed, clients: Pki) -> None:
    """The policy says the same at the frontend and at the backends, to which the identity goes."""
    keys = [shared.key(node, "private") for node in shared.backends]
    handoffs = shared.switch("handoffs")
    with connect(shared, clients.issue("partner")) as conn:
        for key in keys * 2:
            assert conn.request("PUT", key, b"for partners").status in (201, 204)
            answer = conn.request("GET", key)
            assert (answer.status, answer.body) == (200, b"for partners")
            assert answer.node == f"{shared.owner(key)}/0"
    assert shared.switch("handoffs") - handoffs == 4
    public = shared.key("be2", "public")
    shared.store(public, 5000)
    for certificate in (None, clients.issue("stranger")):
        with connect(shared, certificate) as conn:
            refused = conn.request("GET", keys[0])
            assert (refused.status, refused.node) == (403, "fe1/0")
            assert conn.request("GET", public).node == "be2/0"
            refused = conn.request("GET", keys[1])
            assert (refused.status, refused.node) == (403, "be2/0")


def test_a_certificate_of_another_ca_is_refused(shared: Bed, tmp_path: Path) -> None:
    """It is not taken for none."""
    other = Pki(tmp_path).issue("partner")
    with pytest.raises((ssl.SSLError, ConnectionResetError)), connect(shared, other) as conn:
        conn.request("GET", "/")


def test_a_new_service_certificate_is_used(shared: Bed) -> None:
    """By new connections, without a restart; those there are go on, handed over or not."""
    path = shared.key("be1", "renewed")
    shared.store(path, 5000)
    with connect(shared) as old, connect(shared) as unused:
        assert old.request("GET", path).status == 200
        before = old.sock.getpeercert(True)  # type: ignore[attr-defined]
        pid = shared.cluster.node("fe1").pid
        files = shared.cluster.config("fe1").tls.certificates[0]  # type: ignore[union-attr]
        renew(shared, files.certificate)

        def changed() -> bool:
            with connect(shared) as conn:
                new = conn.sock.getpeercert(True)  # type: ignore[attr-defined]
                assert conn.request("GET", path).status == 200
            return bool(new != before)

        assert wait_for(changed, 20, 0.2)
        assert shared.cluster.node("fe1").pid == pid
        for conn in (old, unused):
            assert conn.request("GET", path).status == 200


def renew(bed: Bed, certificate: Path) -> None:
    """Another certificate of the lab's CA, for the same names."""
    addresses = tuple(service.host for service in bed.cluster.topology.services(443))
    request = pki.Request(certificate.stem, server=True, addresses=addresses)
    assert pki.issue(certificate.parent, request, force=True).certificate == certificate
