"""Every example does what it says, as its own process and over a real socket."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from httpx_sse import ServerSentEvent, connect_sse
from playwright.sync_api import Browser, Page, expect
from support import ROOT, Server, chromium, free_port, python, serving, wait_for

pytestmark = pytest.mark.live

EXAMPLES = ROOT / "examples"
NAMES = ["hello", "chat", "countdown", "schedule", "bottle_app", "django_app", "bare_wsgi"]
# Where each listens to a pool, and where each counts down for one request.
POOLS = {
    "hello": "/stream?connectKey=news",
    "chat": "/stream?connectKey=room-lobby",
    "schedule": "/stream?connectKey=time",
    "bottle_app": "/stream?connectKey=news",
    "django_app": "/stream?connectKey=news",
    "bare_wsgi": "/stream?connectKey=news",
}
COUNTDOWNS = {"countdown": "/countdown?from=10", "bottle_app": "/countdown/", "bare_wsgi": "/countdown"}
HEARD = ["hello", "chat", "bottle_app", "django_app", "bare_wsgi"]
SOON = 5.0  # seconds; a stream that says something only at its first heartbeat does so after 10

Run = Callable[[str], Server]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Give a function that starts an example; at the end SIGTERM ends it, and its log has nothing but its requests."""
    with contextlib.ExitStack() as started:

        def run(name: str) -> Server:
            port = free_port()
            # Bottle 0.12 hooks itself into Python's imports in a way that later imports warn of.
            warnings = ("-W", "error", "-W", "ignore::ImportWarning") if name == "bottle_app" else ("-W", "error")
            command = python(*warnings, str(EXAMPLES / f"{name}.py"))
            server = started.enter_context(serving(command, port, tmp_path / f"{name}.log", {"PORT": str(port)}))
            started.callback(lambda: server.process is None or ends_quietly(server, signal.SIGTERM))
            return server

        yield run


def ends_quietly(server: Server, how: int) -> None:
    assert server.process is not None
    server.process.send_signal(how)
    assert server.process.wait(10) == 0
    for line in server.log.splitlines():
        # pywsgi's log of a request begins with its client
        assert line.startswith(("127.0.0.1 - - [", f"{server.url} (Ctrl-C ends it)")), server.log


@contextlib.contextmanager
def listening(server: Server, path: str, cursor: str | None = None) -> Iterator[Iterator[ServerSentEvent]]:
    """Give the events of a stream; the first one of a pool is the place where it began, and fires nothing."""
    headers = {} if cursor is None else {"Last-Event-ID": cursor}
    with httpx.Client(timeout=15) as client, connect_sse(client, "GET", server.url + path, headers=headers) as source:
        assert source.response.status_code == 200
        # httpx-sse gives a block that sets the reconnection time alone, which a browser does not fire.
        yield (event for event in source.iter_sse() if event.event != "message" or event.data or event.id)


def say(name: str, server: Server, text: str) -> httpx.Response:
    """Publish one text in the way that an example's page does."""
    with httpx.Client(base_url=server.url, timeout=15) as client:
        if name == "chat":
            return client.post("/rooms/lobby", json={"name": "Ada", "text": text})
        if name == "django_app":
            token = client.get("/").cookies["csrftoken"]
            return client.post("/news", json=text, headers={"X-CSRFToken": token})
        if name == "bare_wsgi":
            return client.post("/news", content=text.encode())
        return client.post("/news", json=text)


def text_of(event: ServerSentEvent) -> str:
    said: dict[str, Any] = json.loads(event.data)
    return str(said["text"] if "text" in said else said["title"])


@pytest.mark.parametrize("name", NAMES)
def test_the_page_is_served_and_needs_no_other_host(name: str, run: Run) -> None:
    server = run(name)
    response = httpx.get(f"{server.url}/")
    assert response.status_code == 200
    assert response.headers["Content-Type"].startswith("text/html")
    assert "new EventSource(" in response.text
    assert not re.search(r"//[a-z]+\.|\bsrc=|\bhref=", response.text)
    assert f"{server.url} (Ctrl-C ends it)" in server.log


@pytest.mark.parametrize("name", NAMES)
def test_no_page_makes_html_of_what_it_is_sent(name: str) -> None:
    source = (EXAMPLES / f"{name}.py").read_text()
    assert "textContent" in source
    assert not re.search(r"\.(innerHTML|outerHTML|insertAdjacentHTML|write\()", source)


@pytest.mark.parametrize(("name", "path"), [*POOLS.items(), *COUNTDOWNS.items()])
def test_a_stream_opens_at_once(name: str, path: str, run: Run) -> None:
    server = run(name)
    before = time.monotonic()
    with httpx.stream("GET", server.url + path, timeout=SOON) as response:
        assert response.status_code == 200
        assert response.headers["Content-Type"] == "text/event-stream"
        assert next(response.iter_bytes()).startswith(b"retry: 3000\n\n: open\n\n")
    assert time.monotonic() - before < SOON


