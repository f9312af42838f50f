"""Who may listen, with real browsers, real servers, and real processes that hear of what is revoked."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from clients import DEADLINE, Listener
from conftest import HERE
from playwright.sync_api import Browser, Page
from support import ROOT, Server, chromium, free_port, python, serving, wait_for
from workers import LONG, Workers

pytestmark = pytest.mark.live
CLOSED = 2


class Access(Server):
    """The app of this file's tests; its second origin is ``foreign``."""

    def __init__(self, log: Path) -> None:
        ports = free_port(), free_port()
        self.foreign = f"http://127.0.0.1:{ports[1]}"
        command = python(str(HERE / "access_app.py"), *map(str, ports))
        environment = {"FOREIGN_ORIGIN": self.foreign, "PYTHONPATH": f"{ROOT}:{HERE}", "PYTHONWARNINGS": "error"}
        super().__init__(command, ports[0], log, environment)

    def get(self, path: str, **query: str) -> httpx.Response:
        return httpx.get(self.url + path, params=query, timeout=DEADLINE, trust_env=False).raise_for_status()

    def post(self, path: str, json: Any = None) -> str:
        return httpx.post(self.url + path, json=json, timeout=DEADLINE, trust_env=False).raise_for_status().text


@pytest.fixture(scope="module")
def access(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Access]:
    server = Access(tmp_path_factory.mktemp("access") / "log")
    try:
        server.start()
        yield server
        assert "Traceback" not in server.log, server.log[-5000:]
        assert "ticket=" not in server.log
    finally:
        server.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    page = browser.new_page()
    yield page
    page.close()


def with_cookie(page: Page, access: Access) -> None:
    # A cookie does not know ports, and pages of one host are of one site: so it is sent along.
    page.context.add_cookies([{"name": "user", "value": "ann", "url": access.url}])


OPEN = """([target, options]) => {
    listen("about:blank", []);
    source.close();
    events = []; opens = 0; errors = [];
    source = new EventSource(target, options);
    source.onopen = () => { opens += 1; };
    source.onerror = () => { errors.push(source.readyState); };
    source.onmessage = e => { events.push({type: e.type, data: e.data, id: e.lastEventId}); };
}"""


def open_source(page: Page, target: str, **options: bool) -> None:
    page.evaluate(OPEN, [target, options])


# Tickets


@pytest.mark.browser
def test_over_renewals_of_its_ticket_a_page_loses_nothing_and_sees_nothing_twice(
    page: Page, access: Access, key: str
) -> None:
    page.goto(f"{access.url}/renewing")
    page.evaluate("url => listen(url)", f"/url?ttl=0.4&key={key}")
    wait_for(lambda: page.evaluate("source !== null && source.readyState === 1"), "it listens", DEADLINE)
    published = []

    def renewed() -> bool:
        published.append(access.post("/publish", {"key": key, "data": str(len(published))}))
        return int(page.evaluate("tickets")) >= 5

    wait_for(renewed, "four renewals", LONG)
    wait_for(lambda: len(page.evaluate("events")) >= len(published), "all of it", DEADLINE)
    events = page.evaluate("events")
    assert [event["data"] for event in events] == [str(number) for number in range(len(published))]
    assert [event["id"] for event in events] == published
    assert {event["type"] for event in events} == {"message"}
    access.post("/revoke")
    wait_for(lambda: page.evaluate("over") == "revoked", "it is told that this was the end", DEADLINE)


@pytest.mark.browser
def test_a_page_that_renews_nothing_asks_once_more_and_stops(page: Page, access: Access, key: str) -> None:
    page.goto(f"{access.url}/page")
    asked: list[int] = []
    page.on("response", lambda response: asked.append(response.status) if "/stream" in response.url else None)
    open_source(page, access.get("/url", key=key, ttl="0.4").text)
    wait_for(lambda: page.evaluate("source.readyState") == CLOSED, "it stops", DEADLINE)
    wait_for(lambda: len(asked) == 2, "both answers", DEADLINE)
    assert asked == [200, 401]
    assert page.evaluate("opens") == 1


