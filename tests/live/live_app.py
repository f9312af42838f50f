"""The one app that every server of the live suite runs, and what lets a test see into its process.

It uses the extension as anybody would; nothing here reaches into it.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import parse_qs

import gevent
import greenlet
from flask import Flask, Response, abort, request
from flask.typing import ResponseReturnValue
from gevent.monkey import get_original
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from flask_sse_stream import SSE, Event, PoolManager, Stream

PAGE = """<!doctype html><meta charset="utf-8"><title>listener</title>
<script>
"use strict";
var events = [], opens = 0, errors = [], source = null;
function listen(url, names) {
  source = new EventSource(url);
  source.onopen = () => { opens += 1; };
  source.onerror = () => { errors.push(source.readyState); };
  for (const name of ["message", ...names]) {
    source.addEventListener(name, e => { events.push({type: e.type, data: e.data, id: e.lastEventId}); });
  }
}
</script>
"""


def create_app() -> Flask:
    """Make the app; ``SSE_PING_INTERVAL`` and ``SSE_RETRY`` may be given by the environment."""
    app = Flask(__name__)
    app.config["SSE_PING_INTERVAL"] = float(os.environ.get("SSE_PING_INTERVAL", "0.5"))
    app.config["SSE_RETRY"] = int(os.environ.get("SSE_RETRY", "300"))
    app.config["SSE_QUEUE_EVENTS"] = int(os.environ.get("SSE_QUEUE_EVENTS", "1000"))
    if "SSE_MAX_AGE" in os.environ:
        app.config["SSE_MAX_AGE"] = float(os.environ["SSE_MAX_AGE"])
    sse = SSE(app)
    before_any_request = [sse.publish("startup", f"start {number}") for number in (1, 2)]

    _watch_requests(app)
    _add_pools(app, sse, before_any_request)
    _add_streams_of_one_request(app, sse)
    _add_publishers(app, sse)
    # Two more apps in the process, so that the limits need no server of their own.
    app.wsgi_app = DispatcherMiddleware(  # type: ignore[method-assign]
        app.wsgi_app,
        {
            "/ticketed": _ticketed().wsgi_app,
            **{f"/full-{answer}": _limited(answer).wsgi_app for answer in ("retry", "503")},
        },
    )
    return app


def _limited(answer: str) -> Flask:
    app = Flask(__name__)
    sse = SSE(app, max_clients=2, when_full=answer, ping_interval=0.5, retry=300)

    @app.get("/count")
    def count() -> ResponseReturnValue:
        return {"streams": sse.count_all(), "refused": sse.stats().refused}

    return app


def _ticketed() -> Flask:
    """One whose streams need a ticket, of which ``/ticket`` gives those to whom it is told to give them."""
    app = Flask(__name__)
    app.secret_key = "of the live tests"
    sse = SSE(app, tickets=True, ping_interval=0.4, retry=300, client_path=None)
    given: list[str] = []

    @app.get("/ticket/<key>")
    def ticket(key: str) -> ResponseReturnValue:
        given.append(key)
        if given.count(key) > int(request.args.get("at-most", "100")):
            abort(401)
        ttl = float(request.args["ttl"])
        return sse.ticket(key, ttl=ttl) if "alone" in request.args else sse.url_for_stream(key, user=key, ttl=ttl)

    @app.get("/given/<key>")
    def how_many(key: str) -> ResponseReturnValue:
        return {"given": given.count(key), "streams": sse.count(key)}

    @app.post("/publish")
    def publish() -> ResponseReturnValue:
        return {"id": sse.publish(**request.get_json())}

    return app


def pause(seconds: float) -> None:
    """Sleep as code under this server does: in a greenlet that nobody patched, ``time.sleep`` stops the hub."""
    if isinstance(gevent.getcurrent(), gevent.Greenlet):
        gevent.sleep(seconds)
    else:
        time.sleep(seconds)


# What a test may look at


def _watch_requests(app: Flask) -> None:
    seen: collections.deque[dict[str, Any]] = collections.deque(maxlen=10_000)

    @app.after_request
    def note(response: Response) -> Response:
        seen.append(
            {
                "method": request.method,
                "path": request.path,
                "keys": parse_qs(request.query_string.decode("latin-1")).get("connectKey", []),
                "last_event_id": request.headers.get("Last-Event-ID"),
            }
        )
        return response

    @app.get("/requests")
    def requests() -> ResponseReturnValue:
        return list(seen)

    @app.get("/page")
    def page() -> ResponseReturnValue:
        return PAGE


def _add_pools(app: Flask, sse: SSE, before_any_request: list[str]) -> None:
    @app.post("/publish")
    def publish() -> ResponseReturnValue:
        given = request.get_json()
        key = given.pop("key", None)
        return {"id": sse.publish_all(**given) if key is None else sse.publish(key, **given)}

    @app.post("/burst")
    def burst() -> ResponseReturnValue:
        return [sse.publish(request.args["key"], str(number)) for number in range(int(request.args["times"]))]

    @app.post("/close")
    def close() -> ResponseReturnValue:
        return {"closed": sse.close(request.args["key"], reconnect="reconnect" in request.args)}

    @app.get("/count")
    def count() -> ResponseReturnValue:
        return {"count": sse.count(request.args["key"])}

    @app.get("/state")
    def state() -> ResponseReturnValue:
        gc.collect()
        # Without those that every thread has once it was asked which is its own: they have no parent.
        greenlets = [item for item in gc.get_objects() if isinstance(item, greenlet.greenlet) and item.parent]
        # gunicorn's threads stay for later, and it starts them as it thinks fit.
        pool = [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]
        return {
            "pid": os.getpid(),
            "patched": "gevent.monkey" in sys.modules and sys.modules["gevent.monkey"].is_module_patched("threading"),
            "count_all": sse.count_all(),
            "stats": dataclasses.asdict(sse.stats()),
            "startup": before_any_request,
            "greenlets": sum(not item.dead for item in greenlets),
            "threads": len(os.listdir("/proc/self/task")) - len(pool),
            "files": len(os.listdir("/proc/self/fd")),
        }


# Streams of one request


def _add_streams_of_one_request(app: Flask, sse: SSE) -> None:
    noted: dict[str, list[str]] = collections.defaultdict(list)
    released: set[str] = set()

    @app.get("/noted/<name>")
    def what_was_noted(name: str) -> ResponseReturnValue:
        return noted[name]

    @app.post("/release/<name>")
    def release(name: str) -> ResponseReturnValue:
        released.add(name)
        return "", 204

    @app.get("/countdown/<name>")
    @sse.event_stream()
    def countdown(name: str) -> Iterator[Any]:
        noted[name].append("started")
        for number in (3, 2, 1):
            yield {"left": number}

    @app.get("/ticking/<name>")
    @sse.event_stream()
    def ticking(name: str) -> Iterator[Any]:
        try:
            number = 0
            while True:
                yield {"tick": number}
                number += 1
                pause(0.02)
        finally:
            noted[name].append("closed")

    @app.get("/thinking/<name>")
    @sse.event_stream()
    def thinking(name: str) -> Iterator[Any]:
        try:
            yield "wait"
            while name not in released:
                pause(0.02)
            yield "answer"
        finally:
            noted[name].append("closed")

    @app.get("/raising")
    @sse.event_stream()
    def raising() -> Iterator[Any]:
        yield "before"
        raise RuntimeError("the secret of the source")

    @app.get("/forbidden")
    @sse.event_stream()
    def forbidden() -> Iterator[Any]:
        if request.method == "GET":
            abort(403)
        yield "never"

    @app.post("/echo")
    @sse.event_stream()
    def echo() -> Iterator[Any]:
        given = request.get_json()
        yield Event(comment="")
        for part in given["parts"]:
            yield Event(part, event="part")

    @app.get("/function")
    def function() -> ResponseReturnValue:
        def feed(stream: Stream) -> None:
            stream.send("one")
            stream.send({"two": 2}, event="second", id="2")
            stream.send_end({"total": 2}, event="done")

        return sse.stream(feed)

    @app.get("/pushed")
    def pushed() -> ResponseReturnValue:
        response = sse.stream()
        stream = response.stream
        stream.send("before the response")

        def later() -> None:
            stream.send("after it")
            stream.send_end()

        threading.Timer(0.05, later).start()
        return response


# Publishing from everywhere


class _Finalised:
    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action

    def __del__(self) -> None:
        self.action()


def _add_publishers(app: Flask, sse: SSE) -> None:
    signalled: collections.deque[str] = collections.deque()

    def on_signal(signum: int, frame: object) -> None:
        manager: PoolManager = app.extensions["sse_stream"]
        manager.publish(signalled.popleft(), "signal")

    # In every server it is the main thread that makes the app.
    signal.signal(signal.SIGUSR1, on_signal)

    def in_native_thread(action: Callable[[], None]) -> None:
        get_original("_thread", "start_new_thread")(action, ())

    def in_threadpool(action: Callable[[], None]) -> None:
        gevent.get_hub().threadpool.spawn(action)
        pause(0.01)  # Without a loop of gevent's that goes on, the thread's hub has to be let run.

    def in_hub(action: Callable[[], None]) -> None:
        gevent.get_hub().loop.run_callback(action)
        gevent.sleep(0.01)

    def in_executor(action: Callable[[], None]) -> None:
        with ThreadPoolExecutor(2) as executor:
            executor.submit(action).result()

    def in_asyncio(action: Callable[[], None]) -> None:
        async def main() -> None:
            await asyncio.sleep(0)
            action()

        thread = threading.Thread(target=lambda: asyncio.run(main()))
        thread.start()
        thread.join()

    def in_greenlet(action: Callable[[], None]) -> None:
        gevent.spawn(action).join()

    places: dict[str, Callable[[Callable[[], None]], object]] = {
        "greenlet": in_greenlet,
        "native-thread": in_native_thread,
        "threadpool": in_threadpool,
        "hub-callback": in_hub,
        "executor": in_executor,
        "asyncio": in_asyncio,
        "thread": lambda action: threading.Thread(target=action).start(),
        "finalizer": _Finalised,
    }

    # Those in another thread have no context of Flask's: ``sse`` knows its only app.
    @app.post("/publish-from/<place>")
    def publish_from(place: str) -> ResponseReturnValue:
        key = request.args["key"]
        if place == "view":
            sse.publish(key, place)
        elif place == "signal":
            signalled.append(key)
            os.kill(os.getpid(), signal.SIGUSR1)
        else:

            def action() -> None:
                sse.publish(key, place)

            places[place](action)
        return "", 204
