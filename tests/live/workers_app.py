"""The app that several processes serve at once; its settings are the environment's ``SSE_`` variables.

Every response tells which process it came from. Run as a program it is one process of gevent's own server, and with
``--patch`` one that is patched in full; PATCH in the environment does so anywhere.
"""

from __future__ import annotations

import os
import sys

if "--patch" in sys.argv or "PATCH" in os.environ:
    from gevent import monkey

    monkey.patch_all()

import json
from typing import Any

from flask import Flask, Response, request
from flask.typing import ResponseReturnValue

from flask_sse_stream import SSE


def _setting(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


app = Flask(__name__)
app.config.update({name: _setting(text) for name, text in os.environ.items() if name.startswith("SSE_")})
app.secret_key = os.environ.get("SECRET_KEY")
sse = SSE(app)

# With --preload this is the parent of all workers.
if "PUBLISH_AT_IMPORT" in os.environ:
    sse.publish(os.environ["PUBLISH_AT_IMPORT"], f"imported by {os.getpid()}")


@app.after_request
def tell_the_process(response: Response) -> Response:
    response.headers["X-Process"] = str(os.getpid())
    return response


@app.post("/publish/<key>")
def publish(key: str) -> ResponseReturnValue:
    once = request.headers.get("Idempotency-Key")
    return sse.publish(key, request.get_data(as_text=True), idempotency_key=once)


@app.get("/url/<user>/<key>")
def url(user: str, key: str) -> ResponseReturnValue:
    return sse.url_for_stream(key, user=user)


@app.post("/revoke/<user>")
def revoke(user: str) -> ResponseReturnValue:
    sse.revoke(user=user)
    return "", 204


@app.get("/process")
def process() -> ResponseReturnValue:
    return "here"


if __name__ == "__main__":
    from gevent.pywsgi import WSGIServer

    WSGIServer(("127.0.0.1", int(sys.argv[1])), app, log=None, backlog=2048).serve_forever()
