"""The public names are these, and no others by accident."""

from __future__ import annotations

import pytest

import flask_sse_stream

PUBLIC = [
    "SSE",
    "AccessDenied",
    "BrokerError",
    "CloseReason",
    "Event",
    "EventDecoder",
    "EventError",
    "Job",
    "JobClosed",
    "JobState",
    "PoolManager",
    "Publisher",
    "SSEError",
    "Settings",
    "SettingsError",
    "Stream",
    "StreamClosed",
    "StreamsFull",
    "Ticket",
]


def test_the_package_exports_exactly_its_public_surface() -> None:
    assert sorted(flask_sse_stream.__all__) == sorted(PUBLIC)


def test_every_public_name_can_be_had_from_the_package() -> None:
    for name in PUBLIC:
        assert getattr(flask_sse_stream, name).__module__.startswith("flask_sse_stream.")


def test_dir_lists_every_public_name() -> None:
    assert set(PUBLIC) <= set(dir(flask_sse_stream))


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Channel'"):
        flask_sse_stream.Channel  # noqa: B018
