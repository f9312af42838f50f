"""What one writes by hand who wants a history in Redis: a stream a key, and an XREAD that blocks for each client.

Events carry the ids of the Redis stream, so a client that comes back is given what it missed. Each client has a
connection of the client's pool to itself, because the XREAD occupies it. No limits.
"""

# ruff: noqa: E402
from __future__ import annotations

from gevent import monkey

monkey.patch_all()

from collections.abc import Iterator
from typing import Any

import redis
from endpoint import PING_SECONDS, STORE_URL, add_publish, serve
from flask import Flask, Response, request

app = Flask(__name__)
client: Any = redis.Redis.from_url(
    STORE_URL,
    decode_responses=True,
    protocol=2,  # so that an answer of XREAD looks the same in all versions of redis-py
    socket_timeout=None,
    max_connections=100_000,
)


@app.get("/stream")
def stream() -> Response:
    key = request.args.get("connectKey", "default")
    cursor = request.headers.get("Last-Event-ID")

    def events() -> Iterator[str]:
        last = cursor
        if last is None:
            newest = client.xrevrange(key, count=1)
            last = newest[0][0] if newest else "0-0"
        yield "retry: 3000\n\n"
        while True:
            answers = client.xread({key: last}, block=round(PING_SECONDS * 1000))
            if not answers:
                yield ": ping\n\n"
                continue
            ((_, entries),) = answers
            last = entries[-1][0]
            yield "".join(f"id: {id}\nevent: tick\ndata: {fields['data']}\n\n" for id, fields in entries)

    return Response(events(), mimetype="text/event-stream", headers={"Cache-Control": "no-cache"})


add_publish(app, lambda key, text: client.xadd(key, {"data": text}, maxlen=1000, approximate=True))

if __name__ == "__main__":
    serve(app)
