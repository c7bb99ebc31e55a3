"""P4Runtime's messages and calls, on whatever protobuf is installed.

The package ``p4runtime`` comes with classes that were generated for protobuf 3; newer versions,
which are several times as fast, refuse to load them. The descriptors in those files are good all
the same, so where the import fails the classes are made of them.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import grpc
from google.protobuf import descriptor_pool, message_factory

__all__ = ["Stub", "handlers", "p4", "p4_config"]

_FILES: Final = ("p4/config/v1/p4types", "p4/config/v1/p4info", "p4/v1/p4data", "p4/v1/p4runtime")
_SERVICE: Final = "p4.v1.P4Runtime"
_CALLS: Final = {
    "Write": ("unary_unary", "WriteRequest", "WriteResponse"),
    "Read": ("unary_stream", "ReadRequest", "ReadResponse"),
    "SetForwardingPipelineConfig": (
        "unary_unary",
        "SetForwardingPipelineConfigRequest",
        "SetForwardingPipelineConfigResponse",
    ),
    "GetForwardingPipelineConfig": (
        "unary_unary",
        "GetForwardingPipelineConfigRequest",
        "GetForwardingPipelineConfigResponse",
    ),
    "StreamChannel": ("stream_stream", "StreamMessageRequest", "StreamMessageResponse"),
    "Capabilities": ("unary_unary", "CapabilitiesRequest", "CapabilitiesResponse"),
}
"""Name: kind of call, request and response (P4Runtime specification 1.3, chapter 4)."""


def _descriptor(name: str) -> bytes:
    """The serialized ``FileDescriptorProto`` in a generated file.

    Raises:
        ImportError: there is none.
    """
    module = name.replace("/", ".") + "_pb2"
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ImportError(f"{module} is not installed", name=module)
    for node in ast.walk(ast.parse(Path(spec.origin).read_bytes())):
        if isinstance(node, ast.keyword) and node.arg == "serialized_pb":
            found = ast.literal_eval(node.value)
            if isinstance(found, bytes):
                return found
    raise ImportError(f"{module} has no descriptor", name=module, path=spec.origin)


def _built(pool: Any, name: str) -> Any:
    """The classes of one file."""
    file = pool.FindFileByName(f"{name}.proto")
    return SimpleNamespace(
        **{
            message: message_factory.GetMessageClass(descriptor)
            for message, descriptor in file.message_types_by_name.items()
        }
    )


def _messages() -> tuple[Any, Any]:
    """The messages of ``p4info.proto`` and of ``p4runtime.proto``."""
    try:
        from p4.config.v1 import p4info_pb2  # noqa: PLC0415
        from p4.v1 import p4runtime_pb2  # noqa: PLC0415
    except TypeError:  # "Descriptors cannot be created directly"
        import google.protobuf.any_pb2  # noqa: PLC0415
        import google.rpc.status_pb2  # noqa: F401, PLC0415  # both are imported by p4runtime.proto

        pool = descriptor_pool.Default()
        for name in _FILES:
            pool.AddSerializedFile(_descriptor(name))
        return _built(pool, _FILES[1]), _built(pool, _FILES[3])
    return p4info_pb2, p4runtime_pb2


p4_config, p4 = _messages()


class Stub:
    """A controller's side: one attribute for each call.

    Args:
        channel: to the switch.
    """

    def __init__(self, channel: grpc.Channel) -> None:
        for name, (kind, request, response) in _CALLS.items():
            call = getattr(channel, kind)(
                f"/{_SERVICE}/{name}",
                request_serializer=getattr(p4, request).SerializeToString,
                response_deserializer=getattr(p4, response).FromString,
            )
            setattr(self, name, call)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"P4Runtime has no call {name}")


def handlers(servicer: object) -> grpc.GenericRpcHandler:
    """A switch's side: what a server calls, the servicer's methods of the same names."""
    found = {
        name: getattr(grpc, f"{kind}_rpc_method_handler")(
            getattr(servicer, name),
            request_deserializer=getattr(p4, request).FromString,
            response_serializer=getattr(p4, response).SerializeToString,
        )
        for name, (kind, request, response) in _CALLS.items()
    }
    return grpc.method_handlers_generic_handler(_SERVICE, found)
