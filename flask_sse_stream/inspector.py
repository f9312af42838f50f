"""The inspector's page, and who may see it: ``SSE_INSPECTOR``.

Every request for it passes one gate. A function of the application's decides (``@sse.authorize_inspector``); without
one the page is for requests from this machine while the application is in debug mode. To all others there is no such
page: they are answered as for any path that does not exist, whatever their method.

Its streams are those of a pool manager of their own, so that they are in no number that the page shows, take no place
of a client's, and are told to none of the application's hooks.
"""

from __future__ import annotations

import functools
import ipaddress
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.resources import files
from typing import Any, Final
from urllib.parse import urlsplit

from flask import Flask, Response, current_app, request
from flask.typing import ResponseReturnValue
from werkzeug.exceptions import NotFound

from .errors import BrokerError, EventError, SettingsError
from .inspecting import Sampler
from .keys import JobKey, check_key
from .pools import PoolManager
from .responses import EventStreamResponse
from .stream import Stream

__all__ = ["Admit", "Inspector"]

logger: logging.Logger = logging.getLogger("flask_sse_stream")

Admit = Callable[[], Any]
View = Callable[[], ResponseReturnValue]

_ENDPOINT: Final = "sse_stream_inspector"
_ASSETS: Final = {
    "inspector.css": "text/css; charset=utf-8",
    "inspector.js": "text/javascript; charset=utf-8",
    "inspector.svg": "image/svg+xml",
}
_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store, no-transform",
}
_MARK: Final = "X-SSE-Inspector"
"""The header of requests that do something: no page of another origin can send it without asking first."""
_PAGES: Final = 20  # streams of open pages in one process
_ASKED_AGAIN: Final = 300.0  # seconds after which an open page comes back, and has to be admitted anew
_MORE_BYTES: Final = 16 * 1024  # of a request, beside the data of an event
# Headers with which proxies say whom they speak for. Whoever is behind one is not on this machine.
_FORWARDED: Final = (
    "Forwarded", "Via", "X-Real-Ip", "X-Client-Ip", "X-Cluster-Client-Ip", "True-Client-Ip", "Cf-Connecting-Ip",
    "Fastly-Client-Ip", "Fly-Client-Ip",
)  # fmt: skip


class Inspector:
    """The page of one application.

    ``admit``
        gives the application's own function that says who may see it, or ``None``.
    """

    def __init__(self, app: Flask, manager: PoolManager, path: str, admit: Callable[[], Admit | None]) -> None:
        self._manager = manager
        self._admit = admit
        self._warned = False
        self._sampler = Sampler(manager)
        self._base = path.rsplit("/", 1)[1]
        own = replace(
            manager.settings, broker_url="memory://", max_clients=_PAGES, max_clients_per_key=None, when_full="retry",
            retry=1000, headers={}, cors_origins=(), cors_credentials=False, max_age=_ASKED_AGAIN, close_event="close",
            history_size=0, join_history=0, queue_bytes=4 * 1024 * 1024, max_event_bytes=4 * 1024 * 1024,
            overflow="disconnect",
        )  # fmt: skip
        self._pages = PoolManager(own)
        manager.stopping += [self._sampler.stop, self._pages.shutdown]
        views: dict[str, View] = {
            "": functools.partial(self._guard, self._page, may_be_a_link=True),
            "/events": functools.partial(self._guard, self._events),
            "/publish": functools.partial(self._guard, functools.partial(self._act, self._publish), is_action=True),
            "/end": functools.partial(self._guard, functools.partial(self._act, self._end), is_action=True),
        }
        for name, kind in _ASSETS.items():
            views[f"/{name}"] = functools.partial(self._guard, functools.partial(self._asset, name, kind))
        for rest, view in views.items():
            _add_route(app, path + rest, _ENDPOINT + rest.replace("/", "_").replace(".", "_"), view)

    # The gate

    def _guard(self, view: View, *, is_action: bool = False, may_be_a_link: bool = False) -> ResponseReturnValue:
        if not self._is_admitted() or not _is_of_this_site(may_be_a_link=may_be_a_link):
            raise NotFound
        if request.method not in (("POST",) if is_action else ("GET", "HEAD")):
            return _say(405, headers={"Allow": "POST" if is_action else "GET, HEAD"}, error="wrong method")
        return view()

    def _is_admitted(self) -> bool:
        admit = self._admit()
        if admit is not None:
            answer = current_app.ensure_sync(admit)()
            if answer and answer is not True:
                # A redirect to a login, say, which is true as any object is.
                raise TypeError(
                    f"what authorize_inspector registered gives True or False, or aborts; not {answer!r:.80}"
                )
            return answer is True
        why = _what_is_far() if current_app.debug else "the application is not in debug mode"
        if why is None:
            return True
        if not self._warned:
            self._warned = True
            logger.warning(
                "the inspector was asked for by %r and not shown, since %s: register a function with "
                "@sse.authorize_inspector, which says who may see it. Without one it is for requests from this machine "
                "in debug mode alone",
                (request.remote_addr or "somebody without an address")[:80],
                why,
            )
        return False

    # What is behind it

    def _page(self) -> ResponseReturnValue:
        text = _file("inspector.html").decode().replace("{{ base }}", self._base)
        return Response(text, content_type="text/html; charset=utf-8", headers=_HEADERS)

    def _asset(self, name: str, kind: str) -> ResponseReturnValue:
        return Response(_file(name), content_type=kind, headers=_HEADERS)

    def _events(self) -> ResponseReturnValue:
        try:
            text, job = request.args.get("key"), request.args.get("job") == "1"
            # Who may see the inspector may see every key, and a job's is as good as any.
            key = None if text is None else JobKey.of(check_key(text)) if job else check_key(text)
        except ValueError as error:  # what is no key, or no UTF-8
            return _say(400, error=str(error))
        stream = Stream(self._pages)
        source = self._sampler.events(key)
        return EventStreamResponse(self._pages, stream=stream, source=source, headers=_HEADERS)

    def _act(self, action: Callable[[dict[str, Any]], ResponseReturnValue]) -> ResponseReturnValue:
        if request.headers.get(_MARK) != "1" or request.mimetype != "application/json":
            return _say(403, error=f"this needs JSON, and the header {_MARK}: 1")
        limit = 2 * self._manager.settings.max_event_bytes + _MORE_BYTES
        if request.content_length is None or request.content_length > limit:
            return _say(413, error=f"this needs a Content-Length of at most {limit} bytes")
        try:
            given = json.loads(request.get_data())
        except (ValueError, RecursionError):
            given = None
        if not isinstance(given, dict):
            return _say(400, error="this needs a JSON object")
        try:
            return action(given)
        except EventError as error:
            return _say(400, error=str(error))
        except BrokerError as error:
            return _say(503, error=str(error))

    def _publish(self, given: dict[str, Any]) -> ResponseReturnValue:
        key, event, data = given.get("key"), given.get("event"), given.get("data", "")
        to_all, as_json = given.get("all") is True, given.get("json") is True
        if not isinstance(data, str) or not isinstance(event, (str, type(None))):
            return _say(400, error="data and event are text")
        if as_json:
            try:
                value = json.loads(data, parse_constant=_refuse_constant)
            except (ValueError, RecursionError) as error:
                return _say(400, error=f"the data are no JSON: {error}"[:300])
            data = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
        if to_all:
            return _say(200, id=self._manager.publish_all(data, event=event or None))
        return _say(200, id=self._manager.publish(check_key(key), data, event=event or None))

    def _end(self, given: dict[str, Any]) -> ResponseReturnValue:
        name, reconnect = given.get("stream"), given.get("reconnect", False)
        if not isinstance(name, str) or not 0 < len(name) <= 100 or not isinstance(reconnect, bool):
            return _say(400, error="stream is the name of one, and reconnect true or false")
        if not self._manager.reaches_other_processes and not name.startswith(self._manager.asking.process):
            return _say(409, error="that stream is in another process, which SSE_BROKER_URL=memory:// cannot reach")
        self._manager.asking.kick(name, reconnect=reconnect)
        return _say(202)


