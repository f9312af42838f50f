"""What ``docs/scheduling.rst`` calls clock.py, on the app of several workers. It notes who asks and who speaks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from workers_app import app, sse

from flask_sse_stream import StreamClosed

__all__ = ["app", "tick"]


def write_down(what: str, **details: Any) -> None:
    with Path(os.environ["NOTES"]).open("a") as notes:  # one write, which no other process comes between
        notes.write(json.dumps({"what": what, "process": os.getpid(), "time": time.monotonic(), **details}) + "\n")


def tick() -> None:
    notes = os.environ["NOTES"]
    # A name that all workers give to what they say for a while, as to a report of the hour.
    same = Path(f"{notes}.same").exists()
    name = "the same" if same else str(int(time.time()))
    write_down("asks", tick=name)
    held = sse.lease("clock", float(os.environ["LEASE"]))
    write_down("has it" if held else "has it not", tick=name)
    if held:
        if same and not Path(f"{notes}.stood").exists():
            Path(f"{notes}.stood").touch()
            write_down("stands still", tick=name)
            os.kill(os.getpid(), signal.SIGSTOP)
        data = {"tick": name, "process": os.getpid()}
        identifier = sse.publish("clock", data, event="tick", idempotency_key=f"clock {name}")
        write_down("has spoken", tick=name, id=identifier)
    for stream in sse.streams("worker"):
        with contextlib.suppress(StreamClosed):
            stream.send({"tick": name, "process": os.getpid()}, event="figures")
