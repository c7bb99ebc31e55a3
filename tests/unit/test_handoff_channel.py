"""Two channels over real TCP on the loopback, and everything that can come between them."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import socket

import pytest
import uvloop

from prism.errors import HandoffError
from prism.flow import Endpoint
from prism.handoff import connection, link, wire
from prism.handoff.channel import (
    Channel,
    LinkLost,
    Offer,
    Reason,
    Refused,
    Taken,
    TimedOut,
    answer_event,
)
from prism.handoff.machine import Event

pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy")
KEY = b"0123456789abcdef"
OFFER = Offer(bytes(36), 7, b"tcp state" * 50, b"", b"pending")
ANYWHERE = Endpoint("127.0.0.1", 0)


@pytest.fixture(params=["asyncio", "uvloop"])
def event_loop_policy(request):
    if request.param == "uvloop":
        return uvloop.EventLoopPolicy()
    return asyncio.DefaultEventLoopPolicy()


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(link, "BACKOFF_FIRST", 0.01)
    monkeypatch.setattr(link, "BACKOFF_LONGEST", 0.05)


@contextlib.asynccontextmanager
async def channel(name, on_offer=lambda offer, reply: reply(Taken()), key=KEY, **times):
    made = Channel(name, key, on_offer)
    for attribute, value in times.items():
        setattr(made.shared, attribute, value)
    try:
        yield made
    finally:
        await made.close()


async def ask(way, offer=OFFER, deadline=1.0):
    answers = asyncio.Queue()
    way.offer(offer, answers.put_nowait, deadline)
    return await asyncio.wait_for(answers.get(), 5)


async def until(condition, seconds=3.0):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


class Wiretap:
    """A relay between two channels that can copy, alter, hold or cut what passes."""

    def __init__(self, target: Endpoint) -> None:
        self.target = target
        self.captured = bytearray()
        self.alter = lambda data, to_listener: data
        self.writers: list[asyncio.StreamWriter] = []
        self.tasks: set[asyncio.Task] = set()

    async def __aenter__(self):
        self.server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.endpoint = Endpoint(*self.server.sockets[0].getsockname())
        return self

    async def __aexit__(self, *exc):
        self.server.close()
        self.cut()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def _accept(self, reader, writer):
        far_reader, far_writer = await asyncio.open_connection(*self.target)
        self.writers += [writer, far_writer]
        for source, sink, forward in ((reader, far_writer, True), (far_reader, writer, False)):
            task = asyncio.ensure_future(self._pump(source, sink, forward))
            self.tasks.add(task)

    async def _pump(self, source, sink, to_listener):
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                if to_listener:
                    self.captured += data
                sink.write(self.alter(data, to_listener))
        sink.close()

    def cut(self):
        for writer in self.writers:
            writer.close()
        self.writers.clear()

    def inject(self, data):
        self.writers[1].write(data)


async def test_a_thousand_offers():
    seen = []

    def on_offer(offer, reply):
        assert reply.peer == "fe1/0"
        seen.append(offer)
        answer = Taken() if offer.gen % 2 else Refused(Reason.BUSY, "no room")
        if offer.gen % 3:
            reply(answer)
        else:
            asyncio.get_running_loop().call_soon(reply, answer)

    async with channel("be1/0", on_offer) as there, channel("fe1/0") as here:
        way = here.link("be1/0", await there.listen(ANYWHERE))
        assert here.link("be1/0", way.endpoint) is way
        assert await way.wait_connected(2)
        answers = {}
        for gen in range(1000):
            way.offer(
                OFFER._replace(gen=gen), lambda answer, gen=gen: answers.update({gen: answer})
            )
        assert way.outstanding == 1000
        await until(lambda: len(answers) == 1000)
        assert way.outstanding == 0
        for gen, answer in answers.items():
            assert isinstance(answer, Taken if gen % 2 else Refused), gen
        assert [offer._replace(id=0) for offer in seen] == [
            OFFER._replace(gen=gen) for gen in range(1000)
        ]
        assert (here.counters.taken, here.counters.refused) == (500, 500)
        assert there.counters.offers_received == 1000
        assert here.counters.connects == 1


async def test_a_large_state_passes():
    got = []

    def on_offer(offer, reply):
        got.append(offer)
        reply(Taken())

    offer = OFFER._replace(tcp=os.urandom(8 << 20))
    async with channel("be1/0", on_offer) as there, channel("fe1/0") as here:
        way = here.link("be1/0", await there.listen(ANYWHERE))
        assert await way.wait_connected(2)
        assert type(await ask(way, offer)) is Taken
        assert got[0].tcp == offer.tcp
        refused = await ask(way, offer._replace(tcp=bytes(wire.MAX_OFFER + 1)))
        assert refused.reason is Reason.TOO_LARGE
        assert type(await ask(way)) is Taken  # the link has not been harmed


async def test_without_a_link_the_offer_never_leaves():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = Endpoint(*taken.getsockname())
    async with channel("fe1/0") as here:
        way = here.link("be1/0", nobody)
        answers = []
        way.offer(OFFER, answers.append)
        assert answers == [Refused(Reason.LINK_DOWN, "no link to be1/0")]
        assert not await way.wait_connected(0.05)
        assert here.counters.refused_here == 1


async def test_a_link_comes_up_when_the_peer_does():
    async with channel("fe1/0") as here:
        async with channel("be1/0") as there:
            endpoint = await there.listen(ANYWHERE)
            way = here.link("be1/0", endpoint)
            assert await way.wait_connected(2)
        await until(lambda: not way.connected)
        async with channel("be1/0") as there:
            await there.listen(endpoint)
            assert await way.wait_connected(2)
            assert type(await ask(way)) is Taken
        assert here.counters.connects == 2
        await until(lambda: here.counters.disconnects == 2)


async def test_a_busy_link_refuses_here(monkeypatch):
    monkeypatch.setattr(link, "MAX_OUTSTANDING", 3)
    async with channel("be1/0", lambda offer, reply: None) as there, channel("fe1/0") as here:
        way = here.link("be1/0", await there.listen(ANYWHERE))
        assert await way.wait_connected(2)
        answers = []
        for _ in range(5):
            way.offer(OFFER, answers.append)
        assert [answer.reason for answer in answers] == [Reason.LINK_BUSY] * 2


async def test_a_link_that_the_peer_does_not_read_is_bounded_in_octets(monkeypatch):
    monkeypatch.setattr(link, "MAX_QUEUED", 1 << 20)
    async with channel("be1/0") as there, channel("fe1/0") as here:
        endpoint = await there.listen(ANYWHERE)
        async with Wiretap(endpoint) as tap:
            way = here.link("be1/0", tap.endpoint)
            assert await way.wait_connected(2)
            answers = []
            for _ in range(64):
                way.offer(OFFER._replace(tcp=bytes(1 << 20)), answers.append)
            assert 40 < len(answers) < 64
            assert {answer.reason for answer in answers} == {Reason.LINK_BUSY}


async def test_silence_is_a_timeout_and_a_late_answer_is_still_told():
    replies = []
    async with (
        channel("be1/0", lambda offer, reply: replies.append(reply)) as there,
        channel("fe1/0") as here,
    ):
        way = here.link("be1/0", await there.listen(ANYWHERE))
        assert await way.wait_connected(2)
        answers = []
        way.offer(OFFER, answers.append, 0.05)
        way.offer(OFFER, answers.append, 0.02)
        await until(lambda: len(answers) == 2)
        assert answers == [TimedOut(), TimedOut()]
        assert way.outstanding == 0
        replies[0](Taken())
        await until(lambda: len(answers) == 3)
        assert type(answers[2]) is Taken
        with pytest.raises(HandoffError, match="answered once"):
            replies[0](Taken())
        assert here.counters.timed_out == 2
        assert here.counters.late_answers == 1


async def test_late_answers_are_remembered_in_bounds(monkeypatch):
    monkeypatch.setattr(link, "MAX_LATE", 4)
    async with channel("be1/0", lambda offer, reply: None) as there, channel("fe1/0") as here:
        way = here.link("be1/0", await there.listen(ANYWHERE))
        assert await way.wait_connected(2)
        answers = []
        for _ in range(10):
            way.offer(OFFER, answers.append, 0.01)
        await until(lambda: len(answers) == 10)
        assert len(way._outstanding) == 4


async def test_a_broken_connection_loses_what_is_outstanding():
    replies = []
    async with (
        channel("be1/0", lambda offer, reply: replies.append(reply)) as there,
        channel("fe1/0") as here,
        Wiretap(await there.listen(ANYWHERE)) as tap,
    ):
        way = here.link("be1/0", tap.endpoint)
        assert await way.wait_connected(2)
        answers = []
        for _ in range(10):
            way.offer(OFFER, answers.append, 30)
        await until(lambda: len(replies) == 10)
        tap.cut()
        await until(lambda: len(answers) == 10)
        assert answers == [LinkLost()] * 10
        await until(lambda: there.counters.disconnects)
        replies[0](Taken())
        assert there.counters.answers_lost == 1
        assert await way.wait_connected(2)


async def test_a_stopped_peer_is_given_up():
    async with (
        channel("be1/0") as there,
        channel("fe1/0", ping_interval=0.05, silence=0.2) as here,
        Wiretap(await there.listen(ANYWHERE)) as tap,
    ):
        way = here.link("be1/0", tap.endpoint)
        assert await way.wait_connected(2)
        await asyncio.sleep(0.5)
        assert way.connected  # pings keep it up
        answers = []
        tap.alter = lambda data, to_listener: b""
        way.offer(OFFER, answers.append, 30)
        await until(lambda: answers)
        assert answers == [LinkLost()]
        assert here.counters.silent == 1


async def test_a_caller_that_says_nothing_is_dropped():
    async with channel("be1/0", handshake_time=0.05) as there:
        endpoint = await there.listen(ANYWHERE)
        reader, writer = await asyncio.open_connection(*endpoint)
        assert await asyncio.wait_for(reader.read(), 2) == b""
        writer.close()
        assert there.counters.handshakes_failed == 1


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n" * 9, bytes(64), os.urandom(4096)])
async def test_garbage_is_dropped_and_counted(data):
    async with channel("be1/0") as there:
        endpoint = await there.listen(ANYWHERE)
        reader, writer = await asyncio.open_connection(*endpoint)
        writer.write(data)
        with contextlib.suppress(ConnectionResetError):
            assert await asyncio.wait_for(reader.read(), 2) == b""
        writer.close()
        assert there.counters.malformed + there.counters.bad_mac == 1


async def test_a_wrong_key_is_refused():
    async with channel("be1/0") as there, channel("fe1/0", key=b"another key 0123") as here:
        way = here.link("be1/0", await there.listen(ANYWHERE))
        assert not await way.wait_connected(0.1)
        assert there.counters.bad_mac > 0
        assert there.counters.connects == here.counters.connects == 0


async def test_the_wrong_node_is_refused():
    async with channel("be2/0") as there, channel("fe1/0") as here:
        way = here.link("be1/0", await there.listen(ANYWHERE))
        assert not await way.wait_connected(0.1)
        assert there.counters.malformed > 0


async def test_a_replayed_capture_makes_no_offer():
    offers = []

    def on_offer(offer, reply):
        offers.append(offer)
        reply(Taken())

    async with channel("be1/0", on_offer) as there, channel("fe1/0") as here:
        endpoint = await there.listen(ANYWHERE)
        async with Wiretap(endpoint) as tap:
            way = here.link("be1/0", tap.endpoint)
            assert await way.wait_connected(2)
            await ask(way)
            way.close()
            captured = bytes(tap.captured)
        assert len(offers) == 1
        reader, writer = await asyncio.open_connection(*endpoint)
        writer.write(captured)
        with contextlib.suppress(ConnectionResetError):
            await asyncio.wait_for(reader.read(), 2)
        writer.close()
        assert len(offers) == 1
        assert there.counters.bad_mac == 1


async def test_a_frame_repeated_on_its_own_connection_ends_it():
    offers = []
    async with (
        channel("be1/0", lambda offer, reply: offers.append(offer)) as there,
        channel("fe1/0") as here,
        Wiretap(await there.listen(ANYWHERE)) as tap,
    ):
        way = here.link("be1/0", tap.endpoint)
        assert await way.wait_connected(2)
        before = len(tap.captured)
        answers = []
        way.offer(OFFER, answers.append, 30)
        await until(lambda: offers)
        tap.inject(bytes(tap.captured[before:]))
        await until(lambda: answers)
        assert answers == [LinkLost()]
        assert there.counters.replays == 1
        assert len(offers) == 1


async def test_an_answer_altered_on_its_way_is_not_believed():
    async with (
        channel("be1/0") as there,
        channel("fe1/0") as here,
        Wiretap(await there.listen(ANYWHERE)) as tap,
    ):
        way = here.link("be1/0", tap.endpoint)
        assert await way.wait_connected(2)
        tap.alter = lambda data, to_listener: (
            data if to_listener else data[:-1] + bytes((data[-1] ^ 1,))
        )
        assert await ask(way, deadline=30) == LinkLost()
        assert here.counters.bad_mac == 1


async def test_callers_are_bounded(monkeypatch):
    monkeypatch.setattr("prism.handoff.channel.MAX_CALLERS", 2)
    async with channel("be1/0") as there:
        endpoint = await there.listen(ANYWHERE)
        streams = [await asyncio.open_connection(*endpoint) for _ in range(3)]
        with contextlib.suppress(ConnectionResetError):
            assert await asyncio.wait_for(streams[2][0].read(), 2) == b""
        assert there.counters.callers_turned_away == 1
        for _, writer in streams:
            writer.close()
        await until(lambda: not there._callers)


async def test_closing_the_channel_loses_what_is_outstanding():
    answers = []
    async with channel("be1/0", lambda offer, reply: None) as there:
        async with channel("fe1/0") as here:
            way = here.link("be1/0", await there.listen(ANYWHERE))
            assert await way.wait_connected(2)
            way.offer(OFFER, answers.append, 30)
        assert answers == [LinkLost()]
        assert asyncio.all_tasks() == {asyncio.current_task()}


def _serve(pipe) -> None:
    async def main() -> None:
        there = Channel("be1/0", KEY, lambda offer, reply: None)
        pipe.send(await there.listen(ANYWHERE))
        await asyncio.sleep(60)

    asyncio.run(main())


async def test_a_killed_process_loses_what_is_outstanding():
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(False)
    process = context.Process(target=_serve, args=(sender,), daemon=True)
    process.start()
    try:
        endpoint = await asyncio.to_thread(receiver.recv)
        async with channel("fe1/0") as here:
            way = here.link("be1/0", endpoint)
            assert await way.wait_connected(5)
            answers = []
            way.offer(OFFER, answers.append, 30)
            await asyncio.sleep(0.02)
            os.kill(process.pid, signal.SIGKILL)
            await until(lambda: answers)
            assert answers == [LinkLost()]
    finally:
        process.kill()
        process.join()


def test_answers_are_events():
    assert answer_event(Taken()) is Event.TAKEN
    assert answer_event(Refused(Reason.BUSY)) is Event.REFUSED
    assert answer_event(Refused(Reason.DROPPED)) is Event.DROPPED
    assert answer_event(LinkLost()) is Event.LINK_LOST
    assert answer_event(TimedOut()) is Event.TIMED_OUT
    assert (LinkLost().label, TimedOut().label) == ("link-lost", "timed-out")


@pytest.mark.parametrize(("name", "key"), [("", KEY), ("n" * 65, KEY), ("fe1/0", b"short")])
def test_names_and_keys_that_cannot_be_used(name, key):
    with pytest.raises(ValueError, match="octets"):
        Channel(name, key, lambda offer, reply: None)


def test_the_handshake_takes_less_than_the_silence():
    assert connection.HANDSHAKE_TIME < connection.SILENCE
