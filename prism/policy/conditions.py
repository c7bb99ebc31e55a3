"""Conditions: what a rule asks of a request."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

import re2

from prism.policy.subject import Subject

__all__ = ["Condition", "client", "field", "globs", "host", "identity", "method", "path", "query"]
__all__ += ["server_name"]

Test = Callable[[Subject], bool]


@dataclass(frozen=True, slots=True)
class Condition:
    """One thing that must hold.

    Attributes:
        says: what it asks for, for people.
        test: whether it holds.
    """

    says: str
    test: Test


def globs(patterns: Iterable[str], *, fold: bool = False) -> Callable[[str], bool]:
    """A test of a text against shell patterns (``*``, ``?``, ``[a-z]``); any may match.

    Patterns are compiled by RE2, so a match takes time linear in the text.
    """
    options = re2.Options()
    options.case_sensitive = not fold
    options.log_errors = False
    compiled = [_compile(_translate(pattern), options) for pattern in patterns]
    return lambda text: any(one.fullmatch(_clean(text)) for one in compiled)


def _translate(pattern: str) -> str:
    # Python's own translation ends with \Z and may hold look-aheads, which RE2 has not.
    translated = ""
    for part in re.split(r"(\*+|\?|\[[^\]]+\])", pattern):
        if part.startswith("*"):
            translated += ".*"
        elif part == "?":
            translated += "."
        elif part.startswith("[") and part.endswith("]") and len(part) > 2:
            inner = part[1:-1]
            negated = inner.startswith("!")
            inner = inner[negated:].replace("\\", "\\\\").replace("^", "\\^")
            translated += f"[{'^' * negated}{inner}]"
        else:
            translated += re2.escape(part)
    return f"(?s){translated}"


def _compile(pattern: str, options: Any) -> Any:
    try:
        return re2.compile(pattern, options)
    except re2.error as error:
        said = error.args[0] if error.args else error
        text = said.decode("utf-8", "replace") if isinstance(said, bytes) else str(said)
        raise ValueError(f"{pattern!r} is not a pattern RE2 can use: {text}") from None


def _clean(text: str) -> str:
    """Octets that are no UTF-8 become U+FFFD: RE2 takes text only."""
    if text.isascii():
        return text
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def host(patterns: Sequence[str]) -> Condition:
    """The host asked for matches a glob; case does not count."""
    test = globs([pattern.lower() for pattern in patterns])
    return Condition(f"host is {_any(patterns)}", lambda subject: test(subject.host))


def path(
    exact: Sequence[str],
    prefixes: Sequence[str],
    patterns: Sequence[str],
    regexes: Sequence[str],
    *,
    wary: bool,
) -> Condition:
    """The path is one of these, begins with a prefix, or matches a glob or a regular expression.

    Args:
        exact: whole paths.
        prefixes: a path has one if it is it, or goes on after it with a slash.
        patterns: globs.
        regexes: RE2 expressions, searched for (anchor them).
        wary: for refusals: any reading of the path, in any case of letters, is enough. Otherwise
            all readings must match, so that what is allowed cannot be read as something else.
    """
    fold = str.casefold if wary else str
    wholes = frozenset(fold(one) for one in exact)
    starts = tuple(fold(one).rstrip("/") for one in prefixes)
    glob = globs(patterns, fold=wary)
    options = re2.Options()
    options.case_sensitive = not wary
    options.log_errors = False
    searched = [_compile(one, options) for one in regexes]

    def one(text: str) -> bool:
        folded = fold(text)
        if folded in wholes:
            return True
        for start in starts:
            if folded.startswith(start) and (
                len(folded) == len(start) or folded[len(start)] == "/"
            ):
                return True
        if glob(text):
            return True
        return any(pattern.search(_clean(text)) for pattern in searched)

    choose = any if wary else all
    parts = [
        *([f"is {_any(exact)}"] if exact else []),
        *([f"is below {_any(prefixes)}"] if prefixes else []),
        *([f"matches {_any(patterns)}"] if patterns else []),
        *([f"has {_any(regexes)}"] if regexes else []),
    ]
    says = f"path {' or '.join(parts)}" + (", however it is read" if wary else "")

    def test(subject: Subject) -> bool:
        read = subject.readings
        return one(read[0]) if len(read) == 1 else choose(map(one, read))

    return Condition(says, test)


def method(names: Sequence[str]) -> Condition:
    """The method is one of these."""
    wanted = frozenset(name.encode() for name in names)
    return Condition(f"method is {_any(names)}", lambda subject: subject.head.method in wanted)


def field(name: str, patterns: Sequence[str]) -> Condition:
    """A header field is there and its values, joined by commas, match a glob."""
    key, test = name.lower().encode(), globs(patterns)

    def holds(subject: Subject) -> bool:
        value = subject.head.get_all(key)
        return value is not None and test(value.decode("latin-1"))

    return Condition(f"field {name} is {_any(patterns)}", holds)


def query(name: str, patterns: Sequence[str]) -> Condition:
    """A query parameter is there and one of its values matches a glob."""
    test = globs(patterns)

    def holds(subject: Subject) -> bool:
        text = subject.head.query.decode("utf-8", "surrogateescape")
        try:
            pairs = parse_qsl(text, keep_blank_values=True, max_num_fields=1000)
        except ValueError:
            return False
        return any(key == name and test(value) for key, value in pairs)

    return Condition(f"query parameter {name} is {_any(patterns)}", holds)


def client(networks: Sequence[ipaddress.IPv4Network | ipaddress.IPv6Network]) -> Condition:
    """The client's address is in one of these networks."""
    kept = tuple(networks)

    def holds(subject: Subject) -> bool:
        try:
            address = ipaddress.ip_address(subject.client)
        except ValueError:
            return False
        mapped = getattr(address, "ipv4_mapped", None)
        return any((mapped or address) in network for network in kept)

    return Condition(f"client is in {_any(map(str, kept))}", holds)


def server_name(patterns: Sequence[str]) -> Condition:
    """The name asked for in the TLS handshake (SNI) matches a glob."""
    test = globs([pattern.lower() for pattern in patterns])
    return Condition(
        f"TLS server name is {_any(patterns)}", lambda subject: test(subject.peer.server_name)
    )


def identity(patterns: Sequence[str]) -> Condition:
    """The verified client certificate's subject, a name or its fingerprint matches a glob."""
    test = globs(patterns)

    def holds(subject: Subject) -> bool:
        peer = subject.peer
        if not peer.fingerprint:
            return False
        return any(test(one) for one in (peer.subject, *peer.names, peer.fingerprint))

    return Condition(f"client certificate is {_any(patterns)}", holds)


def _any(values: Iterable[str]) -> str:
    return " or ".join(values)
