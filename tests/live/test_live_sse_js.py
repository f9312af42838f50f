"""``sse.js`` in a real browser: one connection for all tabs, which outlives whatever happens to them and to servers."""

from __future__ import annotations

import contextlib
import json
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from conftest import LiveServer
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from playwright.sync_api import Browser, BrowserContext, Error, Page, Route
from proxy import Proxy
from support import ROOT, chromium, wait_for
from test_event import WIRES, cut, events

from flask_sse_stream import EventDecoder

pytestmark = [
    pytest.mark.live,
    pytest.mark.browser,
    pytest.mark.parametrize("running", ["pywsgi"], indirect=True),
]

DEADLINE = 20.0
BEGIN = """async ([path, options]) => {
  const { connect } = await import("/stream.js");
  window.events = [];
  window.states = [];
  const note = (data, event) => events.push({ type: event.type, data, id: event.lastEventId });
  const listeners = Object.fromEntries(["message", "headline", "close"].map((name) => [name, note]));
  const ask = async () => {
    const answer = await fetch(options.tickets);
    return answer.ok ? answer.text() : null;
  };
  const ways = {
    url: { renew: ask },
    header: {
      renew: async () => { window.ticket = await ask(); },
      headers: () => (window.ticket ? { Authorization: `Bearer ${ticket}` } : {}),
    },
  };
  window.source = connect(path, {
    events: listeners, onReset: note, onExpired: note, onState: (state, status) => states.push([state, status]),
    ...ways[options.way], ...options,
  });
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Of the module, not of the session: while it runs, this thread has an event loop of asyncio's."""
    with chromium() as browser:
        yield browser


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """What tabs of one browser share; another test's tabs are those of another browser."""
    context = browser.new_context()
    yield context
    context.close()


