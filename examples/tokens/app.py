"""A page that asks a language model and shows its answer while it is written, over reloads.

The model is a stand-in beside it (``model.py``) unless ``MODEL_URL`` names another one that speaks the chat-completions
format. Run it with ``python examples/tokens/app.py`` and open the printed address.
"""

# ruff: noqa: E402
from gevent import monkey

monkey.patch_all()  # before every other import, so that waiting for the model holds up nobody

import json
import os
import signal
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException

import gevent
import model
from flask import Flask, Response, abort, render_template, request
from gevent.pywsgi import WSGIServer

from flask_sse_stream import SSE, Event, EventDecoder, EventError, Job

MODEL_URL = os.environ.get("MODEL_URL", "")
MODEL_KEY = os.environ.get("MODEL_KEY", "")
SILENCE_SECONDS = 30  # a model that says nothing for so long is given up
UNREAD_SECONDS = 3  # for a reload

app = Flask(__name__)
sse = SSE(
    app,
    broker_url=os.environ.get("SSE_BROKER_URL", "memory://"),
    public_keys=["model"],
    join_history=1,  # a page that opens is told at once what the model does
    retry=500,
    ping_interval=float(os.environ.get("PING_INTERVAL", "10")),
)
busy = 0


class ModelError(Exception):
    """The model cannot be asked, or what it says is no answer."""


def ask(prompt: str) -> Iterator[str]:
    """Give the pieces of the model's answer as they come. Whoever closes this hangs up on the model, which stops.

    Raises :class:`ModelError`.
    """
    body = {"model": "stand-in", "stream": True, "messages": [{"role": "user", "content": prompt}]}
    headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
    if MODEL_KEY:
        headers["Authorization"] = f"Bearer {MODEL_KEY}"
    asked = urllib.request.Request(f"{MODEL_URL}/chat/completions", json.dumps(body).encode(), headers)
    decoder = EventDecoder(max_bytes=1024 * 1024)
    try:
        with urllib.request.urlopen(asked, timeout=SILENCE_SECONDS) as answer, being_busy():
            while data := answer.read1(65536):
                for event in decoder.feed(data):
                    if event.data == "[DONE]":
                        return
                    if piece := piece_of(event.data or ""):
                        yield piece
    except (OSError, HTTPException, EventError) as error:
        raise ModelError(f"the model cannot be asked, or hung up: {error}") from error
    raise ModelError("the model's answer broke off")


def piece_of(data: str) -> str:
    try:
        piece = json.loads(data)["choices"][0]["delta"].get("content") or ""
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"the model sent what is no part of an answer: {data!r:.100}") from error
    if not isinstance(piece, str):
        raise ModelError(f"the model sent what is no text: {piece!r:.100}")
    return piece


class being_busy:  # noqa: N801  it reads as what it does
    """Tells every page how many answers the model is writing."""

    def __enter__(self) -> None:
        self.count(1)

    def __exit__(self, *error: object) -> None:
        self.count(-1)

    @staticmethod
    def count(by: int) -> None:
        global busy
        busy += by
        sse.publish("model", {"busy": busy}, event="busy")


def write(job: Job, prompt: str) -> None:
    """Put the model's answer into a job. However it ends, its readers are told."""
    try:
        for piece in ask(prompt):
            job.send(piece, event="token")
    except ModelError as error:
        app.logger.error("an answer failed: %s", error)
        job.failed("The model’s answer broke off.")


def prompt_of(order: object) -> str:
    prompt = order.get("prompt") if isinstance(order, dict) else None
    if not isinstance(prompt, str) or not 0 < len(prompt.strip()) <= 2000:
        abort(400, "prompt is text of 1 to 2000 characters")
    return prompt


@app.get("/")
def index() -> Response:
    # 'self' is the proof that the page needs no other host.
    return Response(render_template("index.html"), headers={"Content-Security-Policy": "default-src 'self'"})


# A job: it survives its readers, and whoever knows its id, which nobody can guess, may read it.


@app.post("/answers")
def start() -> tuple[dict[str, str], int]:
    # JSON and not a form: any page of the web can have a browser post a form to here.
    order = request.get_json()
    prompt = prompt_of(order)
    job = sse.job(stop_when_unread=UNREAD_SECONDS if order.get("unread") == "stop" else None)
    job.start(write, prompt)
    return {"id": job.id}, 202


@app.get("/answers/<id>")
def read(id: str) -> Response:
    return sse.job(id).response()


@app.delete("/answers/<id>")
def stop(id: str) -> dict[str, bool]:
    return {"stopped": sse.job(id).cancel()}


# A stream of one request, as clients of language models want it: the same format as the model's, by POST, and without
# heartbeats, for some of these clients take a comment for broken JSON. It ends with its reader, as the model's does.


@app.post("/v1/chat/completions")
def chat() -> Response:
    order = request.get_json()
    messages = order.get("messages") if isinstance(order, dict) else None
    if not isinstance(messages, list) or not messages or not isinstance(messages[-1], dict):
        abort(400, "messages is a list of messages")
    prompt = prompt_of({"prompt": messages[-1].get("content")})
    return sse.stream(chunks(prompt), close_event=None, heartbeats=False)


def chunks(prompt: str) -> Iterator[Event | str | dict[str, object]]:
    try:
        for piece in ask(prompt):
            yield {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": piece}}]}
    except ModelError as error:
        app.logger.error("an answer failed: %s", error)
        yield {"error": {"message": "The model’s answer broke off."}}
    else:
        yield "[DONE]"


def main() -> None:
    global MODEL_URL
    if not MODEL_URL:
        MODEL_URL = f"http://127.0.0.1:{model.serve(0).server_port}/v1"
    server = WSGIServer(("127.0.0.1", int(os.environ.get("PORT", "5000"))), app)

    def end() -> None:
        # Readers are told what becomes of their answers, and browsers to come back, each at its own time.
        app.extensions["sse_stream"].shutdown()
        server.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        gevent.signal_handler(number, end)
    server.start()
    print(f"http://127.0.0.1:{server.server_port} (Ctrl-C ends it)", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