def _say(status: int, *, headers: Mapping[str, str] | None = None, **found: Any) -> Response:
    text = json.dumps(found, ensure_ascii=False)
    return Response(text, status, content_type="application/json", headers={**_HEADERS, **(headers or {})})


def _add_route(app: Flask, path: str, endpoint: str, view: View) -> None:
    if any(rule.rule == path for rule in app.url_map.iter_rules()):
        raise SettingsError(f"SSE_INSPECTOR: {path!r} is another view's route already: choose another path")
    # For every method, and without a redirect: what Flask answers by itself would tell that there is such a path.
    rule = app.url_rule_class(path, endpoint=endpoint, methods=None, merge_slashes=False)
    rule.provide_automatic_options = False  # type: ignore[attr-defined]  # Flask's, as in its add_url_rule()
    app.url_map.add(rule)
    app.view_functions[endpoint] = view


@functools.cache
def _file(name: str) -> bytes:
    return (files(__package__) / "static" / name).read_bytes()


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not in JSON")


def _what_is_far() -> str | None:
    """Say why this request may be from elsewhere; ``None``: a program of this machine asked for this machine.

    By the name that was asked for as well: a page of another site may have its own name lead here (DNS rebinding).
    """
    for name, _ in request.headers:
        if name.title() in _FORWARDED or name.lower().startswith("x-forwarded"):
            return f"a proxy says for whom it speaks ({name})"
    # A proxy that says nothing else speaks HTTP/1.0, as nginx's does unless it is told otherwise; no browser does.
    if request.environ.get("SERVER_PROTOCOL") in ("HTTP/1.0", "HTTP/0.9"):
        return "it came over HTTP/1.0, as from a proxy"
    if not _is_loopback(request.environ.get("REMOTE_ADDR", "")):
        return "its address is not this machine's"
    if not _is_loopback_name(request.environ.get("HTTP_HOST", "")):
        return "its URL does not say localhost"
    return None


def _is_loopback(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False  # a socket of a file, behind which there is a proxy as a rule
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback


def _is_loopback_name(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    return name == "localhost" or name.endswith(".localhost") or _is_loopback(name)


def _is_of_this_site(*, may_be_a_link: bool) -> bool:
    """Whether no page of another site asks: a browser says so (Fetch Metadata), or says which page's origin it is."""
    headers = request.headers
    site = headers.get("Sec-Fetch-Site", "none")
    if site not in ("same-origin", "none"):
        # Who follows a link comes to the page as a document of its own.
        if not (may_be_a_link and headers.get("Sec-Fetch-Mode") == "navigate"):
            return False
        return headers.get("Sec-Fetch-Dest") == "document" and request.method == "GET"
    origin = headers.get("Origin")
    # The scheme is the proxy's that ends TLS, and not known here.
    host = request.environ.get("HTTP_HOST", "").lower()
    return origin is None or origin.lower() in (f"http://{host}", f"https://{host}")
