"""P4Runtime served by the soft switch: any controller can read and program its real table.

After the P4Runtime specification 1.3. There are no roles; the only program is the one that comes
with Prism. Errors of single updates travel as ``p4.v1.Error`` details, one for each update.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NoReturn

import grpc
from google.rpc import code_pb2 as codes
from google.rpc import status_pb2

from prism.errors import SwitchError
from prism.switch.p4runtime_messages import handlers, p4
from prism.switch.p4runtime_tls import NO_TLS, TlsFiles
from prism.switch.p4service_table import EntryTable, UpdateError

__all__ = ["MAX_UPDATES", "P4Service"]

MAX_UPDATES: Final = 4096
"""Updates of one Write; more are RESOURCE_EXHAUSTED."""

_log = logging.getLogger(__name__)
_VERSION: Final = "1.3.0"
_MAX_STREAMS: Final = 16
_MAX_QUEUE: Final = 1024  # messages that wait for a slow controller
_THREADS: Final = _MAX_STREAMS + 8
_PAGE: Final = 128  # entities in one message of a Read
_MAX_MESSAGE: Final = 16 << 20
_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}


class _Client:
    """One StreamChannel."""

    def __init__(self) -> None:
        self.out: queue.Queue[Any | None] = queue.Queue(_MAX_QUEUE)
        self.election: tuple[int, int] | None = None

    def tell(self, message: Any) -> None:
        try:
            self.out.put_nowait(message)
        except queue.Full:  # as a switch drops packets that the CPU does not take
            pass


class P4Service:
    """The service and its server.

    Args:
        table: the entries.
        address: ``HOST:PORT`` to listen on; port 0 takes any.
        device_id: the switch's number.
        on_packet_out: takes packets of the primary, called from threads.
        tls: its certificate and key, and the CA of the controllers'; in the clear without.

    Attributes:
        port: where it listens.
    """

    def __init__(
        self,
        table: EntryTable,
        address: str,
        *,
        device_id: int = 1,
        on_packet_out: Callable[[bytes], object] | None = None,
        tls: TlsFiles = NO_TLS,
    ) -> None:
        self.table = table
        self.port = 0
        self._address = address
        self._device_id = device_id
        self._on_packet_out = on_packet_out
        self._credentials = tls.switch()
        self._clients: list[_Client] = []
        self._lock = threading.Lock()
        self._cookie = table.pipeline.cookie
        self._saved: Any | None = None
        self._server = grpc.server(
            ThreadPoolExecutor(_THREADS, "p4service"),
            options=[
                ("grpc.max_receive_message_length", _MAX_MESSAGE),
                ("grpc.so_reuseport", 0),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 1000),
            ],
        )
        self._server.add_generic_rpc_handlers((handlers(self),))

    def start(self) -> None:
        """Begin to listen.

        Raises:
            SwitchError: the address cannot be used.
        """
        try:
            if self._credentials is None:
                self.port = self._server.add_insecure_port(self._address)
            else:
                self.port = self._server.add_secure_port(self._address, self._credentials)
        except RuntimeError:
            self.port = 0
        if not self.port:
            raise SwitchError(
                f"cannot listen on {self._address} for P4Runtime: is it taken, or not this host's?"
            )
        self._server.start()

    def close(self) -> None:
        """End all streams and stop."""
        with self._lock:
            for client in self._clients:
                client.tell(None)
        self._server.stop(0.5).wait()

    def packet_in(self, payload: bytes) -> bool:
        """Give a packet to the primary; ``False``: there is none."""
        with self._lock:
            primary = self._primary()
        if primary is None:
            return False
        message = p4.StreamMessageResponse()
        message.packet.payload = payload
        for field in self.table.pipeline.packet_in or ():
            message.packet.metadata.add(metadata_id=field.id, value=b"\0")
        primary.tell(message)
        return True

    # Arbitration

    def _primary(self) -> _Client | None:
        """The client with the highest election id."""
        standing = [client for client in self._clients if client.election]
        return max(standing, key=lambda client: client.election or (0, 0), default=None)

    def StreamChannel(self, requests: Any, context: Any) -> Iterator[Any]:
        """One controller's stream."""
        client = _Client()
        with self._lock:
            if len(self._clients) >= _MAX_STREAMS:
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many controllers")
            self._clients.append(client)
        failure: list[tuple[Any, str]] = []

        def listen() -> None:
            try:
                for request in requests:
                    self._on_request(client, request)
            except UpdateError as error:
                failure.append((_CODES[error.code], error.text))
            except grpc.RpcError:
                pass  # how gRPC ends the requests of a stream that was cancelled or has broken
            except Exception:
                _log.exception("a fault in a P4Runtime stream, which ends with it")
                failure.append((grpc.StatusCode.INTERNAL, "a fault in the switch: see its log"))
            client.out.put(None)

        threading.Thread(target=listen, name="p4service-stream", daemon=True).start()
        try:
            while (message := client.out.get()) is not None:
                yield message
        finally:
            with self._lock:
                self._clients.remove(client)
                was_standing, client.election = client.election is not None, None
                if was_standing:
                    self._announce()
        if failure:
            context.abort(*failure[0])

    def _on_request(self, client: _Client, request: Any) -> None:
        kind = request.WhichOneof("update")
        if kind == "arbitration":
            self._arbitrate(client, request.arbitration)
        elif kind == "packet":
            with self._lock:
                allowed = self._primary() is client
            if allowed and self._on_packet_out is not None:
                self._on_packet_out(request.packet.payload)
            elif not allowed:
                message = p4.StreamMessageResponse()
                message.error.canonical_code = codes.PERMISSION_DENIED
                message.error.message = "only the primary may send packets"
                message.error.packet_out.packet_out.CopyFrom(request.packet)
                client.tell(message)
        else:
            raise UpdateError(
                codes.INVALID_ARGUMENT, f"a stream takes no {kind or 'empty message'}"
            )

    def _arbitrate(self, client: _Client, update: Any) -> None:
        if update.device_id != self._device_id:
            raise UpdateError(codes.NOT_FOUND, f"this is device {self._device_id}")
        if update.HasField("role") and (update.role.name or update.role.id):
            raise UpdateError(codes.INVALID_ARGUMENT, "there are no roles here")
        election = (update.election_id.high, update.election_id.low)
        with self._lock:
            if election != (0, 0) and any(
                other.election == election for other in self._clients if other is not client
            ):
                raise UpdateError(codes.INVALID_ARGUMENT, "another controller has this election id")
            before = self._primary()
            client.election = election if election != (0, 0) else None
            if self._primary() is not before or before is client:
                self._announce()
            else:
                client.tell(self._standing(client))

    def _announce(self) -> None:
        for client in self._clients:
            client.tell(self._standing(client))

    def _standing(self, client: _Client) -> Any:
        primary = self._primary()
        message = p4.StreamMessageResponse()
        told = message.arbitration
        told.device_id = self._device_id
        if primary is not None and primary.election is not None:
            told.election_id.high, told.election_id.low = primary.election
        if primary is client:
            told.status.code = codes.OK
        else:
            told.status.code = codes.NOT_FOUND if primary is None else codes.ALREADY_EXISTS
            told.status.message = "there is no primary" if primary is None else "you are a backup"
        return message

    def _check(self, request: Any, context: Any, *, primary: bool = False) -> None:
        if request.device_id != self._device_id:
            context.abort(grpc.StatusCode.NOT_FOUND, f"this is device {self._device_id}")
        if not primary:
            return
        election = (request.election_id.high, request.election_id.low)
        if request.role or request.role_id:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "there are no roles here")
        with self._lock:
            leader = self._primary()
        if leader is None or leader.election != election:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "only the primary may change things")

    # Calls

    def Capabilities(self, request: Any, context: Any) -> Any:
        """The version of the protocol."""
        return p4.CapabilitiesResponse(p4runtime_api_version=_VERSION)

    def SetForwardingPipelineConfig(self, request: Any, context: Any) -> Any:
        """Take a program, if it is the only one there is."""
        self._check(request, context, primary=True)
        kinds = p4.SetForwardingPipelineConfigRequest
        if request.action not in kinds.Action.values() or request.action == kinds.UNSPECIFIED:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no such action")
        config: Any = request.config
        if request.action == kinds.COMMIT:
            if request.HasField("config"):
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "COMMIT comes without a config")
            if self._saved is None:
                context.abort(grpc.StatusCode.FAILED_PRECONDITION, "nothing was saved to commit")
            config, self._saved = self._saved, None
        elif config.p4info != self.table.pipeline.p4info:
            context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, "the soft switch runs prism.p4 and nothing else"
            )
        if request.action == kinds.VERIFY_AND_SAVE:
            self._saved = config
        elif request.action != kinds.VERIFY:
            if request.action != kinds.RECONCILE_AND_COMMIT:
                self.table.clear()
            self._cookie = config.cookie.cookie
        return p4.SetForwardingPipelineConfigResponse()

    def GetForwardingPipelineConfig(self, request: Any, context: Any) -> Any:
        """The program and its cookie; its device configuration is empty."""
        self._check(request, context)
        response = p4.GetForwardingPipelineConfigResponse()
        response.config.cookie.cookie = self._cookie
        kinds = p4.GetForwardingPipelineConfigRequest
        if request.response_type in (kinds.ALL, kinds.P4INFO_AND_COOKIE):
            response.config.p4info.CopyFrom(self.table.pipeline.p4info)
        return response

    def Write(self, request: Any, context: Any) -> Any:
        """Change entries."""
        self._check(request, context, primary=True)
        kinds = p4.WriteRequest
        if request.atomicity == kinds.DATAPLANE_ATOMIC:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "batches are not atomic for packets")
        if request.atomicity not in kinds.Atomicity.values():
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no such atomicity")
        if len(request.updates) > MAX_UPDATES:
            context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"at most {MAX_UPDATES} updates at once"
            )
        errors = self.table.write(
            request.updates, rollback=request.atomicity == kinds.ROLLBACK_ON_ERROR
        )
        if any(errors):
            _abort_write(context, errors)
        return p4.WriteResponse()

    def Read(self, request: Any, context: Any) -> Iterator[Any]:
        """Entries and direct counters."""
        self._check(request, context)
        response = p4.ReadResponse()
        for entity in request.entities:
            try:
                for found in self._read(entity):
                    response.entities.append(found)
                    if len(response.entities) >= _PAGE:
                        yield response
                        response = p4.ReadResponse()
            except UpdateError as error:
                context.abort(_CODES[error.code], error.text)
        yield response

    def _read(self, entity: Any) -> Iterator[Any]:
        kind = entity.WhichOneof("entity")
        if kind == "table_entry":
            asked = entity.table_entry
        elif kind == "direct_counter_entry":
            asked = entity.direct_counter_entry.table_entry
        else:
            code = codes.INVALID_ARGUMENT if kind is None else codes.UNIMPLEMENTED
            raise UpdateError(code, f"{kind or 'nothing'} cannot be read")
        if asked.table_id and asked.table_id in self.table.pipeline.tables:
            pass  # a table that the soft switch does not have is empty
        elif asked.table_id or asked.match:
            self.table.table(asked.table_id)
        counted = kind != "table_entry" or asked.HasField("counter_data")
        for key, value in self.table.read(asked.table_id, asked):
            found = p4.Entity()
            if kind == "table_entry":
                entry = found.table_entry
                entry.CopyFrom(self.table.message(key, value))
            else:
                entry = found.direct_counter_entry.table_entry
                entry.CopyFrom(self.table.message(key, value))
                entry.ClearField("action")
                entry.ClearField("metadata")
            if counted:
                data = (
                    entry.counter_data if kind == "table_entry" else found.direct_counter_entry.data
                )
                data.packet_count, data.byte_count = self.table.counters(key)
            yield found


def _abort_write(context: Any, errors: list[UpdateError | None]) -> NoReturn:
    """Refuse a Write, with one detail for each update (specification, section 12.3)."""
    status = status_pb2.Status(code=codes.UNKNOWN, message="some updates failed")
    for error in errors:
        one = p4.Error(canonical_code=codes.OK)
        if error is not None:
            one = p4.Error(canonical_code=error.code, message=error.text, space="prism")
        status.details.add().Pack(one)
    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    context.abort(grpc.StatusCode.UNKNOWN, status.message)
    raise AssertionError
