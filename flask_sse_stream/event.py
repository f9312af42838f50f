"""Values in, bytes out, and back: the ``text/event-stream`` format of the WHATWG HTML standard, section 9.2.

This file knows the wire format and nothing else: no stream, no key's rights, no socket, no clock. Everything in
it is a value or a pure function, save :class:`EventDecoder`, which belongs to whoever feeds it. Any thread may
call it. It imports only ``errors`` and ``keys``.

Three words, used in the whole package:

body
    what :meth:`Event.encode` gives: the fields of one event and the blank line that dispatches it. Made once,
    by the publisher. An id of the user's own is its first line.
frame
    the body with the id that its place in the log gives it: what a client receives.
chunk
    a frame wrapped for HTTP/1.1's chunked transfer coding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from .errors import EventError
from .keys import JOB_ENDS, is_job

__all__ = [
    "END_ID",
    "MAX_RETRY",
    "PING",
    "Event",
    "EventDecoder",
    "Message",
    "chunk",
    "encode_json",
    "is_body",
    "retry_block",
    "to_text",
]

END_ID: Final = "end"
"""The id of the last event of a stream that is over for good: a reconnect that carries it is answered 204."""

MAX_RETRY: Final = 2**53 - 1
"""The largest ``retry``, in milliseconds: the largest whole number that a browser's script can hold exactly."""

PING: Final = b": ping\n\n"
"""A comment that says nothing: it carries no id, so it never moves a client's cursor."""

# str.splitlines() would also split at U+2028, VT, FF and others, which the format leaves alone.
_LINE_END = re.compile(r"\r\n|\r|\n")
_BYTES_LINE_END = re.compile(rb"\r\n|\r|\n")
_FORBIDDEN = re.compile(r"[\r\n\0]")
_JOB_ENDS = tuple(f"event: {name}\n".encode() for name in JOB_ENDS)


def encode_json(value: Any) -> str:
    """Express a value as compact JSON by the standard library's encoder; NaN and infinity are refused."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def to_text(data: Any, dumps: Callable[[Any], str] = encode_json) -> str:
    """Give the text that stands for ``data`` on the wire: text as it is, any other value as JSON by ``dumps``.

    Raises :class:`EventError` for what JSON cannot express (sets, cycles, NaN, nesting too deep) and for bytes.
    """
    if isinstance(data, str):
        return data
    if isinstance(data, (bytes, bytearray, memoryview)):
        raise EventError(f"data is {type(data).__name__}, but an event is text: decode it first")
    try:
        return dumps(data)
    except (TypeError, ValueError, RecursionError, OverflowError) as error:
        raise EventError(
            f"data of type {type(data).__name__} cannot be expressed as JSON ({error}); "
            "pass text, or what the JSON encoder knows"
        ) from error


def _check_name(field: str, value: Any) -> str:
    """Check what must fit on one line: ``event`` and ``id``."""
    if not isinstance(value, str):
        raise EventError(f"{field} must be text, not {type(value).__name__}")
    bad = _FORBIDDEN.search(value)
    if bad is not None:
        raise EventError(f"{field} must not contain {bad.group()!r}: it would end the line and forge other fields")
    return _check_encodable(field, value)


def _check_encodable(field: str, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise EventError(
            f"{field} has a lone surrogate, {value[error.start]!r} at position {error.start}, which UTF-8 cannot carry"
        ) from error
    return value


def _check_retry(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_RETRY:
        # !r of a number of thousands of digits is itself a ValueError.
        shown = f"a {value.bit_length()}-bit number" if isinstance(value, int) and value > MAX_RETRY else repr(value)
        raise EventError(f"retry must be a whole number of milliseconds from 0 to {MAX_RETRY}, not {shown}")
    return value


@dataclass(frozen=True, slots=True, init=False)
class Event:
    """One server-sent event: an immutable value that is checked when it is made.

    ``data``
        text as it is; any other value becomes JSON by the standard library's encoder (a Flask app's own JSON
        provider is used where ``publish`` and ``send`` are given a plain value). ``""`` is an event with empty
        data. ``None`` is no data at all: such a block moves the cursor, sets the reconnection time or is a
        comment, and fires nothing; with an ``event`` name it becomes ``""``, since a browser drops a named
        event without data. CR and CRLF arrive as LF: the format knows lines, not their ends.
    ``event``
        its name, ``None`` or ``""`` for the browser's ``message``.
    ``id``
        the cursor that a client sends back as ``Last-Event-ID``; a whole number is taken as text, so ``0`` is an id.
    ``retry``
        the client's reconnection time in milliseconds, 0 to :data:`MAX_RETRY`.
    ``comment``
        text that clients ignore; it may have several lines.

    Raises :class:`EventError` for CR, LF or NUL in ``event`` or ``id``, for a ``retry`` that is no whole number
    in its range (``True`` and ``1.5`` are none), for lone surrogates, and for what JSON cannot express.
    """

    data: str | None
    event: str | None
    id: str | None
    retry: int | None
    comment: str | None

    def __init__(
        self,
        data: Any = None,
        *,
        event: str | None = None,
        id: str | int | None = None,
        retry: int | None = None,
        comment: str | None = None,
    ) -> None:
        if isinstance(data, Event):
            raise EventError("data is an Event already: pass it on as it is")
        event = _check_name("event", event) or None if event is not None else None
        if isinstance(id, int) and not isinstance(id, bool):
            id = str(id)
        id = _check_name("id", id) if id is not None else None
        retry = _check_retry(retry) if retry is not None else None
        if comment is not None:
            if not isinstance(comment, str):
                raise EventError(f"comment must be text, not {type(comment).__name__}")
            _check_encodable("comment", comment)
        text = _check_encodable("data", to_text(data)) if data is not None else None
        if text is None and event is not None:
            text = ""
        self._set(text, event, id, retry, comment)

    def _set(self, data: str | None, event: str | None, id: str | None, retry: int | None, comment: str | None) -> None:
        put = object.__setattr__
        put(self, "data", data)
        put(self, "event", event)
        put(self, "id", id)
        put(self, "retry", retry)
        put(self, "comment", comment)

    def encode(self) -> bytes:
        """Give the body: this event's fields and the blank line that ends it, as UTF-8.

        An event with no field at all gives ``b""``.
        """
        lines = []
        if self.id is not None:  # First, so that a reader of the body finds it without decoding the rest.
            lines.append(f"id: {self.id}")
        if self.event is not None:
            lines.append(f"event: {self.event}")
        if self.retry is not None:
            lines.append(f"retry: {self.retry}")
        if self.comment is not None:
            lines += [f": {line}" for line in _LINE_END.split(self.comment)]
        if self.data is not None:
            lines += [f"data: {line}" for line in _LINE_END.split(self.data)]
        return ("\n".join(lines) + "\n\n").encode() if lines else b""


_NO_FIELD = re.compile(rb"^(?!data: |: |event: |retry: [0-9]{1,16}$|id: [^\0]+$)", re.MULTILINE)


def is_body(data: bytes) -> bool:
    """Say whether these bytes, which come from outside, are one body as :meth:`Event.encode` gives it."""
    if not data.endswith(b"\n\n") or b"\r" in data or b"\nid: " in data or data.startswith(b"id: end\n"):
        return False
    if _NO_FIELD.search(data, 0, len(data) - 2) is not None:
        return False
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def retry_block(milliseconds: int) -> bytes:
    """Give the block that sets the client's reconnection time and fires nothing."""
    return Event(retry=milliseconds).encode()


