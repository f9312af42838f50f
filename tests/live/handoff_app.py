"""An app that tells how many of its streams' sockets the server has given up; ``WRAP`` says what is around it."""

from __future__ import annotations

import gc
import os
import sys
import threading
from typing import Any

import greenlet
from flask import Flask
from flask.typing import ResponseReturnValue
from werkzeug.middleware.proxy_fix import ProxyFix

from flask_sse_stream import SSE

app = Flask(__name__)
sse = SSE(app, ping_interval=1.0, fast_path=os.environ.get("FAST_PATH", "yes") == "yes")


@app.get("/state")
def state() -> ResponseReturnValue:
    gc.collect()
    reactor = sys.modules.get("flask_sse_stream.transports.reactor")
    items = gc.get_objects()
    return {
        "handed_off": sum(map(len, reactor.Reactor._all)) if reactor is not None else 0,
        "threads": threading.active_count(),
        "streams": sse.count_all(),
        "greenlets": sum(issubclass(type(item), greenlet.greenlet) and not item.dead for item in items),
        "environs": sum(type(item) is dict and "wsgi.input" in item for item in items),
    }


@app.post("/publish")
def publish() -> ResponseReturnValue:
    return sse.publish("default", "x")


@app.post("/burst")
def burst() -> ResponseReturnValue:
    for number in range(500):
        sse.publish("default", str(number))
    return "", 204


class Watching:
    """What tools that watch an application do: they wrap ``start_response`` and the body."""

    def __init__(self, application: Any) -> None:
        self._application = application

    def __call__(self, environ: Any, start_response: Any) -> Any:
        def start(status: str, headers: Any, exc_info: Any = None) -> Any:
            return start_response(status, [*headers, ("X-Watched", "yes")], exc_info)

        body = self._application(environ, start)
        try:
            yield from body
        finally:
            if hasattr(body, "close"):
                body.close()


class Replacing(Watching):
    """One that does not pass the server's ``write`` on."""

    def __call__(self, environ: Any, start_response: Any) -> Any:
        def start(status: str, headers: Any, exc_info: Any = None) -> Any:
            write = start_response(status, headers, exc_info)
            return lambda data: write(data)

        return self._application(environ, start)


WRAPS = {"": lambda inner: inner, "proxy": ProxyFix, "watching": Watching, "replacing": Replacing}
app.wsgi_app = WRAPS[os.environ.get("WRAP", "")](app.wsgi_app)  # type: ignore[method-assign]

if __name__ == "__main__":
    if "--patch" in sys.argv:
        from gevent import monkey

        monkey.patch_all()
    from gevent.pywsgi import WSGIServer

    WSGIServer(("127.0.0.1", int(sys.argv[1])), app).serve_forever()
