"""The soft switch's P4Runtime service, asked by plain gRPC."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.rpc import code_pb2 as codes
from p4_served import DELETE, INSERT, MODIFY, Served, rule, serving

from prism.switch.p4runtime_messages import p4
from prism.switch.p4runtime_pipeline import load
from prism.switch.p4service import MAX_UPDATES
from prism.switch.p4service_table import EntryTable

pytestmark = pytest.mark.net


@pytest.fixture
def served() -> Iterator[Served]:
    with serving() as found:
        yield found


@pytest.mark.parametrize("v6", [False, True])
@pytest.mark.parametrize("here", [False, True])
def test_entries_become_the_rule_they_say(served: Served, v6: bool, here: bool) -> None:
    for locked in (False, True):
        wanted = rule(locked=locked, v6=v6, here=here)
        kind = MODIFY if locked else INSERT
        results = served.write(*served.updates(kind, wanted))
        assert {code for code, _ in results} == {codes.OK}
        assert served.state() == [wanted]
    served.write(*served.updates(DELETE, wanted))
    assert served.state() == []
    assert served.read() == []


def test_half_a_rule_is_locked(served: Served) -> None:
    speaker, guard, to_owner = served.updates(INSERT, rule())
    assert served.write(to_owner) == [(codes.OK, "")]
    assert [found.locked for found in served.state()] == [True]
    served.write(speaker, guard)
    assert served.state() == [rule()]


def test_a_new_service_tells_what_the_old_one_had(served: Served) -> None:
    for number in range(5):
        served.write(*served.updates(INSERT, rule(1000 + number, locked=number == 2)))
    again = EntryTable(served.store, load())
    key = lambda entry: entry.SerializeToString(deterministic=True)  # noqa: E731
    told = sorted((again.message(*found) for found in again.read(0)), key=key)
    assert told == sorted((entity.table_entry for entity in served.read()), key=key)


def test_reads_and_counters(served: Served) -> None:
    served.write(*served.updates(INSERT, rule()), *served.updates(INSERT, rule(v6=True)))
    assert len(served.read()) == 6
    to_owner = served.table.pipeline.table("to_owner_v4").id
    (one,) = served.read(to_owner)
    assert served.read(to_owner, match=one.table_entry.match) == [one]
    request = p4.ReadRequest(device_id=1)
    request.entities.add().direct_counter_entry.table_entry.table_id = to_owner
    (answer,) = served.stub.Read(request, timeout=10)
    assert answer.entities[0].direct_counter_entry.data == p4.CounterData()
    other = p4.ReadRequest(device_id=1)
    other.entities.add().register_entry.register_id = 1
    with pytest.raises(grpc.RpcError) as caught:
        list(served.stub.Read(other, timeout=10))
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def _broken(served: Served) -> list[tuple[str, Any, int]]:
    """(what is wrong, an update, its code)."""
    found: list[tuple[str, Any, int]] = []

    def bad(what: str, code: int) -> Any:
        update = p4.Update()
        update.CopyFrom(served.updates(INSERT, rule(2000))[2])
        found.append((what, update, code))
        return update.entity.table_entry

    bad("table", codes.NOT_FOUND).table_id = 0x02FFFFFF
    bad("field", codes.INVALID_ARGUMENT).match[0].field_id = 99
    bad("twice", codes.INVALID_ARGUMENT).match[0].field_id = 2
    del bad("missing field", codes.INVALID_ARGUMENT).match[3]
    bad("wide", codes.OUT_OF_RANGE).match[1].exact.value = b"\x01\x00\x00"
    bad("empty", codes.INVALID_ARGUMENT).match[1].exact.value = b""
    bad("kind", codes.INVALID_ARGUMENT).match[0].lpm.prefix_len = 8
    bad("priority", codes.INVALID_ARGUMENT).priority = 1
    bad("default", codes.INVALID_ARGUMENT).is_default_action = True
    bad("no action", codes.INVALID_ARGUMENT).ClearField("action")
    bad("action", codes.INVALID_ARGUMENT).action.action.action_id = 1
    bad("default only", codes.INVALID_ARGUMENT).action.action.action_id = 21257015
    del bad("missing param", codes.INVALID_ARGUMENT).action.action.params[1]
    bad("extra param", codes.INVALID_ARGUMENT).action.action.params.add(param_id=9, value=b"1")
    bad("wide param", codes.OUT_OF_RANGE).action.action.params[1].value = b"\x01\x00\x00"
    bad("port 0", codes.INVALID_ARGUMENT).action.action.params[1].value = b"\0"
    bad("idle", codes.INVALID_ARGUMENT).idle_timeout_ns = 1
    bad("group", codes.INVALID_ARGUMENT).action.action_profile_group_id = 1
    found.append(("type", p4.Update(entity=served.updates(INSERT, rule(2000))[2].entity),
                  codes.INVALID_ARGUMENT))  # fmt: skip
    found.append(("nothing", p4.Update(type=INSERT), codes.INVALID_ARGUMENT))
    found.append(("modify", served.updates(MODIFY, rule(2000))[2], codes.NOT_FOUND))
    found.append(("delete", served.updates(DELETE, rule(2000))[2], codes.NOT_FOUND))
    found.append(("insert", served.updates(INSERT, rule(1000))[2], codes.ALREADY_EXISTS))
    return found


def test_broken_updates_change_nothing_and_say_what_is_wrong(served: Served) -> None:
    served.write(*served.updates(INSERT, rule()))
    before = served.state()
    broken = _broken(served)
    results = served.write(*(update for _, update, _ in broken))
    for (what, _, code), (told, text) in zip(broken, results, strict=True):
        assert told == code, (what, text)
        assert text, what
    assert served.state() == before
    # between good ones, only the broken is refused; with ROLLBACK_ON_ERROR, all are
    good = served.updates(INSERT, rule(3000))
    rollback = p4.WriteRequest.ROLLBACK_ON_ERROR
    results = served.write(*good, broken[0][1], atomicity=rollback)
    assert [code for code, _ in results] == [codes.ABORTED] * 3 + [codes.NOT_FOUND]
    assert served.state() == before
    results = served.write(good[0], broken[0][1], *good[1:])
    assert [code for code, _ in results] == [0, codes.NOT_FOUND, 0, 0]
    assert served.state() == sorted([*before, rule(3000)])


def test_fuzzed_updates_never_change_the_table_when_refused(served: Served) -> None:
    random.seed(5)
    served.write(*served.updates(INSERT, rule()))
    for _ in range(300):
        update = p4.Update()
        data = bytearray(served.updates(MODIFY, rule(2000))[2].SerializeToString())
        for _ in range(random.randint(1, 4)):
            data[random.randrange(len(data))] = random.randrange(256)
        try:
            update.ParseFromString(bytes(data))
        except Exception:  # the client's library refuses it already
            continue
        before = served.state()
        ((code, text),) = served.write(update)
        assert code == codes.OK or (served.state() == before and text)
    assert served.stub.Capabilities(p4.CapabilitiesRequest()).p4runtime_api_version


def _requests(served: Served) -> dict[str, Any]:
    """One good request of each call that could change something, or tell."""
    write = p4.WriteRequest(device_id=1, updates=served.updates(MODIFY, rule(locked=True)))
    config = p4.SetForwardingPipelineConfigRequest(
        device_id=1, action=p4.SetForwardingPipelineConfigRequest.VERIFY
    )
    for request in (write, config):
        request.election_id.low = 10
    config.config.p4info.CopyFrom(served.table.pipeline.p4info)
    read = p4.ReadRequest(device_id=1)
    read.entities.add().table_entry.table_id = served.table.pipeline.table("to_owner_v4").id
    return {
        "Write": write,
        "SetForwardingPipelineConfig": config,
        "Read": read,
        "GetForwardingPipelineConfig": p4.GetForwardingPipelineConfigRequest(device_id=1),
    }


def _send(served: Served, call: str, data: bytes) -> grpc.RpcError | None:
    """Octets as a request; the error that comes of it."""
    kind = served.channel.unary_stream if call == "Read" else served.channel.unary_unary
    try:
        answer = kind(f"/p4.v1.P4Runtime/{call}")(data, timeout=10)
        if call == "Read":
            list(answer)
    except grpc.RpcError as error:
        return error
    return None


def test_requests_of_damaged_octets(served: Served) -> None:
    """Whole requests with octets changed, cut off or put in; and octets that are no request."""
    random.seed(7)
    served.write(*served.updates(INSERT, rule()))
    seen: Counter[Any] = Counter()
    for call, request in _requests(served).items():
        good = request.SerializeToString()
        assert _send(served, call, good) is None
        for number in range(80):
            served.write(*served.updates(MODIFY, rule()))
            before = served.state()
            data = bytearray(good) if number % 8 else bytearray(random.randbytes(number))
            for _ in range(random.randint(1, 3)):
                at = random.randrange(len(data)) if data else 0
                data[at : at + random.randrange(3)] = random.randbytes(random.randrange(3))
            error = _send(served, call, bytes(data))
            if error is None:
                seen[call, "OK"] += 1
                continue
            code = error.code()
            seen[call, code] += 1
            assert code not in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE)
            assert error.details()
            if code != grpc.StatusCode.UNKNOWN:  # then some of the updates were good
                assert served.state() == before, (call, bytes(data))
            else:
                assert dict(error.trailing_metadata())["grpc-status-details-bin"]
    refused = {(call, code) for call, code in seen if code != "OK"}
    assert len(refused) >= 8, seen
    assert served.write(*served.updates(MODIFY, rule()))[0] == (codes.OK, "")


def test_what_is_too_large(served: Served) -> None:
    update = served.updates(INSERT, rule())[2]
    update.entity.table_entry.metadata = bytes(1025)
    assert served.write(update)[0][0] == codes.RESOURCE_EXHAUSTED
    update.entity.table_entry.metadata = bytes(17 << 20)
    with pytest.raises(grpc.RpcError) as caught:
        served.write(update)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.details()
    assert len(served.table) == 0
    # entries of to_client that belong to no rule are bounded, too
    speakers = [served.updates(INSERT, rule(1000 + number))[0] for number in range(300)]
    results = []
    for start in range(0, 300, 50):  # the errors of larger batches are too much for gRPC's limit
        results += [code for code, _ in served.write(*speakers[start : start + 50])]
    assert results == [codes.OK] * 256 + [codes.RESOURCE_EXHAUSTED] * 44


def test_who_may_write(served: Served) -> None:
    update = served.updates(INSERT, rule())[0]

    def refused(expected: grpc.StatusCode, **fields: Any) -> None:
        with pytest.raises(grpc.RpcError) as caught:
            served.write(update, **fields)
        assert caught.value.code() == expected
        assert caught.value.details()
        assert len(served.table) == 0

    denied = grpc.StatusCode.PERMISSION_DENIED
    refused(denied, election=9)
    refused(denied, role="other")
    refused(grpc.StatusCode.UNIMPLEMENTED, atomicity=p4.WriteRequest.DATAPLANE_ATOMIC)
    backup = served.join(9)
    assert backup.first.status.code == codes.ALREADY_EXISTS
    refused(denied, election=9)
    heir = served.join(11)  # a higher one takes over, and all are told
    assert heir.first.status.code == codes.OK
    assert next(served.stream).arbitration.status.code == codes.ALREADY_EXISTS
    refused(denied, election=10)
    heir.cancel()  # the next highest is the primary again
    assert next(served.stream).arbitration.status.code == codes.OK
    with pytest.raises(grpc.RpcError) as caught:
        served.write(*[update] * (MAX_UPDATES + 1))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert served.write(update) == [(codes.OK, "")]
    with pytest.raises(grpc.RpcError) as caught:
        served.join(10)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_the_table_is_bounded(served: Served) -> None:
    results = [served.write(*served.updates(INSERT, rule(1000 + n)))[2][0] for n in range(70)]
    assert results == [codes.OK] * 64 + [codes.RESOURCE_EXHAUSTED] * 6
    assert len(served.state()) == 64


def faults(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelname == "ERROR"]


def test_a_fault_in_a_stream_is_logged_with_its_cause(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    """The controller is told, and the others' streams go on."""
    stream = served.join(20, b"first", b"", b"never")
    with pytest.raises(grpc.RpcError) as caught:
        while True:
            next(stream)
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    assert served.packets_out == [b"first"]
    assert faults(caplog) == ["a fault in a P4Runtime stream, which ends with it"]
    assert "ZeroDivisionError: a packet of nothing" in caplog.text
    assert next(served.stream).arbitration.status.code == codes.ALREADY_EXISTS
    assert next(served.stream).arbitration.status.code == codes.OK


