"""One controller's connection to a P4Runtime switch: arbitration, pipeline, writes and reads.

Every call blocks, with a deadline; the driver makes them in threads of its own. The messages are
those that p4runtime-shell uses; its own client exits the process on errors, has no deadlines, and
wants a slow protobuf.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import grpc
from google.rpc import code_pb2, status_pb2

from prism.errors import SwitchError
from prism.switch.p4runtime_messages import Stub, p4
from prism.switch.p4runtime_pipeline import Pipeline
from prism.switch.p4runtime_tls import NO_TLS, TlsFiles, unreachable

__all__ = ["NotPrimaryError", "Session", "SessionSettings"]

_MAX_MESSAGE: Final = 64 << 20
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE),
    ("grpc.max_send_message_length", _MAX_MESSAGE),
    # The errors of a batch travel as one trailer; gRPC's own limits are 8 and 16 KiB.
    ("grpc.max_metadata_size", 1 << 20),
    ("grpc.absolute_max_metadata_size", 1 << 20),
    ("grpc.keepalive_time_ms", 5000),
    ("grpc.keepalive_timeout_ms", 3000),
    ("grpc.use_local_subchannel_pool", 1),
)
_RPC_ERRORS: Final = (grpc.RpcError,)
_EACH: Final = 0.02  # seconds more for each update of a write: a switch works through them


class NotPrimaryError(SwitchError):
    """Another controller is the switch's primary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSettings:
    """What a controller is told.

    Attributes:
        address: ``HOST:PORT`` of the switch.
        device_id: the switch's number.
        election_id: (high, low); the highest of all controllers is the primary.
        timeout: seconds for one call.
        tls: files for TLS; without a CA the connection is in the clear.
    """

    address: str
    device_id: int = 1
    election_id: tuple[int, int] = (0, 1)
    timeout: float = 2.0
    tls: TlsFiles = NO_TLS


