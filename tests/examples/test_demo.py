"""The demo in a real browser: what it promises on its page is true."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect
from support import ROOT, Server, chromium, free_port, python, wait_for

pytestmark = [pytest.mark.live, pytest.mark.browser, pytest.mark.timeout(180)]

PATIENCE = 30_000  # milliseconds; a busy machine starts Chromium slowly
# A line was drawn when the canvas has pixels of its colour; axes and grid are grey.
DRAWN = """(id) => {
  const canvas = document.querySelector(`#${id} canvas`);
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  for (let i = 0; i < data.length; i += 4) {
    const colours = [data[i], data[i + 1], data[i + 2]];
    if (data[i + 3] > 200 && Math.max(...colours) - Math.min(...colours) > 60) return true;
  }
  return false;
}"""

OpenTab = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Server]:
    """The demo as users start it; whatever a test did with it, no traceback may be in its log."""
    port = free_port()
    server = Server(python(str(ROOT / "examples/demo/app.py")), port, tmp_path / "demo.log", {"PORT": str(port)})
    try:
        yield server.start()
        assert server.url in server.log
        assert server.log.count("\n") == 1, server.log
    finally:
        server.stop()


@pytest.fixture
def open_tab(browser: Browser, demo: Server) -> Iterator[OpenTab]:
    """Give a function that opens the demo in a tab; what goes wrong in a script fails the test at its end."""
    context = browser.new_context()
    problems: list[str] = []

    def open_tab(name: str = "Ada", **options: str) -> Page:
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: message.type == "error" and problems.append(message.text))
        page.goto(demo.url)
        page.get_by_label("Your name").fill(name)
        expect(page.locator("#state")).to_have_text("Live", timeout=PATIENCE)
        return page

    yield open_tab
    context.close()
    assert problems == []


def say(page: Page, text: str) -> None:
    field = page.get_by_label("Message", exact=True)
    field.fill(text)
    field.press("Enter")
    expect(field).to_have_value("", timeout=PATIENCE)  # the server has it


def count(page: Page, name: str) -> int:
    return int(page.locator(f"#{name}-count").inner_text())


def test_the_charts_show_this_machine_and_nothing_comes_from_another_host(demo: Server, browser: Browser) -> None:
    with browser.new_context() as context:
        page = context.new_page()
        urls: list[str] = []
        page.on("request", lambda request: urls.append(request.url))
        page.goto(demo.url)
        for plot in ("cpu-plot", "memory-plot", "network-plot"):
            page.wait_for_function(DRAWN, arg=plot, timeout=PATIENCE)
        for figure in ("cpu", "memory", "received", "sent"):
            assert float(page.locator(f"#{figure}").inner_text()) >= 0
        assert urls
        assert [url for url in urls if not url.startswith(demo.url)] == []


def test_a_message_of_one_tab_is_shown_in_another_as_text(open_tab: OpenTab) -> None:
    ada, bob = open_tab("Ada"), open_tab("Bob")
    say(ada, "<img src=x onerror=alert(1)> & <b>hello</b>")
    message = bob.locator("#talk li")
    expect(message.locator("p")).to_have_text("<img src=x onerror=alert(1)> & <b>hello</b>", timeout=PATIENCE)
    expect(message.locator(".who b")).to_have_text("Ada")
    assert bob.locator("#talk img").count() == 0


def test_a_room_has_its_own_talk_and_tells_it_to_who_comes_later(open_tab: OpenTab) -> None:
    ada, bob = open_tab("Ada"), open_tab("Bob")
    ada.get_by_label("Kitchen").check(force=True)
    expect(bob.locator("[data-count=room-kitchen]").last).to_have_text("1", timeout=PATIENCE)
    expect(bob.locator("[data-count=room-lobby]").last).to_have_text("1", timeout=PATIENCE)
    say(ada, "The kettle is on")
    expect(ada.locator("#talk p")).to_have_text(["The kettle is on"], timeout=PATIENCE)
    say(bob, "Is anybody here?")
    expect(bob.locator("#talk p")).to_have_text(["Is anybody here?"], timeout=PATIENCE)
    bob.get_by_label("Kitchen").check(force=True)
    expect(bob.locator("#talk p")).to_have_text(["The kettle is on"], timeout=PATIENCE)
    expect(ada.locator("[data-count=room-kitchen]").last).to_have_text("2", timeout=PATIENCE)
    # Another room is another EventSource, which goes on where the one before it was.
    wait_for(lambda: count(bob, "received") > 8, "numbers go on coming")
    assert (count(bob, "lost"), count(bob, "doubled")) == (0, 0)


def test_the_countdown_ends_and_does_not_begin_again(open_tab: OpenTab) -> None:
    page = open_tab()
    answers: list[int] = []
    page.on("response", lambda response: "/countdown" in response.url and answers.append(response.status))
    page.get_by_label("Seconds", exact=True).fill("2")
    page.get_by_role("button", name="Start").click()
    expect(page.locator("#countdown-says")).to_contain_text("was answered 204 and has stopped", timeout=PATIENCE)
    expect(page.get_by_role("timer")).to_have_text("0")
    assert answers == [200, 204]
    assert page.evaluate("countdown.source.readyState === EventSource.CLOSED")


def test_what_a_cut_connection_missed_is_replayed_without_loss_or_double(open_tab: OpenTab) -> None:
    ada, bob = open_tab("Ada"), open_tab("Bob")
    wait_for(lambda: count(ada, "received") > 4, "live numbers")
    ada.get_by_role("button", name="Cut the connection").click()
    expect(ada.locator("#state")).to_have_text("Reconnecting", timeout=PATIENCE)
    wait_for(lambda: ada.locator("#strip .missed").count() > 4, "missed numbers")
    say(bob, "Ada cannot hear this yet")
    expect(bob.locator("#talk p")).to_have_text(["Ada cannot hear this yet"], timeout=PATIENCE)
    assert ada.locator("#talk p").count() == 0
    before = count(ada, "received")
    assert count(ada, "replayed") == 0

    expect(ada.locator("#state")).to_have_text("Live", timeout=PATIENCE)
    expect(ada.locator("#talk .missed p")).to_have_text(["Ada cannot hear this yet"], timeout=PATIENCE)
    # Five seconds of four numbers each; the machine that tests may be slow to make them.
    wait_for(lambda: count(ada, "replayed") >= 10, "replayed numbers")
    wait_for(lambda: count(ada, "received") > before + count(ada, "replayed"), "live numbers again")
    expect(ada.locator("#strip .missed")).to_have_count(0, timeout=PATIENCE)
    assert ada.locator("#strip .replayed").count() == count(ada, "replayed")
    assert (count(ada, "lost"), count(ada, "doubled")) == (0, 0)
    # The cut was of one tab alone.
    assert (count(bob, "replayed"), count(bob, "lost"), count(bob, "doubled")) == (0, 0, 0)


def test_the_page_begins_afresh_when_the_server_was_restarted(demo: Server, browser: Browser) -> None:
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(demo.url)
        wait_for(lambda: count(page, "received") > 4, "live numbers")
        demo.stop()
        expect(page.locator("#state")).to_have_text("Reconnecting", timeout=PATIENCE)
        demo.log_path.unlink()
        demo.start()
        expect(page.locator("#notice")).to_contain_text("started afresh", timeout=PATIENCE)
        wait_for(lambda: count(page, "received") > 0, "live numbers again")
        assert (count(page, "lost"), count(page, "doubled")) == (0, 0)


def test_what_is_no_message_is_refused_and_reaches_nobody(demo: Server) -> None:
    with httpx.Client(base_url=demo.url) as client:
        for body in (
            b"nonsense",
            b"[]",
            b"null",
            b'{"name":"Ada"}',
            b'{"name":1,"text":"x"}',
            b'{"name":" ","text":"x"}',
        ):
            answer = client.post("/chat/lobby", content=body, headers={"Content-Type": "application/json"})
            assert answer.status_code == 400, body
        assert client.post("/chat/lobby", json={"name": "Ada", "text": "x" * 501}).status_code == 400
        assert client.post("/chat/lobby", data={"name": "Ada", "text": "x"}).status_code == 415
        assert client.post("/chat/cellar", json={"name": "Ada", "text": "x"}).status_code == 404
        assert client.post("/cut/everybody").status_code == 404
        assert client.get("/countdown", params={"from": 0}).status_code == 400
        assert client.get("/chat/lobby").json() == []


def test_ctrl_c_ends_the_demo_quietly_while_tabs_are_open(demo: Server, browser: Browser) -> None:
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(demo.url)
        expect(page.locator("#state")).to_have_text("Live", timeout=PATIENCE)
        process = demo.process
        assert process is not None
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0  # and the fixture looks at what it said
