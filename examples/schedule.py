"""Publishing on a schedule: APScheduler runs a job every second, beside the server and in the same process.

It needs ``pip install "flask-sse-stream[schedule]"``. Run it with ``python examples/schedule.py`` and open the
printed address. Or:

    curl -N 'http://127.0.0.1:5000/stream?connectKey=time'

Any number of these processes, each with a PORT of its own, share one clock if SSE_BROKER_URL in their environment names
a log that they share: ``sqlite:////tmp/clock.db``, or ``redis://127.0.0.1``. When one is killed, another one ticks.
"""

# ruff: noqa: E402
from gevent import monkey

monkey.patch_all()  # before every other import, so that a job that waits (for another server, say) holds up nobody

import os
import signal
from datetime import datetime, timezone

import gevent
from apscheduler.schedulers.gevent import GeventScheduler
from flask import Flask
from gevent.pywsgi import WSGIServer

from flask_sse_stream import SSE

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>The time</title>
<p><time></time></p>
<script>
  const source = new EventSource("/stream?connectKey=time");
  source.addEventListener("tick", (event) => {
    document.querySelector("time").textContent = new Date(JSON.parse(event.data).now).toLocaleTimeString();
  });
</script>
"""

app = Flask(__name__)
sse = SSE(
    app,
    broker_url=os.environ.get("SSE_BROKER_URL", "memory://"),
    history_size=60,  # a minute of ticks: a browser that was away for longer starts with the present
    join_history=1,  # a new page shows the time at once
)


@app.get("/")
def index() -> str:
    return PAGE


def tick() -> None:
    # No request and no app context is needed: this instance serves one app.
    if not sse.lease("clock", 5):
        return  # Another process has the clock; if it is killed, it will not have it for more than 5 seconds.
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    # The key is for a process that stood still right here, and has lost the clock meanwhile.
    sse.publish("time", {"now": now}, event="tick", idempotency_key=f"clock {now}")


def main() -> None:
    server = WSGIServer(("127.0.0.1", int(os.environ.get("PORT", "5000"))), app)
    # Started here and not at import, which may happen in a process that serves nobody (a shell, gunicorn --preload).
    scheduler = GeventScheduler(timezone=timezone.utc)
    # After a pause (a laptop slept) one tick, late as it is, and not all that were missed.
    scheduler.add_job(tick, "cron", second="*", coalesce=True, misfire_grace_time=None)

    def stop() -> None:
        # Browsers come back when the server does: each is told another time, so that they do not come all at once.
        sse.drain()
        server.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        gevent.signal_handler(number, stop)
    server.start()
    scheduler.start()
    print(f"http://127.0.0.1:{server.server_port} (Ctrl-C ends it)", flush=True)
    server.serve_forever()
    scheduler.shutdown()


if __name__ == "__main__":
    main()
