"""Bottle: the middleware answers ``/stream``, routes publish, and a mounted callable is a stream of one request.

It needs ``pip install bottle``. Run it with ``python examples/bottle_app.py`` and open the printed address. Or:

    curl -N 'http://127.0.0.1:5000/stream?connectKey=news' &
    curl -H 'Content-Type: application/json' -d '"hello"' http://127.0.0.1:5000/news
    curl -N http://127.0.0.1:5000/countdown/
"""

# ruff: noqa: E402
from gevent import monkey

monkey.patch_all()  # before every other import, so that a route that waits (for a database, say) holds up nobody

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import gevent
from bottle import Bottle, HTTPResponse, abort, request
from gevent.pywsgi import WSGIServer

from flask_sse_stream import Event, EventError, PoolManager, Settings
from flask_sse_stream.wsgi import SSEMiddleware, last_event_id, respond

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Bottle</title>
<form><input autofocus placeholder="A headline" aria-label="A headline"> <button>Publish</button></form>
<p>Countdown: <output></output></p>
<ul></ul>
<script>
  const news = new EventSource("/stream?connectKey=news");
  news.addEventListener("headline", (event) => {
    const item = document.createElement("li");
    item.textContent = JSON.parse(event.data).title;
    document.querySelector("ul").prepend(item);
  });
  const output = document.querySelector("output");
  const countdown = new EventSource("/countdown/");
  countdown.addEventListener("left", (event) => { output.textContent = event.data; });
  countdown.addEventListener("close", () => { output.textContent = "over"; });
  document.querySelector("form").addEventListener("submit", (event) => {
    event.preventDefault();
    const input = document.querySelector("input");
    fetch("/news", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(input.value),
    });
    input.value = "";
  });
</script>
"""

app = Bottle()
manager = PoolManager(Settings(public_keys=("news",)))  # the same settings as in Flask, without SSE_


@app.get("/")
def index() -> str:
    return PAGE


@app.post("/news")
def news() -> HTTPResponse:
    # JSON and not a form: any page of the web can have a browser post a form to here.
    title = request.json
    if not isinstance(title, str):
        abort(400, "a headline is a JSON string")
    try:
        manager.publish("news", {"title": title}, event="headline")
    except EventError as error:  # too large, or no text that UTF-8 can carry
        abort(400, str(error))
    return HTTPResponse(status=204)


def countdown(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answer with a stream of this request alone, which has an end. A WSGI application."""
    return respond(manager, environ, start_response, source=count_from(10, last_event_id(environ)))


def count_from(start: int, cursor: str | None) -> Iterator[Event]:
    # Each event's id is its number, so a browser whose network failed goes on where it was.
    start = {str(left): left - 1 for left in range(start + 1)}.get(cursor or "", start)
    for left in range(start, -1, -1):
        yield Event(str(left), event="left", id=left)
        if left:
            time.sleep(1)  # when the page goes away meanwhile, the generator is closed here


app.mount("/countdown/", countdown)
application = SSEMiddleware(app, manager)  # GET /stream?connectKey=news


def main() -> None:
    server = WSGIServer(("127.0.0.1", int(os.environ.get("PORT", "5000"))), application)

    def stop() -> None:
        # Browsers come back when the server does: each is told another time, so that they do not come all at once.
        manager.drain()
        server.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        gevent.signal_handler(number, stop)
    server.start()
    print(f"http://127.0.0.1:{server.server_port} (Ctrl-C ends it)", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
