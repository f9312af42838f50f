"""A chat: each room is a key, and a page listens to several of them through one connection.

Run it with ``python examples/chat.py`` and open the printed address in two tabs. Or:

    curl -N 'http://127.0.0.1:5000/stream?connectKey=room-lobby&connectKey=room-garden'
"""

# ruff: noqa: E402
from gevent import monkey

monkey.patch_all()  # before every other import, so that a view that waits (for a database, say) holds up nobody

import os
import signal

import gevent
from flask import Flask, abort, render_template_string, request
from gevent.pywsgi import WSGIServer

from flask_sse_stream import SSE

ROOMS = ("lobby", "kitchen", "garden")

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Chat</title>
<form>
  <select name="room" aria-label="Room">{% for room in rooms %}<option>{{ room }}</option>{% endfor %}</select>
  <input name="name" required maxlength="24" placeholder="Your name" aria-label="Your name">
  <input name="text" required maxlength="500" placeholder="Say something" aria-label="Say something">
  <button>Say</button>
</form>
<ul></ul>
<script>
  const keys = new URLSearchParams();
  for (const option of document.querySelectorAll("option")) keys.append("connectKey", "room-" + option.value);

  // One connection for all rooms: with HTTP/1.1 a browser allows six to a host, over all its tabs.
  const source = new EventSource("/stream?" + keys);
  source.addEventListener("said", (event) => {
    const said = JSON.parse(event.data);
    const item = document.createElement("li");
    // textContent and never innerHTML: what somebody typed is text, whatever it looks like.
    item.textContent = `[${said.room}] ${said.name}: ${said.text}`;
    document.querySelector("ul").append(item);
  });
  // Away for longer than the server remembers: what is on the page has a hole, so begin anew.
  source.addEventListener("stream-reset", () => location.reload());

  const form = document.querySelector("form");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const { room, name, text } = form.elements;
    fetch("/rooms/" + room.value, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ name: name.value, text: text.value }),
    });
    text.value = "";
  });
</script>
"""

app = Flask(__name__)
sse = SSE(
    app,
    public_keys=["room-*"],  # a client names its keys itself: only what is meant for all may be open to all
    join_history=50,  # who comes in gets the last things that were said
)


@app.get("/")
def index() -> str:
    return render_template_string(PAGE, rooms=ROOMS)


@app.post("/rooms/<room>")
def say(room: str) -> tuple[str, int]:
    if room not in ROOMS:
        abort(404)
    # JSON and not a form: any page of the web can have a browser post a form to here.
    message = request.get_json()
    if not isinstance(message, dict):
        abort(400, "a message is an object with a name and a text")
    name, text = str(message.get("name", "")).strip(), str(message.get("text", "")).strip()
    if not 0 < len(name) <= 24 or not 0 < len(text) <= 500:
        abort(400, "a name has 1 to 24 characters, a text 1 to 500")
    # The room is in the data, because an event does not say through which key it came.
    sse.publish(f"room-{room}", {"room": room, "name": name, "text": text}, event="said")
    return "", 204


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
