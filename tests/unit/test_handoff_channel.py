"""Two channels over real TCP on the loopback, and everything that can come between them."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import socket
import ssl
import time

import pytest
import uvloop
from channel_bed import (
    authority,
    files_of,
    identity_of,
    issue_in_the_past,
    pki_directory,
    subordinate,
)

from prism.errors import HandoffError
from prism.flow import Endpoint
from prism.handoff import connection, link, secure, wire
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
from prism.handoff.wire import State
from prism.tls import pki
from prism.tls.identity import Identity, IdentityError, IdentityFiles

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
async def channel(
    name, on_offer=lambda offer, reply: reply(Taken()), key=KEY, identity=None, **times
):
    made = Channel(name, key, on_offer, identity or identity_of(name.partition("/")[0]))
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


def client_context(files: IdentityFiles | None = None) -> ssl.SSLContext:
    """Of somebody who does not care who listens; with files, even unusable ones, to show."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if files is not None:
        context.load_cert_chain(files.certificate, files.key)
    return context


async def say(endpoint, data, context, loud=False) -> None:
    """Connect, say something, and be hung up on."""
    reader, writer = await asyncio.open_connection(*endpoint, ssl=context)
    try:
        writer.write(data)
        await asyncio.wait_for(reader.read(), 2)
    except (ConnectionResetError, ssl.SSLError):
        if loud:
            raise
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            await writer.wait_closed()


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


async def test_reports_reach_all_callers():
    async with channel("be1/0") as there, channel("fe1/0") as first, channel("be2/0") as second:
        endpoint = await there.listen(ANYWHERE)
        heard = []
        for caller in (first, second):
            caller.shared.on_report = heard.append
            assert await caller.link("be1/0", endpoint).wait_connected(3)
        await until(lambda: all(caller.ready for caller in there._callers))
        there.report(b"x" * wire.MAX_REPORT)
        await until(lambda: len(heard) == 2)
        assert set(heard) == {b"x" * wire.MAX_REPORT}


async def test_callers_are_told_how_a_node_is():
    """When their link is up, and when it changes; and that a link is up, or down."""
    async with channel("be1/0") as there, channel("fe1/0") as here:
        told, links = [], []
        here.shared.on_state = lambda peer, state: told.append((peer, state))
        here.shared.on_link = lambda peer, up: links.append((peer, up))
        there.tell(State(connections=7))
        way = here.link("be1/0", await there.listen(ANYWHERE))
        assert await way.wait_connected(3)
        await until(lambda: told == [("be1/0", State(False, 7))])
        there.tell(State(draining=True))
        await until(lambda: told[1:] == [("be1/0", State(True, 0))])
        assert links == [("be1/0", True)]
        way.close()
        assert links == [("be1/0", True), ("be1/0", False)]


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


def unreachable(caplog):
    return [line for line in caplog.messages if "cannot be reached" in line]


