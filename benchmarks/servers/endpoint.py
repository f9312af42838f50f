"""What every server of the benchmarks has beside its streams, so that only the streams differ.

``POST /publish?events=200&interval=0.05&size=100`` publishes that many events of ``size`` bytes to the key
``bench``, ``interval`` seconds apart (0: back to back), and answers with the times at which each publish
began and returned. With ``&keys=1000`` each event goes to the keys ``bench-0`` to ``bench-999`` in turn, and the
times are those of the whole turn. ``GET /view`` is an ordinary view. :func:`serve` runs an app on the listening
socket the benchmark passed on.

The data of an event begins with its number in the request and the time at which it is published: by these the
load client sees what is lost or doubled, and how old an event is.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from time import monotonic_ns

import gevent
from flask import Flask, Response, jsonify, request
from gevent.pywsgi import WSGIServer

KEY = "bench"

# Seconds between heartbeats; the benchmark sets it, gunicorn's command line has no place for it.
PING_SECONDS = float(os.environ.get("BENCHMARK_PING_SECONDS", "10"))

# Where the events are kept, of a server that does not keep them itself.
STORE_URL = os.environ.get("BENCHMARK_STORE_URL", "memory://")


def key_names(keys: int) -> list[str]:
    """The keys that a request for so many means; 0 is the one that all share."""
    return [f"{KEY}-{number}" for number in range(keys)] or [KEY]


def add_publish(app: Flask, publish: Callable[[str, str], object]) -> None:
    """Add ``POST /publish`` and ``GET /view`` to ``app``; ``publish`` takes a key and the text of one event."""

    @app.post("/publish")
    def publish_events() -> Response:
        events = request.args.get("events", 1, type=int)
        interval = round(request.args.get("interval", 0.0, type=float) * 1e9)
        size = request.args.get("size", 100, type=int)
        keys = key_names(request.args.get("keys", 0, type=int))
        started, returned = [0] * events, [0] * events
        due = monotonic_ns()
        for number in range(events):
            if interval:
                due += interval
                gevent.sleep(max(0, due - monotonic_ns()) / 1e9)
            started[number] = monotonic_ns()
            text = f"{number} {started[number]} ".ljust(size, "x")
            for key in keys:
                publish(key, text)
            returned[number] = monotonic_ns()
        return jsonify(started=started, returned=returned)

    @app.get("/view")
    def view() -> str:
        return "an ordinary view\n"


def serve(app: Flask) -> None:
    """Serve ``app`` under gevent's pywsgi until the process is ended; the first argument is the socket's number."""
    listener = socket.socket(fileno=int(sys.argv[1]))
    listener.setblocking(False)  # noqa: FBT003 - its only parameter has no name
    WSGIServer(listener, app, log=None).serve_forever()
