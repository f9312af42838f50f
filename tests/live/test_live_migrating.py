"""What the page about coming over shows before and after, in a browser; Flask-SSE is in test_live_flask_sse.py."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from clients import DEADLINE
from docs_blocks import blocks
from flask import Flask, request
from playwright.sync_api import Browser, Page
from proxy import Proxy
from support import chromium, free_port, wait_for
from werkzeug.serving import make_server

from flask_sse_stream import SSE, PoolManager

pytestmark = [pytest.mark.live, pytest.mark.browser]

PAGE = """<!doctype html><meta charset="utf-8">
<script>
"use strict";
let opened = 0;
const events = [];
const source = new EventSource(URL_OF_THE_STREAM);
source.onopen = () => { opened += 1; };
for (const name of ["message", "order", "volume"])
    source.addEventListener(name, (event) => events.push([name, event.data]));
</script>
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def pages(browser: Browser) -> Iterator[list[Page]]:
    pages = [browser.new_page() for _ in range(2)]
    yield pages
    for page in pages:
        page.close()


def made_by(*parts: str) -> dict[str, Any]:
    """Run the blocks of the page that have one of these in them; give their names."""
    quick = functools.partial(SSE, ping_interval=0.5, retry=500)
    names: dict[str, Any] = {"Flask": Flask, "request": request, "SSE": quick, "__name__": "a_page_of_the_docs"}
    for part in parts:
        [text] = [text for _, text in blocks("docs/migrating.rst") if part in text]
        exec(compile(text, part, "exec", dont_inherit=True), names)
    return names


@contextlib.contextmanager
def served(app: Flask) -> Iterator[int]:
    """Serve an application with threads, in this process; give the port."""
    server = make_server("127.0.0.1", free_port(), app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.port
    finally:
        server.shutdown()
        thread.join(DEADLINE)
        server.server_close()
        manager = app.extensions.get("sse_stream")
        if isinstance(manager, PoolManager):
            manager.shutdown()


def events(page: Page) -> list[list[str]]:
    found: list[list[str]] = page.evaluate("events")
    return found


def heard(page: Page) -> list[str]:
    return [data for _, data in events(page)]


@pytest.mark.parametrize("moved", [False, True], ids=["before", "after"])
def test_what_a_generator_written_by_hand_loses_is_kept_from_now_on(moved: bool, pages: list[Page]) -> None:
    names = made_by("by_hand = Flask", *(["from_now_on = Flask"] if moved else []))
    app: Flask = names["from_now_on" if moved else "by_hand"]
    announce = names["announce"]
    app.add_url_rule("/", "index", lambda: PAGE.replace("URL_OF_THE_STREAM", '"/events"'))
    numbers = map(str, itertools.count())
    page = pages[0]

    def say_until_it_is_heard() -> str:
        """By hand, nothing is sent before the first event, so nobody can see when a page listens."""
        said = []

        def is_heard() -> bool:
            said.append(next(numbers))
            announce(said[-1])
            with contextlib.suppress(AssertionError):
                return wait_for(lambda: said[-1] in heard(page), "it is heard", 0.5)
            return False

        wait_for(is_heard, "the page listens", DEADLINE)
        return said[-1]

    with served(app) as port, Proxy(port) as proxy:
        page.goto(proxy.url)
        if moved:  # at once, before anything is said
            wait_for(lambda: page.evaluate("opened"), "it is open", DEADLINE)
        before = say_until_it_is_heard()
        announce("two\nlines")
        announce("text\n\ndata: forged")
        first, *others = ["two\nlines", "text\n\ndata: forged"] if moved else ["two", "text", "forged"]
        wait_for(lambda: heard(page)[-1:] == [[first, *others][-1]], "it is told", DEADLINE)
        assert heard(page)[heard(page).index(before) + 1 :] == [first, *others]

        proxy.cut()
        announce("missed")
        proxy.mend()
        after = say_until_it_is_heard()
        assert ("missed" in heard(page)) is moved
        assert heard(page).index(others[-1]) < heard(page).index(after)
        page.goto("about:blank")
        proxy.cut()
        if moved:
            wait_for(lambda: names["announcing"].count("announcements") == 0, "who has left is gone", DEADLINE)
        else:
            announce("to nobody")
            assert len(names["listeners"]) >= 2, "who has left stays"


def test_what_was_emitted_to_rooms_and_to_all_comes_to_the_pages(pages: list[Page]) -> None:
    names = made_by("market = Flask")
    app: Flask = names["market"]
    for room in ("ABC", "XYZ"):
        url = f'"/stream?connectKey={room}&connectKey=secret"'
        app.add_url_rule(f"/page/{room}", room, lambda url=url: PAGE.replace("URL_OF_THE_STREAM", url))
    with served(app) as port:
        for page, room in zip(pages, ("ABC", "XYZ"), strict=True):
            page.goto(f"http://127.0.0.1:{port}/page/{room}")
            wait_for(lambda page=page: page.evaluate("opened"), "it is open", DEADLINE)  # type: ignore[misc]
        order = """fetch("/orders/ABC", {
            method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ pieces: 7 }),
        }).then((answer) => answer.status)"""
        assert pages[1].evaluate(order) == 204
        wait_for(lambda: events(pages[0])[1:] and events(pages[1]), "they are told", DEADLINE)
        assert events(pages[0]) == [["order", '{"pieces": 7}'], ["volume", '{"orders": 1}']]
        assert events(pages[1]) == [["volume", '{"orders": 1}']]
        names["pushed"].publish("secret", "not for them")
        names["pushed"].publish_all("last")
        wait_for(lambda: "last" in heard(pages[0]), "what comes later is there", DEADLINE)
        assert "not for them" not in heard(pages[0])
        for page in pages:
            page.goto("about:blank")
