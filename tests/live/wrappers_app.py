"""One app many times in a process, each time inside something else that people put around apps.

What is asked for as ``/sentry/stream`` is answered by the app inside Sentry's middleware, and so on for ``VARIANTS``.
"""

from __future__ import annotations

import collections
import sys

if __name__ == "__main__" and "--patch" in sys.argv:
    from gevent import monkey

    monkey.patch_all()

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import sentry_sdk
from flask import Flask, request
from flask.typing import ResponseReturnValue
from flask_compress import Compress
from opentelemetry.instrumentation.wsgi import OpenTelemetryMiddleware
from opentelemetry.sdk.trace import Span, SpanProcessor, TracerProvider
from sentry_sdk.transport import Transport
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.middleware.lint import LintMiddleware
from werkzeug.middleware.proxy_fix import ProxyFix

from flask_sse_stream import SSE, Event

Wrap = Callable[[Flask], Any]

reports: list[str] = []
"""What would have been sent to whoever looks after errors."""

seen: collections.Counter[str] = collections.Counter()
"""What each variant's tool has noted, by which it shows that it is at work."""

unfinished: collections.Counter[str] = collections.Counter()
"""Requests that a tool has seen begin, and not yet end."""


# The real Sentry and the real OpenTelemetry, of which nothing leaves the process


class SentryHere(Transport):
    """Counts what Sentry would send."""

    def capture_envelope(self, envelope: Any) -> None:
        for item in envelope.items:
            seen[f"sentry {item.type}"] += 1
            if item.type == "event":
                reports.append(f"sentry: {item.payload.json}")


# As most people call it, so with everything that Sentry puts around Flask, logging and threads by itself.
sentry_sdk.init(dsn="http://key@127.0.0.1:9/1", transport=SentryHere, traces_sample_rate=1.0)


class SpansHere(SpanProcessor):
    """Counts OpenTelemetry's spans."""

    def on_start(self, span: Span, parent_context: Any = None) -> None:
        unfinished["opentelemetry"] += 1
        seen["opentelemetry"] += 1

    def on_end(self, span: Any) -> None:
        unfinished["opentelemetry"] -= 1
        if not span.status.is_ok and span.status.description:
            reports.append(f"opentelemetry: {span.status.description}")


provider = TracerProvider(shutdown_on_exit=False)
provider.add_span_processor(SpansHere())


# The same in a few lines, without what a new release of theirs may change


class Reporting:
    """What tools that report errors do: they look at whatever is called, iterated or closed."""

    def __init__(self, application: Any) -> None:
        self._application = application

    def __call__(self, environ: Any, start_response: Any) -> Any:
        def start(status: str, headers: Any, exc_info: Any = None) -> Any:
            return start_response(status, headers, *([exc_info] if exc_info else []))

        unfinished["reporting"] += 1
        seen["reporting"] += 1
        return _ReportingBody(_reported(self._application, environ, start))


class _ReportingBody:
    def __init__(self, body: Iterable[bytes]) -> None:
        self._body = body

    def __iter__(self) -> Iterator[bytes]:
        iterator = _reported(iter, self._body)
        while True:
            try:
                item = _reported(next, iterator)
            except StopIteration:
                return
            yield item

    def close(self) -> None:
        unfinished["reporting"] -= 1
        _reported(getattr(self._body, "close", lambda: None))


