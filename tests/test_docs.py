"""The README and the documentation: their code runs and does what they say, and what they name exists."""

from __future__ import annotations

import ast
import asyncio
import functools
import importlib.util
import inspect
import json
import logging
import os
import re
import subprocess
import sys
import textwrap
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from celery._state import _on_app_finalizers
from docs_blocks import PAGES, all_blocks, blocks
from fakes import shut_down
from flask import Flask
from redis_server import RedisServer
from support import ROOT, chromium, free_port, wait_for
from werkzeug.serving import make_server
from werkzeug.test import Client

import flask_sse_stream
from flask_sse_stream import Event, EventDecoder, EventError, PoolManager, Publisher, Settings
from flask_sse_stream.metrics import NAMES
from flask_sse_stream.overflow import Hole
from flask_sse_stream.reports import Inquiry
from flask_sse_stream.testing import sse_clock
from flask_sse_stream.tickets import Tickets
from flask_sse_stream.wsgi import SSEMiddleware

DOCS = ROOT / "docs"


class Page:
    """A page's blocks, run in their order in one namespace, as a reader would who types them one after another.

    ``redis``
        the Redis that they find where a reader has one.
    """

    redis: RedisServer

    def __init__(self, name: str) -> None:
        self.names: dict[str, Any] = {"__name__": "a_page_of_the_docs"}
        for line, block in blocks(name):
            here = block.replace("redis://localhost:6379/0", self.redis.url)
            # The empty lines in front put the page's own line numbers into tracebacks.
            exec(compile("\n" * (line - 1) + here, str(ROOT / name), "exec", dont_inherit=True), self.names)

    def __getitem__(self, name: str) -> Any:
        return self.names[name]


class Reader:
    """Reads a stream of a WSGI application, as a client does."""

    def __init__(self, application: Any, path: str, headers: dict[str, str] | None = None, **options: Any) -> None:
        self.response = Client(application).open(path, headers=headers, **options)
        self.chunks = iter(self.response.response)
        self.decoder = EventDecoder()
        self.events: list[Event] = []

    def take(self, number: int) -> list[Event]:
        while len(self.events) < number:
            self.events += self.decoder.feed(next(self.chunks))
        taken, self.events = self.events[:number], self.events[number:]
        return taken

    def to_the_end(self) -> list[Event]:
        for chunk in self.chunks:
            self.events += self.decoder.feed(chunk)
        return self.events

    def close(self) -> None:
        self.response.close()


def first_place(manager: PoolManager) -> dict[str, str]:
    """The cursor of a client that has been there from the beginning and has seen nothing."""
    return {"Last-Event-ID": manager.publish("another key", "x").partition("-")[0] + "-0"}


def said(events: list[Event]) -> list[tuple[str | None, str | None]]:
    return [(event.event, event.data) for event in events]


@pytest.fixture(scope="module", autouse=True)
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        Page.redis = server
        yield server


