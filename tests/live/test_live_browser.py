"""A real browser's ``EventSource``: the client that all of this is for."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from clients import DEADLINE, reset_reason
from conftest import PING, SERVERS, LiveServer
from playwright.sync_api import Browser, Page
from proxy import Proxy
from support import chromium, wait_for

pytestmark = [pytest.mark.live, pytest.mark.browser]

# Patching changes how events reach the response, and nothing about the response.
most_servers = pytest.mark.parametrize("running", [kind for kind in SERVERS if kind != "pywsgi-patched"], indirect=True)
RETRY = 0.3  # what the server's first bytes ask for
CLOSED = 2


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Of the module, not of the session: while it runs, this thread has an event loop of asyncio's."""
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    page = browser.new_page()
    yield page
    page.close()


class Source:
    """One ``EventSource`` in a page."""

    def __init__(self, page: Page, base: str, target: str, *names: str) -> None:
        self._page = page
        page.goto(f"{base}/page")
        page.evaluate("([target, names]) => listen(target, names)", [target, list(names)])

    @property
    def events(self) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = self._page.evaluate("events")
        return events

    @property
    def data(self) -> list[str]:
        return [event["data"] for event in self.events]

    @property
    def opens(self) -> int:
        return int(self._page.evaluate("opens"))

    @property
    def state(self) -> int:
        return int(self._page.evaluate("source.readyState"))

    def wait_for_opens(self, times: int = 1) -> None:
        wait_for(lambda: self.opens >= times, f"the page's EventSource opens for the {times}. time", DEADLINE)

    def wait_for_events(self, number: int) -> list[dict[str, Any]]:
        wait_for(lambda: len(self.events) >= number, f"{number} events: {self.events}", DEADLINE)
        events = self.events
        assert len(events) == number
        return events


def _listen(page: Page, server: LiveServer, *keys: str, names: tuple[str, ...] = ("close", "stream-reset")) -> Source:
    source = Source(page, server.url, server.stream_url(*keys).removeprefix(server.url), *names)
    source.wait_for_opens()
    return source


def _assert_over(server: LiveServer, source: Source, requests_of: str) -> None:
    """The last request was the one that is answered 204, and none follows."""

    def last_ids() -> list[str | None]:
        return [request["last_event_id"] for request in server.requests(requests_of)]

    wait_for(lambda: last_ids()[-1:] == ["end"], "the request that is answered 204", DEADLINE)
    wait_for(lambda: source.state == CLOSED, "the page's EventSource gives up", DEADLINE)
    before = last_ids()
    assert before.count("end") == 1
    until = time.monotonic() + 2 * RETRY
    while time.monotonic() < until:
        assert last_ids() == before
        time.sleep(0.02)
    assert source.state == CLOSED


def test_open_fires_before_any_event_and_any_heartbeat(page: Page, fresh: Callable[..., LiveServer], key: str) -> None:
    server = fresh("pywsgi", SSE_PING_INTERVAL="0")
    source = _listen(page, server, key)
    assert source.events == []
    server.publish(key, "first")
    assert source.wait_for_events(1)[0]["data"] == "first"


@most_servers
def test_events_reach_the_page_as_they_were_published(page: Page, server: LiveServer, key: str) -> None:
    source = _listen(page, server, key, f"{key}-second", names=("headline", "überschrift", "empty"))
    assert source.events == []
    text = " leading, trailing \n\n:colon\ndata: x\n\ttab \u2028 \x85 \ufeff größe – 日本 🦊 "
    first = server.publish(key, "plain")
    server.publish(key, text, event="headline")
    server.publish(key, {"größe": ["日本", None, 1.5]}, event="überschrift", id="größe – 日本")
    server.publish(f"{key}-second", "", id="sec ond")
    server.publish(key, event="empty")
    last = server.publish(key, "\n")
    plain, headline, heading, second, empty, newline = source.wait_for_events(6)
    assert plain == {"type": "message", "data": "plain", "id": first}
    assert (headline["type"], headline["data"]) == ("headline", text)
    assert (heading["type"], heading["id"]) == ("überschrift", "größe – 日本")
    assert json.loads(heading["data"]) == {"größe": ["日本", None, 1.5]}
    assert second == {"type": "message", "data": "", "id": "sec ond"}
    assert (empty["type"], empty["data"]) == ("empty", "")
    assert newline == {"type": "message", "data": "\n", "id": last}


@most_servers
def test_a_page_that_leaves_is_noticed(page: Page, server: LiveServer, key: str) -> None:
    _listen(page, server, key)
    assert server.count(key) == 1
    page.goto("about:blank")
    server.wait_for_count(key, 0, 2 * PING + DEADLINE)


@most_servers
def test_a_page_that_is_asked_to_come_back_misses_nothing(page: Page, server: LiveServer, key: str) -> None:
    source = _listen(page, server, key)
    server.publish(key, "seen")
    source.wait_for_events(1)
    server.post("/close", key=key, reconnect="1")
    server.publish(key, "missed")
    source.wait_for_opens(2)
    server.publish(key, "live")
    source.wait_for_events(3)
    assert source.data == ["seen", "missed", "live"]
    assert len(server.requests(key)) == 2