def _reported(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except StopIteration:
        raise
    except BaseException as error:
        reports.append(f"reporting: {error!r}")
        raise


class Tracing:
    """What tools that measure requests do: the request has ended when its body, a generator of theirs, is closed."""

    def __init__(self, application: Any) -> None:
        self._application = application

    def __call__(self, environ: Any, start_response: Any) -> Any:
        def start(status: str, headers: Any, *exc_info: Any) -> Any:
            return start_response(status, [*headers, ("X-Traced", "yes")], *exc_info)

        unfinished["tracing"] += 1
        seen["tracing"] += 1
        return self._traced(self._application(environ, start))

    def _traced(self, body: Any) -> Iterator[bytes]:
        try:
            yield from body
        except Exception as error:
            reports.append(f"tracing: {error!r}")
            raise
        finally:
            getattr(body, "close", lambda: None)()
            unfinished["tracing"] -= 1


class Counting:
    """One that also counts what goes through the server's ``write``, for which it needs one of its own."""

    def __init__(self, application: Any) -> None:
        self._application = application

    def __call__(self, environ: Any, start_response: Any) -> Any:
        def start(status: str, headers: Any, exc_info: Any = None) -> Any:
            write = start_response(status, headers, exc_info)

            def counted(data: bytes) -> Any:
                seen["counting"] += len(data)
                return write(data)

            return counted

        body = self._application(environ, start)
        try:
            for data in body:
                seen["counting"] += len(data)
                yield data
        finally:
            getattr(body, "close", lambda: None)()


# The app


def create_app(name: str) -> Flask:
    app = Flask(__name__)
    app.config["SSE_PING_INTERVAL"] = 0.15
    if name == "compress-streams":
        app.config["COMPRESS_MIMETYPES"] = ["text/html", "text/event-stream"]
    if name.startswith("compress"):
        Compress(app)
    sse = SSE(app)

    @app.get("/view")
    def view() -> ResponseReturnValue:
        seen[f"{name} {request.remote_addr}"] += 1
        return "a view, " * 100

    @app.get("/countdown")
    @sse.event_stream()
    def countdown() -> Iterator[Any]:
        yield Event(comment="")
        for number in (3, 2, 1):
            yield {"left": number}

    @app.post("/publish")
    def publish() -> ResponseReturnValue:
        # Not by a body, about reading which werkzeug's lint has something to say.
        return sse.publish(request.args["key"], request.args["data"])

    @app.get("/state")
    def state() -> ResponseReturnValue:
        return {
            "transports": [type(stream.transport).__name__ for stream in sse.streams(request.args["key"])],
            "streams": sse.count_all(),
            "reports": reports,
            "seen": seen,
            # Without this one.
            "unfinished": unfinished[name] - (name in unfinished),
        }

    @app.get("/raising")
    def raising() -> ResponseReturnValue:
        def body() -> Iterator[str]:
            yield "so far"
            raise RuntimeError("the view raised")

        return app.response_class(body())

    return app


def _bare(app: Flask) -> Any:
    return app.wsgi_app  # Sentry has replaced the app's own __call__.


VARIANTS: dict[str, Wrap] = {
    "bare": _bare,
    "compress": _bare,
    "compress-streams": _bare,
    "proxy": lambda app: ProxyFix(app.wsgi_app),
    "dispatcher": lambda app: DispatcherMiddleware(Flask(__name__).wsgi_app, {"/dispatcher": app.wsgi_app}),
    "sentry": lambda app: app,
    "reporting": lambda app: Reporting(app.wsgi_app),
    "opentelemetry": lambda app: OpenTelemetryMiddleware(app.wsgi_app, tracer_provider=provider),
    "tracing": lambda app: Tracing(app.wsgi_app),
    "counting": lambda app: Counting(app.wsgi_app),
    "lint": lambda app: LintMiddleware(app.wsgi_app),
}


class Front(Flask):
    """Hands each request to the variant that its path names, and is in the way of nothing it does."""

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        name = environ["PATH_INFO"].split("/")[1]
        if name != "dispatcher":  # That one takes the path apart itself.
            environ["SCRIPT_NAME"] = f"/{name}"
            environ["PATH_INFO"] = environ["PATH_INFO"].removeprefix(f"/{name}")
        return variants[name](environ, start_response)


variants = {name: wrap(create_app(name)) for name, wrap in VARIANTS.items()}
app = Front(__name__)

if __name__ == "__main__":
    from gevent.pywsgi import WSGIServer

    WSGIServer(("127.0.0.1", int(sys.argv[1])), app).serve_forever()
