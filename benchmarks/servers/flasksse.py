"""The same application with Flask-SSE: every client has a subscription, and a connection to Redis, of its own."""

# ruff: noqa: E402
from __future__ import annotations

from gevent import monkey

monkey.patch_all()

from collections.abc import Iterator

from endpoint import STORE_URL, add_publish, serve
from flask import Flask, Response, request, stream_with_context
from flask_sse import sse

app = Flask(__name__)
app.config["REDIS_URL"] = STORE_URL


@app.get("/stream")
def stream() -> Response:
    channel = request.args.get("connectKey", "default")

    def events() -> Iterator[str]:
        # Flask-SSE's own view, but for this: it sends nothing, not even the response's head, before the first event.
        yield ": open\n\n"
        for message in sse.messages(channel=channel):
            yield str(message)

    return Response(stream_with_context(events()), mimetype="text/event-stream")


add_publish(app, lambda key, text: sse.publish(text, type="tick", channel=key))

if __name__ == "__main__":
    serve(app)