@pytest.mark.parametrize("name", HEARD)
def test_what_is_posted_arrives_as_it_was(name: str, run: Run) -> None:
    server = run(name)
    text = '<b>Grüße</b> & "Küsse" \u2028 🎈'
    with listening(server, POOLS[name]) as first, listening(server, POOLS[name]) as second:
        place = next(first).id
        assert next(second).id == place
        assert say(name, server, text).status_code == 204
        for events in (first, second):
            event = next(events)
            assert event.event == ("said" if name == "chat" else "headline")
            assert text_of(event) == text


@pytest.mark.parametrize("name", HEARD)
def test_a_client_that_comes_back_gets_exactly_what_it_missed(name: str, run: Run) -> None:
    server = run(name)
    with listening(server, POOLS[name]) as events:
        next(events)
        say(name, server, "heard")
        cursor = next(events).id
    say(name, server, "missed")
    say(name, server, "missed too")
    with listening(server, POOLS[name], cursor) as events:
        assert [text_of(next(events)) for _ in range(2)] == ["missed", "missed too"]
        say(name, server, "live")
        assert text_of(next(events)) == "live"


@pytest.mark.parametrize("name", HEARD)
@pytest.mark.parametrize("text", ["x" * 1_500_000, "\\ud800", "\\u0000", ""])
def test_no_text_makes_a_server_error_of_a_post(name: str, text: str, run: Run) -> None:
    server = run(name)
    with httpx.Client(base_url=server.url, headers={"Content-Type": "application/json"}) as client:
        if name == "django_app":
            client.headers["X-CSRFToken"] = client.get("/").cookies["csrftoken"]
        path, body = (
            ("/rooms/lobby", f'{{"name": "Ada", "text": "{text}"}}') if name == "chat" else ("/news", f'"{text}"')
        )
        assert client.post(path, content=body).status_code in (204, 400, 413)
    assert say(name, server, "all is well").status_code == 204


@pytest.mark.parametrize("name", ["chat", "bottle_app", "django_app", "bare_wsgi"])
def test_a_key_that_is_not_public_is_refused(name: str, run: Run) -> None:
    assert httpx.get(f"{run(name).url}/stream?connectKey=secret").status_code == 403


@pytest.mark.parametrize("name", COUNTDOWNS)
def test_a_countdown_ends_for_good(name: str, run: Run) -> None:
    server = run(name)
    with listening(server, COUNTDOWNS[name], cursor="2") as events:
        rest = [(event.event, event.data, event.id) for event in events]
    assert rest == [("left", "1", "1"), ("left", "0", "0"), ("close", "", "end")]
    # As a browser does after its stream's end: this is the one answer at which it stops.
    again = httpx.get(server.url + COUNTDOWNS[name], headers={"Last-Event-ID": rest[-1][2]})
    assert again.status_code == 204


@pytest.mark.parametrize("name", COUNTDOWNS)
@pytest.mark.parametrize(("cursor", "first"), [(None, "10"), ("4", "3"), ("99", "10"), ("9" * 5000, "10"), ("x", "10")])
def test_a_countdown_goes_on_where_it_was(name: str, cursor: str | None, first: str, run: Run) -> None:
    with listening(run(name), COUNTDOWNS[name], cursor) as events:
        event = next(events)
    assert (event.event, event.data, event.id) == ("left", first, first)


@pytest.mark.parametrize(("start", "status"), [("1", 200), ("60", 200), ("0", 400), ("61", 400), ("many", 200)])
def test_the_countdown_view_may_refuse_before_its_first_yield(start: str, status: int, run: Run) -> None:
    with httpx.stream("GET", f"{run('countdown').url}/countdown?from={start}", timeout=SOON) as response:
        assert response.status_code == status


def test_the_countdown_has_no_pools(run: Run) -> None:
    assert httpx.get(f"{run('countdown').url}/stream").status_code == 404


def test_the_schedule_ticks_every_second(run: Run) -> None:
    server = run("schedule")
    with listening(server, POOLS["schedule"]) as events:
        ticks = [event for event in (next(events) for _ in range(4)) if event.event == "tick"][:3]
    times = [datetime.fromisoformat(json.loads(tick.data)["now"]) for tick in ticks]
    gaps = [(later - earlier).total_seconds() for earlier, later in pairwise(times)]
    assert all(0 <= gap <= 3 for gap in gaps), gaps  # 1 each, unless the machine is busy
    assert sum(gaps) >= 1
    assert times[0].utcoffset() == timedelta(0)


def test_the_schedule_replays_the_ticks_that_were_missed(run: Run) -> None:
    server = run("schedule")
    with listening(server, POOLS["schedule"]) as events:
        heard = [next(event for event in events if event.event == "tick") for _ in range(3)]
    with listening(server, POOLS["schedule"], heard[0].id) as events:
        assert [(next(events).id) for _ in range(2)] == [tick.id for tick in heard[1:]]


def test_a_new_page_of_the_schedule_shows_the_time_at_once(run: Run) -> None:
    server = run("schedule")
    with listening(server, POOLS["schedule"]) as events:
        heard = next(event for event in events if event.event == "tick")
        with listening(server, POOLS["schedule"]) as later:
            first = next(later)
            assert first.event == "tick"
            assert json.loads(first.data)["now"] >= json.loads(heard.data)["now"]


