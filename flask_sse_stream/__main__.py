"""``python -m flask_sse_stream``: the commands that need no application."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    main(prog_name="python -m flask_sse_stream")
