"""The wire format: values in, bytes out, and back."""

from __future__ import annotations

import json
import re
from dataclasses import FrozenInstanceError

import pytest
from httpx_sse._decoders import SSEDecoder
from hypothesis import example, given
from hypothesis import strategies as st

from flask_sse_stream.errors import EventError
from flask_sse_stream.event import MAX_RETRY, PING, Event, EventDecoder, Message, chunk, retry_block

text = st.text(st.characters(exclude_categories=["Cs"]))
wild_text = st.lists(
    st.one_of(
        text,
        st.sampled_from(["\r", "\n", "\r\n", ":", " ", "data:", "\n\n", "\ufeff", "\u2028", "\x85", "\v", "\f"]),
    )
).map("".join)
one_line = text.map(lambda value: re.sub(r"[\r\n\0]", "", value))
events = st.builds(
    Event,
    st.none() | wild_text,
    event=st.none() | one_line,
    id=st.none() | one_line,
    retry=st.none() | st.integers(0, MAX_RETRY),
    comment=st.none() | wild_text,
)


def lf(value: str) -> str:
    """What the format makes of line ends."""
    return value.replace("\r\n", "\n").replace("\r", "\n")


def decode(data: bytes, **options: bool) -> list[Event]:
    return EventDecoder(**options).feed(data)


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({place % (len(data) + 1) for place in cuts})
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


def reference(stream: bytes) -> list[tuple[str, str, str]]:
    """Follow the standard's algorithm to the letter over a whole stream: (type, data, lastEventId) of each event."""
    out = []
    decoded = stream.decode("utf-8", "replace")
    decoded = decoded.removeprefix("\ufeff")
    data = kind = buffer = ""
    lines = re.split("\r\n|\n|\r", decoded)
    for line in lines[:-1]:  # what follows the last line end is no line yet
        if line == "":
            last = buffer
            if data:
                out.append((kind or "message", data[:-1], last))
            data = kind = ""
        elif not line.startswith(":"):
            field, colon, value = line.partition(":")
            value = value.removeprefix(" ")
            if field == "event":
                kind = value
            elif field == "data":
                data += value + "\n"
            elif field == "id" and "\0" not in value:
                buffer = value
    return out


# Encoding


@pytest.mark.parametrize(
    ("event", "wire"),
    [
        (Event("hi"), b"data: hi\n\n"),
        (Event(""), b"data: \n\n"),
        (Event("a\nb\rc\r\nd"), b"data: a\ndata: b\ndata: c\ndata: d\n\n"),
        (Event("a\n"), b"data: a\ndata: \n\n"),
        (Event(":colon"), b"data: :colon\n\n"),
        (Event("x\u2028y\vz\x85"), "data: x\u2028y\vz\x85\n\n".encode()),
        (Event({"a": [1, None, "é"]}), 'data: {"a":[1,null,"é"]}\n\n'.encode()),
        (Event(0), b"data: 0\n\n"),
        (Event(False), b"data: false\n\n"),
        (Event("x", id=0, retry=0), b"id: 0\nretry: 0\ndata: x\n\n"),
        (Event("x", id="", event=""), b"id: \ndata: x\n\n"),
        (Event(event="tick"), b"event: tick\ndata: \n\n"),
        (Event(comment="a\nb"), b": a\n: b\n\n"),
        (Event(comment=""), b": \n\n"),
        (Event("d", event="e", id="i", retry=1, comment="c"), b"id: i\nevent: e\nretry: 1\n: c\ndata: d\n\n"),
        (Event(), b""),
    ],
)
def test_an_event_is_encoded_as(event: Event, wire: bytes) -> None:
    assert event.encode() == wire


