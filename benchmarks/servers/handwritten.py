"""What a Flask application under gevent does today without a library: a generator and a queue per client.

Written as well as it usually is, and a little better: the frame is made and encoded once per event, clients
that leave are removed, silent streams get a heartbeat, and events carry an id. It has no history, no limits
and no bound on what a slow client may have waiting.
"""

# ruff: noqa: E402
from __future__ import annotations

from gevent import monkey

monkey.patch_all()

from collections import defaultdict
from collections.abc import Iterator
from itertools import count

from endpoint import PING_SECONDS, add_publish, serve
from flask import Flask, Response, request
from gevent.queue import Empty, Queue

app = Flask(__name__)
listeners: defaultdict[str, set[Queue[bytes]]] = defaultdict(set)
numbers = count(1)


@app.get("/stream")
def stream() -> Response:
    key = request.args.get("connectKey", "default")

    def events() -> Iterator[bytes]:
        queue: Queue[bytes] = Queue()
        listeners[key].add(queue)
        try:
            yield b"retry: 3000\n\n"
            while True:
                try:
                    frame = queue.get(timeout=PING_SECONDS)
                except Empty:
                    frame = b": ping\n\n"
                yield frame
        finally:
            listeners[key].discard(queue)

    return Response(events(), mimetype="text/event-stream", headers={"Cache-Control": "no-cache"})


def publish(key: str, text: str) -> None:
    frame = f"id: {next(numbers)}\nevent: tick\ndata: {text}\n\n".encode()
    for queue in listeners[key]:
        queue.put(frame)


add_publish(app, publish)

if __name__ == "__main__":
    serve(app)