@pytest.fixture(autouse=True)
def nothing_is_patched_and_nothing_is_left_running(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[None]:
    """Pages may patch the standard library, start streams and make files; none of it shall outlive its test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gevent.monkey.patch_all", lambda: None)
    # Or every application of Celery's that is made from now on would have the tasks of these pages.
    monkeypatch.setattr("celery._state._on_app_finalizers", set(_on_app_finalizers))
    levels = {name: logging.getLogger(name).level for name in ("flask_sse_stream", "werkzeug")}
    made = []
    begin = PoolManager.__init__

    def recording(manager: PoolManager, *arguments: Any, **options: Any) -> None:
        made.append(manager)
        begin(manager, *arguments, **options)

    monkeypatch.setattr(PoolManager, "__init__", recording)
    # What the pages call "your application" is the README's.
    news = types.ModuleType("news")
    monkeypatch.setitem(sys.modules, "news", news)
    # And its project of Django's.
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "mysite.settings")
    for name in ("mysite", "mysite.live", "mysite.settings", "mysite.urls"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    mysite = {"SECRET_KEY": "secret", "ROOT_URLCONF": "mysite.urls", "ALLOWED_HOSTS": ["localhost"], "USE_TZ": True}
    sys.modules["mysite.settings"].__dict__.update(mysite)
    [live] = [code for _, code in blocks("docs/frameworks.rst") if "\nlive = PoolManager(" in code]
    exec(live, sys.modules["mysite.live"].__dict__)
    news.__dict__.update(Page("README.md").names)
    (tmp_path / "page").mkdir()  # a page's sse.db is not the README's
    monkeypatch.chdir(tmp_path / "page")
    yield
    for manager in made:
        shut_down(manager)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    redis.cli("FLUSHALL")


def extension_of_the_docs(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# All pages


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_every_python_block_runs(page: str) -> None:
    Page(page)


def test_blocks_are_found_in_both_formats() -> None:
    assert len(blocks("README.md")) == 3
    assert len(blocks("docs/quickstart.rst")) > 10
    assert all("app = Flask(__name__)" in blocks(page)[0][1] for page in ("README.md", "docs/index.rst"))


def test_the_readme_and_the_first_page_of_the_docs_show_the_same_example() -> None:
    assert blocks("README.md")[0][1].strip() == blocks("docs/index.rst")[0][1].strip()


@pytest.mark.parametrize("page", [*PAGES, "CHANGES.md"])
def test_every_setting_that_is_named_exists(page: str) -> None:
    named = set(re.findall(r"\bSSE_[A-Z_]+\b", (ROOT / page).read_text(encoding="utf-8")))
    assert named <= {f"SSE_{item.name.upper()}" for item in fields(Settings)}


@pytest.mark.parametrize("page", ["README.md", "CHANGES.md", "examples/README.md"])
def test_every_relative_link_leads_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    local = [target for target in targets if target and not re.match(r"[a-z]+:", target)]
    assert local or page == "CHANGES.md"
    missing = [target for target in local if not (ROOT / page).parent.joinpath(target).exists()]
    assert missing == []


def test_every_page_of_the_docs_is_in_the_table_of_contents() -> None:
    listed = (DOCS / "index.rst").read_text(encoding="utf-8").partition(".. toctree::")[2].split()
    assert {path.stem for path in DOCS.glob("*.rst")} - {"index"} <= set(listed)


def test_the_drawings_are_told_in_words_too_and_have_colours_for_the_dark() -> None:
    page = (DOCS / "how-it-works.rst").read_text(encoding="utf-8")
    drawings = re.findall(r"\.\. image:: (_static/\w+\.svg)\n    :width: 100%\n    :alt: .{100}", page)
    assert len(drawings) == 2
    for drawing in drawings:
        text = (DOCS / drawing).read_text(encoding="utf-8")
        light, _, dark = text.partition("@media (prefers-color-scheme: dark)")
        assert set(re.findall(r'class="(\w+)', text)) <= set(re.findall(r"\.(\w+)", light))
        assert set(re.findall(r"^\.(page|note|box|ours|missed)\b", light, re.MULTILINE)) <= set(
            re.findall(r"\.(\w+)", dark)
        )
        assert ET.fromstring(text).tag.endswith("svg")


def test_the_table_of_settings_names_every_setting_with_its_default_and_its_meaning() -> None:
    table = extension_of_the_docs("settings_table").rst()
    for item in fields(Settings):
        row = re.search(rf"\* - ``SSE_{item.name.upper()}``\n +- (.+)\n +- (.+)\n", table)
        assert row is not None, item.name
        assert str(getattr(Settings(), item.name)).strip("()',") in row[1].replace('"', "'")
        assert row[2] == item.metadata["doc"]
    assert ".. settings-table::" in (DOCS / "settings.rst").read_text(encoding="utf-8")


def test_the_page_of_the_benchmarks_shows_every_table_of_the_results() -> None:
    markdown = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    page = (DOCS / "benchmarks.rst").read_text(encoding="utf-8")
    first, last = re.findall(r":(?:first|last): (.+)", page)
    shown = extension_of_the_docs("markdown_section").rst(markdown, first, last)
    results = markdown.partition("\n## Results\n")[2].partition("\n## ")[0]
    assert shown.count(".. list-table::") == len(re.findall(r"^\|-", results, re.MULTILINE)) > 0
    assert "``publish``" in shown
    assert "|" not in shown


def test_the_api_page_has_every_public_name() -> None:
    page = (DOCS / "api.rst").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\.\. auto\w+:: (?:[\w.]+\.)?(\w+)", page, re.MULTILINE))
    assert set(flask_sse_stream.__all__) <= documented


# What the pages say


def test_the_readmes_app_publishes_and_a_stream_sees_it() -> None:
    app = Page("README.md")["app"]
    reader = Reader(app, "/stream?connectKey=news")
    assert app.test_client().post("/news").status_code == 204
    assert said(reader.take(1)) == [("headline", '{"title": "hi"}')]
    reader.close()


def test_the_quickstarts_first_app_publishes_what_was_posted() -> None:
    page = Page("docs/quickstart.rst")
    app: Flask = page["app"]
    reader = Reader(app, "/stream?connectKey=news")
    assert app.test_client().post("/news", data={"title": "hello"}).status_code == 204
    assert said(reader.take(1)) == [("headline", '{"title": "hello"}')]
    reader.close()
    assert "/stream?connectKey=news" in app.test_client().get("/").text


def test_the_quickstarts_events_are_those_it_describes() -> None:
    app = Page("docs/quickstart.rst")["app"]
    events = Reader(app, "/stream?connectKey=news", first_place(app.extensions["sse_stream"])).take(6)
    assert said(events) == [
        (None, "text goes out as it is"),
        (None, '{"title": "any other value goes out as JSON"}'),
        ("refresh", ""),
        (None, "and come back soon"),
        (None, "with an id of my own"),
        ("notice", '{"text": "maintenance at noon"}'),
    ]
    assert (events[3].retry, events[4].id) == (500, "invoice-17")


def test_the_tutorials_board_outlives_its_process_takes_the_load_from_elsewhere_and_keeps_secrets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FLASK_SSE_BROKER_URL", "sqlite:///board.db")
    page = Page("docs/tutorial.rst")
    client = page["app"].test_client()
    [url] = re.findall(r'EventSource\("(.+?)"\)', client.get("/").text)
    reader = Reader(page["app"], url)
    assert client.post("/notes", json="hi").status_code == 204
    assert client.post("/notes", json="").status_code == 400
    assert said(reader.take(1)) == [("note", '{"text": "hi"}')]
    page["report_load"]()
    assert said(reader.take(1))[0][0] == "load"
    seen = reader.decoder.last_event_id
    reader.close()
    page["sse"].manager.shutdown()
    page["publisher"].publish("notes", {"text": "while you were away"}, event="note")
    again = Page("docs/tutorial.rst")
    reader = Reader(again["app"], url, {"Last-Event-ID": seen})
    assert said(reader.take(1)) == [("note", '{"text":"while you were away"}')]
    reader.close()
    late = Reader(again["app"], url)
    assert [event.event for event in late.take(3)] == ["note", "load", "note"]
    late.close()
    client = again["app"].test_client()
    assert client.get("/stream?connectKey=user-ann").status_code == 403
    assert client.post("/login", json={"name": "ann"}).status_code == 204
    assert client.post("/notes/ann", json="for Ann").status_code == 204
    for key, status in (("user-bob", 403), ("user-ann", 200)):
        with client.get(f"/stream?connectKey={key}") as response:
            assert response.status_code == status
    page["publisher"].close()
    again["publisher"].close()


@pytest.mark.parametrize("options", [{"event": "a\nb"}, {"id": "a\nb"}, {"data": b"bytes"}, {"data": "x" * 2**20}])
def test_what_cannot_be_sent_is_an_error_of_the_publisher_alone(options: dict[str, Any]) -> None:
    page = Page("README.md")
    with pytest.raises(EventError):
        page["sse"].publish("news", **options)
    assert page["sse"].stats().published == 0


def test_a_client_that_comes_back_gets_what_it_missed_and_then_what_is_new() -> None:
    page = Page("README.md")
    app, sse = page["app"], page["sse"]
    reader = Reader(app, "/stream?connectKey=news")
    sse.publish("news", "1")
    seen = reader.take(1)[0].id
    reader.close()
    sse.publish("news", "2")
    for headers, query in (({"Last-Event-ID": str(seen)}, ""), ({}, f"&lastEventId={seen}")):
        again = Reader(app, f"/stream?connectKey=news{query}", headers)
        assert said(again.take(1)) == [(None, "2")]
        again.close()


@pytest.mark.parametrize(("cursor", "reason"), [("000000000000-1", "epoch"), ("nonsense", "unknown")])
def test_a_client_whose_id_leads_nowhere_is_told_so(cursor: str, reason: str) -> None:
    page = Page("README.md")
    reader = Reader(page["app"], "/stream?connectKey=news", {"Last-Event-ID": cursor})
    assert said(reader.take(1)) == [("stream-reset", f'{{"reason": "{reason}", "keys": ["news"]}}')]
    page["sse"].publish("news", "live")
    assert said(reader.take(1)) == [(None, "live")]
    reader.close()


def test_who_comes_new_to_the_board_is_shown_what_was_said_and_who_comes_back_is_not_shown_it_again() -> None:
    app = Page("docs/quickstart.rst")["board"]
    reader = Reader(app, "/stream?connectKey=notes")
    assert said(reader.take(3)) == [("note", f"note {number}") for number in range(3)]
    again = Reader(app, "/stream?connectKey=notes", {"Last-Event-ID": reader.decoder.last_event_id})
    app.extensions["sse_stream"].publish("notes", "new")
    assert said(again.take(1)) == [(None, "new")]
    reader.close()
    again.close()


def test_the_guarded_app_asks_who_may_listen() -> None:
    page = Page("docs/quickstart.rst")
    client = page["guarded"].test_client()
    assert client.get("/stream?connectKey=news").status_code == 401
    with client.session_transaction() as session:
        session["user"] = "7"
    assert client.get("/stream?connectKey=user-8").status_code == 403
    response = client.get("/stream?connectKey=user-7&connectKey=user-8")
    assert response.status_code == 200
    assert page["private"].streams("user-7")[0].keys == ("user-7",)
    assert page["private"].close("user-7", reconnect=True) == 1
    assert b"event: close" not in b"".join(response.response)


def test_the_app_that_needs_tickets_gives_them_out_takes_them_and_takes_them_back() -> None:
    page = Page("docs/access.rst")
    client = page["ticketed"].test_client()
    assert client.get("/stream?connectKey=news").status_code == 401
    url = client.get("/stream-url").get_data(as_text=True)
    reader = Reader(page["ticketed"], url)
    page["guarded"].publish("user-ann", "for Ann")
    assert said(reader.take(1)) == [(None, "for Ann")]
    assert client.post("/logout").status_code == 204
    assert said(reader.to_the_end()) == [("stream-expired", '{"reason": "revoked"}')]
    assert client.get(url).status_code == 403
    renewed = Reader(page["ticketed"], client.get("/stream-url").get_data(as_text=True))
    assert renewed.response.status_code == 200
    renewed.close()


def test_the_bare_application_that_needs_tickets_takes_those_of_its_secrets() -> None:
    page = Page("docs/access.rst")
    older = Tickets(page["manager"].settings, "the one before").make("news")
    for text, status in ((page["tickets"].make("news"), 200), (older, 200), ("none", 401)):
        reader = Reader(page["application"], "/", {"Authorization": f"Bearer {text}"})
        assert reader.response.status_code == status
        reader.close()


def test_the_app_with_a_function_gives_streams_a_user_and_an_end() -> None:
    page = Page("docs/access.rst")
    client = page["app"].test_client()
    assert client.get("/stream?connectKey=news").status_code == 401
    with client.session_transaction() as session:
        session["user"] = "ann"
    response = client.get("/stream?connectKey=news&connectKey=user-bob")
    [stream] = page["sse"].streams("news")
    assert (stream.keys, stream.ticket.user, round(stream.ticket.left(), -2)) == (("news",), "ann", 3600)
    response.close()
    page["manager"].shutdown()


def test_the_shared_app_lets_the_pages_of_its_origin_read_with_cookies() -> None:
    client = Page("docs/access.rst")["shared"].test_client()
    for origin, allowed in (("https://example.org", "true"), ("https://evil.example", None), ("null", None)):
        response = client.get("/stream", headers={"Origin": origin})
        assert response.headers.get("Access-Control-Allow-Credentials") == allowed
        response.close()


def test_the_countdown_ends_for_good_and_its_view_may_abort() -> None:
    app = Page("docs/quickstart.rst")["app"]
    assert app.test_client().get("/countdown?from=1001").status_code == 400
    reader = Reader(app, "/countdown")
    events = reader.to_the_end()
    assert said(events) == [
        (None, '{"left": 3}'),
        (None, '{"left": 2}'),
        (None, '{"left": 1}'),
        ("news", "lift-off"),
        ("close", ""),
    ]
    assert app.test_client().get("/countdown", headers={"Last-Event-ID": str(events[-1].id)}).status_code == 204


def test_a_function_feeds_a_stream_and_ends_it() -> None:
    app = Page("docs/quickstart.rst")["app"]
    events = Reader(app, "/reports", method="POST", data={"number": "2"}).to_the_end()
    assert said(events) == [
        ("progress", '{"share": 0.5}'),
        ("progress", '{"share": 1.0}'),
        ("close", '{"result": "done"}'),
    ]


def test_a_stream_without_a_source_is_fed_from_elsewhere() -> None:
    page = Page("docs/quickstart.rst")
    reader = Reader(page["app"], "/jobs/a")
    assert said(reader.take(1)) == [(None, "queued")]
    page["job_is_done"]("a")
    assert said(reader.to_the_end()) == [("close", "finished")]
    assert page["jobs"] == {}


def test_close_ends_for_good_and_reconnect_asks_to_come_back() -> None:
    page = Page("README.md")
    app, sse = page["app"], page["sse"]
    for reconnect, ending in ((False, [("close", "")]), (True, [])):
        reader = Reader(app, "/stream?connectKey=news")
        assert sse.close("news", reconnect=reconnect) == 1
        assert said(reader.to_the_end()) == ending
        assert (reader.decoder.last_event_id == "end") is not reconnect


def test_signals_reach_their_receivers(caplog: pytest.LogCaptureFixture) -> None:
    page = Page("docs/quickstart.rst")
    caplog.set_level("INFO", "a_page_of_the_docs")
    with pytest.raises(ValueError, match="nothing may be published here"):
        page["sse"].publish("frozen", "x")
    reader = Reader(page["app"], "/stream?connectKey=news")
    reader.close()
    wait_for(lambda: "('news',) left: peer" in caplog.text, "the end is told")
    assert "('news',) listens" in caplog.text


def test_each_app_of_a_factory_has_pools_of_its_own() -> None:
    page = Page("docs/quickstart.rst")
    first, second = page["first"], page["second"]
    assert first.test_client().get("/stream").status_code == 404
    assert [app.extensions["sse_stream"].stats().published for app in (first, second)] == [1, 1]
    assert first.extensions["sse_stream"].settings.ping_interval == 5
    with pytest.raises(RuntimeError, match="serves 2 apps"):
        page["live"].publish("news", "for whom?")


def test_the_middleware_puts_streams_in_front_of_any_wsgi_application() -> None:
    page = Page("docs/quickstart.rst")
    application = page["application_with_streams"]
    reader = Reader(application, "/stream?connectKey=news")
    assert Client(application).get("/page").text == "hello\n"
    assert said(reader.take(1)) == [("visit", '{"path":"/page"}')]
    reader.close()
    assert Client(application).get("/stream?connectKey=secret").status_code == 403


def test_respond_listens_to_given_keys_or_to_a_source() -> None:
    page = Page("docs/quickstart.rst")
    reader = Reader(page["streams"], "/mine", environ_overrides={"REMOTE_USER": "7"})
    page["manager"].publish("user-7", "for you")
    assert said(reader.take(1)) == [(None, "for you")]
    reader.close()
    assert [event.data for event in Reader(page["streams"], "/").to_the_end()] == ["one", "two", "three", ""]


def test_the_helper_for_tests_reads_a_stream_of_the_test_client() -> None:
    page = Page("docs/quickstart.rst")
    client = page["app"].test_client()
    assert [event.data for event in page["listen"](client, "/countdown", 2)] == ['{"left": 3}', '{"left": 2}']


def test_what_another_process_publishes_reaches_the_streams_of_an_app_that_names_the_same_file() -> None:
    page = Page("docs/brokers.rst")
    reader = Reader(page["app"], "/stream?connectKey=reports")
    page["report_is_ready"](7)
    assert said(reader.take(1)) == [("ready", '{"number":7}')]
    reader.close()


def test_a_client_that_comes_back_after_a_restart_gets_what_it_missed_from_the_file() -> None:
    page = Page("docs/brokers.rst")
    seen = page["sse"].publish("reports", "1")
    page["app"].extensions["sse_stream"].shutdown()
    page["report_is_ready"](2)
    reader = Reader(Page("docs/brokers.rst")["app"], "/stream?connectKey=reports", {"Last-Event-ID": seen})
    assert said(reader.take(1)) == [("ready", '{"number":2}')]
    reader.close()


def test_a_task_that_is_run_again_speaks_once() -> None:
    page = Page("docs/brokers.rst")
    ids = [page["make_report"].apply((7,), task_id=task).get() for task in ("one", "one", "two")]
    assert ids[0] == ids[1] != ids[2]
    reader = Reader(page["app"], "/stream?connectKey=reports", {"Last-Event-ID": ids[0].partition("-")[0] + "-0"})
    assert said(reader.take(2)) == [("ready", '{"number":7}')] * 2
    reader.close()


def test_one_process_of_two_ticks_until_it_ends() -> None:
    one, two = Page("docs/brokers.rst"), Page("docs/brokers.rst")
    cursor = first_place(one["sse"].manager)
    for page in (one, two, one, two):
        page["tick"]()
    assert [page["sse"].stats().published for page in (one, two)] == [3, 0]
    one["sse"].manager.shutdown()
    two["tick"]()
    reader = Reader(two["app"], "/stream?connectKey=clock", cursor)
    assert [event for event, _ in said(reader.take(3))] == ["tick"] * 3
    reader.close()


@pytest.mark.parametrize(("app", "extension"), [("app", "sse"), ("elsewhere", "live")])
def test_the_health_of_a_log_can_be_asked(app: str, extension: str) -> None:
    page = Page("docs/brokers.rst")
    page[extension].publish("news", "x")
    reader = Reader(page[app], "/stream?connectKey=news")
    health = page["app"].test_client().get("/health").json
    assert health == {"live": True, "error": "", "reconnects": 0, "gaps": 0}
    reader.close()


def test_the_redis_pages_app_and_task_share_a_log() -> None:
    page = Page("docs/redis.rst")
    reader = Reader(page["app"], "/stream?connectKey=news", first_place(page["sse"].manager))
    assert said(reader.take(1)) == [("headline", '{"title":"hi"}')]
    page["Publisher"](Page.redis.url).publish("news", "again")
    assert said(reader.take(1)) == [(None, "again")]
    reader.close()


def make_user(page: str, redis: RedisServer) -> str:
    """Make the user that the page's ACL line is about, and give the URL with which it connects."""
    [line] = re.findall(r"^ +(ACL SETUSER .+)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    words = line.split()
    redis.cli("ACL", "DELUSER", words[2])
    redis.cli(*words)
    return redis.url.replace("://", f"://{words[2]}:password@")


def test_the_redis_pages_user_may_do_all_that_the_log_does(redis: RedisServer) -> None:
    url = make_user("docs/redis.rst", redis)
    apps = [Flask("one"), Flask("two")]
    one, two = (flask_sse_stream.SSE(app, broker_url=url).manager for app in apps)
    first = one.publish("news", "1", idempotency_key="first")
    assert one.publish("news", "1", idempotency_key="first") == first
    # Beyond 10,000 keys, it forgets those that are over.
    redis.cli("ZADD", "{sse}:keys", *(word for number in range(10_001) for word in (0, f"k:{number}")))
    one.publish_all("2")
    assert redis.cli("ZCARD", "{sse}:keys") == 10_002
    assert one.lease("clock", 5)
    one.give_back("clock")
    assert two.lease("clock", 5)
    reader = Reader(apps[1], "/stream?connectKey=news", {"Last-Event-ID": first})
    assert said(reader.take(1)) == [(None, "2")]
    one.publish("news", "3")
    assert said(reader.take(1)) == [(None, "3")]
    assert redis.cli("ACL LOG") == []
    reader.close()


def test_the_names_in_redis_are_those_that_the_page_lists(redis: RedisServer) -> None:
    page = Page("docs/redis.rst")
    page["sse"].publish_all("x", idempotency_key="report 7")
    page["sse"].lease("clock", 60)
    page["sse"].revoke(user="ann")
    page["sse"].manager.asking.answer(Inquiry("who asks how it is"))
    table = (ROOT / "docs/redis.rst").read_text(encoding="utf-8").partition("What is in Redis\n")[2]
    listed = set(re.findall(r"^``(\{sse\}:.+?)``", table, re.MULTILINE))
    mark = next(iter(re.findall(r"``(\{sse\}:mark:\w+)``", table)))
    assert listed | {mark} == {
        name.replace("\x01", "\\x01").replace("\x03", "\\x03") for name in redis.cli("KEYS", "*")
    }


def test_redis_takes_no_more_memory_than_the_page_says(redis: RedisServer) -> None:
    page = (ROOT / "docs/redis.rst").read_text(encoding="utf-8")
    least, factor, more = re.findall(
        r"larger of ([\d,]+) bytes and +events kept × \(([\d.]+) × size of an event \+ (\d+) bytes\)", page
    )[0]
    for size in (10, 100, 1000, 10_000):
        for history in (1, 200):
            with Publisher(redis.url, f"s{size}-{history}", history_size=history) as publisher:
                for _ in range(history):
                    publisher.publish("news", "x" * size)
            name = f"{{s{size}-{history}}}:k:news"
            each = float(factor) * (size + len("data: \n\n")) + int(more)
            used = redis.cli("MEMORY USAGE", name, "SAMPLES", 0)
            assert used <= max(int(least.replace(",", "")), redis.cli("XLEN", name) * each) * 1.05, (size, history)


def test_a_bridge_makes_events_of_what_is_said_on_a_channel_or_a_pattern(redis: RedisServer) -> None:
    page = Page("docs/bridging.rst")
    reader = Reader(page["app"], "/stream?connectKey=news&connectKey=shop-7")
    wait_for(lambda: redis.cli("PUBSUB CHANNELS", "orders"), "it listens to the channel")
    wait_for(lambda: page["shops"].stats().up, "it listens to the pattern")
    redis.cli("PUBLISH", "orders", '{"number": 7}')
    assert said(reader.take(1)) == [("order", '{"number": 7}')]
    for order in ('{"number": 8, "test": true}', "no JSON", '{"number": 9, "secret": 1}'):
        redis.cli("PUBLISH", "shop:7:orders", order)
    assert said(reader.take(1)) == [("order", '{"number": 9}')]
    wait_for(lambda: page["shops"].stats()[1:3] == (1, 2), "they are counted")
    reader.close()


def test_a_bridge_runs_in_a_process_of_its_own_until_it_is_stopped(redis: RedisServer) -> None:
    page = Page("docs/bridging.rst")
    orders = page["orders"]
    stopping = threading.Timer(0.5, orders.stop)
    stopping.start()
    orders.run()
    stopping.join()
    assert not orders.stats().up
    assert redis.cli("KEYS", "{sse}:lease:*") == []


def test_the_bridging_pages_user_may_do_all_that_a_bridge_does(redis: RedisServer) -> None:
    url = make_user("docs/bridging.rst", redis)
    app = Flask("app")
    sse = flask_sse_stream.SSE(app)
    bridge = sse.bridge("orders", "news", url=url)
    reader = Reader(app, "/stream?connectKey=news")
    wait_for(lambda: bridge.stats().up, "it listens")
    last = {"user": "bridge", "cmd": "ping"}
    wait_for(lambda: any(last.items() <= client.items() for client in redis.cli("CLIENT LIST")), "it asks for Redis")
    redis.cli("PUBLISH", "orders", "x")
    assert said(reader.take(1)) == [(None, "x")]
    assert redis.cli("ACL LOG") == []
    reader.close()


def test_an_order_is_taken_though_nobody_can_be_told(caplog: pytest.LogCaptureFixture) -> None:
    page = Page("docs/brokers.rst")
    Path("sse.db").write_text("no database, but long enough to be looked at as one " * 20, encoding="utf-8")
    assert page["app"].test_client().post("/orders").status_code == 201
    assert "order 7 was taken, but nobody was told" in caplog.text
    assert "not a database; delete the file" in caplog.text


def test_the_quickstarts_other_process_publishes_into_the_log_of_its_app() -> None:
    page = Page("docs/quickstart.rst")
    reader = Reader(page["joined"], "/stream?connectKey=news", first_place(page["shared"].manager))
    assert said(reader.take(1)) == [(None, "from another process")]
    reader.close()


def test_a_loop_in_a_thread_shows_how_far_it_is_to_the_page_and_to_one_that_comes_late() -> None:
    app = Page("docs/progress.rst")["app"]
    reader = Reader(app, "/stream?connectKey=import")
    assert app.test_client().post("/import").status_code == 202
    events = reader.take(2)
    while json.loads(str(events[-1].data))["state"] == "running":
        events += reader.take(1)
    reader.close()
    late = Reader(app, "/stream?connectKey=import")
    assert said(late.take(1)) == said(events[-1:])
    late.close()
    example = (DOCS / "progress.rst").read_text(encoding="utf-8").partition(".. code-block:: json")[2].split("\n")[2]
    for event in events:
        assert event.event == "progress"
        assert set(json.loads(str(event.data))) == set(json.loads(example))
    assert [json.loads(str(events[-1].data))[name] for name in ("state", "count", "fraction")] == ["done", 1000, 1.0]
    assert 'addEventListener("progress"' in app.test_client().get("/").text


def test_a_report_is_told_of_by_the_task_that_makes_it(tmp_path: Path) -> None:
    page = Page("docs/progress.rst")
    app, task = page["reports"], page["make_report"]
    reader = Reader(app, "/stream?connectKey=task-7", first_place(page["live"].manager))
    task.apply((2,), task_id="7")
    events = [(event.event, json.loads(str(event.data))) for event in reader.take(4)]
    reader.close()
    assert [event for event, _ in events] == ["started", "progress", "progress", "succeeded"]
    assert events[2][1]["meta"] == {"page": 1, "of": 2}
    assert events[3][1]["result"] == "/reports/7"
    assert all({"task", "name", "state", "retries"} <= set(data) for _, data in events)
    assert app.test_client().post("/reports").status_code == 202


def test_a_film_is_a_job_that_its_task_ends() -> None:
    page = Page("docs/progress.rst")
    client = page["cinema"].test_client()
    film = client.post("/films").get_json()["film"]
    reader = Reader(page["cinema"], f"/films/{film}")
    assert reader.response.status_code == 200
    page["cut_film"].apply((2,), task_id=film)
    events = reader.to_the_end()
    assert [event.event for event in events if event.event] == ["started", "progress", "progress", "done"]
    end = {"Last-Event-ID": reader.decoder.last_event_id}
    assert client.get(f"/films/{film}", headers=end).status_code == 204
    other = client.post("/films").get_json()["film"]
    assert client.delete(f"/films/{other}").status_code == 204
    assert [event.event for event in Reader(page["cinema"], f"/films/{other}").to_the_end()][-1] == "cancelled"


def test_an_order_is_told_of_once_it_is_stored(capsys: pytest.CaptureFixture[str]) -> None:
    page = Page("docs/sqlalchemy.rst")
    app, db = page["app"], page["db"]
    with app.app_context():
        db.create_all()
    reader = Reader(app, "/stream?connectKey=orders&connectKey=returns")
    client = app.test_client()
    assert client.post("/orders/tea").json == {"id": 1}
    with app.app_context():
        db.session.add(page["Order"](item="lost"))
        db.session.flush()
    assert said(reader.take(1)) == [("order", '{"id": 1, "item": "tea"}')]
    assert client.post("/returns/7").status_code == 404
    assert client.post("/returns/1").status_code == 204
    # What was added first comes first; the row is deleted in the flush.
    assert said(reader.take(2)) == [(None, '{"id": 1}'), ("gone", '{"id": 1}')]
    reader.close()

    def away(*_: Any) -> str:
        raise flask_sse_stream.BrokerError("away")

    page["sse"].manager._broker.publish = away
    assert client.post("/orders/soap").json == {"id": 1}
    assert client.post("/returns/1").status_code == 204
    assert [(key, event.data) for key, event in page["unpublished"]] == [("returns", '{"id": 1}')]
    assert "AfterCommitStats(published=" in capsys.readouterr().out
    with app.app_context():
        db.engine.dispose()


def test_a_session_of_plain_sqlalchemy_publishes_into_the_log_of_another_process() -> None:
    page = Page("docs/sqlalchemy.rst")
    house = flask_sse_stream.PoolManager(Settings(broker_url="sqlite:///sse.db", join_history=1))
    reader = Reader(SSEMiddleware(page["app"], house), "/stream?connectKey=orders")
    assert said(reader.take(1)) == [("order", '{"item":"tea"}')]
    reader.close()


def test_the_settings_page_prints_what_its_comments_say(capsys: pytest.CaptureFixture[str]) -> None:
    Page("docs/settings.rst")
    comments = " ".join(re.findall(r"# (.*)", "\n".join(block for _, block in blocks("docs/settings.rst"))))
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3
    assert all(line in comments for line in printed)


def test_the_worksheet_prints_what_the_page_shows_and_takes_its_figures_from_where_they_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = Page("docs/scaling.rst")
    text = (DOCS / "scaling.rst").read_text(encoding="utf-8")
    shown = textwrap.dedent(text.partition(".. code-block:: text\n\n")[2].partition("\n\n")[0])
    assert capsys.readouterr().out.strip() == shown.strip()
    least, factor, more = re.findall(
        r"larger of ([\d,]+) bytes and +events kept × \(([\d.]+) × size(?: of an event)? \+ (\d+) bytes\)",
        (DOCS / "redis.rst").read_text(encoding="utf-8"),
    )[0]
    assert f"the larger of {least} bytes and events kept × ({factor} × size + {more} bytes)" in text
    bytes_kept = 7 * 10 * (float(factor) * 1e6 + float(more))
    assert page["worksheet"](1, 1, 1, 1e6, 7, history_size=10)["MB of Redis"] == round(bytes_kept / 1e6 + 0.5)
    assert page["worksheet"](25_000, 0, 0, 1, 1)["processes"] == 4
    plots = (DOCS / "_static" / "benchmarks" / "measured.inc").read_text(encoding="utf-8")
    measured = {
        letter: float(re.findall(rf"{letter}\.svg\n +:alt: .*10,000 clients: .*?flask_sse_stream ([\d.]+)", plots)[0])
        for letter in "cdeh"
    }
    figures = {name: item.default for name, item in inspect.signature(page["worksheet"]).parameters.items()}
    # Rounded up, and not by much: c is in µs a delivery, d in bytes, e in seconds for all, h in percent of a core.
    for name, value in (
        ("delivery", measured["c"] / 1e6),
        ("client_bytes", measured["d"]),
        ("opening", measured["e"] / 10_000),
        ("heartbeat", measured["h"] / 100 / 1_000),
    ):
        assert 0.95 * figures[name] <= value * 1.1 <= 1.25 * figures[name], (name, value)
    assert figures["publish_in_redis"] == 26e-6
    assert "26 µs for 1" in (DOCS / "redis.rst").read_text(encoding="utf-8")


def test_whoever_stops_a_process_waits_for_its_drain() -> None:
    text = (DOCS / "services.rst").read_text(encoding="utf-8")

    def number(pattern: str) -> float:
        [found] = re.findall(pattern, text)
        return float(found)

    gunicorns, two = 30, 2  # graceful_timeout; what a drain may take besides its seconds
    drain, pre_stop = number(r'FLASK_SSE_DRAIN_SECONDS, value: "(\d+)"'), number(r'\["sleep", "(\d+)"\]')
    for patience in (number(r"TimeoutStopSec=(\d+)"), number(r"stop_grace_period: (\d+)s")):
        assert patience > max(gunicorns, Settings().drain_seconds + two)
    assert number(r"terminationGracePeriodSeconds: (\d+)") > pre_stop + max(gunicorns, drain + two)
    assert number(r"minReadySeconds: (\d+)") > drain + Settings().retry / 1000
    assert (
        number(r"path: /ready, port: 8000}\n +periodSeconds: \d+\n +timeoutSeconds: (\d+)") > Settings().broker_timeout
    )
    assert number(r"LimitNOFILE=(\d+)") > 10_100 > Settings().max_clients
    page = Page("docs/services.rst")
    paths = {rule.rule for rule in page["app"].url_map.iter_rules()}
    paths |= {rule.rule for rule in Page("docs/tools.rst")["app"].url_map.iter_rules()}
    assert set(re.findall(r"httpGet: {path: (\S+),", text)) == {"/ready", "/alive"} <= paths
    assert page["app"].test_client().get("/alive").status_code == 204


def test_whoever_knows_the_token_publishes_from_another_language() -> None:
    page = Page("docs/publishing.rst")
    client = page["app"].test_client()
    page["report_is_ready"](7)
    page["report_is_ready"](7)
    reader = Reader(page["app"], "/stream?connectKey=news&connectKey=reports", first_place(page["sse"].manager))
    assert said(reader.take(2)) == [("notice", "the backup is done"), ("ready", '{"number":7}')]
    page["work"]()
    asyncio.run(page["listen_elsewhere"]())
    assert client.post("/news", data={"title": "hi"}).status_code == 204
    assert [event for event, _ in said(reader.take(3))] == [None, None, "headline"]
    token = {"Authorization": "Bearer a long random text"}
    for headers in ({}, {"Authorization": "Bearer another"}, {"Authorization": "größe".encode().decode("latin-1")}):
        assert client.post("/publish/news", json=1, headers=headers).status_code == 401
    assert client.post("/publish/news?event=a%0Ab", json=1, headers=token).status_code == 400
    identifier = client.post("/publish/news?event=order", json={"number": 7}, headers=token).json["id"]
    [event] = reader.take(1)
    assert (event.event, event.data, reader.decoder.last_event_id) == ("order", '{"number": 7}', identifier)
    reader.close()
    page["publisher"].close()


def test_a_stream_that_works_begins_as_the_page_about_trouble_says(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "a_page_of_the_docs")
    [shown] = [block.text for block in all_blocks("docs/troubleshooting.rst") if block.language == "text"]
    head, _, body = shown.strip("\n").partition("\n\n")
    page = Page("docs/troubleshooting.rst")
    reader = Reader(page["app"], "/stream?connectKey=news")
    first, *headers = head.split("\n")
    assert first == f"HTTP/1.1 {reader.response.status}"
    assert {line.partition(": ")[0]: line.partition(": ")[2] for line in headers} == dict(reader.response.headers)
    assert next(reader.chunks).decode().startswith(body)
    reader.close()
    wait_for(lambda: "('news',) left: peer" in caplog.text, "the end is told")
    text = (DOCS / "troubleshooting.rst").read_text(encoding="utf-8")
    named = text[text.index("``slow`` is a client") : text.index("all are in")]
    names = set(re.findall(r"``(\w+)``", named))
    assert names <= {reason.value for reason in flask_sse_stream.CloseReason} | {"SSE_MAX_AGE"}


def test_bottles_and_djangos_applications_publish_and_have_streams() -> None:
    page = Page("docs/frameworks.rst")
    reader = Reader(page["SSEMiddleware"](page["app"], page["manager"]), "/stream?connectKey=news")
    assert Client(page["app"]).post("/news", data={"title": "hi"}).text == "published"
    assert said(reader.take(1)) == [("headline", '{"title":"hi"}')]
    reader.close()
    left = [event.data for event in Reader(page["app"], "/countdown/").to_the_end() if event.event is None]
    assert left == ['{"left":3}', '{"left":2}', '{"left":1}']

    from django.http import HttpRequest
    from django.urls import path

    request = HttpRequest()
    request.user = types.SimpleNamespace(pk=7)  # type: ignore[attr-defined]  # what its middleware puts there
    url = json.loads(page["stream_url"](request).content)["url"]
    application = page["application"]
    assert Client(application).get("/stream?connectKey=news").status_code == 401
    reader = Reader(application, url)
    sys.modules["mysite.urls"].__dict__["urlpatterns"] = [path("order", page["order"])]
    assert Client(application).post("/order").status_code == 204
    assert said(reader.take(1)) == [("order", '{"number":7}')]
    page["live"].publish("user-7", "for you")
    assert said(reader.take(1)) == [(None, "for you")]
    reader.close()

    reader = Reader(page["bare"], "/stream")
    mine = Reader(page["bare"], "/mine")
    assert Client(page["bare"]).get("/page").text == "hello\n"
    assert said(reader.take(1)) == [("visit", '{"path":"/page"}')]
    page["house"].publish("mine", "yours")
    assert said(mine.take(1)) == [(None, "yours")]
    reader.close()
    mine.close()


def test_a_broker_of_ones_own_is_that_of_the_app_and_one_around_another_sees_what_passes() -> None:
    page = Page("docs/extending.rst")
    for app, extension in (("app", "sse"), ("audited", "live")):
        reader = Reader(page[app], "/stream?connectKey=news")
        identifier = page[extension].publish("news", "hi")
        assert said(reader.take(1)) == [(None, "hi")]
        assert reader.decoder.last_event_id == identifier
        reader.close()
    assert isinstance(page["sse"].manager._broker, page["PlainBroker"])
    assert page["live"].manager._broker.notes == [(identifier, "news", len("data: hi\n\n"))]


@pytest.mark.live
def test_the_broker_of_the_page_about_brokers_keeps_its_promises(tmp_path: Path) -> None:
    code = "\n".join(block for _, block in blocks("docs/extending.rst"))
    run_as_tests(tmp_path, code, "PlainBroker or PlainReplay or MyServer and first_bytes")


def test_both_ways_of_the_migration_page_publish_the_same() -> None:
    app = Page("docs/migrating.rst")["app"]
    events = Reader(app, "/stream?connectKey=news", first_place(app.extensions["sse_stream"])).take(2)
    for event in events:
        assert (json.loads(str(event.data)), event.id, event.event, event.retry) == ({"aa": 11}, "7", "data", 3000)


def test_the_migration_pages_view_is_a_stream_only_where_it_was_asked_for_one() -> None:
    app = Page("docs/migrating.rst")["app"]
    assert app.test_client().get("/progress").json == {"done": 0.5}
    assert len(Reader(app, "/progress?stream").to_the_end()) == 3


def test_the_tests_of_the_page_about_testing_pass_and_fail_where_the_app_is_wrong() -> None:
    page = Page("docs/testing.rst")
    tests = [value for name, value in page.names.items() if name.startswith("test_") and not value.__code__.co_argcount]
    assert len(tests) == 7
    for test in tests:
        test()
    page["app"].view_functions["news"] = lambda: ("", 204)
    with pytest.raises(AssertionError, match="published were: nothing"):
        page["test_a_headline_is_published_once"]()


def run_as_tests(directory: Path, code: str, chosen: str) -> None:
    """Run a page's code as a file of tests, in a process of its own."""
    (directory / "test_page.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "flask_sse_stream.testing.plugin"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [*command, "-k", chosen, "test_page.py"],
        cwd=directory,
        env=env,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


@pytest.mark.live
def test_the_page_about_testing_is_a_test_file(tmp_path: Path) -> None:
    code = "\n".join(block for _, block in blocks("docs/testing.rst"))
    run_as_tests(tmp_path, code, "news or headline or MyBroker or MyReplay or first_bytes or arrive")


def test_the_app_that_was_moved_from_flask_sse_greets() -> None:
    app = Page("docs/migrating.rst")["greeting"]
    reader = Reader(app, "/stream?channel=users.social")
    assert app.test_client().post("/hello").status_code == 204
    assert said(reader.take(1)) == [("greeting", '{"message": "Hello!"}')]
    reader.close()


def test_the_app_that_was_moved_from_flask_socketio_tells_a_room_and_everybody() -> None:
    app = Page("docs/migrating.rst")["market"]
    reader, other = Reader(app, "/stream?connectKey=ABC"), Reader(app, "/stream?connectKey=XYZ&connectKey=secret")
    assert app.test_client().post("/orders/ABC", json={"pieces": 7}).status_code == 204
    assert said(reader.take(2)) == [("order", '{"pieces": 7}'), ("volume", '{"orders": 1}')]
    assert said(other.take(1)) == [("volume", '{"orders": 1}')]
    for each in (reader, other):
        each.close()


def test_the_generator_that_was_written_by_hand_has_become_two_lines() -> None:
    page = Page("docs/migrating.rst")
    reader = Reader(page["from_now_on"], "/events")
    page["announce"]("two\nlines")
    assert said(reader.take(1)) == [(None, "two\nlines")]
    reader.close()
    assert said(Reader(page["from_now_on"], "/countdown").to_the_end())[:1] == [(None, '{"left": 3}')]


def test_what_flask_sse_publishes_is_bridged(redis: RedisServer) -> None:
    app = Page("docs/migrating.rst")["moved"]
    reader = Reader(app, "/stream?channel=users&channel=sse")
    wait_for(lambda: set(redis.cli("PUBSUB CHANNELS")) >= {"users", "sse"}, "both bridges listen")
    # As its version 1.0 writes them.
    redis.cli("PUBLISH", "users", '{"data": {"message": "Hello!"}, "type": "greeting"}')
    assert said(reader.take(1)) == [("greeting", '{"message":"Hello!"}')]
    redis.cli("PUBLISH", "sse", '{"data": "text", "id": 7, "retry": 500}')
    [event] = reader.take(1)
    assert (event.data, event.event, event.id, event.retry) == ("text", None, "7", 500)
    reader.close()


def test_the_browser_pages_page_imports_the_client_from_where_it_is_kept() -> None:
    page = Page("docs/browser.rst")
    client = page["app"].test_client()
    [url] = re.findall(r'from "(/stream.js\?v=\w+)"', client.get("/").text)
    response = client.get(url)
    assert response.data == page["client"]
    assert "immutable" in response.headers["Cache-Control"]


@functools.cache
def defined_by(path: Path) -> set[str]:
    """The names of the tests that a file defines, those of a class with its name before them."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
    return {name for name in found if name.rpartition("::")[2].startswith("test_")}


def test_each_hostile_case_names_what_happens_and_tests_that_there_are() -> None:
    text = (DOCS / "hostile-cases.rst").read_text(encoding="utf-8")
    rows = re.split(r"^    \* - (?=\d+$)", text, flags=re.MULTILINE)[1:]
    assert [int(row.split("\n", 1)[0]) for row in rows] == list(range(1, 41))
    for row in rows:
        names = re.findall(r"``(tests/[^`]+\.py)::([^`]+)``", row)
        assert names, f"no test shows this: {row}"
        assert len(names) == row.count("``tests/"), row
        for path, name in names:
            assert name in defined_by(ROOT / path), f"{path} has no {name}"


def test_the_readiness_view_answers_503_once_the_process_is_about_to_stop() -> None:
    page = Page("docs/tools.rst")
    client = page["app"].test_client()
    assert (client.get("/ready").status_code, client.get("/ready").json) == (200, {"reasons": []})
    page["sse"].manager.begin_drain()
    answer = client.get("/ready")
    assert (answer.status_code, len(answer.json["reasons"])) == (503, 1)


def test_the_metrics_view_has_the_metrics_and_the_page_names_each_with_its_kind() -> None:
    page = Page("docs/tools.rst")
    page["sse"].publish("news", "x")
    text = page["app"].test_client().get("/metrics").get_data(as_text=True)
    assert "flask_sse_events_published_total 1.0" in text
    rows = re.findall(
        r"^    \* - ``(\w+)``\n      - (\w+).*\n      - (.+)\n", (DOCS / "tools.rst").read_text(), re.MULTILINE
    )
    assert {name: meaning for name, _, meaning in rows} == NAMES
    for name, kind, _ in rows:
        assert f"# TYPE {name} {kind}\n" in text


# In a browser

STUBS = """() => {
    window.calls = [];
    for (const name of ["show", "tick", "render", "add", "clear", "finish", "complain", "reload"])
        window[name] = (...what) => calls.push([name, ...what]);
    window.load = () => calls.push(["load"]);
    window.source = new EventTarget();
    source.close = () => calls.push(["closed"]);
    window.bar = {};
    window.task = "7";
}"""
SCRIPTS = {
    page: [block.text for block in all_blocks(page) if block.language in ("js", "javascript")]
    for page in PAGES
    if page != "docs/browser.rst"  # those run in tests/live/test_live_sse_js.py
}


class Visit:
    """A page of the docs, whose scripts run in a browser, in a page of the app that its Python blocks made."""

    def __init__(self, context: Any, name: str, app: str) -> None:
        self.names = Page(name)
        self.server = make_server("127.0.0.1", free_port(), self.names[app], threaded=True)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.port}"
        self.page = context.new_page()
        self.said: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        self.page.route(f"{self.url}/", lambda route: route.fulfill(content_type="text/html", body="<!doctype html>"))
        self.page.goto(f"{self.url}/")
        self.page.evaluate(STUBS)

    def run(self, script: str, after: str = "") -> None:
        """Run one script as it stands, and beside it what the page leaves to others."""
        self.page.add_script_tag(type="module", content=f"{script}\n{after}")

    def calls(self, number: int) -> list[Any]:
        """Give what the scripts have done so far, in any order, as soon as it is so much."""
        wait_for(lambda: len(self.page.evaluate("calls")) >= number, f"{number} calls, {self.said}", 20)
        assert not [line for line in self.said if line.startswith("error")]
        return sorted(self.page.evaluate("calls"), key=json.dumps)

    def wait_until_said(self, what: str) -> None:
        # What the browser reports is heard while it is asked something.
        wait_for(lambda: self.page.evaluate("1") and what in self.said, f"{what!r} is on the console: {self.said}", 20)

    def listening(self, extension: str, key: str, number: int = 1) -> None:
        wait_for(lambda: self.names[extension].count(key) == number, f"the page listens to {key}, {self.said}", 20)

    def close(self) -> None:
        self.page.close()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    with chromium() as browser:
        yield browser.new_context()


@pytest.fixture
def visit(context: Any) -> Iterator[Callable[[str, str], Visit]]:
    visits: list[Visit] = []

    def begin(name: str, app: str = "app") -> Visit:
        visits.append(Visit(context, name, app))
        return visits[-1]

    yield begin
    for each in visits:
        each.close()


@pytest.mark.live
@pytest.mark.browser
class TestInABrowser:
    def test_the_readmes_page_shows_the_headline(self, visit: Callable[..., Visit]) -> None:
        at = visit("README.md")
        [script] = SCRIPTS["README.md"]
        at.run(script)
        at.listening("sse", "news")
        at.page.evaluate("fetch('/news', { method: 'POST' })")
        at.wait_until_said("hi")

    def test_the_quickstarts_pages_show_what_is_published_and_end(self, visit: Callable[..., Visit]) -> None:
        at = visit("docs/quickstart.rst")
        several, with_state, by_hand, end = SCRIPTS["docs/quickstart.rst"]
        at.page.route("**/news.json", lambda route: route.fulfill(json=["a", "b"]))
        at.run(several)
        at.run(with_state)
        at.run(by_hand, "connect();")
        at.listening("sse", "news", 3)
        assert at.calls(1) == [["render", ["a", "b"]]]
        at.names["sse"].publish("news", {"title": "hi"}, event="headline")
        at.names["sse"].publish("clock", "12:00:00", event="tick")
        title = {"title": "hi"}
        assert at.calls(5) == [
            ["add", title],
            ["add", title],
            ["render", ["a", "b"]],
            ["show", title],
            ["tick", "12:00:00"],
        ]
        at.run(end, 'source.dispatchEvent(new MessageEvent("close"));')
        assert ["closed"] in at.calls(6)

    def test_the_page_with_tickets_goes_on_with_another_one(self, visit: Callable[..., Visit]) -> None:
        at = visit("docs/access.rst", "ticketed")
        tickets, elsewhere = SCRIPTS["docs/access.rst"]
        fetched: list[str] = []
        at.page.on("request", lambda request: fetched.append(request.url.partition("?")[0].removeprefix(at.url)))
        with sse_clock() as clock:
            at.run(tickets, "listen();")
            at.listening("guarded", "news")
            at.names["guarded"].publish("news", "hi")
            assert at.calls(1) == [["show", "hi"]]
            clock.advance(601)  # beyond the page's ttl
            renewed = ["/stream-url", "/stream"] * 2
            wait_for(lambda: at.page.evaluate("1") and fetched == renewed, f"it has a new ticket: {fetched}", 20)
            at.names["guarded"].publish("news", "again")
            assert at.calls(2) == [["show", "again"], ["show", "hi"]]
        asked = []

        def answer(route: Any) -> None:
            asked.append(route.request.headers["origin"])
            route.fulfill(
                content_type="text/event-stream",
                body="data: from far away\n\n",
                headers={"Access-Control-Allow-Origin": at.url, "Access-Control-Allow-Credentials": "true"},
            )

        at.page.route("https://live.example.com/**", answer)
        after = "source.onmessage = (event) => { show(event.data, source.withCredentials); source.close(); };"
        at.run(elsewhere, after)
        assert ["show", "from far away", True] in at.calls(3)
        assert asked == [at.url]

    def test_the_page_of_a_job_shows_its_pages_and_its_end(self, visit: Callable[..., Visit]) -> None:
        at = visit("docs/jobs.rst")
        [script] = SCRIPTS["docs/jobs.rst"]
        start = "async () => window.url = (await (await fetch('/reports/may', { method: 'POST' })).json()).url"
        at.page.evaluate(start)
        at.run(script)
        pages = [["show", {"page": number}] for number in (1, 2, 3)]
        assert at.calls(4) == [["finish", {"pages": 3, "month": "may"}], *pages]

    def test_the_bar_of_a_task_moves(self, visit: Callable[..., Visit]) -> None:
        at = visit("docs/progress.rst", "reports")
        [script] = SCRIPTS["docs/progress.rst"]
        at.run(script)
        at.listening("live", "task-7")
        at.names["make_report"].apply((2,), task_id="7")
        at.page.wait_for_url("**/reports/7", wait_until="commit")

    def test_a_page_that_was_too_slow_loads_what_it_missed(self, visit: Callable[..., Visit]) -> None:
        at = visit("docs/slow-clients.rst")
        [script] = SCRIPTS["docs/slow-clients.rst"]
        [shown] = [block.text for block in all_blocks("docs/slow-clients.rst") if block.language == "text"]
        hole = Hole()
        hole.add(17, ["ticker-a"])
        assert hole.frame.decode().strip() == shown.strip()
        [event] = EventDecoder().feed(hole.frame)
        name, data = json.dumps(event.event), json.dumps(event.data)
        at.run(script, f"source.dispatchEvent(new MessageEvent({name}, {{ data: {data} }}));")
        assert at.calls(1)[0][:2] == ["reload", "ticker-a"]

    def test_the_console_shows_what_a_page_sees(self, visit: Callable[..., Visit]) -> None:
        at = visit("docs/troubleshooting.rst")
        [script] = SCRIPTS["docs/troubleshooting.rst"]
        at.run(script)
        at.listening("sse", "news")
        identifier = at.names["sse"].publish("news", "hi", event="headline")
        at.wait_until_said(f"headline 1 {identifier} hi")

    def test_the_scripts_of_every_page_run_here(self) -> None:
        source = inspect.getsource(TestInABrowser)
        for page, scripts in SCRIPTS.items():
            assert not scripts or f'= SCRIPTS["{page}"]' in source, f"the scripts of {page} do not run in a browser"