@pytest.mark.parametrize("field", ["event", "id"])
@pytest.mark.parametrize("bad", ["a\nb", "a\rb", "a\r\nb", "a\0b", "\n"])
def test_a_line_end_or_nul_in_a_name_is_refused_by_its_field(field: str, bad: str) -> None:
    with pytest.raises(EventError, match=f"^{field} must not contain"):
        Event("x", **{field: bad})  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["event", "id", "comment"])
@pytest.mark.parametrize("bad", [b"x", 1.5, True, ["x"], object()])
def test_a_name_that_is_no_text_is_refused_by_its_field(field: str, bad: object) -> None:
    with pytest.raises(EventError, match=f"^{field} must be text"):
        Event("x", **{field: bad})  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [-1, True, False, 1.5, 1.0, "100", float("nan"), 10**400, MAX_RETRY + 1, b"1"])
def test_a_retry_that_is_no_whole_number_in_range_is_refused(bad: object) -> None:
    with pytest.raises(EventError, match="^retry must be a whole number"):
        Event("x", retry=bad)  # type: ignore[arg-type]


def cyclic() -> list[object]:
    value: list[object] = []
    value.append(value)
    return value


def deep() -> list[object]:
    value: list[object] = []
    for _ in range(100_000):
        value = [value]
    return value


@pytest.mark.parametrize(
    "bad",
    [float("nan"), float("inf"), {"x": float("-inf")}, {1, 2}, object(), cyclic(), deep(), {(1, 2): 3}],
    ids=["nan", "inf", "nested inf", "set", "object", "cycle", "deep", "tuple key"],
)
def test_data_that_json_cannot_express_is_refused(bad: object) -> None:
    with pytest.raises(EventError, match="^data of type .* cannot be expressed as JSON"):
        Event(bad)


@pytest.mark.parametrize("bad", [b"x", bytearray(b"x"), memoryview(b"x")])
def test_bytes_are_refused_with_the_cure(bad: object) -> None:
    with pytest.raises(EventError, match="decode it first"):
        Event(bad)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("data", {"data": "a\ud800"}),
        ("data", {"data": {"k": "\udfff"}}),
        ("event", {"event": "\ud800"}),
        ("id", {"id": "\ud800"}),
        ("comment", {"comment": "\ud800"}),
    ],
)
def test_a_lone_surrogate_is_refused_by_its_field(field: str, values: dict[str, object]) -> None:
    with pytest.raises(EventError, match=f"^{field} has a lone surrogate"):
        Event(**{"data": "x", **values})  # type: ignore[arg-type]


def test_an_event_inside_an_event_is_refused() -> None:
    with pytest.raises(EventError, match="already"):
        Event(Event("x"))


def test_an_event_is_immutable_hashable_and_equal_by_value() -> None:
    event = Event("x", id=1)
    assert event == Event("x", id="1")
    assert len({event, Event("x", id="1")}) == 1
    with pytest.raises(FrozenInstanceError):
        event.data = "y"  # type: ignore[misc]


def test_data_is_taken_when_the_event_is_made_and_not_when_it_is_sent() -> None:
    value = {"n": 1}
    event = Event(value)
    value["n"] = 2
    assert event.data == '{"n":1}'


# Decoding


STREAMS: list[tuple[bytes, list[tuple[str, str, str]]]] = [
    (b"data\n\n", [("message", "", "")]),
    (b"data:\n\n", [("message", "", "")]),
    (b"data\ndata\n\n", [("message", "\n", "")]),
    (b"data:test\n\ndata: test\n\n", [("message", "test", "")] * 2),
    (b"data:  two\n\n", [("message", " two", "")]),
    (b"data:\ttab\n\n", [("message", "\ttab", "")]),
    (b"\xef\xbb\xbfdata: bom\n\n", [("message", "bom", "")]),
    (b"\xef\xbb\xbf\xef\xbb\xbfdata: bom\n\n", []),
    (b"data: a\n\n\xef\xbb\xbfdata: b\n\n", [("message", "a", "")]),
    (b"data: cut off at the end", []),
    (b"data: no blank line\n", []),
    (b"id: 7\n\ndata: x\n\n", [("message", "x", "7")]),
    (b"id: 7\n\nid\ndata: x\n\n", [("message", "x", "")]),
    (b"id: 7\ndata: x\n\nid: a\0b\ndata: y\n\n", [("message", "x", "7"), ("message", "y", "7")]),
    (b"event: e\n\ndata: x\n\n", [("message", "x", "")]),
    (b"Data: x\n\n", []),
    (b" data: x\n\n", []),
    (b"event: e\rdata: x\r\n\r\n", [("e", "x", "")]),
    (b"data: \xff\xe2\x82\n\n", [("message", "\ufffd\ufffd", "")]),
    (b":\n\n: comment\ndata: x\n\n", [("message", "x", "")]),
]
WIRES = [wire for wire, _ in STREAMS]


