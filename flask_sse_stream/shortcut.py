"""Answers the endpoint's requests before Flask builds a request context, where nobody would notice.

Half of what it costs to open a stream is Flask's: a context, a session, the matching of the URL, a response. When
thousands of browsers come back at once, that is half of the time until the last of them is served. Nobody misses it
where the application has no hook, signal, session or method of its own that would see the request; where there is one,
or the answer is anything but a stream, the request takes Flask's way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any, Final

from flask import Flask
from flask.sessions import SecureCookieSessionInterface
from flask.signals import appcontext_pushed, request_finished, request_started, request_tearing_down

from .access import Ticket
from .pools import PoolManager
from .tickets import Tickets
from .wsgi import check_public, requested_keys, respond

__all__ = ["Shortcut"]

_SIGNALS: Final = (request_started, request_finished, request_tearing_down, appcontext_pushed)
# What a request passes through in Flask, and what a subclass or a tool that watches applications may have replaced.
_METHODS: Final = (
    "wsgi_app", "request_context", "app_context", "create_url_adapter", "full_dispatch_request", "preprocess_request",
    "dispatch_request", "finalize_request", "make_response", "process_response", "do_teardown_request",
)  # fmt: skip


class Shortcut:
    """Stands before ``app.wsgi_app``.

    ``is_free``
        says whether streams are open to whom ``SSE_PUBLIC_KEYS`` lets in, or who has a ticket, without a look at the
        rest of the request.
    """

    def __init__(
        self, app: Flask, manager: PoolManager, tickets: Tickets, endpoint: str, is_free: Callable[[], bool]
    ) -> None:
        self._app = app
        self._manager = manager
        self._tickets = tickets
        self._endpoint = endpoint
        self._view = app.view_functions[endpoint]
        self._is_free = is_free
        # As WSGI hands paths over: UTF-8 that was read as Latin-1.
        self._path = (manager.settings.path or "").encode().decode("latin-1")
        self._inner = app.wsgi_app
        # A middleware that was there before would be left out.
        self._stands_first = "wsgi_app" not in vars(app)
        self._is_flasks_own: bool | None = None  # not before the first request: it may be changed until then

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """Answer one request."""
        if environ.get("PATH_INFO") == self._path and environ["REQUEST_METHOD"] == "GET" and self._is_unseen(environ):
            manager = self._manager
            ticket: Ticket | None = None
            try:
                if manager.settings.tickets:
                    keys, ticket = self._tickets.of(environ)
                else:
                    keys = manager.check_keys(requested_keys(manager.settings, environ))
                    check_public(manager.settings, keys)
            except Exception:  # noqa: S110  Flask's way says what is wrong, as the application has it said
                pass
            else:
                return respond(manager, environ, start_response, keys=keys, ticket=ticket)
        return self._inner(environ, start_response)

    def _is_unseen(self, environ: dict[str, Any]) -> bool:
        """Whether nothing of the application's would see this request but the stream's own endpoint."""
        app = self._app
        config = app.config
        if self._is_flasks_own is None:
            self._is_flasks_own = all(_is_flasks_own(app, name) for name in _METHODS)
        return not (
            not self._stands_first
            or not self._is_flasks_own
            or not self._is_free()
            or app.before_request_funcs.get(None)
            or app.after_request_funcs.get(None)
            or app.teardown_request_funcs.get(None)
            or app.url_value_preprocessors.get(None)
            or any(signal.receivers and signal.has_receivers_for(app) for signal in _SIGNALS)
            or app.view_functions.get(self._endpoint) is not self._view
            # A session that is read may have to be written.
            or type(app.session_interface) is not SecureCookieSessionInterface
            or config["SESSION_COOKIE_NAME"] in environ.get("HTTP_COOKIE", "")
            # Requests that Flask's URL adapter may refuse.
            or config["SERVER_NAME"]
            or config.get("TRUSTED_HOSTS")
            or app.url_map.host_matching
            or app.subdomain_matching
            # The debugger and Flask's test client want to see the context afterwards.
            or "werkzeug.debug.preserve_context" in environ
            # Werkzeug has its own opinion of bytes that are no UTF-8.
            or "%" in environ.get("QUERY_STRING", "")
        )


def _is_flasks_own(app: Flask, name: str) -> bool:
    # By where its code was written: a wrapper has the name and the module of what it wraps.
    method = getattr(type(app), name, None)
    return (name == "wsgi_app" or name not in vars(app)) and (
        type(method) is FunctionType and method.__globals__.get("__name__") == "flask.app"
    )
