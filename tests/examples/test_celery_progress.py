"""The example with Celery: a real worker on a real Redis, the app as its README starts it, and a real browser."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, expect
from redis_server import RedisServer
from support import ROOT, Server, chromium, free_port, python, serving, wait_for
from task_workers import TaskWorker

pytestmark = [pytest.mark.live, pytest.mark.timeout(240)]

EXAMPLE = ROOT / "examples" / "celery_progress"
PATIENCE = 90_000  # milliseconds; the task takes some seconds of a processor that others want too
POOLS = ["prefork", "gevent"]


def told_by_the_readme(program: str) -> list[str]:
    """Give the arguments with which the README starts a program."""
    lines = re.findall(rf"^    {program} (.+)$", (EXAMPLE / "README.md").read_text(), re.MULTILINE)
    assert len(lines) == 1
    return str(lines[0]).split()


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def environment(request: pytest.FixtureRequest, redis: RedisServer, tmp_path: Path) -> dict[str, str]:
    """What worker and app are told: where Redis is, and perhaps that the events have a log elsewhere."""
    elsewhere = getattr(request, "param", "in Redis") == "in SQLite"
    return {"REDIS_URL": redis.url} | ({"SSE_BROKER_URL": f"sqlite:///{tmp_path}/sse.db"} if elsewhere else {})


@pytest.fixture
def app(environment: dict[str, str], tmp_path: Path) -> Iterator[Server]:
    """The app; nothing but its requests is in its log at the end."""
    port = free_port()
    command = python("-W", "error", *told_by_the_readme("python"))
    with serving(command, port, tmp_path / "app.log", {**environment, "PORT": str(port)}) as server:
        yield server
        for line in server.log.splitlines():
            assert line.startswith(("127.0.0.1 - - [", f"{server.url} (Ctrl-C ends it)")), server.log


def worker_of(pool: str, environment: dict[str, str], tmp_path: Path) -> TaskWorker:
    options = ["--pool", pool, "--concurrency", "2", "--loglevel", "INFO"]
    command = python("-m", "celery", *told_by_the_readme("celery"), *options)
    return TaskWorker(command, " ready.", tmp_path / "worker.log", environment)


@pytest.fixture(params=POOLS)
def worker(request: pytest.FixtureRequest, environment: dict[str, str], tmp_path: Path) -> Iterator[TaskWorker]:
    """A worker with room for two tasks; it complains of nothing."""
    with worker_of(request.param, environment, tmp_path) as worker:
        yield worker
        for sign in ("Traceback", "Warning:", "nobody is told"):
            assert sign not in worker.log, worker.log


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, app: Server) -> Iterator[Page]:
    """The page in a tab: it asks no other host for anything, and nothing goes wrong in it."""
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: message.type == "error" and problems.append(message.text))
    page.on("request", lambda asked: asked.url.startswith(app.url) or problems.append(asked.url))
    page.goto(app.url)
    yield page
    context.close()
    assert problems == []


def start(page: Page, letters: int) -> Locator:
    """Start a task by the keyboard alone; give its card."""
    field = page.get_by_role("spinbutton")
    field.fill(str(letters))
    field.press("Enter")
    card = card_of(page, letters)
    expect(card).to_be_visible(timeout=PATIENCE)
    return card


def card_of(page: Page, letters: int) -> Locator:
    return page.locator("#tasks > li").filter(has_text=f"Names of at least {letters} letters")


def value(card: Locator) -> float:
    return float(card.locator("progress").evaluate("bar => bar.value"))


def wait_for_the_middle(*cards: Locator) -> None:
    wait_for(lambda: all(value(card) > 0 for card in cards), "the bars move", PATIENCE / 1000)


def expect_the_end(card: Locator) -> None:
    expect(card.locator(".state")).to_have_text(re.compile(r"^Done: ([\d,]+) of \1 files$"), timeout=PATIENCE)
    assert card.locator("progress").evaluate("bar => bar.value === bar.max && bar.max > 100")
    expect(card.locator("ol li")).to_have_count(10)


@pytest.mark.browser
def test_a_bar_moves_to_the_end_and_a_page_that_is_reloaded_in_the_middle_goes_on(
    page: Page, worker: TaskWorker
) -> None:
    card = start(page, 12)
    wait_for_the_middle(card)
    with worker.paused():  # nothing is published meanwhile: what the page shows is what it was given when it came
        before = value(card)
        page.reload()
        wait_for_the_middle(card)
        middle = value(card)
        expect(card.locator(".state")).to_have_text(re.compile(r"^[\d,]+ of [\d,]+ files$"))
        assert before <= middle
    if "gevent" in worker.command:  # a process of its own is always another one
        assert len(worker.processes()) == 1
    wait_for(lambda: value(card) > middle, "the bar moves on", PATIENCE / 1000)
    expect_the_end(card)
    for name, count in zip(
        card.locator("ol code").all_inner_texts(), card.locator("ol span").all_inner_texts(), strict=True
    ):
        assert len(name) >= 12
        assert int(count.replace(",", "")) > 0
    expect(page.get_by_role("status")).to_contain_text("Done")
    assert page.evaluate("source.readyState === EventSource.CLOSED")


@pytest.mark.browser
def test_one_page_shows_two_tasks_that_are_at_work_at_once_and_stops_one_by_the_keyboard(
    page: Page, worker: TaskWorker
) -> None:
    first, second = start(page, 9), start(page, 13)
    wait_for_the_middle(first, second)
    assert len(parse_qs(urlsplit(page.url).query)["task"]) == 2
    for card in (first, second):
        assert card.get_attribute("data-state") == "progress"
    page.keyboard.press("Tab")  # from the field to the button beside it
    page.keyboard.press("Tab")
    expect(second.get_by_role("button", name="Stop")).to_be_focused()
    page.keyboard.press("Enter")
    expect(second.locator(".state")).to_have_text("Stopped", timeout=PATIENCE)
    expect(second.get_by_role("button")).to_be_hidden()
    expect(page.get_by_role("spinbutton")).to_be_focused()
    middle = value(first)
    wait_for(lambda: value(first) > middle, "the other goes on", PATIENCE / 1000)
    worker.stop(signal.SIGKILL)  # another test waits for the end


@pytest.mark.browser
@pytest.mark.parametrize("worker", ["prefork"], indirect=True)
@pytest.mark.parametrize("environment", ["in SQLite"], indirect=True)
def test_a_page_that_comes_after_the_end_is_shown_the_end(page: Page, worker: TaskWorker, browser: Browser) -> None:
    card = start(page, 12)
    expect_the_end(card)
    names = card.locator("ol").inner_text()
    worker.stop()
    with browser.new_context() as elsewhere:
        late = elsewhere.new_page()
        late.goto(page.url)
        expect_the_end(card_of(late, 12))
        assert card_of(late, 12).locator("ol").inner_text() == names


@pytest.mark.browser
@pytest.mark.parametrize("worker", ["prefork"], indirect=True)
def test_a_page_whose_server_was_restarted_in_the_middle_goes_on(
    page: Page, worker: TaskWorker, app: Server, browser: Browser
) -> None:
    with browser.new_context() as context:  # whose console may say that a connection was refused
        tab = context.new_page()
        tab.goto(app.url)
        card = start(tab, 12)
        wait_for_the_middle(card)
        with worker.paused():
            before = value(card)
            app.stop()
            expect(tab.get_by_role("alert")).to_contain_text("The browser tries again", timeout=PATIENCE)
            app.start()
            expect(tab.get_by_role("alert")).to_be_hidden(timeout=PATIENCE)
            middle = value(card)
            assert middle >= before
        wait_for(lambda: value(card) > middle, "the bar moves on", PATIENCE / 1000)
        worker.stop(signal.SIGKILL)  # another test waits for the end


@pytest.mark.browser
def test_a_page_is_told_of_a_task_whose_process_was_killed(
    page: Page, environment: dict[str, str], tmp_path: Path
) -> None:
    with worker_of("prefork", environment, tmp_path) as worker:
        card = start(page, 12)
        wait_for_the_middle(card)
        with worker.paused():
            for child in worker.processes()[1:]:
                os.kill(child.pid, signal.SIGKILL)
        expect(card.locator(".state")).to_have_text("Failed: WorkerLostError", timeout=PATIENCE)
        assert card.get_attribute("data-state") == "failed"
        assert value(card) > 0


@pytest.mark.browser
def test_a_page_of_an_unknown_task_says_so(page: Page, app: Server) -> None:
    page.goto(f"{app.url}/?task=00000000-0000-4000-8000-000000000000")
    expect(page.locator("#tasks .state")).to_have_text("Nothing is known of this task yet, or any more.")


@pytest.mark.browser
def test_the_page_is_light_or_dark_as_its_reader_wishes(page: Page) -> None:
    brightness = "() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]"
    page.emulate_media(color_scheme="light")
    assert page.evaluate(brightness) > 200
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(brightness) < 50


@pytest.mark.parametrize(
    ("order", "status"),
    [
        ({"json": {"letters": 0}}, 400),
        ({"json": {"letters": 31}}, 400),
        ({"json": {"letters": True}}, 400),
        ({"json": {"letters": "8"}}, 400),
        ({"json": [8]}, 400),
        ({"content": b"{", "headers": {"Content-Type": "application/json"}}, 400),
        ({"data": {"letters": "8"}}, 415),
    ],
)
def test_what_is_no_order_starts_nothing(
    order: dict[str, object], status: int, app: Server, redis: RedisServer
) -> None:
    assert httpx.post(f"{app.url}/tasks", **order).status_code == status  # type: ignore[arg-type]
    assert redis.cli("DBSIZE") == 0


def test_what_is_no_task_cannot_be_stopped(app: Server) -> None:
    assert httpx.delete(f"{app.url}/tasks/everything").status_code == 404


def test_a_key_of_no_task_is_refused(app: Server) -> None:
    assert httpx.get(f"{app.url}/stream?connectKey=secret").status_code == 403


@pytest.mark.parametrize("environment", ["in Redis", "in SQLite"], indirect=True)
def test_a_task_that_cannot_be_started_is_a_503(
    environment: dict[str, str], redis: RedisServer, tmp_path: Path
) -> None:
    port = free_port()
    command = python("-W", "error", *told_by_the_readme("python"))
    with serving(command, port, tmp_path / "app.log", {**environment, "PORT": str(port)}) as server:
        redis.stop()
        answer = httpx.post(f"{server.url}/tasks", json={"letters": 8}, timeout=30)
        assert answer.status_code == 503
        assert "a task could not be started" in server.log
        redis.start()
        started = httpx.post(f"{server.url}/tasks", json={"letters": 8}, timeout=30)
        assert started.status_code == 202
        task = f"{server.url}/tasks/{started.json()['task']}"
        assert httpx.delete(task, timeout=30).status_code == 202
        redis.stop()
        assert httpx.delete(task, timeout=30).status_code == 503


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_app_quietly_while_somebody_listens(how: signal.Signals, app: Server) -> None:
    assert app.process is not None
    with httpx.stream("GET", f"{app.url}/stream?connectKey=task-1") as response:
        assert next(response.iter_bytes())
        app.process.send_signal(how)
        assert app.process.wait(10) == 0


def test_the_page_makes_no_html_of_what_it_is_sent() -> None:
    script = (EXAMPLE / "static" / "progress.js").read_text()
    assert "textContent" in script
    assert not re.search(r"\.(innerHTML|outerHTML|insertAdjacentHTML|write\()", script)


def test_the_readme_of_the_example_leads_to_files_that_exist() -> None:
    files = re.findall(r"^\| \[[^]]+\]\(([^)]+)\)", (EXAMPLE / "README.md").read_text(), re.MULTILINE)
    assert {"tasks.py", "app.py"} <= set(files)
    assert [file for file in files if not (EXAMPLE / file).is_file()] == []
