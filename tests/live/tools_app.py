"""The app of which the tests look at the metrics, the health and the commands; settings are FLASK_SSE_ variables."""

from __future__ import annotations

import os

from flask import Flask, Response, request
from flask.typing import ResponseReturnValue
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from flask_sse_stream import SSE
from flask_sse_stream.metrics import SSECollector

app = Flask(__name__)
app.config.from_prefixed_env()
sse = SSE(app)
registry = CollectorRegistry()
registry.register(SSECollector(sse.manager))


@app.get("/metrics")
def metrics() -> ResponseReturnValue:
    return Response(generate_latest(registry), content_type=CONTENT_TYPE_LATEST)


@app.get("/ready")
def ready() -> ResponseReturnValue:
    health = sse.health()
    return {"reasons": health.reasons}, 200 if health.ok else 503


@app.get("/count/<key>")
def count(key: str) -> ResponseReturnValue:
    return str(sse.count(key))


@app.post("/close/<key>")
def close(key: str) -> ResponseReturnValue:
    return {"closed": sse.close(key, reconnect=True)}


@app.after_request
def tell_the_process(response: Response) -> Response:
    response.headers["X-Process"] = str(os.getpid())
    return response


@app.post("/publish/<key>")
def publish(key: str) -> ResponseReturnValue:
    return sse.publish(key, request.get_data(as_text=True))
