"""Every option in one place: its name, unit, default and bounds. A frozen value, checked when it is made.

It knows no Flask: it is made from any mapping (``app.config`` is one) and from keyword arguments. Times are
seconds, sizes are bytes; ``retry`` is milliseconds, because the wire says so.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, Literal, get_args

from .errors import SettingsError
from .keys import REPORT_KEY, Kept, is_job

__all__ = ["DEFAULT_POLICY", "PREFIX", "Overflow", "Settings", "WhenFull"]

PREFIX: Final = "SSE_"
"""What every setting's name begins with in ``app.config``."""

Overflow = Literal["disconnect", "drop_oldest", "drop_newest", "conflate"]
DEFAULT_POLICY: Final[Overflow] = "disconnect"
"""The policy of a key that ``SSE_OVERFLOW`` does not mention."""
WhenFull = Literal["retry", "503"]

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z")
# As browsers write it (HTML standard, 7.1.1): no capitals, no user, and no port where it is the scheme's own.
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s*?#@A-Z]+\Z")
_USUAL_PORT = re.compile(r"(http://.*:80|https://.*:443)\Z")
# The server owns how the body is framed, and the format owns its type (RFC 9112; HTML standard, 9.2.5).
_NOT_OURS_TO_SEND = {"connection", "content-length", "content-type", "keep-alive", "transfer-encoding", "upgrade"}

_Check = Callable[[Any], Any]


class _BadValue(Exception):
    """Carries what a value may be to where its setting's name is known."""


def _number(low: float, high: float, *, whole: bool, optional: bool = False) -> _Check:
    def check(value: Any) -> Any:
        if value is None and optional:
            return None
        types = int if whole else (int, float)
        # A NaN would pass every comparison that is written the other way round.
        if isinstance(value, bool) or not isinstance(value, types) or math.isnan(value) or not low <= value <= high:
            kind = "a whole number" if whole else "a number"
            above = f"from {low} up" if high == math.inf else f"from {low} to {high}"
            raise _BadValue(f"{kind} {above}" + (", or None" if optional else ""))
        return value if whole else float(value)

    return check


def _text(description: str, fits: Callable[[str], bool], *, optional: bool = False) -> _Check:
    def check(value: Any) -> Any:
        if value is None and optional:
            return None
        if not isinstance(value, str) or not fits(value):
            raise _BadValue(description)
        return value

    return check


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _BadValue("True or False")
    return value


def _one_of(*choices: str) -> _Check:
    return _text("one of " + ", ".join(map(repr, choices)), choices.__contains__)


def _texts(description: str, fits: Callable[[str], bool]) -> _Check:
    def check(value: Any) -> tuple[str, ...]:
        values = (value,) if isinstance(value, str) else value
        if not isinstance(values, (tuple, list, set, frozenset)) or not all(
            isinstance(item, str) and fits(item) for item in values
        ):
            raise _BadValue(description)
        return tuple(values)

    return check


def _headers(value: Any) -> Mapping[str, str]:
    wanted = "a dict of header names and values, each text on one line"
    if not isinstance(value, Mapping):
        raise _BadValue(wanted)
    for name, text in value.items():
        if not isinstance(name, str) or not _TOKEN.match(name):
            raise _BadValue(f"{wanted} ({name!r} is no header name)")
        if not isinstance(text, str) or not text.isprintable() or not _is_latin(text):
            raise _BadValue(f"{wanted} (the value of {name!r} is not)")
        if name.lower() in _NOT_OURS_TO_SEND:
            raise _BadValue(f"{wanted}, without {name!r}: the server and the format decide that one")
    return dict(value)


_POLICIES: Final = get_args(Overflow)


