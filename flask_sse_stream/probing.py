"""Opens a stream as a browser does, and finds whether anything on the way holds it back."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal
from urllib.parse import parse_qs, urlsplit

from .errors import BrokerError, EventError
from .event import Event, EventDecoder
from .pools import PoolManager
from .reading import Request, ResponseError, Streaming
from .settings import Settings

__all__ = ["Finding", "look_at_url"]

_HEAD_SECONDS: Final = 8.0
_FIRST_SECONDS: Final = 5.0
_EVENT_SECONDS: Final = 8.0
_BEAT_SECONDS: Final = 5.0  # for a heartbeat to be late
_LATE: Final = 2.0
_TURNED_AWAY_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that was looked at: all is well, or not, and then what to do."""

    level: Literal["ok", "warning", "problem"]
    check: str
    text: str
    cure: str = ""


def look_at_url(manager: PoolManager, url: str, headers: Mapping[str, str]) -> Iterator[Finding]:
    """Open a stream, publish to it, and wait for a heartbeat; find what is held back on the way."""
    held = (
        "something on the way keeps the response for itself: for nginx proxy_buffering off and gzip off in the "
        "location, for others their setting against response buffering"
    )
    stream: Streaming | None = None
    try:
        began = time.monotonic()
        try:
            stream = Streaming(Request(url, dict(headers)), _HEAD_SECONDS)
            status, found = stream.head(_HEAD_SECONDS)
        except TimeoutError:
            text = f"no answer within {_HEAD_SECONDS:g} s, although the server sends its first bytes at once"
            yield Finding("problem", "first bytes", text, held)
            return
        except (OSError, ResponseError) as error:
            yield Finding("problem", "endpoint", f"{url}: {error}", "start the server, or mend the URL")
            return
        after = time.monotonic() - began
        of_the_head = list(_look_at_head(url, status, found))
        yield from of_the_head
        if any(finding.level == "problem" for finding in of_the_head):
            return
        probe = _Probe(stream, found.get("content-length", ""))
        if not probe.wait(lambda: probe.bytes > 0, _FIRST_SECONDS):
            yield Finding("problem", "first bytes", "the head came, and no byte of the stream after it", held)
            return
        # A stream begins with ": open". Who is told to come back gets "retry:" and the end, from us with ": full".
        probe.wait(lambda: probe.ended or bool({*probe.comments} - {"full"}), _TURNED_AWAY_SECONDS)
        if probe.ended and not {*probe.comments} - {"full"} and probe.retry is not None:
            text = f"{url} says retry: {probe.retry} and ends: nobody is given a stream there now"
            cure = "start the application, if this is what the proxy answers for it; otherwise it is about to stop, "
            cure += "or is full: raise SSE_MAX_CLIENTS, or start more processes"
            yield Finding("problem", "endpoint", text, cure)
            return
        if "content-length" in found:
            text = "the response has a Content-Length: it was read to its end before it was passed on"
            yield Finding("problem", "headers", text, "turn response buffering off")
        text = f"after {after * 1000:.0f} ms"
        yield Finding("warning" if after > _LATE else "ok", "first bytes", text, held if after > _LATE else "")
        if manager.reaches_other_processes:
            yield _event(manager, url, probe, held)
        yield _heartbeat(manager.settings, probe, held)
    except (OSError, ResponseError) as error:
        text = f"the stream broke: {error}"
        yield Finding("problem", "endpoint", text, "see the logs of the server and of what is before it")
    finally:
        if stream is not None:
            stream.close()