class Session:
    """A connection; of no use any more once ``on_stream(None)`` was called.

    Args:
        settings: where to.
        on_stream: called from a thread with every message of the stream, ``None`` at its end.
    """

    def __init__(self, settings: SessionSettings, on_stream: Callable[[Any | None], None]) -> None:
        self.settings = settings
        self._on_stream = on_stream
        self._out: queue.SimpleQueue[Any | None] = queue.SimpleQueue()
        self._channel = _channel(settings)
        self._stub = Stub(self._channel)
        self._election = p4.Uint128(high=settings.election_id[0], low=settings.election_id[1])
        self._stream: Any = None

    def connect(self) -> None:
        """Connect: enough for reading.

        Raises:
            SwitchError: the switch does not answer, or TLS fails.
        """
        request = p4.CapabilitiesRequest()
        try:
            self._stub.Capabilities(request, timeout=self.settings.timeout)
        except _RPC_ERRORS as error:
            if error.code() == grpc.StatusCode.UNIMPLEMENTED:  # older than version 1.1
                return
            details = error.details() or error.code().name
            if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                details = f"no answer in {self.settings.timeout:g} s"
            raise unreachable(self.settings.address, self.settings.tls, details) from None

    def open(self) -> None:
        """Connect and ask to be the primary; the answer comes by ``on_stream``.

        Raises:
            SwitchError: the switch does not answer.
        """
        self.connect()
        request = p4.StreamMessageRequest()
        request.arbitration.device_id = self.settings.device_id
        request.arbitration.election_id.CopyFrom(self._election)
        self._out.put(request)
        self._stream = self._stub.StreamChannel(iter(self._out.get, None))
        threading.Thread(target=self._read_stream, name="p4runtime-stream", daemon=True).start()

    def _read_stream(self) -> None:
        try:
            for message in self._stream:
                self._on_stream(message)
        except _RPC_ERRORS:
            pass
        self._on_stream(None)

    def send_packet(self, payload: bytes, metadata: Sequence[tuple[int, bytes]]) -> None:
        """Put a packet into the switch."""
        request = p4.StreamMessageRequest()
        request.packet.payload = payload
        for id, value in metadata:
            request.packet.metadata.add(metadata_id=id, value=value)
        self._out.put(request)

    def close(self) -> None:
        """End the stream and the connection. Idempotent."""
        self._out.put(None)
        if self._stream is not None:
            self._stream.cancel()
        self._channel.close()

    def pipeline_cookie(self) -> int | None:
        """The cookie of the switch's program; ``None``: it has none.

        Raises:
            SwitchError: the switch does not answer.
        """
        request = p4.GetForwardingPipelineConfigRequest(
            device_id=self.settings.device_id,
            response_type=p4.GetForwardingPipelineConfigRequest.COOKIE_ONLY,
        )
        try:
            response = self._stub.GetForwardingPipelineConfig(
                request, timeout=self.settings.timeout
            )
        except _RPC_ERRORS as error:
            if error.code() == grpc.StatusCode.FAILED_PRECONDITION:
                return None
            raise _wrapped(error) from None
        return int(response.config.cookie.cookie) if response.config.HasField("cookie") else None

    def set_pipeline(self, pipeline: Pipeline) -> None:
        """Give the switch its program; its tables are empty then.

        Raises:
            SwitchError: the switch refuses.
        """
        request = p4.SetForwardingPipelineConfigRequest(
            device_id=self.settings.device_id,
            election_id=self._election,
            action=p4.SetForwardingPipelineConfigRequest.VERIFY_AND_COMMIT,
        )
        request.config.p4info.CopyFrom(pipeline.p4info)
        request.config.p4_device_config = pipeline.device_config
        request.config.cookie.cookie = pipeline.cookie
        try:
            self._stub.SetForwardingPipelineConfig(request, timeout=10 * self.settings.timeout)
        except _RPC_ERRORS as error:
            raise _wrapped(error) from None

    def write(self, fills: Sequence[Callable[[Any], object]]) -> list[tuple[int, str]]:
        """Write a batch, going on after errors; (google.rpc.Code, message) of each update.

        Args:
            fills: each fills in one ``Update``, where it stands: copies of messages are slow.

        Raises:
            NotPrimaryError: another controller is.
            SwitchError: no answer; some of the updates may be in force.
        """
        request = p4.WriteRequest(device_id=self.settings.device_id, election_id=self._election)
        for fill in fills:
            fill(request.updates.add())
        try:
            self._stub.Write(request, timeout=self.settings.timeout + _EACH * len(fills))
        except _RPC_ERRORS as error:
            return _write_errors(error, len(fills))
        return [(code_pb2.OK, "")] * len(fills)

    def read(self, tables: Sequence[int], *, counters: bool = False) -> Iterator[Any]:
        """All entries of some tables.

        Args:
            tables: their numbers.
            counters: with their packets and octets.

        Raises:
            SwitchError: the switch does not answer.
        """
        request = p4.ReadRequest(device_id=self.settings.device_id)
        for table in tables:
            entry = request.entities.add().table_entry
            entry.table_id = table
            if counters:
                entry.counter_data.SetInParent()
        try:
            for response in self._stub.Read(request, timeout=60 * self.settings.timeout):
                for entity in response.entities:
                    yield entity.table_entry
        except _RPC_ERRORS as error:
            raise _wrapped(error) from None


def _channel(settings: SessionSettings) -> Any:
    credentials = settings.tls.controller()
    if credentials is None:
        return grpc.insecure_channel(settings.address, options=_OPTIONS)
    return grpc.secure_channel(settings.address, credentials, options=_OPTIONS)


def _wrapped(error: Any) -> SwitchError:
    code = error.code()
    kind = NotPrimaryError if code == grpc.StatusCode.PERMISSION_DENIED else SwitchError
    return kind(f"P4Runtime: {code.name}: {error.details()}")


def _write_errors(error: Any, updates: int) -> list[tuple[int, str]]:
    """What became of each update (P4Runtime specification, section 12.3)."""
    if error.code() == grpc.StatusCode.UNKNOWN:
        for name, value in error.trailing_metadata() or ():
            if name == "grpc-status-details-bin":
                status = status_pb2.Status.FromString(value)
                found: list[tuple[int, str]] = []
                for detail in status.details:
                    one = p4.Error()
                    detail.Unpack(one)
                    found.append((one.canonical_code, one.message))
                if len(found) == updates:
                    return found
    raise _wrapped(error)
