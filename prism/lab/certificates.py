"""The lab's certificates: the nodes' among each other, and the service's that clients see.

Two CAs: what clients are to trust has nothing to do with what nodes trust.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prism.flow import Endpoint

__all__ = ["SERVICE_NAME", "ca_file", "make_node_certificates", "make_service_certificate"]
__all__ += ["tls_settings"]

SERVICE_NAME = "prism.lab"
_FILES = "service"


def ca_file(directory: Path) -> Path:
    """The CA that signs the service's certificate, of a lab whose files are below ``directory``."""
    return directory / "tls/ca.pem"


def make_node_certificates(directory: Path, nodes: Sequence[str]) -> None:
    """Make the cluster CA and a certificate for each node, in ``pki``."""
    from prism.tls import pki  # noqa: PLC0415 - takes a tenth of a second to load

    pki.init(directory / "pki")
    for node in nodes:
        pki.issue(directory / "pki", pki.Request(node))


def make_service_certificate(directory: Path, services: Sequence[Endpoint]) -> None:
    """Make the lab CA and the certificate of the service's addresses, in ``tls``."""
    from prism.tls import pki  # noqa: PLC0415 - takes a tenth of a second to load

    addresses = tuple(service.host for service in services)
    pki.init(directory / "tls")
    request = pki.Request(_FILES, server=True, dns=(SERVICE_NAME,), addresses=addresses)
    pki.issue(directory / "tls", request)


def tls_settings(directory: Path, services: Sequence[Endpoint]) -> dict[str, Any]:
    """The ``[tls]`` section that serves with that certificate."""
    base = directory / "tls"
    pair = {"certificate": str(base / f"{_FILES}.pem"), "key": str(base / f"{_FILES}.key")}
    return {"listen": [str(service) for service in services], "certificates": [pair]}