def _look_at_head(url: str, status: int, headers: Mapping[str, str]) -> Iterator[Finding]:
    kind = headers.get("content-type", "")
    if status != 200 or not kind.startswith("text/event-stream"):
        cure = "name the URL of a stream (SSE_PATH)"
        if status in (401, 403):
            cure = "name keys that you may listen to, or give a ticket: --header 'Authorization: Bearer ...'"
        elif status >= 500:
            cure = "start the application; until it is back, have the proxy answer 200 with a retry: and not 5xx"
        yield Finding("problem", "endpoint", f"{url} is answered {status} {kind or 'without a type'}", cure)
        return
    encoding = headers.get("content-encoding", "identity")
    if encoding not in ("identity", ""):
        cure = "except text/event-stream from compression: gzip off in nginx's location, no encode in Caddy, and "
        cure += "Flask-Compress without this type"
        yield Finding("problem", "compression", f"the stream is compressed ({encoding}): it holds events back", cure)
    else:
        yield Finding("ok", "compression", "none")
    control = headers.get("cache-control", "")
    if "no-cache" not in control and "no-store" not in control:
        text = f"Cache-Control is {control!r}: something on the way has changed it, and may keep what it should not"
        yield Finding("warning", "headers", text, "have the proxy pass Cache-Control: no-cache, no-transform on")


class _Probe:
    """What has come of a stream so far."""

    def __init__(self, stream: Streaming, length: str) -> None:
        self.bytes = 0
        self.comments: list[str] = []
        self.ended = False
        self._stream = stream
        self._length = int(length) if length.isdecimal() else None
        self._decoder = EventDecoder(comments=True)

    @property
    def retry(self) -> int | None:
        return self._decoder.retry

    def wait(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Read until the condition holds; say whether it does."""
        deadline = time.monotonic() + seconds
        while not condition() and not self.ended and (left := deadline - time.monotonic()) > 0:
            data = self._stream.read(left)
            if data is None:
                self.ended = True
            else:
                self.bytes += len(data)
                self.comments += [event.comment or "" for event in self._decoder.feed(data) if event.data is None]
                self.ended = self.bytes == self._length
        return condition()


def _event(manager: PoolManager, url: str, probe: _Probe, held: str) -> Finding:
    settings = manager.settings
    keys = parse_qs(urlsplit(url).query).get(settings.key_param) or [settings.default_key]
    text = f"doctor {os.getpid()}"
    try:
        # A comment: clients do not see it.
        manager.publish(keys[0], Event(comment=text))
    except (BrokerError, EventError) as error:
        return Finding("problem", "events", f"publishing failed: {error}", "see the findings about the broker")
    began = time.monotonic()
    if probe.wait(lambda: text in probe.comments, _EVENT_SECONDS):
        return Finding(
            "ok", "events", f"published to {keys[0]!r}, there after {(time.monotonic() - began) * 1000:.0f} ms"
        )
    cure = f"{held}; or the server at the URL has another SSE_BROKER_URL or SSE_NAMESPACE than this application here"
    return Finding("problem", "events", f"what was published to {keys[0]!r} did not come in {_EVENT_SECONDS:g} s", cure)


def _heartbeat(settings: Settings, probe: _Probe, held: str) -> Finding:
    interval = settings.ping_interval
    if not interval:
        cure = "set SSE_PING_INTERVAL to 10, or lower than the shortest idle timeout on the way"
        return Finding("warning", "heartbeats", "SSE_PING_INTERVAL is 0: proxies cut streams that are silent", cure)
    before, began, patience = probe.bytes, time.monotonic(), 1.5 * interval + _BEAT_SECONDS
    if probe.wait(lambda: probe.bytes > before, patience):
        return Finding("ok", "heartbeats", f"after {time.monotonic() - began:.1f} s")
    if probe.ended:
        return Finding(
            "problem",
            "heartbeats",
            f"the stream was cut after {time.monotonic() - began:.1f} s of silence, before its first heartbeat",
            f"raise the idle timeout on the way (nginx: proxy_read_timeout) above SSE_PING_INTERVAL = {interval:g}, or "
            "lower that",
        )
    text = f"none came in {patience:.0f} s, with SSE_PING_INTERVAL = {interval:g}"
    return Finding("problem", "heartbeats", text, held)
