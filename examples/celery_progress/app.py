"""A page that watches Celery tasks at work, and the view that starts them.

The tasks are in ``tasks.py``. README.md beside it says how to start the worker; then run this with
``python examples/celery_progress/app.py`` and open the printed address.
"""

# ruff: noqa: E402
from gevent import monkey

monkey.patch_all()  # before every other import, so that waiting for Redis holds up nobody

import os
import signal
import uuid

import gevent
from flask import Flask, Response, abort, render_template, request
from gevent.pywsgi import WSGIServer
from kombu.exceptions import OperationalError
from tasks import SSE_BROKER_URL, celery, count_names

from flask_sse_stream import SSE, BrokerError

app = Flask(__name__)
sse = SSE(
    app,
    broker_url=SSE_BROKER_URL,
    public_keys=["task-*"],  # whoever knows a task's id, which nobody can guess, may watch it
    join_history=1,  # a page that comes late gets the latest event, which has all of the task's state
)


@app.get("/")
def index() -> Response:
    # 'self' is the proof that the page needs no other host.
    return Response(render_template("index.html"), headers={"Content-Security-Policy": "default-src 'self'"})


@app.post("/tasks")
def start() -> tuple[dict[str, str], int]:
    # JSON and not a form: any page of the web can have a browser post a form to here.
    order = request.get_json()
    letters = order.get("letters") if isinstance(order, dict) else None
    if type(letters) is not int or not 1 <= letters <= 30:
        abort(400, "letters is a whole number from 1 to 30")
    task_id = str(uuid.uuid4())
    try:
        # Before the task is sent, or a quick worker would be heard first.
        sse.publish(f"task-{task_id}", {"task": task_id, "kwargs": {"letters": letters}}, event="waiting")
        count_names.apply_async(kwargs={"letters": letters}, task_id=task_id)
    except (BrokerError, OperationalError):
        app.logger.exception("a task could not be started")
        abort(503, "Redis is away")
    return {"task": task_id}, 202


@app.delete("/tasks/<uuid:task_id>")
def stop(task_id: uuid.UUID) -> tuple[str, int]:
    # Its worker says that it has stopped. A page of another site cannot have a browser delete anything here.
    try:
        with gevent.Timeout(2):  # or Celery would wait for a Redis that is away until it is back
            celery.control.revoke(str(task_id), terminate=True)
    except (gevent.Timeout, OperationalError):
        app.logger.exception("a task could not be stopped")
        abort(503, "Redis is away")
    return "", 202


def main() -> None:
    server = WSGIServer(("127.0.0.1", int(os.environ.get("PORT", "5000"))), app)

    def stop() -> None:
        # Browsers come back when the server does: each is told another time, so that they do not come all at once.
        sse.drain()
        server.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        gevent.signal_handler(number, stop)
    server.start()
    print(f"http://127.0.0.1:{server.server_port} (Ctrl-C ends it)", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
