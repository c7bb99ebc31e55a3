"""Adaptive handoff: which requests are worth a handoff, and which are better relayed. No I/O.

A handoff costs a fixed time; relaying costs less to begin with, but then for every octet:

    handoff:  h                       relaying:  r + octets * s

So a handoff pays above ``(h - r) / s`` octets. :class:`Costs` measures h, r and s while the node
works. How many octets a request will move is known from its head for uploads and ranges;
:class:`Sizes` remembers it for responses, by key, else by what keys of the same directory had on
average, else by what all had. Both are bounded.
"""

from __future__ import annotations

import re
import struct
from array import array
from collections.abc import Iterable
from typing import Final, NamedTuple

from xxhash import xxh3_64_intdigest

from prism.http.head import RequestHead

__all__ = ["Adaptive", "Costs", "Learned", "Sizes", "Verdict", "pack_learned", "unpack_learned"]

FIRST_THRESHOLD: Final = 64 * 1024  # octets, until there are measurements
# Octets. The times do not show all of what is spent. Every octet that is relayed passes one more
# link, and where links are the limit, that halves what they carry; waiting in front of a full link
# delays handoffs most, so that the measured threshold would grow when it should not. And handoffs
# take several times the processor time of relaying what is small, which is scarcer than links then.
LOWEST, HIGHEST = 32 * 1024, FIRST_THRESHOLD
_SLOTS = 1 << 16  # remembered sizes: 12 octets each
_PROBE = 64  # one in so many requests near the threshold goes the other way, to keep measuring
_NEAR = 4  # a factor: how far from the threshold "near" reaches
_ENOUGH = 8  # measurements of each kind before they count
_STEP = 0.05  # how fast an estimate follows
_BULK = 16 * 1024  # octets from which a relayed response tells of the cost of octets
_SMALL = 4 * 1024  # octets up to which it tells of the fixed cost
_EMPTY_RESPONSES = frozenset((b"HEAD", b"DELETE", b"OPTIONS"))
_UPLOADS = frozenset((b"PUT", b"POST", b"PATCH"))
_NOT_LEARNED = frozenset((206, 304, 412, 416))  # what they send is not the size of the whole
_RANGE = re.compile(rb"bytes=(?:(\d{1,18})-(\d{1,18})?|-(\d{1,18}))\Z")
_ENTRY = struct.Struct("!QQQ")


class Verdict(NamedTuple):
    """Whether a handoff pays, and why: a label for counters."""

    pays: bool
    reason: str


class Learned(NamedTuple):
    """One response's size, as nodes tell each other: hashes of key and directory, octets."""

    key: int
    directory: int
    size: int


def pack_learned(entries: Iterable[Learned]) -> bytes:
    """What travels between nodes."""
    return b"".join(_ENTRY.pack(*entry) for entry in entries)


def unpack_learned(data: bytes) -> list[Learned]:
    """The inverse of :func:`pack_learned`; an incomplete entry at the end is left out."""
    whole = len(data) - len(data) % _ENTRY.size
    return [Learned(*entry) for entry in _ENTRY.iter_unpack(data[:whole])]


class Sizes:
    """Remembered sizes by 64-bit hash, in a table that does not grow: a newer one replaces."""

    __slots__ = ("_mask", "_sizes", "_tags")

    def __init__(self, slots: int = _SLOTS) -> None:
        """Prepare a table of ``slots`` (a power of two)."""
        self._mask = slots - 1
        self._tags = array("Q", bytes(8 * slots))
        self._sizes = array("f", bytes(4 * slots))

    def get(self, name: int) -> float | None:
        """Octets, or ``None``: nothing is remembered."""
        slot = name >> 1 & self._mask  # the lowest bit is always set
        return self._sizes[slot] if self._tags[slot] == name else None

    def learn(self, name: int, size: float, weight: float) -> None:
        """Move towards ``size``; ``weight`` 1 forgets what was there."""
        slot = name >> 1 & self._mask  # the lowest bit is always set
        if self._tags[slot] == name:
            size = self._sizes[slot] * (1 - weight) + size * weight
        self._tags[slot] = name
        self._sizes[slot] = size


class _Quartile:
    """Follows the lower quartile of what it is given: waits for slow peers hardly count."""

    __slots__ = ("count", "value")

    def __init__(self) -> None:
        self.value = 0.0
        self.count = 0

    def add(self, value: float) -> None:
        if value <= 0:
            return
        self.count += 1
        if self.count <= _ENOUGH:  # the first ones are those of a cold start
            self.value = min(self.value or value, value)
        else:
            self.value *= 1 - _STEP * 0.75 if value < self.value else 1 + _STEP * 0.25


