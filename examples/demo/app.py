"""A page that shows this machine, a chat, a countdown and what a cut connection misses: all of it as it happens.

Run it with ``python examples/demo/app.py`` (it needs flask_sse_stream and psutil) and open the printed address in
two tabs. HOST and PORT in the environment say where it listens.
"""

# ruff: noqa: E402
from gevent import monkey

monkey.patch_all()  # before every other import, so that they all get the cooperative socket, time and threading

import os
import signal
import time
import uuid
from collections import deque
from collections.abc import Iterator
from typing import Any

import gevent
import gevent.event
import psutil
from flask import Flask, Response, abort, render_template, request
from gevent.pywsgi import WSGIServer

from flask_sse_stream import SSE, Event
from flask_sse_stream.extension import stream_closed, stream_opened

ROOMS = {"lobby": "Lobby", "kitchen": "Kitchen", "garden": "Garden"}
TICKS_PER_SECOND = 4
CUT_SECONDS = 5
IDLE_SECONDS = 60

app = Flask(__name__)
# A page that is new gets the last so many events of its pools together, so that its charts begin with a past.
sse = SSE(app, join_history=300)
# The talk of each room; in an application of several processes that would be a table of a database.
talks: dict[str, deque[dict[str, Any]]] = {room: deque(maxlen=100) for room in ROOMS}
listeners_changed = gevent.event.Event()


@app.get("/")
def index() -> Response:
    page = render_template("index.html", rooms=ROOMS, cut_seconds=CUT_SECONDS, now=time.time(), tab=uuid.uuid4())
    # 'self' is the proof that the page needs no other host; and a kept page would tell an old time.
    headers = {"Content-Security-Policy": "default-src 'self'", "Cache-Control": "no-store"}
    return Response(page, headers=headers)


@app.get("/chat/<room>")
def talk(room: str) -> list[dict[str, Any]]:
    """Give what was said so far. The page asks when its stream is open, so that nothing falls in between."""
    if room not in ROOMS:
        abort(404)
    return list(talks[room])


@app.post("/chat/<room>")
def say(room: str) -> tuple[str, int]:
    """Hand one message to everybody in the room."""
    if room not in ROOMS:
        abort(404)
    # JSON and not a form: any page of the web can have a browser post a form to here.
    message = request.get_json()
    said: dict[str, Any] = {"at": time.time()}
    for field, most in (("name", 24), ("text", 500)):
        value = message.get(field) if isinstance(message, dict) else None
        if not isinstance(value, str) or not 0 < len(value.strip()) <= most:
            abort(400, f"a message has a {field} of 1 to {most} characters")
        said[field] = value.strip()
    # The id by which the page knows a message that comes to it both ways.
    talks[room].append(said | {"id": sse.publish(f"room-{room}", said, event="said")})
    return "", 204


@app.post("/cut/<uuid:tab>")
def cut(tab: uuid.UUID) -> tuple[str, int]:
    """End the stream of one tab. Each has a pool to itself beside the shared ones, so the others stay as they are."""
    for stream in sse.streams(f"tab-{tab}"):
        stream.send(retry=CUT_SECONDS * 1000)  # the browser comes back after so long, with its cursor
        stream.close()
    return "", 204


@app.get("/countdown")
@sse.event_stream()
def countdown() -> Iterator[Event]:
    """Count down for this one request: a stream that has an end."""
    start = request.args.get("from", 10, type=int)
    if not 1 <= start <= 60:
        abort(400, "from 1 to 60")
    # Each event's id is its number, so a browser whose network failed goes on where it was.
    start = min(start, request.headers.get("Last-Event-ID", start + 1, type=int) - 1)
    for left in range(start, -1, -1):
        yield Event({"left": left}, event="left", id=str(left))
        if left:
            gevent.sleep(1)  # when the page goes away meanwhile, the generator is closed here


def publish_machine() -> None:
    """Publish what this machine does, every second while somebody looks."""
    before = None
    idle = 0
    while True:
        gevent.sleep(1)
        # A page that was cut off counts as looking for a while, or there would be nothing to replay to it.
        idle = 0 if sse.count("machine") else idle + 1
        if idle > IDLE_SECONDS:
            before = None
            continue
        now = time.monotonic()  # a span of time must not depend on somebody setting the clock
        cpu, memory, net = psutil.cpu_percent(), psutil.virtual_memory(), psutil.net_io_counters()
        if before is not None:  # the first reading has nothing to compare with
            then, received, sent = before
            sample = {
                "at": time.time(),
                "cpu": cpu,
                "memory": memory.percent,
                "memory_used": memory.total - memory.available,
                "memory_total": memory.total,
                "received": max(0, net.bytes_recv - received) / (now - then),
                "sent": max(0, net.bytes_sent - sent) / (now - then),
            }
            sse.publish("machine", sample, event="machine")
        before = now, net.bytes_recv, net.bytes_sent


def publish_ticks() -> None:
    """Publish numbers, also while nobody listens: a page that was cut off shall see that none is missing."""
    number = 0
    while True:
        gevent.sleep(1 / TICKS_PER_SECOND)
        number += 1
        sse.publish("ticks", {"number": number, "at": time.time()}, event="tick")


@stream_opened.connect_via(app)
@stream_closed.connect_via(app)
def note_change(*_: object, **__: object) -> None:
    """Only set a flag: this is called wherever a stream begins or ends, and must not keep that from going on."""
    listeners_changed.set()


def publish_listeners() -> None:
    """Publish how many streams each pool has, when that has changed."""
    keys = ["machine", "ticks", *(f"room-{room}" for room in ROOMS)]
    while True:
        listeners_changed.wait()
        gevent.sleep(0.2)  # a page that is loaded anew ends one stream and begins another: tell it once
        listeners_changed.clear()
        pools = {key: sse.count(key) for key in keys}
        sse.publish("listeners", {"total": sse.count_all(), "pools": pools}, event="listeners")


def main() -> None:
    host, port = os.environ.get("HOST", "127.0.0.1"), int(os.environ.get("PORT", "5000"))
    server = WSGIServer((host, port), app, log=None)
    try:
        server.start()
    except OSError as error:
        raise SystemExit(f"Cannot listen on {host}:{port} ({error.strerror}): set PORT to a free one.") from None
    for number in (signal.SIGINT, signal.SIGTERM):
        gevent.signal_handler(number, server.stop)
    for work in (publish_machine, publish_ticks, publish_listeners):
        gevent.spawn(work)
    print(f"The demo is on http://{host}:{server.server_port} (Ctrl-C ends it)", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
