"""What the sections of the configuration are made of: the base model and the types of values."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    WithJsonSchema,
)

from prism.flow import Endpoint

__all__ = ["Address", "HostPort", "Name", "Port", "Seconds", "Section", "endpoint"]

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"


def _address(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("an IP address in quotes is wanted")
    try:
        return str(ipaddress.ip_address(value))
    except ValueError:
        raise ValueError(f"{value!r} is not an IP address (names are not looked up)") from None


def endpoint(value: object) -> Endpoint:
    """The endpoint written as ``value``.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, Endpoint):
        return value
    match = re.fullmatch(r"(?:\[([^\]]+)\]|([^:\[\]]+)):(\d{1,5})", str(value))
    if not isinstance(value, str) or match is None:
        raise ValueError(f'{value!r} is not "ADDRESS:PORT" (IPv6: "[ADDRESS]:PORT")')
    port = int(match[3])
    if not 1 <= port <= 65535:
        raise ValueError(f"port {port} is not between 1 and 65535")
    return Endpoint(_address(match[1] or match[2]), port)


Address = Annotated[str, PlainValidator(_address), WithJsonSchema({"type": "IP address"})]
"""An IPv4 or IPv6 address in canonical text."""

HostPort = Annotated[
    Endpoint,
    PlainValidator(endpoint),
    PlainSerializer(str),
    WithJsonSchema({"type": '"ADDRESS:PORT"'}),
]
"""An endpoint, written ``"192.0.2.1:80"`` or ``"[2001:db8::1]:80"``."""

Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=86400)]
Name = Annotated[str, Field(pattern=_NAME)]


class Section(BaseModel):
    """Unknown keys are errors, values do not change, and no error shows a value."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=False, hide_input_in_errors=True, validate_default=True
    )
