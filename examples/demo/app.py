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
from collections.abc import Iterator

import gevent
import psutil
from flask import Flask, Response, abort, render_template, request
from gevent.pywsgi import WSGIServer

from flask_sse_stream import SSE, Event

ROOMS = {"lobby": "Lobby", "kitchen": "Kitchen", "garden": "Garden"}
TICKS_PER_SECOND = 4
CUT_SECONDS = 5
IDLE_SECONDS = 60

app = Flask(__name__)
# A page that comes without a cursor is given the last events of its pools: charts with a past, the talk of the room.
sse = SSE(app, join_history=120)


@app.get("/")
def index() -> Response:
    page = render_template("index.html", rooms=ROOMS, cut_seconds=CUT_SECONDS, now=time.time())
    # 'self' is the proof that the page needs no other host; and a kept page would tell an old time.
    headers = {"Content-Security-Policy": "default-src 'self'", "Cache-Control": "no-store"}
    return Response(page, headers=headers)


@app.post("/chat/<room>")
def say(room: str) -> tuple[str, int]:
    """Hand one message to everybody in the room; the log of the pool is the room's history."""
    # JSON and not a form: a page of another origin could post a form here without being asked.
    message = request.get_json()
    if room not in ROOMS:
        abort(404)
    if not isinstance(message, dict):
        abort(400, "a message is an object with a name and a text")
    name, text = (" ".join(str(message.get(field, "")).split()) for field in ("name", "text"))
    if not 0 < len(name) <= 24 or not 0 < len(text) <= 500:
        abort(400, "a name has 1 to 24 characters, a text 1 to 500")
    sse.publish(f"room-{room}", {"room": room, "name": name, "text": text, "at": time.time()}, event="said")
    return "", 204


@app.post("/cut/<tab>")
def cut(tab: str) -> tuple[str, int]:
    """End the stream of one tab. Each has a pool to itself beside the shared ones, so the others stay as they are."""
    sse.publish(f"tab-{tab}", retry=CUT_SECONDS * 1000)  # the browser comes back after so long, with its cursor
    sse.close(f"tab-{tab}", reconnect=True)
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
        now, cpu, memory, net = time.time(), psutil.cpu_percent(), psutil.virtual_memory(), psutil.net_io_counters()
        if before is not None:  # the first reading has nothing to compare with
            then, received, sent = before
            sample = {
                "at": now,
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


def publish_listeners() -> None:
    """Publish how many streams each pool has, when that has changed."""
    before = None
    while True:
        gevent.sleep(0.5)
        keys = ["machine", "ticks", *(f"room-{room}" for room in ROOMS)]
        now = {"total": sse.count_all(), "pools": {key: sse.count(key) for key in keys}}
        if now != before:
            sse.publish("listeners", now, event="listeners")
            before = now


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