@pytest.mark.parametrize("kind", ["pywsgi", "werkzeug"])  # its socket taken over, and not
def test_a_page_whose_stream_grows_old_comes_back_again_and_again_and_misses_nothing(
    page: Page, fresh: Callable[..., LiveServer], kind: str, key: str
) -> None:
    server = fresh(kind, SSE_MAX_AGE="0.5", SSE_RETRY="50")
    source = _listen(page, server, key)
    published = []
    deadline = time.monotonic() + 30
    while source.opens < 4:
        assert time.monotonic() < deadline, f"it was opened {source.opens} times"
        published.append(server.publish(key, str(len(published))))
    events = source.wait_for_events(len(published))
    assert [event["id"] for event in events] == published
    assert {event["type"] for event in events} == {"message"}
    assert server.get("/state")["stats"]["closed"]["rotated"] >= 3


@most_servers
def test_a_page_that_was_cut_off_misses_nothing(page: Page, server: LiveServer, key: str) -> None:
    with Proxy(server.port) as proxy:
        source = Source(page, proxy.url, server.stream_url(key).removeprefix(server.url), "close", "stream-reset")
        source.wait_for_opens()
        server.publish(key, "seen")
        source.wait_for_events(1)
        # The second time without having heard anything since.
        for number in (1, 2):
            proxy.cut()
            server.wait_for_count(key, 0, 2 * PING + DEADLINE)
            server.publish(key, f"missed {number}")
            server.publish(f"{key}-other", "of another key")
            proxy.mend()
            source.wait_for_opens(number + 1)
            source.wait_for_events(number + 1)
        server.publish(key, "live")
        source.wait_for_events(4)
        assert source.data == ["seen", "missed 1", "missed 2", "live"]
        page.evaluate("source.close()")


@most_servers
def test_a_page_that_is_asked_to_come_back_before_its_first_event_misses_nothing(
    page: Page, server: LiveServer, key: str
) -> None:
    server.publish(key, "before it came")
    source = _listen(page, server, key)
    server.post("/close", key=key, reconnect="1")
    server.publish(key, "missed")
    source.wait_for_opens(2)
    assert source.wait_for_events(1)[0]["data"] == "missed"
    assert source.events[0]["type"] == "message"


@most_servers
def test_a_page_comes_back_with_an_id_of_the_users_own(page: Page, server: LiveServer, key: str) -> None:
    source = _listen(page, server, key)
    own = "größe – 日本 🦊"
    server.publish(key, "seen", id=own)
    assert source.wait_for_events(1)[0]["id"] == own
    server.post("/close", key=key, reconnect="1")
    server.publish(key, "missed", id="another")
    source.wait_for_opens(2)
    assert source.wait_for_events(2)[1] == {"type": "message", "data": "missed", "id": "another"}


@pytest.mark.parametrize("kind", ["pywsgi", "gunicorn-gthread", "werkzeug"])
def test_after_the_servers_death_a_page_is_told_to_begin_anew(
    page: Page, fresh: Callable[..., LiveServer], kind: str, key: str
) -> None:
    server = fresh(kind)
    source = _listen(page, server, key)
    last = server.publish(key, "before")
    source.wait_for_events(1)
    server.kill_and_restart()
    source.wait_for_opens(2)
    server.publish(key, "after")
    before, reset, after = source.wait_for_events(3)
    assert (reset["type"], reset_reason(reset["data"])) == ("stream-reset", "epoch")
    assert json.loads(reset["data"])["keys"] == [key]
    assert after["data"] == "after"
    assert len({last.partition("-")[0], after["id"].partition("-")[0]}) == 2
    # The reset gave it a place in the new log.
    server.post("/close", key=key, reconnect="1")
    server.publish(key, "missed")
    source.wait_for_events(4)
    assert source.data[2:] == ["after", "missed"]


@most_servers
def test_a_page_whose_key_was_closed_does_not_come_back(page: Page, server: LiveServer, key: str) -> None:
    source = _listen(page, server, key)
    server.publish(key, "last words")
    source.wait_for_events(1)
    server.post("/close", key=key)
    assert source.wait_for_events(2)[1] == {"type": "close", "data": "", "id": "end"}
    _assert_over(server, source, key)


@most_servers
def test_a_countdown_that_is_over_does_not_start_again(page: Page, server: LiveServer, key: str) -> None:
    source = Source(page, server.url, f"/countdown/{key}", "close")
    events = source.wait_for_events(4)
    assert [event["data"] for event in events] == ['{"left": 3}', '{"left": 2}', '{"left": 1}', ""]
    assert events[-1] == {"type": "close", "data": "", "id": "end"}
    _assert_over(server, source, f"/countdown/{key}")
    assert server.get(f"/noted/{key}") == ["started"]
    assert source.data == [event["data"] for event in events]


@most_servers
def test_a_page_that_is_refused_for_now_comes_back(page: Page, server: LiveServer) -> None:
    with server.listen(path="/full-retry/stream"), server.listen(path="/full-retry/stream"):
        source = Source(page, server.url, "/full-retry/stream")
        source.wait_for_opens(2)  # it was let in for a moment each time, and sent away
        assert source.state != CLOSED
    wait_for(lambda: server.get("/full-retry/count")["streams"] == 1, "its turn", 2 * PING + DEADLINE)
    page.evaluate("source.close()")
    wait_for(lambda: server.get("/full-retry/count")["streams"] == 0, "its end", 2 * PING + DEADLINE)


@most_servers
def test_pages_of_one_browser_get_the_same(browser: Browser, server: LiveServer, key: str) -> None:
    pages = [browser.new_page() for _ in range(2)]
    try:
        sources = [_listen(page, server, key) for page in pages]
        server.wait_for_count(key, 2)
        server.publish(key, "to each")
        server.publish(None, f"to all of {key}")
        for source in sources:
            source.wait_for_events(2)
            assert source.data == ["to each", f"to all of {key}"]
    finally:
        for page in pages:
            page.close()
