"""A generator view: a stream of one request, which has an end and does not start again by itself.

Run it with ``python examples/countdown.py`` and open the printed address. Or:

    curl -N 'http://127.0.0.1:5000/countdown?from=3'
"""

# ruff: noqa: E402
from gevent import monkey

monkey.patch_all()  # before every other import, so that a view that waits (for a database, say) holds up nobody

import os
import signal
import time
from collections.abc import Iterator

import gevent
from flask import Flask, abort, request
from gevent.pywsgi import WSGIServer

from flask_sse_stream import SSE, Event

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Countdown</title>
<p><output>10</output></p>
<script>
  const output = document.querySelector("output");
  const source = new EventSource("/countdown?from=10");
  source.addEventListener("left", (event) => { output.textContent = event.data; });
  // An EventSource whose stream ended asks once more; the answer is 204 then, and it stops.
  source.addEventListener("close", () => { output.textContent = "Lift-off"; });
</script>
"""

app = Flask(__name__)
sse = SSE(app, path=None)  # there are no pools here, so there is no /stream


@app.get("/")
def index() -> str:
    return PAGE


@app.get("/countdown")
@sse.event_stream()
def countdown() -> Iterator[Event]:
    # Up to its first yield this is a view like any other: it has the request, and may answer 400.
    start = request.args.get("from", 10, type=int)
    if not 1 <= start <= 60:
        abort(400, "from 1 to 60")
    # Each event's id is its number, so a browser whose network failed goes on where it was.
    start = min(start, request.headers.get("Last-Event-ID", start + 1, type=int) - 1)
    for left in range(start, -1, -1):
        yield Event(str(left), event="left", id=left)
        if left:
            time.sleep(1)  # when the page goes away meanwhile, the generator is closed here


def main() -> None:
    server = WSGIServer(("127.0.0.1", int(os.environ.get("PORT", "5000"))), app)
    for number in (signal.SIGINT, signal.SIGTERM):
        gevent.signal_handler(number, server.stop)
    server.start()
    print(f"http://127.0.0.1:{server.server_port} (Ctrl-C ends it)", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
