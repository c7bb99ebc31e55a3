"""A file server in FastAPI, unchanged behind Prism.

Run it on three backends:

    cd examples/fastapi_files
    sudo FILES=/srv/files prism-proxy lab up --app files:app --backends 3

    curl -T photo.jpg http://10.77.0.80/files/photo.jpg
    curl -O http://10.77.0.80/files/photo.jpg
    curl http://10.77.0.80/files

Files are sent by sendfile(2): Starlette uses ``http.response.pathsend`` where it is offered. All
backends share the directory here; on several machines it would be a network file system, or each
would keep its share, since the placement sends a path to the same backend every time.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Request, WebSocket, WebSocketDisconnect
from fastapi.responses import FileResponse

ROOT = Path(os.environ.get("FILES", "/tmp/prism-files"))

app = FastAPI(title="Files")


def wanted(name: str) -> Path:
    """The file of this name, which must be a plain one."""
    if name.startswith(".") or "/" in name:
        raise HTTPException(400, "names have no slashes and begin with no dot")
    ROOT.mkdir(parents=True, exist_ok=True)
    return ROOT / name


@app.get("/files")
def listing() -> list[dict[str, object]]:
    """What there is."""
    found = sorted(ROOT.glob("[!.]*")) if ROOT.exists() else []
    return [{"name": path.name, "size": path.stat().st_size} for path in found]


@app.get("/files/{name}")
async def download(path: Annotated[Path, Depends(wanted)]) -> FileResponse:
    """A file, or a range of it."""
    if not path.is_file():
        raise HTTPException(404, "there is no such file")
    return FileResponse(path)


@app.put("/files/{name}", status_code=201)
async def upload(path: Annotated[Path, Depends(wanted)], request: Request) -> dict[str, object]:
    """Store the body; it is never held in memory, and seen only when it is whole."""
    part = path.with_name(f".{secrets.token_hex(8)}")
    try:
        with part.open("wb") as file:
            async for piece in request.stream():
                file.write(piece)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return {"name": path.name, "size": path.stat().st_size}


@app.delete("/files/{name}", status_code=204)
async def delete(path: Annotated[Path, Depends(wanted)]) -> None:
    """Remove a file."""
    if not path.is_file():
        raise HTTPException(404, "there is no such file")
    path.unlink()


@app.websocket("/echo")
async def echo(socket: WebSocket) -> None:
    """Say everything back."""
    await socket.accept()
    try:
        while True:
            await socket.send_text(await socket.receive_text())
    except WebSocketDisconnect:
        pass  # the client is done