class Costs:
    """What handoffs and relaying take on this node, in seconds; and the threshold, in octets.

    Attributes:
        threshold: a handoff pays from here on.
        fixed: the threshold was given.
    """

    __slots__ = ("_due", "_handoff", "_octet", "_relay", "fixed", "threshold")

    def __init__(self, threshold: int | None = None) -> None:
        self.fixed = threshold is not None
        self.threshold: float = FIRST_THRESHOLD if threshold is None else threshold
        self._handoff = _Quartile()
        self._relay = _Quartile()
        self._octet = _Quartile()
        self._due = 0

    def handoff(self, seconds: float) -> None:
        """A handoff took so long, from the decision to the new owner's answer."""
        self._handoff.add(seconds)
        self._measured()

    def relayed(self, seconds: float, octets: int) -> None:
        """Relaying a response of so many octets took so long."""
        if octets <= _SMALL:
            self._relay.add(seconds)
        elif octets >= _BULK:
            self._octet.add(max(seconds - self._relay.value, seconds / 8) / octets)
        self._measured()

    def _measured(self) -> None:
        self._due += 1
        if self.fixed or self._due < _ENOUGH:
            return
        self._due = 0
        if min(self._handoff.count, self._octet.count) >= _ENOUGH:
            pays = (self._handoff.value - self._relay.value) / self._octet.value
            self.threshold = min(max(pays, LOWEST), HIGHEST)

    def snapshot(self) -> dict[str, float]:
        """For the status document: microseconds, nanoseconds for an octet, octets."""
        return {
            "threshold": round(self.threshold),
            "handoff_us": round(self._handoff.value * 1e6, 1),
            "relay_us": round(self._relay.value * 1e6, 1),
            "relay_octet_ns": round(self._octet.value * 1e9, 3),
        }


class Adaptive:
    """Weighs requests, and learns from what became of them.

    Attributes:
        costs: what was measured.
    """

    def __init__(self, threshold: int | None = None, *, slots: int = _SLOTS) -> None:
        """Prepare.

        Args:
            threshold: octets from which a handoff pays; ``None``: measured.
            slots: sizes to remember, a power of two.
        """
        self.costs = Costs(threshold)
        self._sizes = Sizes(slots)
        self._turn = 0

    def set_threshold(self, threshold: int | None) -> None:
        """Go by another threshold; ``None``: measure it."""
        self.costs = Costs(threshold)

    def weigh(self, head: RequestHead, rule: str = "", *, stays: bool = False) -> Verdict:
        """Whether handing the connection over pays for this request.

        Args:
            head: of the request.
            rule: the policy's rule; what is learned counts for requests of the same rule.
            stays: the connection will stay with its new owner whatever comes next, and has shown
                that more may come.
        """
        if head.upgrade is not None:
            return Verdict(True, "upgrade")
        if stays:
            return Verdict(True, "kept-alive")
        if head.chunked:
            return Verdict(True, "length-unknown")
        octets, known = self._expect(head, rule)
        if octets is None:
            return Verdict(False, "size-unknown")  # relaying it teaches its size
        threshold = self.costs.threshold
        pays = octets >= threshold
        if not self.costs.fixed and threshold / _NEAR <= octets < threshold * _NEAR:
            self._turn += 1
            if self._turn >= _PROBE:
                self._turn = 0
                return Verdict(not pays, "probe")
        return Verdict(pays, f"{'large' if pays else 'small'}-{known}")

    def _expect(self, head: RequestHead, rule: str) -> tuple[float | None, str]:
        """Octets the request will move, and how that is known."""
        upload = head.content_length or 0
        if upload >= self.costs.threshold or head.method in _UPLOADS:
            return upload, "upload"
        if head.method in _EMPTY_RESPONSES:
            return upload, "method"
        size, known = self._recall(head, rule)
        span = head.get(b"range")
        if span is not None and (match := _RANGE.match(span)):
            first, last, suffix = match.groups()
            if suffix is not None:
                part: float | None = int(suffix)
            elif last is not None:
                part = max(int(last) - int(first) + 1, 0)
            else:
                part = None if size is None else max(size - int(first), 0)
            if part is not None:
                return upload + (part if size is None else min(part, size)), "range"
        return (None if size is None else upload + size), known

    def _recall(self, head: RequestHead, rule: str) -> tuple[float | None, str]:
        key, directory, everything = _hashes(head, rule)
        size = self._sizes.get(key)
        if size is not None:
            return size, "key"
        size = self._sizes.get(directory)
        if size is not None:
            return size, "prefix"
        return self._sizes.get(everything), "rule"

    def answered(
        self, head: RequestHead, rule: str, status: int, sent: int, received: int
    ) -> Learned | None:
        """Learn from a request that was answered here or relayed.

        Args:
            head: of the request.
            rule: the policy's rule.
            status: of the response.
            sent: octets of the response's body.
            received: octets of the request's body.

        Returns:
            What other nodes may want to know, if anything was learned.
        """
        if head.method == b"PUT" and 200 <= status < 300:
            size = received  # what a GET will bring
        elif head.method == b"GET" and status < 500 and status not in _NOT_LEARNED:
            size = sent
        else:
            return None
        key, directory, everything = _hashes(head, rule)
        self._sizes.learn(everything, size, 1 / 64)
        learned = Learned(key, directory, size)
        self.learn(learned)
        return learned

    def learn(self, learned: Learned) -> None:
        """Learn what another node has told."""
        key, directory, size = learned
        self._sizes.learn(key, size, 1)
        self._sizes.learn(directory, size, 1 / 16)


def _hashes(head: RequestHead, rule: str) -> tuple[int, int, int]:
    """Names of the key, of its directory, and of all the rule's keys."""
    key = head.key
    seed = xxh3_64_intdigest(rule.encode()) if rule else 0
    cut = key.rfind(b"/") + 1
    # Never 0, which is the tag of an empty slot; a directory is no key, also when it is asked for.
    return (
        xxh3_64_intdigest(key, seed) | 1,
        xxh3_64_intdigest(key[:cut], seed ^ 0x9E3779B97F4A7C15) | 1,
        xxh3_64_intdigest(b"", seed ^ 0xC2B2AE3D27D4EB4F) | 1,
    )