async def test_why_there_is_no_link_is_said_once_for_each_cause(caplog, monkeypatch):
    monkeypatch.setattr(secure, "_QUIET", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = Endpoint(*taken.getsockname())
    refused = f"handoff channel: be1/0 at {nobody} cannot be reached: Connection refused"
    async with channel("fe1/0", handshake_time=0.2) as here:
        way = here.link("be1/0", nobody)
        await asyncio.sleep(0.4)  # some ten times
        assert unreachable(caplog) == [refused]
        async with channel("be1/0") as there:
            await there.listen(nobody)
            assert await way.wait_connected(2)
        await until(lambda: len(unreachable(caplog)) == 2)
        await asyncio.sleep(0.2)
        assert unreachable(caplog) == [refused, refused]
        here.link("be2/0", Endpoint("192.0.2.1", 9))  # another peer, another cause
        await until(lambda: any("be2/0" in line for line in unreachable(caplog)))
        await asyncio.sleep(0.5)
        assert len([line for line in unreachable(caplog) if "be2/0" in line]) <= 2


async def test_a_link_that_comes_and_goes_is_complained_of_in_bounds(caplog):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = Endpoint(*taken.getsockname())
    async with channel("fe1/0") as here:
        way = here.link("be1/0", nobody)
        for _ in range(4):
            await asyncio.sleep(0.1)
            async with channel("be1/0") as there:
                await there.listen(nobody)
                assert await way.wait_connected(2)
            await until(lambda: not way.connected)
        assert len(unreachable(caplog)) == 1


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


async def test_a_link_stays_up_while_only_the_listener_has_something_to_say():
    """Reports come more often than pings would, and are not answered."""
    async with (
        channel("be1/0", ping_interval=0.2, silence=0.6) as there,
        channel("fe1/0", ping_interval=0.2, silence=0.6) as here,
    ):
        way = here.link("be1/0", await there.listen(ANYWHERE))
        assert await way.wait_connected(2)
        ending = time.monotonic() + 1.2
        while time.monotonic() < ending:
            there.report(b"x")
            await asyncio.sleep(0.01)
        assert there.counters.silent == here.counters.silent == 0
        assert there.counters.disconnects == 0


async def test_who_stood_still_does_not_blame_the_others():
    async with (
        channel("be1/0", ping_interval=0.05, silence=0.2) as there,
        channel("fe1/0", ping_interval=0.05, silence=0.2) as here,
    ):
        way = here.link("be1/0", await there.listen(ANYWHERE))
        assert await way.wait_connected(2)
        for _ in range(3):
            time.sleep(0.4)
            await asyncio.sleep(0.1)
        assert there.counters.silent == here.counters.silent == 0
        assert way.connected


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
        await say(endpoint, data, None)
        assert there.counters.tls_not_tls == 1
        await say(endpoint, data, identity_of("fe1").client_context())
        assert there.counters.malformed + there.counters.bad_mac == 1
        assert there.counters.handshakes_failed == 2


async def test_a_wrong_key_is_refused():
    async with channel("be1/0") as there, channel("fe1/0", key=b"another key 0123") as here:
        way = here.link("be1/0", await there.listen(ANYWHERE))
        assert not await way.wait_connected(0.1)
        assert there.counters.bad_mac > 0
        assert there.counters.connects == here.counters.connects == 0


async def test_the_wrong_worker_is_refused():
    async with channel("be1/1") as there, channel("fe1/0") as here:
        way = here.link("be1/0", await there.listen(ANYWHERE))
        assert not await way.wait_connected(0.1)
        assert there.counters.malformed > 0


async def test_a_listener_of_another_node_is_told_nothing(caplog):
    async with channel("be2/0") as there, channel("fe1/0") as here:
        way = here.link("be1/0", await there.listen(ANYWHERE))
        assert not await way.wait_connected(0.1)
        assert here.counters.tls_wrong_node > 0
        assert there.counters.malformed == 0
        (line,) = caplog.messages
        assert f"be1/0 at {way.endpoint} not accepted: its certificate is node be2's" in line


async def test_a_caller_with_another_node_s_certificate_is_turned_away(caplog):
    """It has the cluster key, too, so its HELLO's MAC is good."""
    async with channel("be1/0") as there:
        endpoint = await there.listen(ANYWHERE)
        sealer = wire.Sealer(wire.hello_keys(KEY)[0])
        hello = sealer.hello(wire.Hello("be2/0", "be1/0", bytes(16)))
        await say(endpoint, hello, identity_of("fe1").client_context())
        assert there.counters.tls_wrong_node == there.counters.handshakes_failed == 1
        assert there.counters.connects == 0
        assert "turned away: it says it is be2/0; its certificate is node fe1's" in caplog.text


@pytest.mark.parametrize("name", ["fe1", "web"])
async def test_a_service_s_certificate_is_no_node_s(caplog, tmp_path, name):
    """Issued by the same CA, for a service that may even have a node's name."""
    pki.issue(authority(tmp_path), pki.Request(name, server=True, dns=("fe1",)))
    async with channel("be1/0") as there:
        endpoint = await there.listen(ANYWHERE)
        sealer = wire.Sealer(wire.hello_keys(KEY)[0])
        hello = sealer.hello(wire.Hello("fe1/0", "be1/0", bytes(16)))
        await say(endpoint, hello, client_context(files_of(name, tmp_path)))
        assert there.counters.tls_untrusted == 1
        assert there.counters.connects == 0
        assert "certificate is not accepted" in caplog.text


async def test_a_certificate_without_a_node_s_name_is_no_node_s(caplog, monkeypatch, tmp_path):
    """As a CA might issue that serves more than Prism: good for clients, with some URI."""
    authority(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(pki, "NODE_URI", "prism://user/")
        pki.issue(tmp_path, pki.Request("fe1"))
    async with channel("be1/0") as there:
        endpoint = await there.listen(ANYWHERE)
        sealer = wire.Sealer(wire.hello_keys(KEY)[0])
        for name in ("fe1/0", "", "/0"):
            hello = sealer.hello(wire.Hello(name, "be1/0", bytes(16)))
            sealer = wire.Sealer(wire.hello_keys(KEY)[0])
            await say(endpoint, hello, client_context(files_of("fe1", tmp_path)))
        assert there.counters.tls_wrong_node == 3
        assert there.counters.connects == 0
        assert "its certificate is no node's" in caplog.text


async def test_a_caller_without_a_certificate_is_turned_away(caplog):
    async with channel("be1/0") as there:
        endpoint = await there.listen(ANYWHERE)
        context = client_context()
        await say(endpoint, b"hello", context)
        await say(endpoint, b"hello", context)
        assert there.counters.tls_no_certificate == 2
        (line,) = caplog.messages  # the second one only counts into a later line
        assert "handoff channel: 127.0.0.1:" in line
        assert line.endswith("turned away: it has shown no certificate")


async def test_another_ca_s_certificates_are_refused_at_both_ends(caplog, tmp_path):
    pki.init(tmp_path)
    pki.issue(tmp_path, pki.Request("fe1"))
    async with channel("be1/0") as there:
        endpoint = await there.listen(ANYWHERE)
        await say(endpoint, b"hello", client_context(files_of("fe1", tmp_path)))
        assert there.counters.tls_untrusted == 1
        async with channel("fe1/0", identity=identity_of("fe1", tmp_path)) as here:
            assert not await here.link("be1/0", endpoint).wait_connected(0.1)
            assert here.counters.tls_untrusted > 0
            assert there.counters.tls_refused_us > 0
        assert "unable to get local issuer certificate" in caplog.text
        assert "it refuses this node's certificate or TLS: unknown ca" in caplog.text


async def test_a_subordinate_ca_is_good_for_its_own_nodes_only(tmp_path):
    one = subordinate(tmp_path / "one", pki_directory())
    two = subordinate(tmp_path / "two", pki_directory())
    for directory, node in ((one, "fe1"), (one, "be1"), (two, "be1")):
        pki.issue(directory, pki.Request(node))
    async with (
        channel("fe1/0", identity=identity_of("fe1", one)) as here,
        channel("be1/0", identity=identity_of("be1", one)) as there,
        channel("be1/0", identity=identity_of("be1", two)) as stranger,
    ):
        assert await here.link("be1/0", await there.listen(ANYWHERE)).wait_connected(2)
        way = here.link("be1/0", await stranger.listen(ANYWHERE))
        assert not await way.wait_connected(0.1)
        assert here.counters.tls_untrusted > 0


async def test_an_expired_certificate_is_refused_and_its_node_told(caplog, tmp_path):
    issue_in_the_past(authority(tmp_path), "fe1", until=-60)
    with pytest.raises(IdentityError, match=r"fe1\.pem expired on .*issue DIR fe1 --force"):
        identity_of("fe1", tmp_path)
    async with channel("be1/0") as there:
        endpoint = await there.listen(ANYWHERE)
        with pytest.raises(ssl.SSLError, match="EXPIRED"):
            await say(endpoint, b"hello", client_context(files_of("fe1", tmp_path)), True)
        assert there.counters.tls_expired == 1
        assert "its certificate is not accepted: certificate has expired" in caplog.text


async def test_a_certificate_that_expires_ends_its_connection(caplog, tmp_path):
    issue_in_the_past(authority(tmp_path), "fe1", until=1.5)
    async with (
        channel("be1/0", ping_interval=0.05) as there,
        channel("fe1/0", identity=identity_of("fe1", tmp_path), ping_interval=0.05) as here,
    ):
        way = here.link("be1/0", await there.listen(ANYWHERE))
        assert await way.wait_connected(1)
        await until(lambda: not way.connected)
        assert there.counters.tls_expired >= 1
        assert "its certificate has expired meanwhile" in caplog.text
        await until(lambda: here.counters.tls_refused_us > 0)
        assert "it refuses this node's certificate or TLS: certificate expired" in caplog.text


async def test_tls_1_2_is_refused(caplog):
    context = client_context(files_of("fe1"))
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    async with channel("be1/0") as there:
        endpoint = await there.listen(ANYWHERE)
        with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
            await say(endpoint, b"hello", context)
        assert there.counters.tls_old_tls == 1
        assert "it does not speak TLS 1.3" in caplog.text


async def test_sessions_are_not_resumed():
    """A resumed one would show no certificate, which may have expired meanwhile."""
    async with channel("be1/0") as there:
        endpoint = await there.listen(ANYWHERE)
        context = identity_of("fe1").client_context()
        reader, writer = await asyncio.open_connection(*endpoint, ssl=context)
        hello = wire.Hello("fe1/0", "be1/0", bytes(16))
        writer.write(wire.Sealer(wire.hello_keys(KEY)[0]).hello(hello))
        assert await asyncio.wait_for(reader.read(10), 2)
        session = writer.get_extra_info("ssl_object").session
        assert not session.has_ticket
        writer.close()


async def test_what_is_on_the_wire_shows_neither_key_nor_state():
    secret = os.urandom(300)
    async with channel("be1/0") as there, channel("fe1/0") as here:
        async with Wiretap(await there.listen(ANYWHERE)) as tap:
            way = here.link("be1/0", tap.endpoint)
            assert await way.wait_connected(2)
            assert type(await ask(way, OFFER._replace(tls=secret))) is Taken
            captured = bytes(tap.captured)
        assert len(captured) > len(secret)
        for at in range(0, 300, 8):
            assert secret[at : at + 8] not in captured
        assert b"be1" not in captured


async def test_a_renewed_certificate_is_used_without_a_restart(caplog, tmp_path):
    directory = authority(tmp_path)
    issue_in_the_past(directory, "be1", until=3600)
    identity = identity_of("be1", directory)
    async with channel("be1/0", identity=identity) as there, channel("fe1/0") as here:
        endpoint = await there.listen(ANYWHERE)
        way = here.link("be1/0", endpoint)
        assert await way.wait_connected(2)
        first = way._calling.tls.peer.not_after
        # Half of a renewal: the key is there, its certificate is not yet.
        pki.issue(directory, pki.Request("new"))
        old_key = (directory / "be1.key").read_bytes()
        (directory / "be1.key").write_bytes((directory / "new.key").read_bytes())
        for _ in range(2):
            way._calling.drop()
            await until(lambda: way.connected)
            assert way._calling.tls.peer.not_after == first
        assert caplog.text.count("changed certificate files are not used") == 1
        assert "is not the key of" in caplog.text
        (directory / "be1.key").write_bytes(old_key)
        pki.issue(directory, pki.Request("be1"), force=True)
        assert way.connected  # the connection that was there stays
        way._calling.drop()
        await until(lambda: way.connected)
        assert way._calling.tls.peer.not_after > first
        assert type(await ask(way)) is Taken


async def test_complaints_are_bounded(caplog, monkeypatch):
    monkeypatch.setattr(secure, "_MAX_TOPICS", 4)
    complaints = secure.Complaints()
    for number in range(100):
        complaints.say(f"192.0.2.{number}", 1, "text")
    assert len(complaints._topics) <= 5
    assert len(caplog.messages) == 5
    monkeypatch.setattr(secure, "_QUIET", 0.0)
    for entry in complaints._topics.values():
        entry[0] = 0.0
    complaints.say("192.0.2.200", 1, "text")
    complaints.say("", 0, "text")
    assert len(complaints._topics) <= 5


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
        await say(endpoint, captured, None)
        assert len(offers) == 1
        assert there.counters.handshakes_failed == 1


async def test_a_record_repeated_on_its_own_connection_ends_it():
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
        assert there.counters.tls_broken == 1
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
        assert here.counters.tls_broken == 1


async def test_callers_are_bounded(monkeypatch):
    monkeypatch.setattr("prism.handoff.channel.MAX_CALLERS", 2)
    async with channel("be1/0") as there, channel("fe1/0") as one, channel("be2/0") as two:
        endpoint = await there.listen(ANYWHERE)
        assert await one.link("be1/0", endpoint).wait_connected(2)
        assert await two.link("be1/0", endpoint).wait_connected(2)
        reader, writer = await asyncio.open_connection(*endpoint)
        with contextlib.suppress(ConnectionResetError):
            assert await asyncio.wait_for(reader.read(), 2) == b""
        writer.close()
        assert there.counters.callers_turned_away == 1
        assert len(there._callers) == 2


async def test_strangers_do_not_keep_peers_out(monkeypatch):
    monkeypatch.setattr("prism.handoff.channel.MAX_CALLERS", 3)
    async with channel("be1/0") as there, channel("fe1/0") as here:
        endpoint = await there.listen(ANYWHERE)
        streams = [await asyncio.open_connection(*endpoint) for _ in range(5)]
        with contextlib.suppress(ConnectionResetError):
            assert await asyncio.wait_for(streams[0][0].read(), 2) == b""
        assert await here.link("be1/0", endpoint).wait_connected(2)
        assert there.counters.callers_turned_away == 3
        assert len(there._callers) == 3
        for _, writer in streams:
            writer.close()
        await until(lambda: len(there._callers) == 1)


async def test_closing_the_channel_loses_what_is_outstanding():
    answers = []
    async with channel("be1/0", lambda offer, reply: None) as there:
        async with channel("fe1/0") as here:
            way = here.link("be1/0", await there.listen(ANYWHERE))
            assert await way.wait_connected(2)
            way.offer(OFFER, answers.append, 30)
        assert answers == [LinkLost()]
        assert asyncio.all_tasks() == {asyncio.current_task()}


def _serve(pipe, files) -> None:
    async def main() -> None:
        there = Channel("be1/0", KEY, lambda offer, reply: None, Identity("be1", files))
        pipe.send(await there.listen(ANYWHERE))
        await asyncio.sleep(60)

    asyncio.run(main())


async def test_a_killed_process_loses_what_is_outstanding():
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(False)
    process = context.Process(target=_serve, args=(sender, files_of("be1")), daemon=True)
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
        Channel(name, key, lambda offer, reply: None, identity_of("fe1"))


def test_a_channel_needs_its_own_node_s_certificate():
    with pytest.raises(ValueError, match="be1/0 cannot show the certificate of node be2"):
        Channel("be1/0", KEY, lambda offer, reply: None, identity_of("be2"))


def test_the_handshake_takes_less_than_the_silence():
    assert connection.HANDSHAKE_TIME < connection.SILENCE