def chunk(data: bytes) -> bytes:
    """Wrap bytes as one chunk of HTTP/1.1's chunked transfer coding (RFC 9112, section 7.1).

    Empty bytes are refused with :class:`ValueError`: they would be the last chunk and end the response.
    """
    if not data:
        raise ValueError("an empty chunk would end the response")
    return b"%x\r\n%b\r\n" % (len(data), data)


class Message:
    """A published event with its place in the log: what brokers carry, windows keep and streams are offered.

    Immutable by convention and shared: one ``frame`` object serves the queues of all clients.

    ``key``
        the key it was published to, or ``None`` for all.
    ``epoch``, ``seq``
        its place: the life of the log, and the number in it. ``seq`` increases over the whole namespace.
    ``id``
        what ``publish`` returns and a client sends back: ``<epoch>-<seq>``, or the user's own.
    ``own_id``
        whether ``id`` is the user's own.
    ``frame``
        the bytes a client receives.
    ``created``
        ``time.monotonic()`` of this process when the event was published.
    ``last``
        whether it is the end of a job, after which its streams end for good: its frame has the id ``end``.
    """

    __slots__ = ("_chunk", "_name", "created", "epoch", "frame", "id", "key", "last", "own_id", "seq")

    def __init__(
        self, key: str | None, epoch: str, seq: int, body: bytes, created: float, *, resumable: bool = True
    ) -> None:
        self.key: str | None = key
        self.epoch: str = epoch
        self.seq: int = seq
        self.created: float = created
        self.own_id: bool = body.startswith(b"id: ")
        self.last: bool = key is not None and is_job(key) and body.startswith(_JOB_ENDS)
        if self.own_id:
            self.id: str = body[4 : body.index(b"\n")].decode()
            self.frame: bytes = body
        else:
            self.id = f"{epoch}-{seq}"
            # A comment carries no id, and without history an id would promise a replay that cannot be had.
            fires = body.startswith(b"data:") or b"\ndata:" in body
            shown = END_ID if self.last else self.id
            self.frame = b"id: %b\n%b" % (shown.encode(), body) if resumable and fires else body
        self._chunk: bytes | None = None
        self._name: bytes | None = None

    @property
    def name(self) -> bytes:
        """The line of the frame that names the event, looked for once; ``b""`` if none does."""
        if self._name is None:
            lines = self.frame.split(b"\n", 3)[:3]  # the id and the name come first
            self._name = next((line for line in lines if line.startswith(b"event: ")), b"")
        return self._name

    @property
    def chunk(self) -> bytes:
        """The frame as one HTTP chunk, made once."""
        if self._chunk is None:
            self._chunk = chunk(self.frame)
        return self._chunk

    def __repr__(self) -> str:
        return f"<Message {self.id} key={self.key!r} {len(self.frame)} bytes>"


