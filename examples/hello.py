"""The two lines: ``SSE(app)`` adds ``/stream``, ``sse.publish`` reaches everybody who listens there.

Run it with ``python examples/hello.py``, open the printed address in two tabs, and type into one of them. Or:

    curl -N 'http://127.0.0.1:5000/stream?connectKey=news' &
    curl -H 'Content-Type: application/json' -d '"hello"' http://127.0.0.1:5000/news
"""

# ruff: noqa: E402
from gevent import monkey

monkey.patch_all()  # before every other import, so that a view that waits (for a database, say) holds up nobody

import os
import signal

import gevent
from flask import Flask, request
from gevent.pywsgi import WSGIServer

from flask_sse_stream import SSE

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Hello</title>
<form><input autofocus placeholder="A headline" aria-label="A headline"> <button>Publish</button></form>
<ul></ul>
<script>
  const source = new EventSource("/stream?connectKey=news");
  source.addEventListener("headline", (event) => {
    const item = document.createElement("li");
    item.textContent = JSON.parse(event.data).title;
    document.querySelector("ul").prepend(item);
  });
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

app = Flask(__name__)
sse = SSE(app)  # GET /stream?connectKey=news


@app.get("/")
def index() -> str:
    return PAGE


@app.post("/news")
def news() -> tuple[str, int]:
    # JSON and not a form: any page of the web can have a browser post a form to here.
    sse.publish("news", {"title": str(request.get_json())[:200]}, event="headline")
    return "", 204


def main() -> None:
    server = WSGIServer(("127.0.0.1", int(os.environ.get("PORT", "5000"))), app)
    for number in (signal.SIGINT, signal.SIGTERM):
        gevent.signal_handler(number, server.stop)
    server.start()
    print(f"http://127.0.0.1:{server.server_port} (Ctrl-C ends it)", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
