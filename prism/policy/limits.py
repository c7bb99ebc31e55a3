"""Rate limits: a token bucket for each client network, in a table of bounded size."""

from __future__ import annotations

import ipaddress
import math
from collections import OrderedDict
from time import monotonic

__all__ = ["MAX_NETWORKS", "RateLimit"]

MAX_NETWORKS = 65_536


class RateLimit:
    """Token buckets by client network.

    A table that is full forgets the network that was heard of longest ago; it starts with a full
    bucket when it comes back.

    Args:
        rate: requests a second, for each network.
        burst: requests that may come at once.
        prefix4, prefix6: length of a network's prefix in bits.
    """

    __slots__ = ("_buckets", "_prefixes", "burst", "rate")

    def __init__(self, rate: float, burst: int, prefix4: int = 32, prefix6: int = 64) -> None:
        self.rate = rate
        self.burst = burst
        self._prefixes = {4: prefix4, 6: prefix6}
        self._buckets: OrderedDict[int, tuple[float, float]] = OrderedDict()

    def take(self, client: str, now: float | None = None) -> int:
        """Take one token.

        Args:
            client: the address.
            now: the clock, seconds.

        Returns:
            0, or the seconds after which there is a token again, rounded up.
        """
        now = monotonic() if now is None else now
        key = self._network(client)
        tokens, since = self._buckets.pop(key, (float(self.burst), now))
        tokens = min(self.burst, tokens + (now - since) * self.rate)
        wait = 0
        if tokens >= 1:
            tokens -= 1
        else:
            wait = max(1, math.ceil((1 - tokens) / self.rate))
        self._buckets[key] = (tokens, now)
        if len(self._buckets) > MAX_NETWORKS:
            self._buckets.popitem(last=False)
        return wait

    def __len__(self) -> int:
        return len(self._buckets)

    def _network(self, client: str) -> int:
        """A number for the client's network; the version is part of it."""
        try:
            address = ipaddress.ip_address(client)
        except ValueError:
            return -1
        mapped = getattr(address, "ipv4_mapped", None)
        address = mapped or address
        bits = address.max_prefixlen - self._prefixes[address.version]
        return (int(address) >> bits) << 4 | address.version
