"""The same application with flask_sse_stream, with its defaults: ids, a history, bounded queues, heartbeats."""

# ruff: noqa: E402
from __future__ import annotations

from gevent import monkey

monkey.patch_all()

from endpoint import PING_SECONDS, STORE_URL, add_publish, serve
from flask import Flask

from flask_sse_stream import SSE

app = Flask(__name__)
sse = SSE(app, broker_url=STORE_URL, ping_interval=PING_SECONDS, max_clients=20_000)
add_publish(app, lambda key, text: sse.publish(key, text, event="tick"))

if __name__ == "__main__":
    serve(app)
