"""Streams that not everybody may have, at two origins of one process: the first serves them, the second is foreign.

``/`` wants tickets and lets the pages of the second origin read, without cookies. ``/private`` and ``/listed`` want a
cookie; the second one lets the pages of the second origin read with it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

from flask import Flask, g, request
from flask.typing import ResponseReturnValue
from live_app import PAGE
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from flask_sse_stream import SSE, AccessDenied, Ticket

FOREIGN = os.environ.get("FOREIGN_ORIGIN", "https://foreign.example")
RENEWING = """<!doctype html><meta charset="utf-8"><title>renewing</title>
<script>
"use strict";
var events = [], tickets = 0, source = null, over = "";
async function listen(url, lastEventId) {
  tickets += 1;
  const target = new URL(await (await fetch(url)).text(), location.href);
  if (lastEventId) target.searchParams.set("lastEventId", lastEventId);
  source = new EventSource(target);
  for (const name of ["message", "stream-reset"])
    source.addEventListener(name, e => { events.push({type: e.type, data: e.data, id: e.lastEventId}); });
  source.addEventListener("stream-expired", e => {
    source.close();
    over = JSON.parse(e.data).reason;
    if (over === "expired") listen(url, e.lastEventId);
  });
}
</script>
"""

app = Flask("tickets")
app.config.update(SECRET_KEY="of a test", SSE_TICKETS=True, SSE_RETRY=300, SSE_PING_INTERVAL=0.5)
app.config["SSE_CORS_ORIGINS"] = [FOREIGN]
sse = SSE(app)


@app.get("/renewing")
def renewing() -> ResponseReturnValue:
    return RENEWING


@app.get("/page")
def page() -> ResponseReturnValue:
    return PAGE


@app.get("/url")
def url() -> ResponseReturnValue:
    return sse.url_for_stream(request.args["key"], user="ann", ttl=float(request.args["ttl"]))


@app.post("/publish")
def publish() -> ResponseReturnValue:
    return sse.publish(**request.get_json())


@app.post("/revoke")
def revoke() -> ResponseReturnValue:
    sse.revoke(user="ann")
    return "", 204


def with_cookie(name: str, **options: Any) -> Flask:
    """An application whose streams are for those with a cookie; it opens a session of a database for each request."""
    inner = Flask(name)
    streams = SSE(inner, ping_interval=0.5, retry=300, **options)
    asked: list[dict[str, str | None]] = []
    sessions: set[object] = set()
    inner.extensions["test_sessions"] = sessions

    @streams.authorize
    def only_ann(keys: Any) -> Ticket:
        g.session = object()
        sessions.add(g.session)
        user = request.cookies.get("user")
        asked.append({"origin": request.headers.get("Origin"), "user": user})
        if user is None:
            raise AccessDenied("log in first", status=401)
        return Ticket(keys, user=user)

    @inner.teardown_appcontext
    def remove(error: BaseException | None) -> None:
        sessions.discard(g.pop("session", None))

    @inner.get("/asked")
    def what_was_asked() -> ResponseReturnValue:
        return asked

    @inner.get("/state")
    def state() -> ResponseReturnValue:
        return {"streams": streams.count_all(), "sessions": len(sessions), "begun_with": begun_with}

    @inner.post("/publish")
    def publish() -> ResponseReturnValue:
        return streams.publish(**request.get_json())

    @inner.post("/close")
    def close() -> ResponseReturnValue:
        return {"closed": streams.close_all(reconnect=True)}

    begun_with: list[int] = []
    application = inner.wsgi_app

    def watched(environ: Any, start_response: Any) -> Iterable[bytes]:
        def note(status: str, headers: Any, error: Any = None) -> Any:
            if ("Content-Type", "text/event-stream") in headers:
                begun_with.append(len(sessions))
            return start_response(status, headers, error)

        return application(environ, note)

    inner.wsgi_app = watched  # type: ignore[method-assign]
    return inner


app.wsgi_app = DispatcherMiddleware(  # type: ignore[method-assign]
    app.wsgi_app,
    {
        "/private": with_cookie("private").wsgi_app,
        "/listed": with_cookie("listed", cors_origins=[FOREIGN], cors_credentials=True).wsgi_app,
    },
)


if __name__ == "__main__":
    from gevent.pywsgi import WSGIServer

    servers = [WSGIServer(("127.0.0.1", int(port)), app, log=None) for port in sys.argv[1:]]
    for server in servers[1:]:
        server.start()
    servers[0].serve_forever()
