"""An app for clients that are slow, stuck, or gone; ``SSE_...`` of the environment are its settings, as JSON."""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
from typing import Any

import greenlet
from flask import Flask, request
from flask.typing import ResponseReturnValue

from flask_sse_stream import SSE

app = Flask(__name__)
app.config.update({name: json.loads(value) for name, value in os.environ.items() if name.startswith("SSE_")})
sse = SSE(app)


@app.get("/state")
def state() -> ResponseReturnValue:
    gc.collect()
    reactor = sys.modules.get("flask_sse_stream.transports.reactor")
    stats = sse.stats()
    return {
        "handed_off": sum(map(len, reactor.Reactor._all)) if reactor is not None else 0,
        "streams": stats.streams,
        "keys": stats.keys,
        "opened": stats.opened,
        "closed": dict(stats.closed),
        "dropped": stats.dropped,
        "outbox": stats.outbox,
        "threads": threading.active_count(),
        "greenlets": sum(
            issubclass(type(item), greenlet.greenlet) and not item.dead and type(item).__name__ != "hub"
            for item in gc.get_objects()
        ),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "resident": resident(),
    }


@app.get("/count")
def count() -> ResponseReturnValue:
    """How many streams ``key`` has, or all; without a look at every object, and without a descriptor."""
    key = request.args.get("key")
    return {"streams": sse.count_all() if key is None else sse.count(key)}


@app.post("/publish")
def publish() -> ResponseReturnValue:
    """Publish ``times`` events of ``size`` bytes, each with its number from ``first`` on, to all ``keys``."""
    asked: dict[str, Any] = request.get_json()
    for number in range(asked.get("first", 0), asked.get("first", 0) + asked.get("times", 1)):
        for key in asked["keys"]:
            sse.publish(key, f"{key} {number} " + "x" * asked.get("size", 0))
    return "", 204


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    from gevent.pywsgi import WSGIServer

    WSGIServer((sys.argv[2], int(sys.argv[1])), app, backlog=4096, log=None).serve_forever()