# Other origins


@pytest.mark.browser
def test_a_stream_with_a_cookie_is_not_readable_from_a_foreign_page(page: Page, access: Access, key: str) -> None:
    with_cookie(page, access)
    target = f"{access.url}/private/stream?connectKey={key}"
    page.goto(f"{access.foreign}/page")
    for options in ({"withCredentials": True}, {}):
        open_source(page, target, **options)
        wait_for(lambda: page.evaluate("source.readyState") == CLOSED, "the browser refuses it", DEADLINE)
        assert (page.evaluate("opens"), page.evaluate("events")) == (0, [])
    fetched = "fetch(url, {credentials: 'include'}).then(r => r.status, e => String(e))"
    assert "TypeError" in page.evaluate(f"url => {fetched}", target)
    asked = access.get("/private/asked").json()
    assert asked[-1] == {"origin": access.foreign, "user": "ann"}, "the server would have let it in"
    # From its own page it can be read.
    page.goto(f"{access.url}/page")
    open_source(page, target)
    wait_for(lambda: page.evaluate("opens") == 1, "its own page reads it", DEADLINE)


@pytest.mark.browser
def test_a_listed_origin_reads_with_cookies_and_comes_back_with_an_unusual_id(
    page: Page, access: Access, key: str
) -> None:
    with_cookie(page, access)
    target = f"{access.url}/listed/stream?connectKey={key}"
    page.goto(f"{access.foreign}/page")
    open_source(page, target, withCredentials=True)
    wait_for(lambda: page.evaluate("opens") == 1, "it is open", DEADLINE)
    unusual = '(größe) "@" {日本}'  # a browser asks first whether it may send that
    access.post("/listed/publish", {"key": key, "data": "seen", "id": unusual})
    wait_for(lambda: len(page.evaluate("events")) == 1, "it reads", DEADLINE)
    access.post("/listed/close")
    access.post("/listed/publish", {"key": key, "data": "missed"})
    wait_for(lambda: len(page.evaluate("events")) == 2, "it is back", DEADLINE)
    assert [event["data"] for event in page.evaluate("events")] == ["seen", "missed"]
    page.evaluate("source.close()")
    # Without its cookies the answer is a 401, which the page may read: it is a listed one.
    refused = "fetch(url, {credentials: 'omit'}).then(async r => [r.status, await r.text()], e => String(e))"
    status, text = page.evaluate(f"url => {refused}", target)
    assert (status, "log in first" in text) == (401, True)


@pytest.mark.browser
def test_a_page_without_an_origin_reads_nothing(page: Page, access: Access, key: str) -> None:
    with_cookie(page, access)
    target = f"{access.url}/listed/stream?connectKey={key}"
    page.goto(f"{access.foreign}/page")
    page.evaluate("""() => {
        const frame = document.createElement("iframe");
        frame.sandbox = "allow-scripts";
        frame.srcdoc = "<title>null</title>";
        document.body.append(frame);
    }""")
    wait_for(lambda: len(page.frames) == 2, "the frame is there", DEADLINE)
    frame = page.frames[1]
    frame.wait_for_function("document.title === 'null'")
    assert frame.evaluate("self.origin") == "null"
    fetched = "fetch(url, {credentials: 'include'}).then(r => r.status, e => String(e))"
    assert "TypeError" in frame.evaluate(f"url => {fetched}", target)
    assert access.get("/listed/asked").json()[-1]["origin"] == "null"