def test_one_connection_hears_the_rooms_that_it_names_and_no_other(run: Run) -> None:
    server = run("chat")
    with listening(server, "/stream?connectKey=room-lobby&connectKey=room-garden") as events:
        next(events)
        for room in ("lobby", "kitchen", "garden"):
            said = httpx.post(f"{server.url}/rooms/{room}", json={"name": "Ada", "text": f"in the {room}"})
            assert said.status_code == 204
        heard = [json.loads(next(events).data) for _ in range(2)]
    assert heard == [
        {"room": "lobby", "name": "Ada", "text": "in the lobby"},
        {"room": "garden", "name": "Ada", "text": "in the garden"},
    ]


def test_who_comes_into_the_chat_gets_what_was_said_before(run: Run) -> None:
    server = run("chat")
    for text in ("one", "two"):
        say("chat", server, text)
    with listening(server, POOLS["chat"]) as events:
        assert [text_of(next(events)) for _ in range(2)] == ["one", "two"]


@pytest.mark.parametrize(
    ("room", "message", "status"),
    [
        ("attic", {"name": "Ada", "text": "hi"}, 404),
        ("lobby", {"name": "Ada", "text": " "}, 400),
        ("lobby", {"name": "A" * 25, "text": "hi"}, 400),
        ("lobby", {"name": "Ada", "text": "x" * 501}, 400),
        ("lobby", ["Ada", "hi"], 400),
    ],
)
def test_the_chat_refuses_what_is_no_message(room: str, message: object, status: int, run: Run) -> None:
    assert httpx.post(f"{run('chat').url}/rooms/{room}", json=message).status_code == status


@pytest.mark.parametrize("name", ["hello", "chat", "bottle_app", "django_app"])
def test_a_form_of_another_page_publishes_nothing(name: str, run: Run) -> None:
    server = run(name)
    path = "/rooms/lobby" if name == "chat" else "/news"
    refused = httpx.post(server.url + path, data={"name": "Eve", "text": "hi"})
    assert refused.status_code in (400, 403, 415)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_quietly_while_somebody_listens(name: str, how: signal.Signals, run: Run) -> None:
    server = run(name)
    path = POOLS.get(name) or COUNTDOWNS[name]
    with listening(server, path) as events:
        next(events)
        ends_quietly(server, how)
        server.process = None


def test_the_readme_lists_every_example() -> None:
    listed = re.findall(r"^\| \[([a-z_/.]+)\]", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    directories = [f"{path.parent.name}/" for path in EXAMPLES.glob("*/app.py")]
    assert sorted(listed) == sorted([*(path.name for path in EXAMPLES.glob("*.py")), *directories])
    assert sorted(listed) == sorted([*(f"{name}.py" for name in NAMES), *directories])


@pytest.mark.parametrize("name", NAMES)
def test_each_example_says_how_to_run_it(name: str) -> None:
    docstring = (EXAMPLES / f"{name}.py").read_text().split('"""')[1]
    assert f"python examples/{name}.py" in docstring


# The pages, in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A tab; what goes wrong in a script fails the test at its end."""
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(30_000)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    yield page
    context.close()
    assert problems == []


@pytest.mark.browser
@pytest.mark.parametrize("name", HEARD)
def test_the_page_shows_what_is_typed_into_it_as_text(name: str, run: Run, page: Page) -> None:
    page.goto(run(name).url)
    if name == "chat":
        page.get_by_label("Your name").fill("<i>Ada</i>")
        page.get_by_label("Say something").fill("<b>hi</b>")
    else:
        page.get_by_label("A headline").fill("<b>hi</b>")
    page.get_by_role("button").click()
    shown = "[lobby] <i>Ada</i>: <b>hi</b>" if name == "chat" else "<b>hi</b>"
    expect(page.locator("li")).to_have_text(shown, timeout=30_000)


@pytest.mark.browser
@pytest.mark.parametrize(("name", "last"), [("countdown", "Lift-off"), ("bottle_app", "over"), ("bare_wsgi", "over")])
def test_the_page_counts_down_once(name: str, last: str, run: Run, page: Page) -> None:
    server = run(name)
    page.goto(server.url)
    output = page.locator("output")
    expect(output).to_have_text("7", timeout=30_000)
    expect(output).to_have_text(last, timeout=30_000)
    # The browser came back once, was answered 204, and stopped: no later request follows.
    wait_for(lambda: re.search(r'GET /countdown\S* HTTP/1.1" 204', server.log), "the browser comes back")
    expect(output).to_have_text(last)
    assert len(re.findall(r"GET /countdown", server.log)) == 2


@pytest.mark.browser
def test_the_page_shows_the_time_as_it_goes_on(run: Run, page: Page) -> None:
    page.goto(run("schedule").url)
    shown = page.locator("time")
    expect(shown).to_have_text(re.compile(r"\d+:\d\d:\d\d"), timeout=30_000)
    first = shown.text_content()
    assert first
    expect(shown).not_to_have_text(first, timeout=30_000)
