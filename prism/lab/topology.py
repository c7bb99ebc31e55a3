"""The lab's network: a router in the middle, the client and each node on a link of its own.

::

    NAME-client --- client +-------------+ fe1 --- NAME-fe1   (service address on lo)
                           | NAME-switch |
                           +-------------+ be1 --- NAME-be1   ...

Every link is a veth pair: ``eth0`` in the node, a device with the node's name in the switch.
Addresses are the same in every lab, which is harmless: nothing leaves its namespaces.

===========  ====================  ======================
what         IPv4                  IPv6
===========  ====================  ======================
control      10.77.0.1             fd77::1
service      10.77.0.80            fd77::80
client       10.77.1.2/24          fd77:1::2/64
frontend i   10.77.(10+i).2/24     fd77:(10+i)::2/64
backend i    10.77.(100+i).2/24    fd77:(100+i)::2/64
===========  ====================  ======================

The switch's end of a link is ``.1`` and ``::1``.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyroute2 import NetlinkError, netns

from prism.errors import ConfigError, PrismError
from prism.flow import Endpoint
from prism.lab.netns import Namespace, join

__all__ = ["MAX_BACKENDS", "MAX_FRONTENDS", "Site", "Topology", "parse_rate", "remove_all"]

MAX_FRONTENDS = 80
MAX_BACKENDS = 120
CONTROL = Endpoint("10.77.0.1", 4760)
SERVICE = "10.77.0.80"
SERVICE6 = "fd77::80"
_BURST = 256 * 1024
_TBF_LATENCY = "50ms"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,23}")
_UNITS = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
_STOP_PATIENCE = 3.0


def parse_rate(text: str) -> int:
    """``200mbit`` as bits a second.

    Raises:
        ConfigError: it is not a number with one of bit, kbit, mbit, gbit, or out of bounds.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?bit)", text.strip().lower())
    rate = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if not 10**5 <= rate <= 10**11:
        raise ConfigError(f"rate {text!r}: write it like 200mbit (100kbit to 100gbit)")
    return rate


@dataclass(frozen=True, slots=True)
class Site:
    """One node's place: its namespace, addresses and device in the switch."""

    role: str
    namespace: Namespace
    subnet: int

    @property
    def address(self) -> str:
        """Its IPv4 address."""
        return f"10.77.{self.subnet}.2"

    @property
    def address6(self) -> str:
        """Its IPv6 address."""
        return f"fd77:{self.subnet}::2"

    @property
    def gateways(self) -> tuple[str, str]:
        """The switch's addresses on the link."""
        return f"10.77.{self.subnet}.1", f"fd77:{self.subnet}::1"