CONTROLLER = """
import sys, time, grpc
from prism.switch.p4runtime_messages import Stub, p4

def requests():
    request = p4.StreamMessageRequest()
    request.arbitration.device_id = 1
    request.arbitration.election_id.low = 20
    yield request
    yield p4.StreamMessageRequest(packet=p4.PacketOut(payload=b"wait"))
    time.sleep(60)

stream = Stub(grpc.insecure_channel(sys.argv[1])).StreamChannel(requests())
next(stream)
print("in", flush=True)
if sys.argv[2] == "cancelled":
    sys.stdin.readline()
    stream.cancel()
    print("out", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("how", ["cancelled", "broken", "stopped"])
def test_a_stream_that_ends_is_no_fault(
    served: Served, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """Cancelled by its controller, broken with its process, or with the service.

    It ends while a request of it is dealt with: gRPC raises at the next one.
    """
    command = [sys.executable, "-c", CONTROLLER, served.address, how]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        try:
            assert other.stdout is not None and other.stdin is not None
            assert other.stdout.readline() == "in\n"
            assert next(served.stream).arbitration.status.code == codes.ALREADY_EXISTS
            assert until(lambda: served.packets_out == [b"wait"])
            if how == "cancelled":
                other.stdin.write("\n")
                other.stdin.flush()
                assert other.stdout.readline() == "out\n"
            elif how == "broken":
                other.kill()
            else:
                served.service.close()
            time.sleep(0.5)  # gRPC tells nobody when it has heard of the end
            served.go_on.set()
            if how != "stopped":
                assert next(served.stream).arbitration.status.code == codes.OK
            served.service.close()
            assert until(lambda: not listening())
        finally:
            other.kill()
    assert faults(caplog) == []


def until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether something comes true in time."""
    deadline = time.monotonic() + seconds
    while not (good := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return good


def listening() -> list[threading.Thread]:
    """Threads that take what controllers send."""
    return [thread for thread in threading.enumerate() if thread.name == "p4service-stream"]
