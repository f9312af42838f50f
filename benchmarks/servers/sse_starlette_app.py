"""The same application with sse-starlette, on uvicorn and uvloop: a queue and a task of asyncio's for each client."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from itertools import count
from time import monotonic_ns
from typing import Any

import uvicorn
from sse_starlette.sse import EventSourceResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

# Not from endpoint.py, which needs Flask and gevent.
PING_SECONDS = float(os.environ.get("BENCHMARK_PING_SECONDS", "10"))
listeners: defaultdict[str, set[asyncio.Queue[dict[str, Any]]]] = defaultdict(set)
numbers = count(1)


async def stream(request: Request) -> EventSourceResponse:
    key = request.query_params["connectKey"]

    async def events() -> AsyncIterator[dict[str, Any]]:
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        listeners[key].add(queue)
        try:
            yield {"comment": "open"}
            while True:
                yield await queue.get()
        finally:
            listeners[key].discard(queue)

    return EventSourceResponse(events(), ping=max(1, round(PING_SECONDS)))


async def publish(request: Request) -> JSONResponse:
    """What ``endpoint.py`` does, with asyncio's sleep."""
    asked = {"events": 1.0, "interval": 0.0, "size": 100.0, "keys": 0.0}
    asked |= {name: float(value) for name, value in request.query_params.items()}
    keys = [f"bench-{number}" for number in range(int(asked["keys"]))] or ["bench"]
    started, returned = [], []
    due = monotonic_ns()
    for number in range(int(asked["events"])):
        if asked["interval"]:
            due += round(asked["interval"] * 1e9)
            await asyncio.sleep(max(0, due - monotonic_ns()) / 1e9)
        started.append(monotonic_ns())
        text = f"{number} {started[-1]} ".ljust(int(asked["size"]), "x")
        for key in keys:
            event = {"id": str(next(numbers)), "event": "tick", "data": text}
            for queue in listeners[key]:
                queue.put_nowait(event)
        returned.append(monotonic_ns())
    return JSONResponse({"started": started, "returned": returned})


async def view(_: Request) -> PlainTextResponse:
    return PlainTextResponse("an ordinary view\n")


app = Starlette(
    routes=[Route("/stream", stream), Route("/view", view), Route("/publish", publish, methods=["POST"])],
)

if __name__ == "__main__":
    listener = socket.socket(fileno=int(sys.argv[1]))
    config = uvicorn.Config(app, loop="uvloop", http="httptools", log_level="error", access_log=False, backlog=4096)
    uvicorn.Server(config).run(sockets=[listener])
