"""Django under WSGI, in one file: the middleware answers ``/stream`` before Django, and views publish.

It needs ``pip install django``. Run it with ``python examples/django_app.py`` and open the printed address. In a
project of your own, the middleware goes around ``get_wsgi_application()`` in ``wsgi.py``, and the pool manager into
a module that both it and the views import.
"""

# ruff: noqa: E402
from gevent import monkey

monkey.patch_all()  # before every other import, so that a view that waits (for a database, say) holds up nobody

import json
import os
import secrets
import signal

import gevent
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse, HttpResponseBadRequest
from django.urls import path
from django.views.decorators.csrf import ensure_csrf_cookie
from django.views.decorators.http import require_GET, require_POST
from gevent.pywsgi import WSGIServer

from flask_sse_stream import PoolManager, Settings
from flask_sse_stream.wsgi import SSEMiddleware

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Django</title>
<form><input autofocus placeholder="A headline" aria-label="A headline"> <button>Publish</button></form>
<ul></ul>
<script>
  const source = new EventSource("/stream?connectKey=news");
  source.addEventListener("headline", (event) => {
    const item = document.createElement("li");
    item.textContent = JSON.parse(event.data).title;
    document.querySelector("ul").prepend(item);
  });
  document.querySelector("form").addEventListener("submit", (event) => {
    event.preventDefault();
    const input = document.querySelector("input");
    fetch("/news", {
      method: "POST",
      headers: { "X-CSRFToken": document.cookie.match(/csrftoken=([^;]+)/)[1] },
      body: JSON.stringify(input.value),
    });
    input.value = "";
  });
</script>
"""

settings.configure(
    SECRET_KEY=secrets.token_hex(),
    ALLOWED_HOSTS=["127.0.0.1", "localhost"],
    ROOT_URLCONF=__name__,
    MIDDLEWARE=["django.middleware.csrf.CsrfViewMiddleware"],
)

# A stream is answered outside Django, so none of its middleware runs for it: no session, no user. Whatever is not
# for everybody stays out of public_keys.
manager = PoolManager(Settings(public_keys=("news",)))


@require_GET
@ensure_csrf_cookie
def index(_: HttpRequest) -> HttpResponse:
    return HttpResponse(PAGE)


@require_POST
def news(request: HttpRequest) -> HttpResponse:
    try:
        manager.publish("news", {"title": str(json.loads(request.body))}, event="headline")
    except ValueError as error:  # no JSON, or an EventError: too large, or no text that UTF-8 can carry
        return HttpResponseBadRequest(str(error), content_type="text/plain")
    return HttpResponse(status=204)


urlpatterns = [path("", index), path("news", news)]
application = SSEMiddleware(get_wsgi_application(), manager)  # GET /stream?connectKey=news


def main() -> None:
    server = WSGIServer(("127.0.0.1", int(os.environ.get("PORT", "5000"))), application)

    def stop() -> None:
        # Browsers come back when the server does: each is told another time, so that they do not come all at once.
        manager.drain()
        server.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        gevent.signal_handler(number, stop)
    server.start()
    print(f"http://127.0.0.1:{server.server_port} (Ctrl-C ends it)", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
