"""A stand-in for a language model: it speaks the common chat-completions format over HTTP, and has nothing to say.

``app.py`` starts it by itself. ``python examples/tokens/model.py`` runs it alone, and prints what ``app.py`` then takes
as ``MODEL_URL``. What it does badly on purpose, a prompt asks for: one with the word ``garbage`` gets something that is
no JSON, and at ``break off`` the connection ends in the middle. At ``think`` it is silent for a second first, and ``at
length`` makes its answer long.
"""

# ruff: noqa: E402
from gevent import monkey

monkey.patch_all()

import json
import os
import re
import time
from collections.abc import Iterator

from flask import Flask, Response, request
from gevent.pywsgi import WSGIServer

PIECES_PER_SECOND = float(os.environ.get("PIECES_PER_SECOND", "15"))
TEXT = """You asked: “{prompt}”

I am no language model. I am a stand-in of a hundred lines that speaks as one does: a piece of text, and then another, \
each in an event of its own, over one long response.

Whoever reads me may reload the page, lose the network, or come later on another device. The work that asks me is a \
job: it goes on, its events are kept, and a reader has them all, from the first one on, and each of them once.

That is worth something where I am slow and cost money. Nobody pays twice for one answer because a page was reloaded, \
and nobody pays for the rest of an answer that nobody wants to read."""

app = Flask(__name__)
counts = {"active": 0, "served": 0}


def reply(prompt: str) -> str:
    """Give the whole answer to a prompt."""
    return "\n\n".join([TEXT.format(prompt=prompt)] * (50 if "at length" in prompt else 1))


def pieces(text: str) -> list[str]:
    return re.findall(r"\s*\S{1,6}", text)


def chunk(**delta: str) -> str:
    return f"data: {json.dumps({'object': 'chat.completion.chunk', 'choices': [{'index': 0, 'delta': delta}]})}\n\n"


def completion(prompt: str) -> Iterator[str]:
    counts["active"] += 1
    counts["served"] += 1
    try:
        yield chunk(role="assistant", content="")
        time.sleep("think" in prompt)
        for number, piece in enumerate(pieces(reply(prompt))):
            if number == 20 and "garbage" in prompt:
                yield "data: <html>502 Bad Gateway</html>\n\n"
            if number == 20 and "break off" in prompt:
                return
            yield chunk(content=piece)
            time.sleep(1 / PIECES_PER_SECOND)
        yield "data: [DONE]\n\n"
    finally:  # also when the client leaves
        counts["active"] -= 1


@app.post("/v1/chat/completions")
def chat() -> Response:
    prompt = request.get_json()["messages"][-1]["content"]
    return Response(completion(prompt), mimetype="text/event-stream")


@app.get("/counts")
def get_counts() -> dict[str, int]:
    """How many answers are being written, and how many were asked for."""
    return counts


def serve(port: int) -> WSGIServer:
    """Start it on a port, 0 for any that is free."""
    server = WSGIServer(("127.0.0.1", port), app, log=None)
    server.start()
    return server


if __name__ == "__main__":
    server = serve(int(os.environ.get("PORT", "5001")))
    print(f"http://127.0.0.1:{server.server_port}/v1 (Ctrl-C ends it)", flush=True)
    server.serve_forever()
