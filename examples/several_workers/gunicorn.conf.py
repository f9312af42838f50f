"""Four processes under gevent, each of which takes its leave of its clients when it is told to stop."""

from pathlib import Path
from typing import Any

import gevent

wsgi_app = "app:app"
pythonpath = str(Path(__file__).resolve().parent)  # from whichever directory it is started
bind = "127.0.0.1:8000"
worker_class = "gevent"
workers = 4
worker_connections = 10_100  # SSE_MAX_CLIENTS, and a hundred for everything else
keepalive = 5  # seconds; longer than nginx keeps idle connections, or it would now and then use one that just closed


def post_worker_init(worker: Any) -> None:
    gevent.spawn(drain_when_it_stops, worker)


def drain_when_it_stops(worker: Any) -> None:
    # No code of an application runs when gunicorn stops a worker, and of the streams it knows nothing any more.
    while worker.alive:
        gevent.sleep(0.2)
    # Until the process ends: it goes on accepting for a second, and answers on connections that nginx has kept.
    while True:
        worker.wsgi.extensions["sse_stream"].drain()  # each client is told when to come back, no two at one time
        gevent.sleep(0.2)


def worker_exit(server: Any, worker: Any) -> None:  # noqa: ARG001  it is gunicorn that calls it
    if getattr(worker, "wsgi", None) is not None:  # what began since the last look
        worker.wsgi.extensions["sse_stream"].drain()
