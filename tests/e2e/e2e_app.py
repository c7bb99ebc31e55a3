"""An ASGI application that says what it was asked for, and is ill where a file says so."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):
        pass
    ill = scope["path"] == "/healthz" and Path(os.environ["ILL"], scope["server"][0]).exists()
    body = scope["path"].encode()
    if scope["path"].endswith("/headers"):
        fields = [[name.decode(), value.decode("latin-1")] for name, value in scope["headers"]]
        body = json.dumps(fields).encode()
    await send({"type": "http.response.start", "status": 503 if ill else 200, "headers": []})
    await send({"type": "http.response.body", "body": body})
