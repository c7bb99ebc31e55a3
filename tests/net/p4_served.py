"""The soft switch's P4Runtime service over a table of its own, and a controller beside it."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import code_pb2 as codes
from google.rpc import status_pb2
from switch_bed import bpffs

from prism.flow import Endpoint, Flow
from prism.switch.base import Rule
from prism.switch.ebpf import EbpfSwitch
from prism.switch.p4runtime_messages import Stub, p4
from prism.switch.p4runtime_pipeline import load
from prism.switch.p4runtime_rules import Codec
from prism.switch.p4runtime_tls import NO_TLS, TlsFiles
from prism.switch.p4service import P4Service
from prism.switch.p4service_table import EntryTable

INSERT, MODIFY, DELETE = p4.Update.INSERT, p4.Update.MODIFY, p4.Update.DELETE


class Served:
    """A table, its service and one controller that is the primary."""

    def __init__(self, pins: Path, tls: TlsFiles, own: TlsFiles, name: str) -> None:
        self.waiting = threading.Event()
        self.store = EbpfSwitch(pins / "prism", max_rules=64)
        self.table = EntryTable(self.store, load())
        self.codec = Codec(self.table.pipeline)
        self.packets_out: list[bytes] = []
        self.go_on = threading.Event()
        self.service = P4Service(
            self.table, "127.0.0.1:0", tls=tls, on_packet_out=self._on_packet_out
        )
        self.service.start()
        self.address = f"127.0.0.1:{self.service.port}"
        credentials = own.controller()
        self.channel = (
            grpc.insecure_channel(self.address)
            if credentials is None
            else grpc.secure_channel(
                self.address,
                credentials,
                (("grpc.ssl_target_name_override", name),) if name else (),
            )
        )
        self.stub = Stub(self.channel)
        self.stream = self.join(10)

    def _on_packet_out(self, payload: bytes) -> None:
        if not payload:
            raise ZeroDivisionError("a packet of nothing")
        self.packets_out.append(payload)
        if payload == b"wait":
            self.go_on.wait(10)

    def join(self, election: int, *packets: bytes) -> Any:
        """A controller's stream; it sends these packets when it is open."""
        request = p4.StreamMessageRequest()
        request.arbitration.device_id = 1
        request.arbitration.election_id.low = election

        def forever() -> Iterator[Any]:
            yield request
            for payload in packets:
                yield p4.StreamMessageRequest(packet=p4.PacketOut(payload=payload))
            self.waiting.wait()

        stream = self.stub.StreamChannel(forever(), timeout=60)
        stream.first = next(stream).arbitration
        return stream

    def close(self) -> None:
        self.waiting.set()
        self.go_on.set()
        self.channel.close()
        self.service.close()
        self.store.close()

    def write(self, *updates: Any, election: int = 10, **fields: Any) -> list[tuple[int, str]]:
        """What became of each update."""
        request = p4.WriteRequest(device_id=1, updates=updates, **fields)
        request.election_id.low = election
        try:
            self.stub.Write(request, timeout=10)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.UNKNOWN:
                raise
            details = dict(error.trailing_metadata())["grpc-status-details-bin"]
            found = []
            for detail in status_pb2.Status.FromString(details).details:
                one = p4.Error()
                assert detail.Unpack(one)
                found.append((one.canonical_code, one.message))
            return found
        return [(codes.OK, "")] * len(updates)

    def updates(self, kind: int, rule: Rule) -> list[Any]:
        entries = self.codec.entries(rule)
        return [self.codec.update(kind, key, None if kind == DELETE else value)
                for key, value in entries.items()]  # fmt: skip

    def read(self, table: int = 0, **fields: Any) -> list[Any]:
        request = p4.ReadRequest(device_id=1)
        request.entities.add().table_entry.CopyFrom(p4.TableEntry(table_id=table, **fields))
        return [e for answer in self.stub.Read(request, timeout=10) for e in answer.entities]

    def state(self) -> list[Rule]:
        return sorted(self.store.rules())


@contextlib.contextmanager
def serving(tls: TlsFiles = NO_TLS, own: TlsFiles = NO_TLS, name: str = "") -> Iterator[Served]:
    """The switch has the files ``tls``, its controller ``own`` and ``name`` for it. Needs root."""
    if os.geteuid() != 0:
        pytest.fail("this test loads eBPF programs and needs root")
    with bpffs() as pins:
        found = Served(pins, tls, own, name)
        try:
            yield found
        finally:
            found.close()


def rule(port: int = 1000, *, locked: bool = False, here: bool = False, v6: bool = False) -> Rule:
    client, service, owner = (
        ("2001:db8::7", "2001:db8::80", "2001:db8:1::2")
        if v6
        else ("198.51.100.7", "192.0.2.80", "10.50.3.2")
    )
    end = Endpoint(service, 80) if here else Endpoint(owner, 4700)
    flow = Flow(Endpoint(client, port), Endpoint(service, 80)).pack()
    return Rule(flow, 77, end, bytes.fromhex("020000000001"), 5000 + port, locked, 9)
