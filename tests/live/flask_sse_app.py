"""An application of Flask-SSE's, as its documentation shows them. Its second import is the line that a move changes."""

from __future__ import annotations

import os

from flask import Flask, abort, request
from flask.typing import ResponseReturnValue
from flask_sse import sse

PAGE = """<!doctype html><meta charset="utf-8"><title>greetings</title>
<script>
"use strict";
const events = [];
const source = new EventSource("/stream?channel=users.social");
source.addEventListener("greeting", (event) => events.push(JSON.parse(event.data).message));
source.onmessage = (event) => events.push(event.data);
</script>
"""

app = Flask(__name__)
app.config["REDIS_URL"] = os.environ["REDIS_URL"]


@sse.before_request
def check_access() -> None:
    if request.args.get("channel") == "analytics" and "admin" not in request.args:
        abort(403)


app.register_blueprint(sse, url_prefix="/stream")


@app.get("/")
def index() -> ResponseReturnValue:
    return PAGE


@app.post("/hello/<message>")
def hello(message: str) -> ResponseReturnValue:
    sse.publish({"message": message}, type="greeting", channel="users.social")
    return "", 204


@app.post("/say/<text>")
def say(text: str) -> ResponseReturnValue:
    sse.publish(text, channel="users.social")
    return "", 204
