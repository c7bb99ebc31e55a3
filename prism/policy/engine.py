"""The policy itself: ordered rules, compiled once, and the function an operator may add."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from time import perf_counter

from prism.config_policy import PolicyConfig, RuleConfig
from prism.errors import ConfigError
from prism.http.head import RequestHead
from prism.loading import load_function
from prism.policy import conditions
from prism.policy.conditions import Condition
from prism.policy.decision import AUTO, Action, Decision, Edits
from prism.policy.limits import RateLimit
from prism.policy.subject import Subject

__all__ = ["Policy", "Route", "Rule", "Step"]

log = logging.getLogger(__name__)

Route = Callable[[RequestHead], Decision | None]
SLOW = 0.005  # seconds; a routing function that takes longer holds up every connection


@dataclass(frozen=True, slots=True)
class Step:
    """One rule in an explanation.

    Attributes:
        rule: its name.
        fails: the first condition that does not hold; empty: the rule decides.
        holds: why it decides: all its conditions.
    """

    rule: str
    fails: str
    holds: str = ""


class Rule:
    """One compiled rule."""

    __slots__ = ("conditions", "decision", "limit", "max_body", "name")

    def __init__(self, config: RuleConfig) -> None:
        self.name = config.name
        self.conditions = tuple(_conditions(config))
        self.max_body = config.max_body
        self.limit: RateLimit | None = None
        if config.rate is not None:
            burst = config.burst or max(1, round(config.rate))
            self.limit = RateLimit(config.rate, burst, config.rate_prefix4, config.rate_prefix6)
        self.decision = _decision(config)

    def fails(self, subject: Subject) -> Condition | None:
        """The first condition that does not hold."""
        for condition in self.conditions:
            if not condition.test(subject):
                return condition
        return None

    def decide(self, subject: Subject) -> Decision:
        """The decision, or the refusal of one request too many or too large."""
        if self.limit is not None and (wait := self.limit.take(subject.client)):
            return _too_many(self.name, wait)
        length = subject.head.content_length
        if self.max_body is not None and length is not None and length > self.max_body:
            detail = f"request bodies here have at most {self.max_body} octets"
            return Decision.deny(413, detail, rule=self.name)
        return self.decision


class Policy:
    """Decides about requests; the same on every node with the same configuration.

    Args:
        config: the ``[policy]`` section.
        route: a function that is asked before the rules, instead of ``policy.route``.

    Raises:
        ConfigError: a pattern cannot be used, or the routing function cannot be loaded.
    """

    __slots__ = ("_default", "_route", "faults", "rules", "trivial")

    def __init__(self, config: PolicyConfig, route: Route | None = None) -> None:
        try:
            self.rules = tuple(map(Rule, config.rules))
        except ValueError as error:
            raise ConfigError(f"policy: {error}") from None
        self._route = route
        if route is None and config.route:
            self._route = load_function("policy.route", config.route, config.route_dir)
        self._default = _default(config.default)
        self.faults = 0
        self.trivial = not self.rules and self._route is None and self._default is AUTO

    def decide(self, head: RequestHead, client: str, facts: bytes = b"") -> Decision:
        """What shall become of a request. Never raises.

        Args:
            head: the request.
            client: the client's address.
            facts: what its TLS handshake told, packed.
        """
        if self.trivial:
            return AUTO
        if self._route is not None:
            decision = self._ask(head)
            if decision is not None:
                return decision
        subject = Subject(head, client, facts)
        for rule in self.rules:
            if rule.fails(subject) is None:
                return rule.decide(subject)
        return self._default

    def explain(
        self, head: RequestHead, client: str, facts: bytes = b""
    ) -> tuple[list[Step], Decision]:
        """The rules up to the one that decides, each with why it does not, and the decision."""
        steps: list[Step] = []
        if self._route is not None:
            decision = self._ask(head)
            steps.append(Step("policy.route", "" if decision else "the function has no opinion"))
            if decision is not None:
                return steps, decision
        subject = Subject(head, client, facts)
        for rule in self.rules:
            failed = rule.fails(subject)
            if failed is not None:
                steps.append(Step(rule.name, failed.says))
            else:
                holds = "; ".join(condition.says for condition in rule.conditions)
                steps.append(Step(rule.name, "", holds or "it has no conditions"))
                return steps, rule.decide(subject)
        return steps, self._default

    def _ask(self, head: RequestHead) -> Decision | None:
        """Ask the operator's function; its faults deny."""
        began = perf_counter()
        try:
            decision = self._route(head) if self._route else None
            if decision is not None and not isinstance(decision, Decision):
                raise TypeError(f"it returned {type(decision).__name__}, not a Decision")
        except Exception:
            self.faults += 1
            log.exception("the routing function failed; the request is refused")
            return _FAULT
        took = perf_counter() - began
        if took > SLOW:
            log.warning("the routing function took %.1f ms: all connections wait", took * 1e3)
        return decision


_FAULT = Decision.deny(500, "the routing function failed", rule="policy.route")


def _default(name: str) -> Decision:
    if name == "auto":
        return AUTO
    return Decision.deny(rule="default") if name == "deny" else Decision(Action(name))


def _too_many(rule: str, wait: int) -> Decision:
    refused = Decision.deny(429, "too many requests from your network", rule=rule)
    if refused.answer is None:
        raise RuntimeError("a refusal has an answer")
    fields = (*refused.answer.headers, (b"Retry-After", b"%d" % wait))
    return replace(refused, answer=replace(refused.answer, headers=fields))


def _conditions(config: RuleConfig) -> list[Condition]:
    """The cheap ones first."""
    found: list[Condition] = []
    if config.method:
        found.append(conditions.method(config.method))
    if config.host:
        found.append(conditions.host(config.host))
    if config.path or config.path_prefix or config.path_glob or config.path_regex:
        found.append(
            conditions.path(
                config.path,
                config.path_prefix,
                config.path_glob,
                config.path_regex,
                wary=config.action == "deny",
            )
        )
    if config.client:
        found.append(conditions.client(config.client))
    if config.tls_server_name:
        found.append(conditions.server_name(config.tls_server_name))
    if config.client_certificate:
        found.append(conditions.identity(config.client_certificate))
    found += [conditions.field(name, patterns) for name, patterns in config.header.items()]
    found += [conditions.query(name, patterns) for name, patterns in config.query.items()]
    return found


def _decision(config: RuleConfig) -> Decision:
    if config.action == "deny":
        return Decision.deny(config.status or 403, rule=config.name)
    if config.action == "respond":
        fields: tuple[tuple[bytes, bytes], ...] = ()
        if config.body:
            fields = ((b"Content-Type", config.content_type.encode()),)
        if config.location:
            fields = (*fields, (b"Location", config.location.encode()))
        status = config.status or (302 if config.location else 200)
        return Decision.respond(status, config.body.encode(), fields, rule=config.name)
    edits = None
    if config.set_headers or config.remove_headers:
        edits = Edits(
            tuple((name.lower().encode(), v.encode()) for name, v in config.set_headers.items()),
            frozenset(name.lower().encode() for name in config.remove_headers),
        )
    return Decision(
        Action(config.action),
        pool=config.pool or "",
        placement=config.placement or "",
        edits=edits,
        max_body=config.max_body,
        rule=config.name,
    )
