"""Handoffs end without cycles of references: workers hardly ever look for garbage."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any, cast

from prism.flow import Endpoint, Flow
from prism.handoff.incoming import Incoming
from prism.handoff.machine import Event, SourceState
from prism.handoff.outgoing import Outgoing, Way
from prism.handoff.wire import Offer
from prism.switch.control import Op, Status

FLOW = Flow(Endpoint("10.0.0.1", 4000), Endpoint("10.0.0.80", 80))


def garbage(make: Any) -> int:
    """Objects that only a look for cycles would find, after making a hundred."""
    make()  # what is made once and kept
    gc.collect()
    gc.disable()
    try:
        for _ in range(100):
            make()
        return gc.collect()
    finally:
        gc.enable()


def ignore(*_: object) -> None:
    pass


def test_an_incoming_one() -> None:
    taker = SimpleNamespace(
        trace=False, import_endpoint=lambda flow: None, settled=ignore, reconcile=ignore
    )
    answers = []

    class Reply:
        peer = "be1/0"

        def __call__(self, answer: object) -> None:
            answers.append(type(answer).__name__)

    def make() -> None:
        Incoming(cast(Any, taker), Offer(FLOW.pack(), 1, b"", b"", b"", 0, 0, 0), Reply()).start()

    assert garbage(make) == 0
    assert set(answers) == {"Refused"}


def test_an_outgoing_one() -> None:
    ended = []

    class Switch:
        def submit(self, op: Op, flow: bytes, on_reply: Any, **_: object) -> None:
            on_reply(SimpleNamespace(op=op, status=Status.FULL, gen=0))

    reporter = SimpleNamespace(
        switch=Switch(),
        trace=False,
        serve_here=ignore,
        finished=lambda handoff: ended.append((handoff.machine.state, handoff.machine.why)),
    )

    def make() -> None:
        connection = SimpleNamespace(
            key=FLOW.pack(), gen=0, local=FLOW.service, head=object(), flow=FLOW,
            detach=ignore, attach=ignore,
        )  # fmt: skip
        Outgoing(cast(Any, reporter), cast(Any, connection), cast(Way, None), "be1/0", 1).start()

    assert garbage(make) == 0
    assert set(ended) == {(SourceState.KEPT, Event.FULL)}
