"""An application of Flask-SSE's is moved by one line: the same pages, and what was lost before is not any more."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from clients import DEADLINE
from playwright.sync_api import Browser, Page
from proxy import Proxy
from redis_server import RedisServer
from support import ROOT, Server, chromium, free_port, python, wait_for

pytestmark = [pytest.mark.live, pytest.mark.browser]

SOURCE = (Path(__file__).parent / "flask_sse_app.py").read_text()
BEFORE = "from flask_sse import sse\n"
AFTER = "from flask_sse_stream.compat.flask_sse import sse\n"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def pages(browser: Browser) -> Iterator[list[Page]]:
    pages = [browser.new_page() for _ in range(3)]
    yield pages
    for page in pages:
        page.close()


class Moved(Server):
    """The application under gunicorn's gevent worker, with a Redis of its own."""

    def __init__(self, line: str, directory: Path, redis: RedisServer) -> None:
        assert SOURCE.count(BEFORE) == 1
        (directory / "greetings.py").write_text(SOURCE.replace(BEFORE, line))
        self.redis = redis
        self.moved = line == AFTER
        port = free_port()
        command = python("-m", "gunicorn", "--bind", f"127.0.0.1:{port}", "--graceful-timeout", "1", "-k", "gevent")
        environment = {"PYTHONPATH": f"{ROOT}:{directory}", "REDIS_URL": redis.url}
        super().__init__([*command, "greetings:app"], port, directory / "log", environment)

    def post(self, path: str) -> None:
        assert httpx.post(self.url + path, timeout=DEADLINE, trust_env=False).status_code == 204

    def subscribers(self) -> int:
        """How many connections of the application's Redis has that listen."""
        kinds = ("sub", "psub", "ssub")
        return sum(any(client.get(kind, "0") != "0" for kind in kinds) for client in self.redis.cli("CLIENT LIST"))


@pytest.fixture(scope="module", params=[BEFORE, AFTER], ids=["before", "after"])
def app(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Moved]:
    directory = tmp_path_factory.mktemp("greetings")
    with RedisServer(directory / "redis") as redis:
        server = Moved(request.param, directory, redis)
        try:
            yield server.start()
        finally:
            server.stop()


def events(page: Page) -> list[Any]:
    found: list[Any] = page.evaluate("events")
    return found


def say_until_it_is_heard(app: Moved, page: Page, numbers: Iterator[int]) -> None:
    """Flask-SSE sends nothing, not even a head, before the first event: nobody can see when a page listens."""

    def heard() -> bool:
        number = next(numbers)
        app.post(f"/say/{number}")
        with contextlib.suppress(AssertionError):
            return wait_for(lambda: str(number) in events(page), "it is heard", 0.5)
        return False

    wait_for(heard, f"the page listens (log: {app.log[-3000:]})", DEADLINE)


def test_a_page_of_flask_sses_is_told_the_same_and_misses_nothing_any_more(app: Moved, pages: list[Page]) -> None:
    numbers = itertools.count()
    page = pages[-1]
    with Proxy(app.port) as proxy:
        for each in pages:
            each.goto(proxy.url)
            say_until_it_is_heard(app, each, numbers)
        # A process has one connection to Redis that listens, where there each page had one.
        assert (app.subscribers() == 1) if app.moved else (app.subscribers() >= 3)
        app.post("/hello/Hello!")
        wait_for(lambda: events(page)[-1:] == ["Hello!"], "the greeting comes", DEADLINE)
        proxy.cut()
        app.post("/hello/missed")
        proxy.mend()
        say_until_it_is_heard(app, page, numbers)
        last = next(numbers) - 1
        said = events(page)
    assert said.index("Hello!") < said.index(str(last))
    if app.moved:
        # All that was said from the first on that it heard, once and in its order.
        middle = said.index("Hello!")
        first = int(said[0])
        assert said[:middle] == [str(number) for number in range(first, first + middle)]
        after = first + middle
        assert said[middle + 1 :] == ["missed", *(str(number) for number in range(after, last + 1))]
    else:
        assert "missed" not in said


def test_who_may_listen_is_asked_by_the_blueprints_hook(app: Moved) -> None:
    assert httpx.get(f"{app.url}/stream?channel=analytics", timeout=DEADLINE, trust_env=False).status_code == 403
