"""An app whose jobs several processes start, read and cancel; its settings are the environment's ``SSE_`` variables."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from flask import Flask, Response, abort, request
from flask.typing import ResponseReturnValue
from workers_app import app as base

from flask_sse_stream import SSE

app = Flask(__name__)
app.config.update({name: value for name, value in base.config.items() if name.startswith("SSE_")})
sse = SSE(app)


@app.after_request
def tell_the_process(response: Response) -> Response:
    response.headers["X-Process"] = str(os.getpid())
    return response


def count(most: int) -> Iterator[str]:
    try:
        for number in range(most):
            yield str(number)
            time.sleep(0.02)
    finally:
        app.logger.error("the generator was closed")


@app.post("/jobs/<int:most>")
def start(most: int) -> ResponseReturnValue:
    job = sse.job()
    job.start(count(most))
    return job.id


@app.get("/jobs/<id>")
def read(id: str) -> ResponseReturnValue:
    if request.args.get("user") == "mallory":
        abort(403)
    return sse.job(id).response()


@app.delete("/jobs/<id>")
def cancel(id: str) -> ResponseReturnValue:
    return str(sse.job(id).cancel())
