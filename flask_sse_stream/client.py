"""Serves ``static/sse.js``, the browser's side, from a Flask app.

Its URL carries the hash of the file, so that it is asked for once and then kept; without the hash, it is asked about
each time and answered 304. Nothing of it depends on who asks.
"""

from __future__ import annotations

import functools
import hashlib
from importlib.resources import files
from typing import Final

from flask import Flask, Response, current_app, request, url_for

from .errors import SettingsError

__all__ = ["add_client", "url_for_client"]

_ENDPOINT: Final = "sse_stream_client"
_YEAR: Final = 31_536_000


@functools.cache
def _client() -> tuple[bytes, str]:
    """Give the file and its hash."""
    source = (files(__package__) / "static" / "sse.js").read_bytes()
    return source, hashlib.sha256(source).hexdigest()[:16]


def add_client(app: Flask, path: str) -> None:
    """Serve the file at ``path``. Raises :class:`SettingsError` where another view has that route already."""
    if any(rule.rule == path and "GET" in (rule.methods or ()) for rule in app.url_map.iter_rules()):
        raise SettingsError(
            f"SSE_CLIENT_PATH {path!r} is another view's route already: choose another path, or None for no route"
        )
    app.add_url_rule(path, endpoint=_ENDPOINT, view_func=_serve, methods=["GET"])


def url_for_client() -> str:
    """Give the file's URL in the current app. Raises :class:`SettingsError` where it is not served."""
    if _ENDPOINT not in current_app.view_functions:
        raise SettingsError("SSE_CLIENT_PATH is None, so sse.js is not served: set it, or serve the file yourself")
    return url_for(_ENDPOINT, v=_client()[1])


def _serve() -> Response:
    source, version = _client()
    response = Response(source, content_type="text/javascript; charset=utf-8")
    response.set_etag(version)
    if request.args.get("v") == version:
        response.cache_control.max_age = _YEAR
        response.cache_control.immutable = True
    else:
        response.cache_control.no_cache = True
    response.cache_control.public = True
    # Modules of other origins are fetched with CORS, and this one is the same for everybody.
    response.headers["Access-Control-Allow-Origin"] = "*"
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.make_conditional(request)
    return response
