"""The least that can be done with Redis: a subscription for each client that hands on what it is sent.

Frames are published ready to send. No ids, no history, no heartbeats; what was published while a client was away
is gone.
"""

# ruff: noqa: E402
from __future__ import annotations

from gevent import monkey

monkey.patch_all()

from collections.abc import Iterator
from typing import Any

import redis
from endpoint import STORE_URL, add_publish, serve
from flask import Flask, Response, request

app = Flask(__name__)
client: Any = redis.Redis.from_url(STORE_URL)


@app.get("/stream")
def stream() -> Response:
    key = request.args.get("connectKey", "default")

    def events() -> Iterator[bytes]:
        with client.pubsub() as subscription:
            subscription.subscribe(key)
            yield b": open\n\n"
            for message in subscription.listen():
                if message["type"] == "message":
                    yield message["data"]

    return Response(events(), mimetype="text/event-stream", headers={"Cache-Control": "no-cache"})


add_publish(app, lambda key, text: client.publish(key, f"event: tick\ndata: {text}\n\n"))

if __name__ == "__main__":
    serve(app)