@pytest.mark.parametrize(("wire", "expected"), STREAMS)
def test_a_stream_is_decoded_as_the_standard_says(wire: bytes, expected: list[tuple[str, str, str]]) -> None:
    assert [(e.event or "message", e.data, e.id or "") for e in decode(wire)] == expected
    assert reference(wire) == expected


@pytest.mark.parametrize(
    ("value", "retry"),
    [
        (b"1000", 1000),
        (b"02000", 2000),
        (b"0", 0),
        (b"000", 0),
        (b"1000x", None),
        (b"", None),
        (b"-1", None),
        (b"1.5", None),
        ("\u0663".encode(), None),
        (b"9" * 5000, MAX_RETRY),
    ],
)
def test_only_ascii_digits_set_the_reconnection_time(value: bytes, retry: int | None) -> None:
    decoder = EventDecoder()
    assert decoder.feed(b"retry: " + value + b"\n\n") == []
    assert decoder.retry == retry


def test_comments_are_dropped_unless_asked_for() -> None:
    assert decode(PING) == []
    assert decode(PING, comments=True) == [Event(comment="ping")]
    assert decode(b": c\ndata: x\n\n", comments=True) == [Event("x", comment="c")]


def test_a_block_without_data_moves_the_cursor_and_fires_nothing() -> None:
    decoder = EventDecoder()
    assert decoder.feed(b"id: 9\n\n") == []
    assert decoder.last_event_id == "9"


def test_the_id_of_a_block_that_never_ends_does_not_move_the_cursor() -> None:
    decoder = EventDecoder()
    decoder.feed(b"id: 9\ndata: x\n")
    assert decoder.last_event_id == ""


@pytest.mark.parametrize("size", [1, 7, 64])
@pytest.mark.parametrize("wire", [b"data: " + b"x" * 300, b"data: x\n" * 60, b"x" * 300, b": " + b"c" * 300])
def test_what_the_decoder_holds_is_bounded(wire: bytes, size: int) -> None:
    decoder = EventDecoder(max_bytes=200, comments=True)
    with pytest.raises(EventError, match="max_bytes=200"):
        for start in range(0, len(wire), size):
            decoder.feed(wire[start : start + size])


def test_the_bound_is_of_one_event_and_not_of_the_stream() -> None:
    decoder = EventDecoder(max_bytes=64)
    assert sum(len(decoder.feed(b"data: " + b"x" * 40 + b"\n\n")) for _ in range(100)) == 100


@given(st.lists(events, max_size=6), st.lists(st.integers(0, 10_000), max_size=12))
@example([Event("ü\r"), Event("\n\n")], [7, 8, 9])
def test_what_goes_in_comes_out_however_it_is_cut(sent: list[Event], cuts: list[int]) -> None:
    wire = b"".join(event.encode() for event in sent)
    decoder = EventDecoder(comments=True)
    received = [event for piece in cut(wire, cuts) for event in decoder.feed(piece)]

    expected, last = [], ""
    for event in sent:
        last = last if event.id is None else event.id
        if event.data is not None or event.comment is not None:
            expected.append(
                (
                    event.event,
                    None if event.data is None else lf(event.data),
                    last or None,
                    event.retry,
                    None if event.comment is None else lf(event.comment),
                )
            )
    assert [(e.event, e.data, e.id, e.retry, e.comment) for e in received] == expected
    assert decoder.last_event_id == last