class Topology:
    """The network of one lab.

    Args:
        name: prefix of the namespaces' names.
        backends: number of backends, at least 1.
        frontends: number of frontends, at least 1.
        rate: bits a second of each node's link, each way; ``None``: as fast as it goes.

    Raises:
        ConfigError: a name or number that cannot be.
    """

    def __init__(
        self, name: str = "prism", *, backends: int = 2, frontends: int = 1, rate: int | None = None
    ) -> None:
        check_name(name)
        if not 1 <= backends <= MAX_BACKENDS or not 1 <= frontends <= MAX_FRONTENDS:
            raise ConfigError(f"1 to {MAX_BACKENDS} backends and 1 to {MAX_FRONTENDS} frontends")
        self.name = name
        self.rate = rate
        self.switch = Namespace(f"{name}-switch")
        self.client = self._site("client", 1)
        self.frontends = tuple(self._site(f"fe{i}", 10 + i) for i in range(1, frontends + 1))
        self.backends = tuple(self._site(f"be{i}", 100 + i) for i in range(1, backends + 1))
        self.control = CONTROL

    def _site(self, role: str, subnet: int) -> Site:
        return Site(role, Namespace(f"{self.name}-{role}"), subnet)

    @property
    def nodes(self) -> tuple[Site, ...]:
        """Frontends, then backends."""
        return self.frontends + self.backends

    @property
    def interfaces(self) -> tuple[str, ...]:
        """The switch's devices."""
        return tuple(site.role for site in (self.client, *self.nodes))

    def services(self, port: int) -> tuple[Endpoint, Endpoint]:
        """The service's endpoints."""
        return Endpoint(SERVICE, port), Endpoint(SERVICE6, port)

    def namespace(self, role: str) -> Namespace:
        """The namespace of ``client``, ``switch``, ``fe1``, ``be2``, ...

        Raises:
            ConfigError: there is no such role.
        """
        if role == "switch":
            return self.switch
        for site in (self.client, *self.nodes):
            if site.role == role:
                return site.namespace
        known = ", ".join(("client", "switch", *(site.role for site in self.nodes)))
        raise ConfigError(f"no role {role!r} in lab {self.name}; there are: {known}")

    def build(self) -> None:
        """Make namespaces, links, addresses and routes; on failure nothing is left.

        Raises:
            PrismError: a namespace of this name is there already, or a privilege is missing.
        """
        if found := namespaces_of(self.name):
            raise PrismError(
                f"lab {self.name} exists already ({len(found)} namespaces); "
                f"remove it with: prism-proxy lab down --name {self.name}"
            )
        try:
            self._build_switch()
            for site in (self.client, *self.nodes):
                self._attach(site)
            for site in self.frontends:
                site.namespace.add_address("lo", f"{SERVICE}/32")
                site.namespace.add_address("lo", f"{SERVICE6}/128")
            self._route_services()
        except NetlinkError as error:
            self.remove()
            raise PrismError(
                f"lab {self.name}: the kernel refused a network setting: {error}"
            ) from error
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Remove all of it and end the processes inside. Idempotent."""
        remove_all(self.name)

    def _build_switch(self) -> None:
        self.switch = Namespace.create(self.switch.name)
        for key, value in (
            ("ipv4/ip_forward", 1),
            ("ipv6/conf/all/forwarding", 1),
            ("ipv4/fib_multipath_hash_policy", 1),  # a flow keeps to its frontend: hash the ports
            ("ipv6/fib_multipath_hash_policy", 1),
        ):
            self.switch.sysctl(key, value)
        # The greater of "all" and the device's own counts, so both have to be 0.
        for device in ("all", "default"):
            self.switch.sysctl(f"ipv4/conf/{device}/rp_filter", 0)
            self.switch.sysctl(f"ipv4/conf/{device}/send_redirects", 0)
            self.switch.sysctl(f"ipv6/conf/{device}/accept_dad", 0)  # usable at once
        self.switch.add_address("lo", f"{CONTROL.host}/32")
        self.switch.add_address("lo", "fd77::1/128")

    def _attach(self, site: Site) -> None:
        namespace = Namespace.create(site.namespace.name)
        for device in ("all", "default"):
            namespace.sysctl(f"ipv6/conf/{device}/accept_dad", 0)
            namespace.sysctl(f"ipv4/conf/{device}/rp_filter", 0)
        join(namespace, "eth0", self.switch, site.role)
        gateway, gateway6 = site.gateways
        self.switch.add_address(site.role, f"{gateway}/24")
        self.switch.add_address(site.role, f"{gateway6}/64")
        namespace.add_address("eth0", f"{site.address}/24")
        namespace.add_address("eth0", f"{site.address6}/64")
        namespace.add_route("default", gateway)
        namespace.add_route("default", gateway6)
        if self.rate is not None and site.role != "client":
            limit(namespace, "eth0", self.rate)
            limit(self.switch, site.role, self.rate)

    def _route_services(self) -> None:
        """Routes to the service in the switch: all frontends at equal cost."""
        with self.switch.route() as route:
            for service, family in ((f"{SERVICE}/32", 0), (f"{SERVICE6}/128", 1)):
                addresses = [(site.address, site.address6)[family] for site in self.frontends]
                target: dict[str, Any] = {"dst": service}
                if len(addresses) == 1:
                    target["gateway"] = addresses[0]
                else:
                    target["multipath"] = [{"gateway": address} for address in addresses]
                route.route("add", **target)


def check_name(name: str) -> None:
    """Refuse names that are no safe prefix.

    Raises:
        ConfigError: not 1 to 24 lower-case letters, digits and hyphens.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"lab name {name!r}: 1 to 24 lower-case letters, digits and hyphens")


def limit(namespace: Namespace, device: str, rate: int) -> None:
    """Limit what a device sends to ``rate`` bits a second (tbf, bursts of 256 KiB)."""
    with namespace.route() as route:
        route.tc(
            "add",
            "tbf",
            namespace.link_index(device),
            handle=0x10000,
            rate=rate // 8,
            burst=_BURST,
            latency=_TBF_LATENCY,
        )


def namespaces_of(name: str) -> list[Namespace]:
    """The namespaces a lab of this name has, or a crashed one has left."""
    role = re.compile(re.escape(name) + r"-(client|switch|(fe|be)\d{1,3})")
    return [Namespace(found) for found in sorted(netns.listnetns()) if role.fullmatch(found)]


def remove_all(name: str) -> list[str]:
    """End what runs in the lab's namespaces and remove them; returns their names. Idempotent."""
    found = namespaces_of(name)
    end_processes(found)
    for namespace in found:
        namespace.remove()
    return [namespace.name for namespace in found]


def processes_in(namespaces: list[Namespace]) -> Iterator[int]:
    """The pids whose network namespace is one of these; never the caller's own."""
    inodes = set()
    for namespace in namespaces:
        try:
            status = namespace.path.stat()
        except FileNotFoundError:
            continue
        inodes.add((status.st_dev, status.st_ino))
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            status = (entry / "ns/net").stat()
        except OSError:
            continue
        if (status.st_dev, status.st_ino) in inodes:
            yield int(entry.name)


def end_processes(namespaces: list[Namespace]) -> None:
    """SIGTERM to everything inside, SIGKILL to what is still there three seconds later."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in processes_in(namespaces):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        deadline = time.monotonic() + _STOP_PATIENCE
        while any(not _is_zombie(pid) for pid in processes_in(namespaces)):
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        else:
            return


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
