"""No framework: ``respond`` answers a WSGI request with a pool's stream, or with a generator of its own.

Run it with ``python examples/bare_wsgi.py`` and open the printed address. Or:

    curl -N 'http://127.0.0.1:5000/stream?connectKey=news' &
    curl -d hello http://127.0.0.1:5000/news
    curl -N http://127.0.0.1:5000/countdown
"""

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import gevent
from gevent.pywsgi import WSGIServer

from flask_sse_stream import Event, PoolManager, Settings
from flask_sse_stream.wsgi import last_event_id, respond

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Bare WSGI</title>
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
  const countdown = new EventSource("/countdown");
  countdown.addEventListener("left", (event) => { output.textContent = event.data; });
  countdown.addEventListener("close", () => { output.textContent = "over"; });
  document.querySelector("form").addEventListener("submit", (event) => {
    event.preventDefault();
    const input = document.querySelector("input");
    fetch("/news", { method: "POST", body: input.value });
    input.value = "";
  });
</script>
"""

manager = PoolManager(Settings(public_keys=("news",)))


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    match environ["REQUEST_METHOD"], environ["PATH_INFO"]:
        case _, "/stream":
            return respond(manager, environ, start_response)
        case "GET", "/countdown":
            return respond(manager, environ, start_response, source=countdown(10, last_event_id(environ)))
        case "POST", "/news":
            size = min(int(environ.get("CONTENT_LENGTH") or 0), 1000)
            title = environ["wsgi.input"].read(size).decode("utf-8", "replace")
            manager.publish("news", {"title": title}, event="headline")
            start_response("204 No Content", [])
            return []
        case "GET", "/":
            start_response("200 OK", [("Content-Type", "text/html; charset=utf-8")])
            return [PAGE.encode()]
    start_response("404 Not Found", [("Content-Type", "text/plain")])
    return [b"Not found\n"]


def countdown(start: int, cursor: str | None) -> Iterator[Event]:
    # Each event's id is its number, so a browser whose network failed goes on where it was.
    start = {str(left): left - 1 for left in range(start + 1)}.get(cursor or "", start)
    for left in range(start, -1, -1):
        yield Event(str(left), event="left", id=left)
        if left:
            # Nothing is patched here, and nothing has to be, as long as whatever waits waits as gevent does.
            gevent.sleep(1)  # when the page goes away meanwhile, the generator is closed here


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