class Tab:
    """A page that listens with ``sse.js``."""

    def __init__(
        self,
        context: BrowserContext,
        server: LiveServer,
        *keys: str,
        base: str | None = None,
        kept: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        """``kept`` is what an earlier page has left in the tab's storage."""
        self.page: Page = context.new_page()
        self.page.goto(f"{base or server.url}/page")
        self.page.evaluate("(kept) => Object.assign(sessionStorage, kept)", kept or {})
        self._arguments = [options.pop("path", "/stream"), {"keys": list(keys), **options}]
        self.begin()

    def begin(self) -> None:
        self.page.evaluate(BEGIN, self._arguments)

    def reload(self) -> None:
        self.page.reload()
        self.begin()

    @property
    def events(self) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = self.page.evaluate("events")
        return events

    @property
    def data(self) -> list[Any]:
        return [event["data"] for event in self.events]

    @property
    def state(self) -> str:
        return str(self.page.evaluate("source.state"))

    @property
    def leads(self) -> bool:
        return bool(self.page.evaluate("source.leader"))

    def wait_for_state(self, state: str = "open") -> None:
        wait_for(lambda: self.state == state, f"the tab is {state}: {self.page.evaluate('states')}", DEADLINE)

    def wait_for_data(self, *expected: Any) -> None:
        """Wait until so many events have come; then they must be these."""
        wait_for(lambda: len(self.data) >= len(expected), f"{len(expected)} events, not {self.data}", DEADLINE)
        assert self.data == list(expected)


def open_tabs(number: int, context: BrowserContext, server: LiveServer, *keys: str, **options: Any) -> list[Tab]:
    tabs = []
    for _ in range(number):
        tabs.append(Tab(context, server, *keys, **options))
        tabs[-1].wait_for_state()
    return tabs


def the_leader(tabs: list[Tab]) -> Tab:
    """Wait until one of them leads, and give it."""

    def leaders() -> list[Tab]:
        return [tab for tab in tabs if tab.leads]

    [leader] = wait_for(lambda: found if len(found := leaders()) == 1 else None, "one tab leads", DEADLINE)
    return leader


# One connection


def test_eight_tabs_have_one_connection_and_all_are_live(context: BrowserContext, server: LiveServer, key: str) -> None:
    tabs = open_tabs(8, context, server, key)
    assert server.count(key) == 1
    assert [tab.leads for tab in tabs] == [True] + [False] * 7
    ids = [server.publish(key, "plain"), server.publish(key, {"title": "hi"}, event="headline")]
    for tab in tabs:
        tab.wait_for_data("plain", '{"title": "hi"}')
        assert [event["id"] for event in tab.events] == ids
        assert [event["type"] for event in tab.events] == ["message", "headline"]
    assert server.count(key) == 1
    assert len(server.requests(key)) == 1


def test_tabs_of_other_keys_or_another_name_have_a_connection_of_their_own(
    context: BrowserContext, server: LiveServer, key: str
) -> None:
    one, both, named = (
        Tab(context, server, *keys, **options)
        for keys, options in (((key,), {}), ((key, f"{key}-2"), {}), ((key,), {"name": "other"}))
    )
    server.wait_for_count(key, 3)
    for tab in (one, both, named):
        tab.wait_for_state()
    server.publish(key, "x")
    server.publish(f"{key}-2", "y")
    both.wait_for_data("x", "y")
    one.wait_for_data("x")
    named.wait_for_data("x")


def test_a_tab_that_joins_late_gets_what_comes_from_then_on(
    context: BrowserContext, server: LiveServer, key: str
) -> None:
    [first] = open_tabs(1, context, server, key)
    server.publish(key, "before")
    first.wait_for_data("before")
    [second] = open_tabs(1, context, server, key)
    server.publish(key, "after")
    first.wait_for_data("before", "after")
    second.wait_for_data("after")


@pytest.mark.parametrize("how", ["unshared", "no locks"])
def test_without_sharing_each_tab_has_its_own_connection(
    context: BrowserContext, server: LiveServer, key: str, how: str
) -> None:
    if how == "no locks":  # as where the origin is not secure
        context.add_init_script("Object.defineProperty(Navigator.prototype, 'locks', { value: undefined })")
    tabs = open_tabs(2, context, server, key, **({"shared": False} if how == "unshared" else {}))
    assert server.count(key) == 2
    server.publish(key, "x")
    for tab in tabs:
        tab.wait_for_data("x")


# Another leader


def close_tab(tab: Tab) -> None:
    tab.page.close()


def close_source(tab: Tab) -> None:
    tab.page.evaluate("source.close()")


def crash(tab: Tab) -> None:
    with contextlib.suppress(Error):  # as it says
        tab.page.goto("chrome://crash")


@pytest.mark.parametrize("end", [close_tab, close_source, crash])
def test_a_leader_that_ends_is_succeeded_and_no_tab_misses_or_repeats_anything(
    context: BrowserContext, server: LiveServer, key: str, end: Callable[[Tab], None]
) -> None:
    tabs = open_tabs(4, context, server, key)
    said = []

    def publish(times: int) -> None:
        for _ in range(times):
            said.append(str(len(said)))
            server.publish(key, said[-1])

    publish(3)
    for _ in range(2):
        leader = the_leader(tabs)
        publish(2)
        end(leader)
        publish(3)
        tabs.remove(leader)
        the_leader(tabs)
        publish(2)
    for tab in tabs:
        tab.wait_for_data(*said)
    server.wait_for_count(key, 1)


@pytest.mark.parametrize(
    ("away", "back"),
    [
        ("new PageTransitionEvent('pagehide', { persisted: true })", "new PageTransitionEvent('pageshow')"),
        ("new Event('freeze')", "new Event('resume')"),
    ],
    ids=["kept for going back", "frozen"],
)
def test_a_leader_that_is_put_aside_is_succeeded_and_catches_up_when_it_is_back(
    context: BrowserContext, server: LiveServer, key: str, away: str, back: str
) -> None:
    """The events are made up, because a driven browser never freezes a page; what they have to do is not."""
    first, second = tabs = open_tabs(2, context, server, key)
    first.page.evaluate(f"document.dispatchEvent({away})")
    wait_for(lambda: second.leads, "the other leads", DEADLINE)
    said = [str(number) for number in range(3)]
    for text in said:
        server.publish(key, text)
    second.wait_for_data(*said)
    assert first.data == []
    assert first.page.evaluate("navigator.locks.query().then(({ pending }) => pending)") == []
    first.page.evaluate(f"document.dispatchEvent({back})")
    first.wait_for_data(*said)
    server.publish(key, "live")
    for tab in tabs:
        tab.wait_for_data(*said, "live")
    assert not first.leads
    server.wait_for_count(key, 1)


def test_a_leader_that_hangs_is_replaced_and_follows_when_it_comes_to(
    context: BrowserContext, server: LiveServer, key: str
) -> None:
    first, second = tabs = open_tabs(2, context, server, key, timeout=2000)
    held: list[Route] = []
    first.page.route("**/hang", lambda route: held.append(route))
    first.page.evaluate("""setTimeout(() => {
      const request = new XMLHttpRequest();
      request.open("GET", "/hang", false); // nothing else runs in this page until it is answered
      request.send();
    })""")
    wait_for(lambda: second.leads, "the other leads", DEADLINE)
    server.publish(key, "meanwhile")
    second.wait_for_data("meanwhile")
    [hanging] = held
    hanging.fulfill(body="")
    server.publish(key, "live")
    for tab in tabs:
        tab.wait_for_data("meanwhile", "live")
    assert the_leader(tabs) is second
    server.wait_for_count(key, 1)
    waiting = first.page.evaluate("navigator.locks.query().then(({ pending }) => pending)")
    assert (
        len({request["clientId"] for request in waiting}) == 2
    )  # the first, and the second's from before it took over
    second.page.evaluate("source.close()")
    wait_for(lambda: first.leads, "it leads again", DEADLINE)
    server.publish(key, "last")
    first.wait_for_data("meanwhile", "live", "last")


def test_what_a_former_leader_says_too_late_is_neither_taken_twice_nor_before_what_is_missing(
    context: BrowserContext, server: LiveServer, key: str
) -> None:
    leader, tab = open_tabs(2, context, server, key, name="it")
    ids = [server.publish(key, "1"), server.publish(key, "2")]
    tab.wait_for_data("1", "2")
    epoch = ids[0].partition("-")[0]
    places = [[epoch, int(id.partition("-")[2]), 0] for id in ids]
    ahead = [epoch, places[1][1] + 10, 0], [epoch, places[1][1] + 11, 0]
    for prev, place in (places, ahead):
        leader.page.evaluate(
            "(message) => new BroadcastChannel('sse:it').postMessage(message)",
            {"prev": prev, "place": place, "id": f"{epoch}-{place[1]}", "data": "late"},
        )
    server.publish(key, "3")
    tab.wait_for_data("1", "2", "3")
    assert leader.data == ["1", "2", "3"]


# Coming back


def test_a_reload_goes_on_where_the_page_was(context: BrowserContext, server: LiveServer, key: str) -> None:
    [tab] = open_tabs(1, context, server, key)
    last = server.publish(key, "seen")
    tab.wait_for_data("seen")
    tab.page.goto("about:blank")
    server.wait_for_count(key, 0)
    server.publish(key, "missed")
    tab.page.goto(f"{server.url}/page")
    tab.begin()
    tab.wait_for_data("missed")
    assert server.requests(key)[-1]["last_event_id"] == last
    server.publish(key, "live")
    tab.wait_for_data("missed", "live")


def test_a_reload_of_one_of_several_tabs_is_told_by_the_others_what_it_missed(
    context: BrowserContext, server: LiveServer, key: str
) -> None:
    tabs = open_tabs(3, context, server, key)
    said = []
    for tab in tabs:  # the leader, and then those that succeeded it
        said.append(f"before {len(said)}")
        server.publish(key, said[-1])
        wait_for(lambda: all(said[-1] in tab.data for tab in tabs), "all have it", DEADLINE)
        tab.page.goto("about:blank")
        said.append(f"missed {len(said)}")
        server.publish(key, said[-1])
        others = [other for other in tabs if other is not tab]
        wait_for(lambda others=others: all(said[-1] in other.data for other in others), "others have it", DEADLINE)
        tab.page.goto(f"{server.url}/page")
        tab.begin()
        tab.wait_for_data(said[-1])
    server.publish(key, "live")
    for tab, first in zip(tabs, (1, 3, 5), strict=True):
        tab.wait_for_data(*said[first:], "live")
    server.wait_for_count(key, 1)


@pytest.mark.parametrize("missed", [3, 0])
def test_a_tab_whose_place_the_leader_does_not_know_reads_by_itself_until_it_has_caught_up(
    context: BrowserContext, server: LiveServer, key: str, missed: int
) -> None:
    cursor = server.publish(key, "seen")
    epoch, _, place = cursor.partition("-")
    said = [f"missed {number}" for number in range(missed)]
    for text in said:
        server.publish(key, text)
    server.publish(f"{key}-other", "so that the leader begins further on")
    [leader] = open_tabs(1, context, server, key, name="both")
    late = Tab(context, server, key, name="both", kept={"sse:both": json.dumps([cursor, [epoch, int(place), 0]])})
    late.wait_for_data(*said)
    wait_for(lambda: len(server.requests(key)) == 2, "it asks the server", DEADLINE)
    assert server.requests(key)[1]["last_event_id"] == cursor
    server.wait_for_count(key, 1)
    server.publish(key, "live")
    late.wait_for_data(*said, "live")
    leader.wait_for_data("live")
    assert [leader.leads, late.leads] == [True, False]


def test_a_server_that_fails_is_asked_again(context: BrowserContext, server: LiveServer, key: str) -> None:
    [tab] = open_tabs(1, context, server, key)
    answers = [502, 429]
    context.route(
        re.compile("/stream\\?"),
        lambda route: route.fulfill(status=answers.pop(0), body="no") if answers else route.continue_(),
    )
    server.post("/close", key=key, reconnect="1")
    server.publish(key, "missed")
    tab.wait_for_data("missed")
    assert answers == []
    assert tab.page.evaluate("states") == [["open", None], ["connecting", None], ["open", None]]


def test_an_answer_that_is_no_stream_is_no_stream(context: BrowserContext, server: LiveServer, key: str) -> None:
    answers = ["data: log in first\n\n"]
    context.route(
        re.compile("/stream\\?"),
        lambda route: (
            route.fulfill(status=200, content_type="text/html", body=answers.pop()) if answers else route.continue_()
        ),
    )
    [tab] = open_tabs(1, context, server, key)
    assert answers == []
    server.publish(key, "live")
    tab.wait_for_data("live")


@pytest.mark.parametrize("status", [401, 404])
def test_a_refusal_is_final_and_its_status_is_told(
    context: BrowserContext, server: LiveServer, key: str, status: int
) -> None:
    asked = []
    context.route(
        re.compile("/stream\\?"), lambda route: (asked.append(route.request.url), route.fulfill(status=status))
    )
    tab = Tab(context, server, key)
    tab.wait_for_state("closed")
    assert tab.page.evaluate("states") == [["closed", status]]
    assert len(asked) == 1


def test_a_connection_that_has_gone_silent_is_given_up(context: BrowserContext, server: LiveServer, key: str) -> None:
    with Proxy(server.port) as proxy:
        [tab] = open_tabs(1, context, server, key, base=proxy.url, timeout=2000)
        server.publish(key, "seen")
        tab.wait_for_data("seen")
        proxy.swallow()
        server.publish(key, "swallowed")
        tab.wait_for_data("seen", "swallowed")
        server.publish(key, "live")
        tab.wait_for_data("seen", "swallowed", "live")
        assert len(server.requests(key)) == 2
        tab.page.close()


def test_heartbeats_keep_a_connection(context: BrowserContext, server: LiveServer, key: str) -> None:
    """They are comments, which an ``EventSource`` would not show."""
    tabs = open_tabs(2, context, server, key, timeout=3000)
    tabs[0].page.wait_for_timeout(3500)
    server.publish(key, "live")
    for tab in tabs:
        tab.wait_for_data("live")
    assert [tab.leads for tab in tabs] == [True, False]
    assert len(server.requests(key)) == 1


def test_an_id_of_the_users_own_is_a_place_to_come_back_to(
    context: BrowserContext, server: LiveServer, key: str
) -> None:
    tabs = open_tabs(2, context, server, key)
    said = []
    for text, own in (("1", "größe – 日本 🦊"), ("2", "order-5"), ("3", "order-3"), ("4", "order-3")):
        server.publish(key, text, id=own)
        said.append(text)
        for tab in tabs:
            tab.wait_for_data(*said)
        server.post("/close", key=key, reconnect="1")
        server.wait_for_count(key, 1)
    leader = the_leader(tabs)
    leader.page.close()
    tabs.remove(leader)
    server.publish(key, "5", id="order-1")
    tabs[0].wait_for_data(*said, "5")


# The end


def test_a_stream_that_is_over_for_good_stays_so_in_every_tab(
    context: BrowserContext, server: LiveServer, key: str
) -> None:
    tabs = open_tabs(3, context, server, key)
    server.publish(key, "last words")
    server.post("/close", key=key)
    for tab in tabs:
        tab.wait_for_state("closed")
        assert tab.data == ["last words", ""]
        assert tab.page.evaluate("states").pop() == ["closed", 204]
        assert tab.page.evaluate("sessionStorage.length") == 0
    assert [request["last_event_id"] for request in server.requests(key)] == [None, "end", "end", "end"]


def test_a_source_that_was_closed_says_nothing_more(context: BrowserContext, server: LiveServer, key: str) -> None:
    """Not even what came together with the event at which it was closed."""
    [tab] = open_tabs(1, context, server, key)
    tab.page.evaluate("void source.on('message', () => source.close())")
    server.post("/burst", key=key, times="5")
    tab.wait_for_state("closed")
    server.wait_for_count(key, 0)
    assert tab.data == ["0"]
    assert tab.page.evaluate("[states.at(-1), source.leader]") == [["closed", 0], False]
    assert tab.page.evaluate("navigator.locks.query().then(({ held, pending }) => [held, pending])") == [[], []]


# Tickets


@pytest.mark.parametrize("way", ["url", "header"])
def test_a_ticket_is_renewed_when_it_is_missing_and_when_it_has_expired(
    context: BrowserContext, server: LiveServer, key: str, way: str
) -> None:
    refused = []
    context.on("response", lambda response: refused.append(response.url) if response.status == 401 else None)
    tickets = f"/ticketed/ticket/{quote(key)}?ttl=2.5" + ("&alone" if way == "header" else "")
    tabs = open_tabs(2, context, server, key, path="/ticketed/stream", way=way, tickets=tickets, name=f"{way} of {key}")
    said = []

    def publish() -> None:
        said.append(f"event {len(said)}")
        server.post("/ticketed/publish", {"key": key, "data": said[-1]})

    def messages(tab: Tab) -> list[Any]:
        return [event["data"] for event in tab.events if event["type"] == "message"]

    publish()
    wait_for(lambda: [event["type"] for event in tabs[1].events].count("stream-expired") > 0, "an end", DEADLINE)
    publish()
    for tab in tabs:
        wait_for(lambda tab=tab: len(messages(tab)) == 2, "both events", DEADLINE)
        assert messages(tab) == said
        assert {"type": "stream-expired", "data": {"reason": "expired"}, "id": tab.events[0]["id"]} in tab.events
    assert len(refused) == 1  # the first, without any ticket
    asked = server.get(f"/ticketed/given/{quote(key)}")
    assert (asked["given"] >= 2, asked["streams"] <= 1) == (True, True)


def test_who_gets_no_other_ticket_stops(context: BrowserContext, server: LiveServer, key: str) -> None:
    tickets = f"/ticketed/ticket/{quote(key)}?ttl=2&at-most=1"
    tab = Tab(context, server, path="/ticketed/stream", way="url", tickets=tickets)
    tab.wait_for_state("closed")
    assert tab.page.evaluate("states") == [["open", None], ["connecting", None], ["closed", 401]]
    assert server.get(f"/ticketed/given/{quote(key)}") == {"given": 2, "streams": 0}


def test_a_ticket_that_is_refused_is_not_asked_for_again_and_again(
    context: BrowserContext, server: LiveServer, key: str
) -> None:
    asked = []

    def give(route: Route) -> None:
        asked.append(route.request.url)
        route.fulfill(body="/ticketed/stream?ticket=broken")

    context.route("**/broken", give)
    tab = Tab(context, server, key, path="/ticketed/stream", way="url", tickets="/broken")
    tab.wait_for_state("closed")
    assert tab.page.evaluate("states") == [["closed", 401]]
    assert len(asked) == 1


# What listeners are given


def test_a_reset_is_told_with_its_reason(context: BrowserContext, server: LiveServer, key: str) -> None:
    tab = Tab(context, server, key, name="it", kept={"sse:it": '["wild", ["", 0, 1]]'})
    wait_for(lambda: tab.events, "the reset", DEADLINE)
    [reset] = tab.events
    assert (reset["type"], reset["data"]) == ("stream-reset", {"reason": "unknown", "keys": [key]})


def test_json_is_parsed_where_it_is_json_and_a_listener_can_be_removed(
    context: BrowserContext, server: LiveServer, key: str
) -> None:
    [tab] = open_tabs(1, context, server, key, json=True)
    tab.page.evaluate("""() => {
      window.removed = [];
      window.off = source.on("message", (data) => { removed.push(data); off(); });
      source.on("message", () => { throw new Error("of a listener"); });
      source.on("message", (data) => removed.push(`text ${data}`), false);
    }""")
    for data in ({"size": [1, None]}, "no JSON {", "", "7"):
        server.publish(key, data)
    tab.wait_for_data({"size": [1, None]}, "no JSON {", "", 7)
    assert tab.page.evaluate("removed") == [
        {"size": [1, None]},
        'text {"size": [1, null]}',
        "text no JSON {",
        "text ",
        "text 7",
    ]


def test_what_a_listener_of_states_throws_is_its_own(context: BrowserContext, server: LiveServer, key: str) -> None:
    page = context.new_page()
    page.goto(f"{server.url}/page")
    page.evaluate(
        """async (key) => {
          const { connect } = await import("/stream.js");
          window.events = [];
          const onState = () => { throw new Error("of a listener"); };
          connect("/stream", { keys: [key], onState, events: { message: (data) => events.push(data) } });
        }""",
        key,
    )
    server.wait_for_count(key, 1)
    server.publish(key, "live")
    wait_for(lambda: page.evaluate("events") == ["live"], "the event", DEADLINE)
    assert len(server.requests(key)) == 1


# The format

PARSE = """async (streams) => {
  const { parser } = await import("/stream.js");
  return streams.map((pieces) => {
    const events = [];
    let last = "";
    let retry = null;
    const feed = parser((block) => {
      last = block.id ?? last;
      retry = block.retry ?? retry;
      if (block.data !== undefined) events.push([block.event || "message", block.data, last]);
    });
    for (const piece of pieces) feed(new Uint8Array(piece));
    return [events, last, retry];
  });
}"""


def parse_in_browser(page: Page, streams: list[list[bytes]]) -> list[Any]:
    parsed: list[Any] = page.evaluate(PARSE, [[list(piece) for piece in pieces] for pieces in streams])
    return parsed


def parse_here(pieces: list[bytes]) -> list[Any]:
    decoder = EventDecoder()
    found = [event for piece in pieces for event in decoder.feed(piece)]
    events = [[event.event or "message", event.data, event.id or ""] for event in found]
    return [events, decoder.last_event_id, decoder.retry]


def any_streams(number: int) -> list[list[bytes]]:
    """Streams of the kinds that the format's own tests are made of, cut anywhere."""
    made = []
    line = st.sampled_from([b"data", b"data:", b"data: x", b"id", b"id: 7", b"id: a\0b", b"event: e", b"retry: 012"])
    field = line | st.sampled_from(
        [b"retry: 1x", b": ping", b"\xef\xbb\xbf", b"Data: x", b":", b" data: x", b"\xf0\x9f"]
    )
    end = st.sampled_from([b"\n", b"\r", b"\r\n"])
    wild = st.lists(field | end | st.binary(max_size=3), min_size=6, max_size=30).map(b"".join)
    sent = st.lists(events, max_size=5).map(lambda given: b"".join(event.encode() for event in given))

    @settings(max_examples=number, database=None, deadline=None, phases=[Phase.generate])
    @given(wild | sent, st.lists(st.integers(0, 2**16), max_size=8))
    def make(stream: bytes, cuts: list[int]) -> None:
        made.append(cut(stream, cuts))

    make()
    return made


def test_the_parser_says_what_the_decoder_says(context: BrowserContext, server: LiveServer) -> None:
    page = context.new_page()
    page.goto(f"{server.url}/page")
    streams = [[wire] for wire in WIRES]
    streams += [[wire[place : place + 1] for place in range(len(wire))] for wire in WIRES]
    streams += any_streams(400)
    assert sum(bool(parse_here(pieces)[0]) for pieces in streams) > 100
    for pieces, parsed in zip(streams, parse_in_browser(page, streams), strict=True):
        assert parsed == parse_here(pieces), pieces


def test_numbers_and_comments_are_given_as_they_come(context: BrowserContext, server: LiveServer) -> None:
    page = context.new_page()
    page.goto(f"{server.url}/page")
    stream = b"retry: 010\nretry: 1.5\nretry:\nretry: -1\n\n: ping\n\n:a\n:\n: b: c\ndata: x\nid\nwhat\n\ndata: cut off"
    blocks = page.evaluate(
        """async (bytes) => {
          const blocks = [];
          (await import("/stream.js")).parser((block) => blocks.push(block))(new Uint8Array(bytes));
          return blocks;
        }""",
        list(stream),
    )
    assert blocks == [{"retry": 10}, {}, {"comment": "ping"}, {"comment": "b: c", "data": "x", "id": ""}]


# What the page of the docs says

STUBS = """() => {
  window.shown = [];
  window.show = (...what) => shown.push(what);
  window.load = () => {};
}"""


def scripts() -> list[str]:
    page = (ROOT / "docs" / "browser.rst").read_text(encoding="utf-8")
    found = re.findall(r"^\.\. code-block:: javascript\n\n((?:    .*\n|\n)+)", page, re.MULTILINE)
    return [textwrap.dedent(script) for script in found]


def test_the_scripts_of_the_docs_run_and_show_what_is_published(context: BrowserContext, server: LiveServer) -> None:
    eventsource, simple, with_url, with_header, by_hand = scripts()
    answers = {"/stream-url": "/stream?connectKey=news", "/ticket": "a ticket", "/answers": "event: part\ndata: 42\n\n"}
    context.route(
        re.compile("/(stream-url|ticket|answers)$"),
        lambda route: route.fulfill(body=answers[urlsplit(route.request.url).path]),
    )
    pages = []
    for script in (eventsource, simple, with_url, with_header):
        page = context.new_page()
        page.goto(f"{server.url}/page")
        page.evaluate(STUBS)
        page.add_script_tag(type="module", content=script)
        pages.append(page)
    server.wait_for_count("news", 4)
    last = server.publish("news", {"title": "hi"}, event="headline")
    shown = [["hi"], ["hi", last], ['{"title": "hi"}'], ['{"title": "hi"}']]
    for page, expected in zip(pages, shown, strict=True):
        wait_for(lambda page=page: page.evaluate("shown"), "it is shown", DEADLINE)
        assert page.evaluate("shown") == [expected]
    pages[0].add_script_tag(type="module", content=by_hand)
    wait_for(lambda: len(pages[0].evaluate("shown")) == 2, "the answer is shown", DEADLINE)
    assert pages[0].evaluate("shown[1]") == ["part", "42"]
