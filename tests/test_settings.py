"""Settings: every value is checked at start, and the message names the setting and what it may be."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import pytest

from flask_sse_stream.errors import SettingsError
from flask_sse_stream.settings import PREFIX, Overflow, Settings


def test_the_defaults_are_valid_and_every_setting_says_what_it_is() -> None:
    settings = Settings()
    assert settings.path == "/stream"
    assert all(item.metadata["doc"] for item in fields(settings))


def test_settings_are_read_by_their_prefix_and_other_items_are_left_alone() -> None:
    config = {"SSE_PATH": "/events", "SSE_RETRY": None, "SECRET_KEY": "x", "SSEX": 1, 5: "not text"}
    settings = Settings.from_mapping(config)
    assert (settings.path, settings.retry, settings.key_param) == ("/events", None, "connectKey")


def test_keyword_arguments_override_the_mapping() -> None:
    assert Settings.from_mapping({"SSE_RETRY": 1}, retry=2).retry == 2


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("SSE_PING_INTERVALL", "did you mean SSE_PING_INTERVAL?"),
        ("SSE_MAX_CLIENT", "did you mean SSE_MAX_CLIENTS?"),
        ("SSE_path", "did you mean SSE_PATH?"),
        ("SSE_ZZZZZZ", "known are SSE_"),
    ],
)
def test_a_misspelt_setting_is_an_error_that_suggests_the_right_one(name: str, suggestion: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_mapping({name: 1})
    assert name in str(caught.value)
    assert suggestion in str(caught.value)


def test_a_misspelt_keyword_argument_is_an_error_that_suggests_the_right_one() -> None:
    with pytest.raises(SettingsError, match="ping_intervall is no keyword argument .* did you mean ping_interval"):
        Settings.from_mapping({}, ping_intervall=1)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("path", "stream"),
        ("path", ""),
        ("path", 5),
        ("path", "/a\nb"),
        ("key_param", ""),
        ("default_key", ""),
        ("default_key", "x" * 256),
        ("headers", []),
        ("headers", {"X A": "b"}),
        ("headers", {"X-A": "b\r\nc"}),
        ("headers", {"X-A": 5}),
        ("headers", {"X-A": "\u20ac"}),
        ("headers", {"Connection": "close"}),
        ("headers", {"transfer-encoding": "chunked"}),
        ("headers", {"Content-Type": "text/html"}),
        ("cors_origins", "example.org"),
        ("cors_origins", ["https://example.org/path"]),
        ("cors_origins", [5]),
        ("cors_origins", 5),
        ("ping_interval", -1),
        ("ping_interval", float("nan")),
        ("ping_interval", float("inf")),
        ("ping_interval", True),
        ("ping_interval", "10"),
        ("ping_interval", None),
        ("retry", -1),
        ("retry", 1.5),
        ("retry", True),
        ("close_event", "a\nb"),
        ("close_event", ""),
        ("match_query", ""),
        ("max_clients", 0),
        ("max_clients", "10"),
        ("max_clients", None),
        ("max_clients_per_key", 0),
        ("when_full", "drop"),
        ("when_full", 503),
        ("queue_events", 0),
        ("queue_bytes", 0),
        ("overflow", "block"),
        ("overflow", None),
        ("overflow", {}),
        ("overflow", {"": "conflate"}),
        ("overflow", {"a\n": "conflate"}),
        ("overflow", {5: "conflate"}),
        ("overflow", {"ticker": "block"}),
        ("overflow", {"ticker": ["conflate"]}),
        ("max_event_bytes", 0),
        ("send_timeout", 0),
        ("send_buffer", 1),
        ("history_size", -1),
        ("history_ttl", 0),
        ("join_history", -1),
        ("broker_url", "memory"),
        ("broker_url", None),
        ("max_age", 0),
        ("drain_seconds", -1),
        ("public_keys", [""]),
        ("public_keys", 5),
    ],
)
def test_a_bad_value_is_refused_by_the_settings_name(name: str, bad: object) -> None:
    with pytest.raises(SettingsError, match=f"^{PREFIX}{name.upper()} .*must be ") as caught:
        Settings(**{name: bad})  # type: ignore[arg-type]
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("name", [item.name for item in fields(Settings)])
def test_no_setting_takes_an_object_of_no_meaning(name: str) -> None:
    with pytest.raises(SettingsError, match=name):
        Settings(**{name: object()})


def test_join_history_needs_a_history() -> None:
    with pytest.raises(SettingsError, match="SSE_JOIN_HISTORY=5 needs a history"):
        Settings(history_size=0, join_history=5)


def test_credentials_are_not_for_everybody() -> None:
    with pytest.raises(SettingsError, match=r"SSE_CORS_CREDENTIALS .* '\*'.* list the origins"):
        Settings(cors_origins=("*",), cors_credentials=True)
    assert Settings(cors_origins=("https://example.org",), cors_credentials=True).cors_credentials


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "example.org",
        "https://example.org/",
        "https://*.example.org",
        "https://Example.org",
        "https://example.org:443",
        "http://example.org:80",
        "https://user@example.org",
    ],
)
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(SettingsError, match=r"^SSE_CORS_ORIGINS .*as browsers send them"):
        Settings(cors_origins=(origin,))


@pytest.mark.parametrize("origin", ["http://localhost:3000", "https://example.org:8443", "http://[::1]:5000"])
def test_an_origin_may_have_a_port(origin: str) -> None:
    assert Settings(cors_origins=(origin,)).cors_origins == (origin,)


def test_tickets_have_a_longest_life_and_a_parameter_of_their_own() -> None:
    with pytest.raises(SettingsError, match="SSE_TICKET_TTL=7200.0 is longer than SSE_TICKET_MAX_TTL=3600.0"):
        Settings(ticket_ttl=7200, ticket_max_ttl=3600)
    with pytest.raises(SettingsError, match="SSE_TICKET_PARAM and SSE_KEY_PARAM are both 'x'"):
        Settings(ticket_param="x", key_param="x")


def test_settings_are_frozen_and_do_not_share_the_users_dict() -> None:
    headers = {"X-A": "b"}
    settings = Settings(headers=headers)
    headers["X-A"] = "c"
    assert settings.headers == {"X-A": "b"}
    with pytest.raises(FrozenInstanceError):
        settings.retry = 5  # type: ignore[misc]


def test_whole_seconds_are_seconds_and_one_origin_is_a_list_of_one() -> None:
    settings = Settings(ping_interval=5, cors_origins="*", public_keys="news")  # type: ignore[arg-type]
    assert (settings.ping_interval, settings.cors_origins, settings.public_keys) == (5.0, ("*",), ("news",))


def test_a_policy_that_is_none_is_refused_by_its_key() -> None:
    with pytest.raises(SettingsError, match=r"such as \{'ticker-\*': 'conflate', .*\(that of 'ticker' is not\)"):
        Settings(overflow={"ticker": "conflat", "*": "disconnect"})  # type: ignore[dict-item]


def test_the_policies_are_those_of_the_start_whatever_becomes_of_the_dict() -> None:
    given: dict[str, Overflow] = {"ticker": "conflate"}
    settings = Settings(overflow=given)
    given.clear()
    assert settings.overflow == {"ticker": "conflate"}
