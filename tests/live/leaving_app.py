"""An app whose process is told to stop; its settings are the environment's ``SSE_`` variables.

``HANDLER`` says whether the program handles SIGTERM itself: ``before`` the extension, ``after`` it, or by ``gevent``.
Run as a program it is gevent's own server, and with ``--patch`` in a process patched in full.
"""

from __future__ import annotations

import sys

if "--patch" in sys.argv:
    from gevent import monkey

    monkey.patch_all()

import json
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import gevent
from flask import Flask, request
from flask.typing import ResponseReturnValue
from gevent.pywsgi import WSGIServer

from flask_sse_stream import SSE

HANDLER = os.environ.get("HANDLER")


def leave(*_: object) -> None:
    print("the handler ran", flush=True)
    # Not sys.exit(): that would be raised in whatever greenlet runs, perhaps one that feeds a stream.
    gevent.spawn(server.stop)


app = Flask(__name__)
app.config.update({name: json.loads(text) for name, text in os.environ.items() if name.startswith("SSE_")})
if HANDLER == "before":
    signal.signal(signal.SIGTERM, leave)
sse = SSE(app)
if HANDLER == "after":
    signal.signal(signal.SIGTERM, leave)


def pause(seconds: float) -> None:
    if isinstance(gevent.getcurrent(), gevent.Greenlet):
        gevent.sleep(seconds)
    else:
        time.sleep(seconds)


@app.post("/source")
@sse.event_stream()
def source() -> Iterator[Any]:
    request.get_data()  # what is left unread of it, Flask's server would wait for at the end, until the client leaves
    try:
        yield "one"
        while True:
            pause(0.1)
            yield "more"
    finally:
        print("finally", flush=True)


@app.post("/publish")
def publish() -> ResponseReturnValue:
    for number in range(int(request.args.get("times", "1"))):
        sse.publish("default", f"{number} " + "x" * int(request.args.get("size", "0")))
    return "", 204


@app.get("/state")
def state() -> ResponseReturnValue:
    stats = sse.stats()
    return {"streams": stats.streams, "draining": stats.draining, "pid": os.getpid()}


if __name__ == "__main__":
    server = WSGIServer(("127.0.0.1", int(sys.argv[1])), app, log=None, backlog=2048)
    if HANDLER == "gevent":
        gevent.signal_handler(signal.SIGTERM, leave)
    server.serve_forever()
    sys.exit(7)
