"""A FastAPI application as anybody would write one: nothing in it knows of Prism."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

from fastapi import (
    BackgroundTasks,
    Depends,
    FastAPI,
    Header,
    HTTPException,
    Request,
    UploadFile,
    WebSocket,
    WebSocketDisconnect,
)
from fastapi.responses import FileResponse, StreamingResponse

events: list[str] = []


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, str]]:
    events.append("started")
    yield {"greeting": "hello"}
    events.append("stopped")


app = FastAPI(lifespan=lifespan)


def caller(x_user: Annotated[str | None, Header()] = None) -> str:
    if x_user is None:
        raise HTTPException(401, "who are you?")
    return x_user


@app.get("/whoami")
async def whoami(request: Request, user: Annotated[str, Depends(caller)]) -> dict[str, object]:
    return {
        "user": user,
        "greeting": request.state.greeting,
        "client": list(request.client or ()),
        "scheme": request.url.scheme,
        "server": list(request.scope["server"]),
        "headers": sorted(request.headers),
        "pid": os.getpid(),
    }


@app.put("/upload/{name}")
async def upload(name: str, request: Request) -> dict[str, object]:
    digest, size = hashlib.sha256(), 0
    async for piece in request.stream():
        digest.update(piece)
        size += len(piece)
    return {"name": name, "size": size, "sha256": digest.hexdigest()}


@app.post("/form")
async def form(file: UploadFile) -> dict[str, object]:
    data = await file.read()
    return {"name": file.filename, "sha256": hashlib.sha256(data).hexdigest()}


@app.get("/download/{size}")
async def download(size: int, declared: bool = False) -> StreamingResponse:
    async def pieces() -> AsyncIterator[bytes]:
        left = size
        while left:
            piece = min(left, 100_000)
            yield b"x" * piece
            left -= piece

    headers = {"Content-Length": str(size)} if declared else None
    return StreamingResponse(pieces(), headers=headers)


@app.get("/file")
async def file(path: Path) -> FileResponse:
    return FileResponse(path)


@app.get("/fails")
async def fails() -> None:
    raise RuntimeError("on purpose")


@app.get("/fails-late")
async def fails_late() -> StreamingResponse:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"some"
        raise RuntimeError("on purpose")

    return StreamingResponse(pieces())


@app.get("/background")
async def background(tasks: BackgroundTasks) -> dict[str, int]:
    async def later() -> None:
        await asyncio.sleep(0.5)
        events.append("background")

    tasks.add_task(later)
    return {"pid": os.getpid()}


@app.get("/events")
async def told() -> list[str]:
    return events


@app.get("/until-gone")
async def until_gone(request: Request) -> dict[str, int]:
    events.append("waiting")
    while not await request.is_disconnected():
        await asyncio.sleep(0.01)
    events.append("gone")
    return {}


@app.websocket("/echo")
async def echo(socket: WebSocket) -> None:
    await socket.accept(subprotocol=next(iter(socket.scope["subprotocols"]), None))
    try:
        while True:
            message = await socket.receive()
            if message["type"] == "websocket.disconnect":
                events.append(f"closed {message['code']}")
                return
            if message.get("text") is not None:
                await socket.send_text(message["text"])
            else:
                await socket.send_bytes(message["bytes"])
    except WebSocketDisconnect:
        events.append("closed")


@app.websocket("/closed")
async def closed(socket: WebSocket) -> None:
    await socket.close()
