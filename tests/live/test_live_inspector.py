"""The inspector in a real browser, over two real workers that share a log."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, expect
from support import chromium, wait_for
from workers import LEFT_OPEN, LONG, Crowd, Log, Workers, gunicorn

pytestmark = [pytest.mark.live, pytest.mark.browser, pytest.mark.timeout(180)]

PATIENCE = 30_000  # milliseconds; a busy machine starts Chromium slowly
PATH = "/sse-inspector"
HOSTILE = '<img src=x onerror="problem()">\u202e' + "W" * 200
# The lowest contrast of an element's text with what is behind it, of all that are to be seen.
CONTRAST = """() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const over = ([r, g, b, a = 1], below) => [r, g, b].map((part, place) => part * a + below[place] * (1 - a));
  const behind = (element) => {
    if (!element) return parts(getComputedStyle(document.body).backgroundColor).slice(0, 3);
    const found = parts(getComputedStyle(element).backgroundColor);
    return (found[3] ?? 1) === 1 ? found.slice(0, 3) : over(found, behind(element.parentElement));
  };
  const light = (colour) => {
    const [r, g, b] = colour.map((part) => (part /= 255) <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const worst = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
    if (!own || !element.checkVisibility() || element.matches(".unseen, .skip, :disabled, option")) continue;
    const below = behind(element);
    const text = over(parts(getComputedStyle(element).color), below);
    const [high, low] = [light(text), light(below)].sort((a, b) => b - a);
    worst.push([(high + 0.05) / (low + 0.05), element.outerHTML.slice(0, 100)]);
  }
  return worst.sort((a, b) => a[0] - b[0]).slice(0, 3).concat([[worst.length, "count"]]);
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Two workers in debug mode, for which requests from this machine are enough."""
    directory = tmp_path_factory.mktemp("inspector")
    log = Log(f"sqlite:///{directory}/log.db", "sse", directory)
    options = ("-k", "gevent", "-w", "2", "workers_app:app")
    server = Workers(gunicorn, options, directory / "log", log, FLASK_DEBUG="1", SSE_INSPECTOR=PATH, SSE_RETRY="300")
    try:
        server.start()
        server.wait_for_workers(2)
        yield server
    finally:
        server.stop()
    said = re.sub(LEFT_OPEN, "", server.log)
    assert "Traceback" not in said, said[-5000:]
    assert "Warning" not in said, said[-5000:]


Open = Callable[..., Page]


@pytest.fixture
def look(browser: Browser, server: Workers) -> Iterator[Open]:
    """Give a function that opens the inspector; what goes wrong in it, or leaves its host, fails the test."""
    contexts: list[BrowserContext] = []
    problems: list[str] = []

    def look(fragment: str = "", *, may_be_cut: bool = False, **options: Any) -> Page:
        def is_trouble(message: ConsoleMessage) -> bool:
            return message.type in ("error", "warning") and not (may_be_cut and "net::ERR_" in message.text)

        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if is_trouble(message) else None)
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        page.on("request", lambda request: request.url.startswith(server.url + PATH) or problems.append(request.url))
        page.goto(f"{server.url}{PATH}{fragment}")
        expect(page.get_by_role("status").first).to_have_text("Live", timeout=PATIENCE)
        return page

    yield look
    for context in contexts:
        context.close()
    assert problems == []


def figure(page: Page, title: str) -> str:
    return page.locator(".chart", has_text=title).locator(".figure").inner_text()


def test_the_numbers_of_all_workers_are_shown_and_move(look: Open, server: Workers, crowd: Crowd) -> None:
    followers = crowd.follow_on_each([server], 3, "prices")
    page = look()
    wait_for(lambda: figure(page, "Streams") == str(len(followers)), "all streams are counted", LONG)
    row = page.get_by_role("row").filter(has=page.get_by_role("button", name="prices", exact=True))
    expect(row.get_by_role("cell")).to_contain_text(
        ["prices", str(len(followers)), "2", "0", "0", "–"], timeout=PATIENCE
    )
    counts = page.locator("#processes tbody tr td:nth-child(3)")
    expect(counts).to_have_count(2, timeout=PATIENCE)
    assert sum(map(int, counts.all_inner_texts())) == len(followers)

    def moves() -> bool:
        server.post("prices", "x" * 100)
        shown = [figure(page, title) for title in ("Events delivered", "Bytes sent", "Lag, 99")]
        return not shown[0].startswith("0") and not shown[1].startswith("0") and shown[2] != "–"

    wait_for(moves, "events, bytes and lag are shown", LONG)
    drawn = page.locator(".chart", has_text="Events delivered").locator("path.line").get_attribute("d")
    assert drawn is not None
    assert len({point.split(" ")[1] for point in re.split("[ML]", drawn)[1:]}) > 1  # no flat line
    page.get_by_role("button", name="Pause").click()
    expect(page.get_by_role("status").first).to_have_text("Paused")


def test_by_keyboard_alone_a_key_is_opened_published_to_and_its_streams_of_every_worker_are_ended(
    look: Open, server: Workers, crowd: Crowd
) -> None:
    key = "orders/4711"
    followers = crowd.follow_on_each([server], 2, key)
    page = look()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the keys")).to_be_focused()
    page.keyboard.press("Enter")
    reach(page, "Filter keys, or open one by its name")
    page.keyboard.type("4711")
    reach(page, key)
    expect(page.locator(":focus-visible")).to_have_css("outline-style", "solid")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name=f"Key {key}")).to_be_focused()
    expect(page.locator("#streams tbody tr")).to_have_count(len(followers), timeout=PATIENCE)

    reach(page, "Data")
    page.keyboard.type('{"n": 1}')
    reach(page, "Text")
    page.keyboard.press("ArrowRight")
    reach(page, "Publish")
    page.keyboard.press("Enter")
    expect(page.locator("#published")).to_contain_text("Published as", timeout=PATIENCE)
    for follower in followers:
        follower.wait_for_data('{"n":1}')
    expect(page.locator("#events li pre")).to_have_text(['{"n":1}'], timeout=PATIENCE)

    # One of each worker's: the page is of one of them, so another one's is among these.
    for process in sorted(server.workers()):
        before = sum(follower.connections for follower in followers)
        row = page.locator("#streams tbody tr").filter(has=page.locator(f"td[title$='/{process}']")).first
        expect(row).to_be_visible(timeout=PATIENCE)
        row.get_by_role("button", name="Reconnect").focus()
        page.keyboard.press("Enter")
        expect(page.locator("#ended")).to_have_text("The stream was told to come back.", timeout=PATIENCE)
        wait_for(lambda before=before: sum(f.connections for f in followers) > before, "it came back", LONG)


def reach(page: Page, name: str) -> None:
    """Press Tab until the focus is on what has this name; a trap would be found as well."""
    named = page.get_by_label(name, exact=True).or_(page.get_by_role("button", name=name, exact=True))
    wanted = named.and_(page.locator("button, input, textarea")).first
    for _ in range(120):
        if wanted.evaluate("element => element === document.activeElement"):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"Tab does not lead to {name!r}")


def test_a_stream_that_is_ended_for_good_does_not_come_back(look: Open, server: Workers, browser: Browser) -> None:
    with browser.new_context() as context:
        reader = context.new_page()
        reader.goto(server.url + "/process")
        reader.evaluate("window.source = new EventSource('/stream?connectKey=alone')")
        reader.wait_for_function("source.readyState === EventSource.OPEN", timeout=PATIENCE)
        page = look("#key=alone")
        page.get_by_role("button", name="End", exact=True).click()
        reader.wait_for_function("source.readyState === EventSource.CLOSED", timeout=PATIENCE)
        expect(page.locator("#streams-more")).to_have_text("Nobody listens.", timeout=PATIENCE)


@pytest.mark.parametrize(("scheme", "width"), [("light", 1400), ("dark", 360)])
def test_it_is_legible_in_light_and_dark_and_fits_a_phone_whatever_keys_and_events_are(
    look: Open, server: Workers, browser: Browser, scheme: Any, width: int
) -> None:
    with browser.new_context() as context:
        reader = context.new_page()
        reader.goto(server.url + "/process")
        reader.evaluate("key => new EventSource('/stream?' + new URLSearchParams({connectKey: key}))", HOSTILE)
        options: dict[str, Any] = {"viewport": {"width": width, "height": 740}, "color_scheme": scheme}
        page = look(**options)
        page.get_by_role("button", name="<img src=x onerror").click()
        page.get_by_label("Event may be empty").fill(HOSTILE)
        page.get_by_label("Data", exact=True).fill("<script>problem()</script>\u202e" + "W" * 5000)
        page.get_by_role("button", name="Publish", exact=True).click()
        expect(page.locator("#events li").first).to_contain_text("<script>problem()</script>⟨202e⟩", timeout=PATIENCE)
        expect(page.locator("#streams tbody tr")).to_have_count(1, timeout=PATIENCE)
        page.locator("#events summary").first.press("Enter")
        assert page.locator("img").count() == 1  # the page's own
        assert page.locator("script").count() == 1
        page.get_by_label("Key", exact=True).fill("")
        page.get_by_role("button", name="Publish", exact=True).click()  # which the browser itself refuses
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        sticks_out = """width => [...document.querySelectorAll("body *")].filter((element) => {
          const box = element.getBoundingClientRect();
          const is_cut = element.closest("table, .skip, .chart, .unseen");
          return element.checkVisibility() && !is_cut && box.right > width + 1;
        }).map((element) => element.outerHTML.slice(0, 100))"""
        assert page.evaluate(sticks_out, width) == []
        wait_for(lambda: page.evaluate("document.getAnimations().length") == 0, "nothing moves", LONG)
        *worst, (count, _) = page.evaluate(CONTRAST)
        assert count > 40
        assert worst[0][0] >= 4.5, worst
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground)[:3])) > 400) is (scheme == "light")
        assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light dark"


def test_the_page_says_that_the_connection_was_cut_and_goes_on_when_the_server_is_back(
    look: Open, server: Workers
) -> None:
    page = look(may_be_cut=True, reduced_motion="reduce")
    state = page.get_by_role("status").first
    server.stop()
    expect(state).to_have_text("Reconnecting", timeout=PATIENCE)
    expect(page.get_by_role("alert")).to_contain_text("The connection to the server was cut")
    assert page.evaluate("document.getAnimations().length") == 0
    server.start()
    expect(state).to_have_text("Live", timeout=PATIENCE)
    expect(page.get_by_role("alert")).to_be_hidden()
    pids = {str(pid) for pid in server.workers()}
    shown = page.locator("#processes tbody tr td:first-child bdi")
    wait_for(lambda: {text.rpartition("/")[2] for text in shown.all_inner_texts()} <= pids, "the new ones", LONG)


def test_it_is_a_path_that_does_not_exist_to_whoever_comes_through_a_proxy(server: Workers) -> None:
    with httpx.Client(base_url=server.url, trust_env=False) as client:
        nothing = client.get("/nothing")
        for headers in ({"X-Forwarded-For": "127.0.0.1"}, {"Host": "example.org"}, {"Sec-Fetch-Site": "cross-site"}):
            for path in (PATH, f"{PATH}/events", f"{PATH}/inspector.js"):
                answer = client.get(path, headers=headers)
                assert (answer.status_code, answer.text) == (nothing.status_code, nothing.text)
        assert client.get(PATH).status_code == 200
    assert 1 <= server.log.count("was asked for by") <= 4  # once in each worker, before and after the restart
