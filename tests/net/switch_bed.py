"""A router with the eBPF switch on its ports, a client and three nodes; for the tests beside it.

::

    client ---+
    fe     ---+--- switch (router, classifier on every port)
    be1    ---+
    be2    ---+

Role number i has 10.50.i.2/24 and fd50:i::2/64, the switch's end is .1; the service address is
10.50.0.80 and fd50::80, on fe's loopback.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from control_conformance import ControlNode

from prism.flow import Endpoint, Flow
from prism.lab.netns import Namespace, join
from prism.switch.base import Rule
from prism.switch.ebpf import EbpfSwitch, Settings

ROLES = ("client", "fe", "be1", "be2")
CONTROL = Endpoint("10.50.0.1", 4760)
CONTROL6 = Endpoint("fd50::1", 4760)
SERVICE = "10.50.0.80"
SERVICE6 = "fd50::80"


@contextlib.contextmanager
def bpffs() -> Iterator[Path]:
    """A BPF file system of its own, unmounted at the end."""
    with tempfile.TemporaryDirectory() as name:
        subprocess.run(["mount", "-t", "bpf", "bpf", name], check=True)
        try:
            yield Path(name)
        finally:
            subprocess.run(["umount", "--lazy", name], check=True)


def host(role: str, family: int = 4) -> str:
    number = ROLES.index(role) + 1
    return f"10.50.{number}.2" if family == 4 else f"fd50:{number}::2"


class SwitchBed:
    """The network and the switch; ``drops`` and ``node`` make it a ``ControlBed``."""

    def __init__(self, pins: Path, *, max_rules: int = 4096) -> None:
        if os.geteuid() != 0:
            pytest.fail("these tests make network namespaces and load eBPF programs: run as root")
        self.key = os.urandom(16)
        self.control = CONTROL
        self.pins = pins / "prism"
        self.tag = f"pt-{uuid.uuid4().hex[:6]}"
        self._closing = contextlib.ExitStack()
        try:
            self._build(max_rules)
        except BaseException:
            self.close()
            raise

    def _build(self, max_rules: int) -> None:
        self.router = self._namespace("switch")
        self.spaces = {role: self._namespace(role) for role in ROLES}
        self.router.sysctl("ipv4/ip_forward", 1)
        self.router.sysctl("ipv6/conf/all/forwarding", 1)
        self.router.add_address("lo", f"{CONTROL.host}/32")
        self.router.add_address("lo", f"{CONTROL6.host}/128")
        for role, space in self.spaces.items():
            join(space, "eth0", self.router, role)
            for family, length, gateway in ((4, 24, ".1"), (6, 64, "::1")):
                address = host(role, family)
                near = address.removesuffix("::2" if family == 6 else ".2") + gateway
                space.add_address("eth0", f"{address}/{length}")
                self.router.add_address(role, f"{near}/{length}")
                space.add_route("default", near)
        fe = self.spaces["fe"]
        fe.add_address("lo", f"{SERVICE}/32")
        fe.add_address("lo", f"{SERVICE6}/128")
        self.router.add_route(f"{SERVICE}/32", host("fe"))
        self.router.add_route(f"{SERVICE6}/128", host("fe", 6))
        self.switch = EbpfSwitch(self.pins, max_rules=max_rules)
        self._closing.callback(self.switch.close)
        self.configure()
        self.switch.attach(ROLES, namespace=self.router.name)

    def _namespace(self, role: str) -> Namespace:
        space = Namespace.create(f"{self.tag}-{role}")
        self._closing.callback(space.remove)
        space.sysctl("ipv6/conf/default/accept_dad", 0)  # link-local addresses usable at once
        return space

    def configure(self, hold_ifindex: int = 0) -> None:
        self.switch.configure(Settings(self.key, (CONTROL, CONTROL6), hold_ifindex))

    def close(self) -> None:
        self._closing.close()

    # ControlBed

    def node(self, name: str, *, role: str = "be1", family: int = 4) -> ControlNode:
        space = self.spaces[role]
        control = CONTROL if family == 4 else CONTROL6
        return ControlNode(space, control, self.key, name, Endpoint(host(role, family), 8080))

    def rule(self, flow: bytes) -> Rule | None:
        return self.switch.get(flow)

    def drops(self) -> dict[str, int]:
        counters = self.switch.counters()
        return {
            "bad": counters["bad_format"] + counters["bad_mac"],
            "replay": counters["replay"],
        }

    # for the data plane's tests

    def flow(self, client_port: int, family: int = 4, service_port: int = 80) -> Flow:
        service = SERVICE if family == 4 else SERVICE6
        return Flow(Endpoint(host("client", family), client_port), Endpoint(service, service_port))