@pytest.mark.browser
def test_a_listed_origin_may_send_its_ticket_in_a_header(page: Page, access: Access, key: str) -> None:
    ticket = httpx.URL(access.get("/url", key=key, ttl="60").text).params["ticket"]
    page.goto(f"{access.foreign}/page")
    read = """async ([url, ticket]) => {
        const response = await fetch(url, {headers: {Authorization: "Bearer " + ticket}});
        const chunk = await response.body.getReader().read();
        return [response.status, new TextDecoder().decode(chunk.value)];
    }"""
    status, text = page.evaluate(read, [f"{access.url}/stream", ticket])
    assert (status, ": open" in text) == (200, True)


# What a request holds


@pytest.mark.parametrize("kind", ["pywsgi", "gunicorn-gthread", "gunicorn-gevent"])
def test_the_session_of_a_database_is_given_back_before_the_stream_starts(
    access: Access, tmp_path: Path, kind: str
) -> None:
    port = free_port()
    workers = {"gunicorn-gthread": ("gthread", "--threads", "8"), "gunicorn-gevent": ("gevent",)}
    if kind == "pywsgi":
        _look_at_sessions(access)
        return
    command = python("-m", "gunicorn", "--bind", f"127.0.0.1:{port}", "-k", *workers[kind], "access_app:app")
    with serving(command, port, tmp_path / "log", {"PYTHONPATH": f"{ROOT}:{HERE}"}) as server:
        _look_at_sessions(server)


def _look_at_sessions(server: Server) -> None:
    listeners = [
        Listener(f"{server.url}/private/stream?connectKey=s{number}", headers={"Cookie": "user=ann"})
        for number in range(3)
    ]
    state = f"{server.url}/private/state"
    before = len(httpx.get(state, trust_env=False).json()["begun_with"])
    with listeners[0], listeners[1], listeners[2]:
        found = httpx.get(state, trust_env=False).json()
        assert (found["streams"], found["sessions"]) == (3, 0)
        assert found["begun_with"][before:] == [0, 0, 0], "and there was none when the answer began"
    wait_for(lambda: httpx.get(state, trust_env=False).json()["streams"] == 0, "they leave", DEADLINE)


# Several processes


def test_what_one_worker_revokes_ends_the_streams_of_all_and_none_lets_the_ticket_in_again(
    serve: Callable[..., Workers],
) -> None:
    server = serve("--workers", "2", "-k", "gevent", SSE_TICKETS="true", SECRET_KEY="of a test")
    processes = server.wait_for_workers(2)
    with httpx.Client(base_url=server.url, trust_env=False, timeout=LONG, headers={"Connection": "close"}) as client:

        def ask(path: str) -> httpx.Response:
            return client.get(path).raise_for_status()

        urls = {user: ask(f"/url/{user}/k").text for user in ("ann", "bob")}
        listeners: dict[str, list[Listener]] = {"ann": [], "bob": []}
        try:
            for user, opened in listeners.items():
                while {int(listener.headers["X-Process"]) for listener in opened} != processes:
                    opened.append(Listener(server.url + urls[user]).__enter__())
                    assert opened[-1].status == 200
            client.post("/revoke/ann").raise_for_status()
            for listener in listeners["ann"]:
                listener.wait_for_end()
                assert [(event.event, event.data) for event in listener.events] == [
                    ("stream-expired", '{"reason": "revoked"}')
                ]
            with Listener(server.url + ask("/url/ann/k").text) as renewed:
                server.post("k", "after")
                for listener in (*listeners["bob"], renewed):
                    listener.wait_for_data("after")
        finally:
            for listener in (*listeners["ann"], *listeners["bob"]):
                if listener.response is not None:
                    listener.leave()

        def who_refuses() -> int:
            response = client.get(urls["ann"])
            assert (response.status_code, "revoked" in response.text) == (403, True)
            return int(ask("/process").headers["X-Process"])

        # Those that were there, and one that starts later.
        for process in processes:
            os.kill(process, signal.SIGKILL)
        wait_for(lambda: not processes & server.workers() and len(server.workers()) == 2, "two others", LONG)
        wait_for(lambda: who_refuses() in server.workers(), "others refuse it too", LONG)
