"""Several workers: four processes that share one log, in SQLite or in Redis, and a page that tells which did what.

Run it with ``gunicorn -c examples/several_workers/gunicorn.conf.py`` and open http://127.0.0.1:8000 in two tabs.
SSE_BROKER_URL in the environment says where the log is. README.md has the same with Redis, and with nginx in front.
"""

import os
from pathlib import Path

from flask import Flask, abort, render_template, request

from flask_sse_stream import SSE, Stream
from flask_sse_stream.extension import stream_opened


def default_broker_url() -> str:
    # An absolute path: whoever publishes from another directory shall find the same file.
    directory = Path(__file__).resolve().parent / "run"
    directory.mkdir(exist_ok=True)
    return f"sqlite:///{directory}/sse.db"


app = Flask(__name__)
app.config.from_prefixed_env()  # any setting: FLASK_SSE_PING_INTERVAL=5
app.config["SSE_BROKER_URL"] = os.environ.get("SSE_BROKER_URL") or default_broker_url()
sse = SSE(
    app,
    public_keys=["news"],  # a client names its keys itself: only what is meant for all may be open to all
    join_history=20,  # who opens the page sees what was said before
)


@app.get("/")
def index() -> str:
    return render_template("index.html")


@app.post("/news")
def publish() -> tuple[dict[str, object], int]:
    # JSON and not a form: any page of the web can have a browser post a form to here.
    text = request.get_json()
    if not isinstance(text, str) or not 0 < len(text.strip()) <= 200:
        abort(400, "a text of 1 to 200 characters")
    said = {"text": text.strip(), "publisher": os.getpid()}
    return {"id": sse.publish("news", said, event="said"), **said}, 201


@app.get("/worker")
def worker() -> dict[str, int]:
    """Tell who answers. Counting is of one process: these are its own streams and no other's."""
    return {"pid": os.getpid(), "streams": sse.count_all()}


@stream_opened.connect_via(app)
def introduce(_: Flask, stream: Stream) -> None:
    """Tell each client whose stream it has. What it missed comes before this, so the page can tell it apart."""
    stream.send({"pid": os.getpid()}, event="worker")
