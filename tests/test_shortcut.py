"""Requests that need no context of Flask's get none; whatever would have seen one of them still does."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Flask, Request, g, request, session
from flask.sessions import SecureCookieSessionInterface
from flask.signals import appcontext_pushed, request_finished, request_started, request_tearing_down
from werkzeug.test import EnvironBuilder, run_wsgi_app

from flask_sse_stream import SSE
from flask_sse_stream.extension import stream_opened
from flask_sse_stream.shortcut import Shortcut

Seen = list[str]


@pytest.fixture
def app() -> Flask:
    app = Flask(__name__)
    app.secret_key = "secret"
    return app


@pytest.fixture
def contexts(app: Flask) -> Seen:
    """One entry for each request that Flask has built a context for."""
    built: Seen = []

    class Watched(Request):
        def __init__(self, environ: Any, *arguments: Any, **named: Any) -> None:
            super().__init__(environ, *arguments, **named)
            built.append(self.path)

    app.request_class = Watched
    return built


@pytest.fixture
def ask(app: Flask) -> Iterator[Callable[..., tuple[str, list[tuple[str, str]], bytes]]]:
    def ask(path: str = "/stream", **options: Any) -> tuple[str, list[tuple[str, str]], bytes]:
        """Give the answer as a server gets it: its status, its headers and its first bytes."""
        body, status, headers = run_wsgi_app(app, EnvironBuilder(path, **options).get_environ())
        stack.callback(getattr(body, "close", int))
        return status, sorted(headers.to_wsgi_list()), next(iter(body), b"")

    with contextlib.ExitStack() as stack:
        yield ask
    app.extensions["sse_stream"].shutdown()


Ask = Callable[..., tuple[str, list[tuple[str, str]], bytes]]


@pytest.mark.parametrize("path", ["/stream", "/stream?connectKey=a&connectKey=b", "/stream?other="])
def test_a_stream_that_nobody_else_looks_at_needs_no_context(app: Flask, ask: Ask, contexts: Seen, path: str) -> None:
    sse = SSE(app)
    status, headers, first = ask(path)
    assert (status, first.startswith(b"retry: 3000\n\n: open\n\n")) == ("200 OK", True)
    assert ("Content-Type", "text/event-stream") in headers
    assert sse.count_all() == 1
    assert contexts == []


def test_functions_that_clean_up_after_a_context_do_not_ask_for_one(app: Flask, ask: Ask, contexts: Seen) -> None:
    SSE(app)
    app.teardown_appcontext(lambda error: contexts.append("cleaned up"))
    ask()
    assert contexts == []


REQUESTS: dict[str, dict[str, Any]] = {
    "one key": {"path": "/stream?connectKey=a"},
    "several keys": {"path": "/stream?connectKey=a&connectKey=b"},
    "a key of another alphabet": {"path": "/stream", "query_string": {"connectKey": "ключ"}},
    "a key of raw bytes": {"path": "/stream", "query_string": "connectKey=\u00ff"},
    "a bad key": {"path": "/stream?connectKey="},
    "a private key": {"path": "/stream?connectKey=secret"},
    "HEAD": {"path": "/stream", "method": "HEAD"},
    "POST": {"path": "/stream", "method": "POST"},
    "OPTIONS": {"path": "/stream", "method": "OPTIONS"},
    "a cursor": {"path": "/stream", "headers": {"Last-Event-ID": "nowhere-1"}},
    "a stream that is over": {"path": "/stream", "headers": {"Last-Event-ID": "end"}},
    "another origin": {"path": "/stream", "headers": {"Origin": "https://example.org"}},
    "another view": {"path": "/other"},
    "a longer path": {"path": "/stream/"},
}


@pytest.mark.parametrize("what", REQUESTS)
def test_the_answer_is_the_one_that_flask_would_have_given(app: Flask, ask: Ask, what: str, contexts: Seen) -> None:
    SSE(app, public_keys=["[!s]*"], cors_origins=["https://example.org"], namespace="n")
    short = ask(**REQUESTS[what])
    shortcut = app.wsgi_app
    assert isinstance(shortcut, Shortcut)
    app.wsgi_app = shortcut._inner  # type: ignore[method-assign]
    before = len(contexts)
    assert short == ask(**REQUESTS[what])
    assert len(contexts) == before + 1, "this one went Flask's way"


def test_a_refusal_is_worded_by_the_application(app: Flask, ask: Ask) -> None:
    SSE(app, public_keys=["open"])
    app.register_error_handler(403, lambda error: ("ours", 403))
    assert ask("/stream?connectKey=other")[::2] == ("403 FORBIDDEN", b"ours")


class Interface(SecureCookieSessionInterface):
    pass


def hook(app: Flask, seen: Seen, where: str) -> None:
    def note(*arguments: Any, **named: Any) -> Any:
        seen.append(where)
        return arguments[0] if where == "after_request" else None

    getattr(app, where)(note)


HOOKS = ("before_request", "after_request", "teardown_request", "url_value_preprocessor")


@pytest.mark.parametrize("where", HOOKS)
def test_a_hook_sees_every_stream(app: Flask, ask: Ask, contexts: Seen, where: str) -> None:
    SSE(app)
    seen: Seen = []
    hook(app, seen, where)
    ask()
    assert (seen, contexts) == ([where], ["/stream"])


@pytest.mark.parametrize(
    "signal", [request_started, request_finished, request_tearing_down, appcontext_pushed], ids=lambda it: it.name
)
def test_a_receiver_of_a_signal_sees_every_stream(app: Flask, ask: Ask, contexts: Seen, signal: Any) -> None:
    SSE(app)
    seen: Seen = []

    def receive(sender: Any, **named: Any) -> None:
        seen.append(signal.name)

    with signal.connected_to(receive):
        ask()
    assert (seen, contexts) == ([signal.name], ["/stream"])
    ask()
    assert contexts == ["/stream"], "and those that come when it listens no more need no context again"


def test_a_receiver_of_our_own_signal_may_ask_for_the_request(app: Flask, ask: Ask) -> None:
    SSE(app)
    seen: Seen = []

    def receive(sender: Any, **named: Any) -> None:
        seen.append(request.path)

    with stream_opened.connected_to(receive):
        ask()
    assert seen == ["/stream"]


def test_authorize_has_the_request(app: Flask, ask: Ask) -> None:
    sse = SSE(app)

    @sse.authorize
    def check(keys: Any) -> Any:
        g.asked = request.path
        return keys if request.headers.get("X-Right") == "yes" else []

    assert ask()[0] == "403 FORBIDDEN"
    assert ask(headers={"X-Right": "yes"})[0] == "200 OK"


def test_a_session_that_is_renewed_is_renewed_by_a_stream_too(app: Flask, ask: Ask) -> None:
    SSE(app)

    @app.get("/login")
    def login() -> str:
        session.permanent = True
        session["user"] = "me"
        return ""

    cookie = dict(ask("/login")[1])["Set-Cookie"].partition(";")[0]
    assert "Set-Cookie" in dict(ask(headers={"Cookie": cookie})[1])


def replaced_view(app: Flask) -> None:
    view = app.view_functions["sse_stream"]
    app.view_functions["sse_stream"] = lambda: view()


def own_sessions(app: Flask) -> None:
    app.session_interface = Interface()


def server_name(app: Flask) -> None:
    app.config["SERVER_NAME"] = "localhost"


@pytest.mark.parametrize("change", [replaced_view, own_sessions, server_name])
def test_what_flask_does_otherwise_is_left_to_flask(
    app: Flask, ask: Ask, contexts: Seen, change: Callable[[Flask], None]
) -> None:
    SSE(app)
    change(app)
    assert ask()[0] == "200 OK"
    assert contexts == ["/stream"]


def test_a_host_that_is_not_trusted_is_refused(app: Flask, ask: Ask, contexts: Seen) -> None:
    app.config["TRUSTED_HOSTS"] = ["example.org"]
    SSE(app)
    ask(base_url="http://evil.example")
    assert contexts == ["/stream"], "Flask 3.1 refuses it, and those before do not know the setting"


def test_a_middleware_that_was_there_before_is_not_left_out(app: Flask, ask: Ask) -> None:
    seen: Seen = []
    inner = app.wsgi_app

    def middleware(environ: Any, start_response: Any) -> Any:
        seen.append(environ["PATH_INFO"])
        return inner(environ, start_response)

    app.wsgi_app = middleware  # type: ignore[method-assign]
    SSE(app)
    ask()
    assert seen == ["/stream"]


def test_an_application_with_a_way_of_its_own_keeps_it() -> None:
    class Own(Flask):
        def preprocess_request(self) -> Any:
            return "closed", 503

    app = Own(__name__)
    SSE(app)
    assert app.test_client().get("/stream").status_code == 503


def test_a_tool_that_watches_applications_sees_every_stream(
    app: Flask, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    SSE(app)
    seen: Seen = []
    original = Flask.dispatch_request

    @functools.wraps(original)
    def watched(self: Flask) -> Any:
        seen.append(request.path)
        return original(self)

    monkeypatch.setattr(Flask, "dispatch_request", watched)
    ask()
    assert seen == ["/stream"]


def test_with_the_test_client_the_context_is_there_to_be_looked_at(app: Flask) -> None:
    SSE(app)
    with app.test_client() as client:
        client.get("/stream?connectKey=k").close()
        assert request.args["connectKey"] == "k"


def test_who_listens_to_another_application_asks_for_nothing_here(app: Flask, ask: Ask, contexts: Seen) -> None:
    SSE(app)

    def receive(sender: Any, **named: Any) -> None:
        raise AssertionError("nothing happens there")

    other = Flask("another")
    with stream_opened.connected_to(receive, other), request_started.connected_to(receive, other):
        ask()
    assert contexts == []
