"""The keys of ``[backend]`` that say what answers the requests."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, PlainSerializer, PlainValidator, WithJsonSchema, model_validator

from prism.config_types import HostPort, Seconds, Section, endpoint
from prism.flow import Endpoint

__all__ = ["AppKeys", "Server"]

_MODULE = r"[A-Za-z_]\w*"
_APP = rf"^{_MODULE}(\.{_MODULE})*:{_MODULE}(\.{_MODULE})*$"
_NAMES = {"localhost": "127.0.0.1"}
_MAX_UNIX_PATH = 107  # octets of sun_path, unix(7)


def _server(value: object) -> Endpoint | str:
    """An upstream's address: an endpoint, or the path of a unix socket."""
    if isinstance(value, Endpoint):
        return value
    text = str(value)
    if isinstance(value, str) and text.startswith(("unix:", "/")):
        path = text.removeprefix("unix:").removeprefix("//")
        if not path.startswith("/") or len(path.encode()) > _MAX_UNIX_PATH:
            raise ValueError(f"{text!r} has no absolute path of at most {_MAX_UNIX_PATH} octets")
        return path
    try:
        url = urlsplit(text)
        port = url.port or 80
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from None
    if not isinstance(value, str) or url.scheme != "http" or not url.hostname:
        raise ValueError(f'{text!r} is neither "http://ADDRESS:PORT" nor "unix:/PATH"')
    if url.path not in ("", "/") or url.query or url.fragment or url.username:
        raise ValueError(f"{text!r}: requests keep their own paths, so give address and port only")
    host = _NAMES.get(url.hostname, url.hostname)
    return endpoint(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")


Server = Annotated[
    HostPort | str,
    PlainValidator(_server),
    PlainSerializer(lambda value: f"unix:{value}" if isinstance(value, str) else f"http://{value}"),
    WithJsonSchema({"type": '"http://ADDRESS:PORT" or "unix:/PATH"'}),
]
"""Where an unmodified server listens: an endpoint, or the path of a unix socket."""


class AppKeys(Section):
    """What a backend serves: its object store, unless one of these keys names something else."""

    app: str | None = Field(
        None,
        pattern=_APP,
        description="ASGI application that answers the requests, `module:attribute`. Needs "
        "`prism-proxy[asgi]`.",
        examples=["shop.main:app"],
    )
    app_dir: Path = Field(
        Path(),
        description="Directory that `app` is imported from, before all others. Relative to this "
        "file.",
    )
    upstream: Server | None = Field(
        None,
        description="Server on this host that answers the requests, unmodified: "
        "`http://ADDRESS:PORT` or `unix:/PATH`.",
        examples=["http://127.0.0.1:9000"],
    )
    upstream_connections: int = Field(
        256, ge=1, le=65535, description="Connections of one worker to `upstream`; then 503."
    )
    upstream_connect_timeout: Seconds = Field(
        3.0, description="Seconds to connect to `upstream`; then 502 or 504."
    )
    upstream_timeout: Seconds = Field(
        60.0,
        description="Seconds for the first octet of `upstream`'s response, and between two pieces "
        "of it; then 504.",
    )
    upstream_forwarded: Literal["x-forwarded", "forwarded", "none"] = Field(
        "x-forwarded",
        description="How `upstream` hears of the client: `X-Forwarded-For` and "
        "`X-Forwarded-Proto`, `Forwarded` (RFC 7239), or not at all.",
    )
    upstream_proxy_protocol: bool = Field(
        False,
        description="Begin each connection to `upstream` with a PROXY protocol header (version "
        "2); connections are then not shared between clients.",
    )

    @property
    def serves_objects(self) -> bool:
        """Whether the object store answers."""
        return self.app is None and self.upstream is None

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.app is not None and self.upstream is not None:
            raise ValueError("app and upstream exclude each other: keep one")
        return self