def _overflow(value: Any) -> Any:
    if isinstance(value, str) and value in _POLICIES:
        return value
    choices = " or ".join(map(repr, _POLICIES))
    wanted = f"{choices}, or a dict that gives each key or pattern of keys one of them, such as"
    wanted += " {'ticker-*': 'conflate', '*': 'disconnect'}"
    if not isinstance(value, Mapping) or not value:
        raise _BadValue(wanted)
    for pattern, policy in value.items():
        if not isinstance(pattern, str) or not 0 < len(pattern) <= 255 or not pattern.isprintable():
            raise _BadValue(f"{wanted} ({pattern!r:.80} is no key and no pattern)")
        if not isinstance(policy, str) or policy not in _POLICIES:
            raise _BadValue(f"{wanted} (that of {pattern!r:.80} is not)")
    return dict(value)


def _is_latin(text: str) -> bool:
    try:
        text.encode("latin-1")
    except UnicodeEncodeError:
        return False
    return True


def _setting(default: Any, check: _Check, doc: str) -> Any:
    return field(default=default, metadata={"check": check, "doc": doc})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The options of one ``SSE``; immutable. In ``app.config`` each has the prefix ``SSE_`` and capitals.

    ``Settings(ping_interval=5)`` checks every value and raises :class:`SettingsError`, naming the setting and
    what it may be. :meth:`from_mapping` reads ``SSE_PING_INTERVAL`` and its like.
    """

    path: str | None = _setting(
        "/stream",
        _text(
            "a path that begins with '/', or None for no route",
            lambda v: v.startswith("/") and v.isprintable(),
            optional=True,
        ),
        "the endpoint; ``None``: no route is added",
    )
    client_path: str | None = _setting(
        "/stream.js",
        _text(
            "a path that begins with '/', or None for no route",
            lambda v: v.startswith("/") and v.isprintable(),
            optional=True,
        ),
        "where ``sse.js`` is served, a client for browsers; ``None``: nowhere",
    )
    inspector: str | None = _setting(
        None,
        _text(
            "a path such as '/sse-inspector' (letters, digits, '.', '_', '~', '-' and '/', which does not end it), or "
            "None for no inspector",
            lambda v: re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", v) is not None and "/." not in v,
            optional=True,
        ),
        "where a page shows streams, rates and events to those who are let in; ``None``: nowhere",
    )
    key_param: str = _setting(
        "connectKey",
        _text("the name of a query parameter", bool),
        "query parameter that names the pools; may be repeated",
    )
    default_key: str = _setting(
        "default",
        _text("a key of 1 to 255 printable characters", lambda v: 0 < len(v) <= 255 and v.isprintable()),
        "the pool of a request that names none",
    )
    headers: Mapping[str, str] = field(
        default_factory=dict, metadata={"check": _headers, "doc": "extra or overriding response headers"}
    )
    cors_origins: tuple[str, ...] = _setting(
        (),
        _texts(
            "a list of origins as browsers send them, such as 'https://example.org' (scheme, host, and port if it is "
            "not the usual one; no path, no capitals, no patterns), or '*'",
            lambda v: v == "*" or (_ORIGIN.match(v) is not None and _USUAL_PORT.match(v) is None),
        ),
        'origins that may read the stream; ``"*"`` for all',
    )
    cors_credentials: bool = _setting(
        False,  # noqa: FBT003
        _flag,
        'their pages may send cookies; not with ``"*"``',
    )
    ping_interval: float = _setting(
        10.0, _number(0, 86_400, whole=False), "seconds; a comment to a stream that was silent for so long; 0: none"
    )
    retry: int | None = _setting(
        3000, _number(0, 2**53 - 1, whole=True, optional=True), "milliseconds; the first ``retry:``; ``None``: not sent"
    )
    close_event: str = _setting(
        "close",
        _text("a name on one line", lambda v: bool(v) and v.isprintable()),
        "the event of ``send_end()`` without data",
    )
    match_query: str | None = _setting(
        None,
        _text("the name of a query parameter, or None", bool, optional=True),
        "a per-request stream is made only where this query parameter is present",
    )
    max_clients: int = _setting(10_000, _number(1, math.inf, whole=True), "streams of one process")
    max_clients_per_key: int | None = _setting(
        None, _number(1, math.inf, whole=True, optional=True), "streams of one key in one process"
    )
    when_full: WhenFull = _setting(
        "retry",
        _one_of("retry", "503"),
        '``"retry"``: 200, a jittered ``retry:``, end, so that a browser comes back; ``"503"``: with Retry-After',
    )
    queue_events: int = _setting(1000, _number(1, math.inf, whole=True), "events that one stream may have waiting")
    queue_bytes: int = _setting(1024 * 1024, _number(1, math.inf, whole=True), "bytes that one stream may have waiting")
    overflow: Overflow | Mapping[str, Overflow] = _setting(
        DEFAULT_POLICY,
        _overflow,
        'what happens beyond that: ``"disconnect"``, ``"drop_oldest"``, ``"drop_newest"`` or ``"conflate"`` '
        "(keeps the last of each key and event name); or a dict of these by key or pattern of keys, where ``*`` stands "
        "for all others",
    )
    max_event_bytes: int = _setting(
        1024 * 1024, _number(16, math.inf, whole=True), "bytes; a larger event is refused at publish"
    )
    send_timeout: float = _setting(
        30.0, _number(0.1, 86_400, whole=False), "seconds; a socket that takes no byte for so long is cut"
    )
    send_buffer: int = _setting(
        128 * 1024, _number(4096, 1024 * 1024 * 1024, whole=True), "bytes; kernel buffer of one client"
    )
    history_size: int = _setting(
        1000, _number(0, math.inf, whole=True), "events kept of each key; 0: no history, ids and replay are off"
    )
    history_ttl: float = _setting(3600.0, _number(0.001, math.inf, whole=False), "seconds that an event is kept")
    join_history: int = _setting(
        0, _number(0, math.inf, whole=True), "latest events of each key for a client that comes without a cursor"
    )
    job_events: int = _setting(10_000, _number(10, math.inf, whole=True), "events kept of each job")
    job_ttl: float = _setting(
        3600.0, _number(1, 315_360_000, whole=False), "seconds that a job is kept after it last said something"
    )
    job_lease: float = _setting(
        10.0,
        _number(0.5, 3600, whole=False),
        "seconds after which a job has failed whose producer was not heard of: its process has died",
    )
    broker_url: str = _setting(
        "memory://",
        _text("a URL such as 'memory://', 'sqlite:///sse.db' or 'redis://localhost:6379/0'", lambda v: "://" in v),
        "where events are ordered and remembered",
    )
    namespace: str = _setting(
        "sse",
        _text(
            "1 to 64 letters, digits, '.', '_' or '-'",
            lambda v: re.fullmatch(r"[A-Za-z0-9._-]{1,64}", v) is not None,
        ),
        "keeps the events of several applications apart in one store",
    )
    fast_path: bool = _setting(
        True,  # noqa: FBT003
        _flag,
        "take sockets over from servers that can give them up, which are gevent's and gunicorn's",
    )
    idempotency_ttl: float = _setting(
        3600.0,
        _number(0.001, math.inf, whole=False),
        "seconds in which an ``idempotency_key`` makes no second event",
    )
    broker_timeout: float = _setting(2.0, _number(0.01, 3600, whole=False), "seconds; longest wait of one ``publish``")
    max_age: float | None = _setting(
        None,
        _number(0.1, math.inf, whole=False, optional=True),
        "seconds; a stream is ended (and comes back) after 80 to 100 % of so many; ``None``: never",
    )
    drain_seconds: float = _setting(
        5.0,
        _number(0, 3600, whole=False),
        "seconds; the clients of a process that stops come back spread over so long, each with its own ``retry:``, "
        "and those that do not read are given up after it; 0: streams just end with their process",
    )
    public_keys: tuple[str, ...] = _setting(
        ("*",),
        _texts("a list of patterns such as 'news' or 'room-*'", bool),
        "patterns of keys open to everybody while no ``authorize`` hook is registered and ``SSE_TICKETS`` is off",
    )
    tickets: bool = _setting(
        False,  # noqa: FBT003
        _flag,
        "a stream of the endpoint needs a ticket; nothing is public",
    )
    ticket_param: str = _setting(
        "ticket", _text("the name of a query parameter", bool), "query parameter that carries the ticket"
    )
    ticket_ttl: float = _setting(
        3600.0, _number(0.1, math.inf, whole=False), "seconds that a ticket is good for, if it is made without ``ttl``"
    )
    ticket_max_ttl: float = _setting(
        86_400.0,
        _number(0.1, 366 * 86_400, whole=False),
        "seconds; no ticket is good for longer, and what was revoked is remembered for so long",
    )

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            try:
                checked = item.metadata["check"](value)
            except _BadValue as error:
                raise SettingsError(
                    f"{PREFIX}{item.name.upper()} (keyword argument {item.name!r}) must be {error}, not {value!r:.80}"
                ) from None
            object.__setattr__(self, item.name, checked)
        if self.history_size == 0 and self.join_history:
            raise SettingsError(
                f"{PREFIX}JOIN_HISTORY={self.join_history} needs a history, but {PREFIX}HISTORY_SIZE is 0: raise it"
            )

        if self.cors_credentials and "*" in self.cors_origins:
            raise SettingsError(
                f"{PREFIX}CORS_CREDENTIALS lets pages send cookies, and {PREFIX}CORS_ORIGINS has '*': anybody's page "
                "could read the streams of who is logged in; list the origins"
            )
        if self.ticket_ttl > self.ticket_max_ttl:
            raise SettingsError(
                f"{PREFIX}TICKET_TTL={self.ticket_ttl} is longer than {PREFIX}TICKET_MAX_TTL={self.ticket_max_ttl}: "
                "shorten the one or raise the other"
            )
        if self.ticket_param == self.key_param:
            raise SettingsError(f"{PREFIX}TICKET_PARAM and {PREFIX}KEY_PARAM are both {self.key_param!r}: rename one")

    def kept(self, key: str | None) -> Kept:
        """Say what is kept of a key; ``None``: of what goes to all."""
        if is_job(key):
            return Kept(self.job_events, self.job_ttl, whole=True)
        if key == REPORT_KEY:
            # Whoever asked has read them by then; one that looks each second would have the store keep them all.
            return Kept(min(self.history_size, 20), min(self.history_ttl, 60.0))
        return Kept(self.history_size, self.history_ttl)

    @classmethod
    def from_mapping(cls, config: Mapping[Any, Any], **options: Any) -> Settings:
        """Read every ``SSE_...`` item of ``config``; keyword arguments (without the prefix) override it.

        Raises :class:`SettingsError` for a name that is no setting, suggesting the nearest, and for bad values.
        """
        names = {item.name for item in fields(cls)}
        values: dict[str, Any] = {}
        for key, value in config.items():
            if isinstance(key, str) and key.startswith(PREFIX):
                name = key.removeprefix(PREFIX).lower()
                if name not in names or key != key.upper():
                    raise _unknown(key, {PREFIX + known.upper() for known in names}, "setting")
                values[name] = value
        for name, value in options.items():
            if name not in names:
                raise _unknown(name, names, "keyword argument")
            values[name] = value
        return cls(**values)


def _unknown(name: str, known: set[str], kind: str) -> SettingsError:
    near = difflib.get_close_matches(name.upper() if name.upper().startswith(PREFIX) else name, sorted(known), n=1)
    hint = f"did you mean {near[0]}?" if near else "known are " + ", ".join(sorted(known))
    return SettingsError(f"{name} is no {kind} of this extension; {hint}")