class EventDecoder:
    """Decode ``text/event-stream`` from chunks cut anywhere, inside a character or between CR and LF too.

    ``last_event_id``
        the id of the last dispatched block, ``""`` for none: what a client sends as ``Last-Event-ID``.
    ``retry``
        the reconnection time that the stream asked for, in milliseconds, or ``None``.

    Every :class:`Event` it gives has ``data``; its ``id`` is ``last_event_id`` at its dispatch, as a browser's
    ``lastEventId``, so it stays with later events that have none (``None`` while it is empty); ``retry`` is
    what its own block asked for. Comments are dropped; with ``comments=True`` they are kept on the event of
    their block, and a block of comments alone (a heartbeat) gives an event without data.

    ``max_bytes`` (default 16 MiB) bounds what is held of one unfinished block: beyond it :meth:`feed` raises
    :class:`EventError`, and the decoder is of no further use.
    """

    def __init__(self, *, max_bytes: int = 16 * 1024 * 1024, comments: bool = False) -> None:
        self.last_event_id: str = ""
        self.retry: int | None = None
        self._max_bytes = max_bytes
        self._comments = comments
        self._line: list[bytes] = []  # the pieces of a line whose end has not come
        self._line_bytes = 0
        self._block_bytes = 0  # of the finished lines of the current block
        self._after_cr = False
        self._first_line = True
        self._id_buffer = ""
        self._clear_block()

    def _clear_block(self) -> None:
        self._block_bytes = 0
        self._name = ""
        self._data: list[str] = []
        self._comment: list[str] = []
        self._block_retry: int | None = None

    def feed(self, data: bytes) -> list[Event]:
        """Take the next bytes and give the events that they complete, in order.

        Bytes of a block that never gets its blank line give nothing, as the standard says.
        """
        events: list[Event] = []
        if self._after_cr and data:
            self._after_cr = False
            if data.startswith(b"\n"):  # The second half of a CRLF that was cut in two.
                data = data[1:]
        *complete, rest = _BYTES_LINE_END.split(data)
        for piece in complete:
            self._line.append(piece)
            self._count(len(piece))
            line = b"".join(self._line)
            self._line.clear()
            self._line_bytes = 0
            self._take_line(line, events)
        if rest:
            self._line.append(rest)
            self._count(len(rest))
        self._after_cr = data.endswith(b"\r") or (self._after_cr and not data)
        return events

    def _count(self, new_bytes: int) -> None:
        self._line_bytes += new_bytes
        if self._block_bytes + self._line_bytes > self._max_bytes:
            raise EventError(f"the stream has an event of more than max_bytes={self._max_bytes} bytes")

    def _take_line(self, line: bytes, events: list[Event]) -> None:
        if self._first_line:
            self._first_line = False
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line:
            self._dispatch(events)
            return
        name, _, value = line.partition(b":")
        text = value.removeprefix(b" ").decode("utf-8", "replace")
        if name == b"data":
            self._block_bytes += len(line) + 1  # the line's end is data too
            self._data.append(text)
        elif name == b"":
            if self._comments:
                self._block_bytes += len(line) + 1
                self._comment.append(text)
        elif name == b"event":
            self._name = text
        elif name == b"id":
            if "\0" not in text:
                self._id_buffer = text
        elif name == b"retry" and text.isascii() and text.isdigit():
            # Converting thousands of digits is slow, and from 4,300 on an error in Python.
            digits = text.lstrip("0") or "0"
            self._block_retry = self.retry = min(int(digits), MAX_RETRY) if len(digits) <= 16 else MAX_RETRY

    def _dispatch(self, events: list[Event]) -> None:
        self.last_event_id = self._id_buffer
        if self._data or self._comment:
            event = Event.__new__(Event)  # What a foreign stream holds need not be what we would publish.
            event._set(
                "\n".join(self._data) if self._data else None,
                self._name or None,
                self.last_event_id or None,
                self._block_retry,
                "\n".join(self._comment) if self._comment else None,
            )
            events.append(event)
        self._clear_block()