@given(st.lists(events, max_size=6))
def test_what_goes_in_comes_out_of_the_standards_own_algorithm(sent: list[Event]) -> None:
    wire = b"".join(event.encode() for event in sent)
    assert reference(wire) == [(e.event or "message", e.data, e.id or "") for e in decode(wire)]


@given(st.lists(events.filter(lambda e: e.data is not None), max_size=6))
def test_what_goes_in_comes_out_of_a_decoder_that_nobody_here_wrote(sent: list[Event]) -> None:
    decoder, received = SSEDecoder(), []
    for event in sent:
        for line in event.encode()[:-1].split(b"\n"):
            got = decoder.decode(line.decode())
            if got is not None:
                received.append(got)
    wanted, last = [], ""
    for event in sent:
        last = last if event.id is None else event.id
        wanted.append((event.event or "message", lf(event.data or ""), last))
    assert [(e.event, e.data, e.id) for e in received] == wanted


@given(st.lists(st.one_of(st.binary(max_size=20), st.sampled_from([b"data:", b"id: 1", b"\n", b"\r", b"\n\n", b":"]))))
def test_any_bytes_are_decoded_as_the_standards_own_algorithm_does(pieces: list[bytes]) -> None:
    decoder = EventDecoder()
    received = [event for piece in pieces for event in decoder.feed(piece)]
    assert [(e.event or "message", e.data, e.id or "") for e in received] == reference(b"".join(pieces))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
        lambda inner: st.lists(inner) | st.dictionaries(text, inner),
        max_leaves=10,
    )
)
def test_a_json_value_comes_out_as_it_went_in(value: object) -> None:
    if isinstance(value, str) or value is None:
        value = [value]
    [event] = decode(Event(value).encode())
    assert event.data is not None
    assert json.loads(event.data) == value


# Messages and frames


def test_a_frame_is_the_body_with_its_place_in_the_log() -> None:
    message = Message("k", "ep", 7, Event("x", event="e").encode(), 0.0)
    assert message.id == "ep-7"
    assert not message.own_id
    assert message.frame == b"id: ep-7\nevent: e\ndata: x\n\n"


def test_an_id_of_the_users_own_is_kept() -> None:
    message = Message("k", "ep", 7, Event("x", id="größe").encode(), 0.0)
    assert (message.id, message.own_id) == ("größe", True)
    assert decode(message.frame) == [Event("x", id="größe")]


@pytest.mark.parametrize("event", [Event(comment="c\ndata: no"), Event(retry=5)])
def test_a_block_that_fires_nothing_gets_no_id(event: Event) -> None:
    assert Message("k", "ep", 7, event.encode(), 0.0).frame == event.encode()


def test_without_history_a_frame_has_no_id() -> None:
    assert Message("k", "ep", 7, Event("x").encode(), 0.0, resumable=False).frame == b"data: x\n\n"


def test_a_chunk_is_made_once_and_holds_the_frame() -> None:
    message = Message("k", "ep", 7, Event("é" * 20).encode(), 0.0)
    assert message.chunk is message.chunk
    size, _, rest = message.chunk.partition(b"\r\n")
    assert rest == message.frame + b"\r\n"
    assert int(size, 16) == len(message.frame)


def test_an_empty_chunk_is_refused() -> None:
    with pytest.raises(ValueError, match="end the response"):
        chunk(b"")


def test_a_retry_block_fires_nothing() -> None:
    decoder = EventDecoder()
    assert decoder.feed(retry_block(2500)) == []
    assert decoder.retry == 2500
