"""Puts a classifier on network interfaces and takes it off (tc-bpf(8), clsact).

The filter has a fixed priority and handle, so putting a new program where an old one is replaces
it in one step: no packet passes without one of the two.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

from pyroute2 import IPRoute, NetlinkError

from prism.errors import SwitchError

__all__ = ["has_ethernet", "install", "uninstall"]

T = TypeVar("T")

_INGRESS: Final = 0xFFFFFFF2  # TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS)
_PRIORITY: Final = 0x5052  # before nothing, after what an administrator put first
_HANDLE: Final = 1
_ETH_P_ALL: Final = 0x0003
_ARPHRD_ETHER: Final = 1


def _in_thread(call: Callable[[], T]) -> T:
    """Call in a thread of its own: the netlink library will not run inside an event loop."""
    result: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(call())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="prism-netlink")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


@contextlib.contextmanager
def _route(namespace: str | None) -> Iterator[Any]:
    path = str(Path("/run/netns") / namespace) if namespace else None
    with IPRoute(netns=path, flags=0) if path else IPRoute() as route:
        yield route


def _index(route: Any, interface: str) -> int:
    found = route.link_lookup(ifname=interface)
    if not found:
        raise SwitchError(f"no network interface {interface!r}: check the switch's port names")
    return int(found[0])


def has_ethernet(interface: str, namespace: str | None = None) -> bool:
    """Whether an interface's packets have an Ethernet header (a TUN device's have none).

    Raises:
        SwitchError: no such interface.
    """

    def look() -> bool:
        with _route(namespace) as route:
            (link,) = route.get_links(_index(route, interface))
            return bool(link["ifi_type"] == _ARPHRD_ETHER)

    return _in_thread(look)


def install(program_fd: int, name: str, interface: str, namespace: str | None = None) -> None:
    """Run a classifier on what arrives at ``interface``, in place of an earlier one of ours.

    Raises:
        SwitchError: no such interface, or the kernel refuses (needs CAP_NET_ADMIN).
    """

    def put() -> None:
        with _route(namespace) as route:
            index = _index(route, interface)
            try:
                route.tc("add", "clsact", index)
            except NetlinkError as error:
                if error.code != errno.EEXIST:
                    raise
            route.tc(
                "replace-filter",
                "bpf",
                index,
                _HANDLE,
                fd=program_fd,
                name=name,
                parent=_INGRESS,
                prio=_PRIORITY,
                protocol=_ETH_P_ALL,
                direct_action=True,
            )

    try:
        _in_thread(put)
    except NetlinkError as error:
        raise SwitchError(
            f"cannot attach the classifier to {interface}: {error.args[1]}; "
            "it needs CAP_NET_ADMIN and a kernel with CONFIG_NET_CLS_BPF and CONFIG_NET_SCH_INGRESS"
        ) from None


def uninstall(interface: str, namespace: str | None = None) -> None:
    """Take the classifier off; not there, or no such interface any more, is fine.

    Raises:
        SwitchError: the kernel refuses.
    """

    def take() -> None:
        with _route(namespace) as route:
            for index in route.link_lookup(ifname=interface):
                route.tc(
                    "del-filter",
                    "bpf",
                    index,
                    _HANDLE,
                    parent=_INGRESS,
                    prio=_PRIORITY,
                    protocol=_ETH_P_ALL,
                )

    try:
        _in_thread(take)
    except NetlinkError as error:
        if error.code not in (errno.ENOENT, errno.EINVAL, errno.ENODEV):
            raise SwitchError(
                f"cannot detach the classifier from {interface}: {error.args[1]}"
            ) from None
