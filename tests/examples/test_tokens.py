"""The example with tokens: a stand-in for a model over HTTP, the app as users start it, and a real browser."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect
from support import ROOT, Server, chromium, free_port, python, wait_for

pytestmark = [pytest.mark.live, pytest.mark.browser, pytest.mark.timeout(240)]

EXAMPLE = ROOT / "examples" / "tokens"
PATIENCE = 60_000  # milliseconds
TEXT = re.search(r'^TEXT = """(.*?)"""', (EXAMPLE / "model.py").read_text(), re.DOTALL | re.MULTILINE)

OpenTab = Callable[..., Page]


def reply(prompt: str) -> str:
    assert TEXT is not None
    text = TEXT[1].replace("\\\n", "").format(prompt=prompt)
    return "\n\n".join([text] * (50 if "at length" in prompt else 1))


class Model(Server):
    def counts(self) -> tuple[int, int]:
        """How many answers are being written, and how many were asked for since it began."""
        found = httpx.get(f"{self.url}/counts", trust_env=False).json()
        return found["active"], found["served"]

    def wait_until_idle(self) -> None:
        wait_for(lambda: self.counts()[0] == 0, "the model has stopped", PATIENCE / 1000)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    port = free_port()
    environment = {"PORT": str(port), "PIECES_PER_SECOND": "70"}
    server = Model(python(str(EXAMPLE / "model.py")), port, tmp_path_factory.mktemp("model") / "log", environment)
    try:
        server.start()
        yield server
        assert "Traceback" not in server.log
    finally:
        server.stop()


@pytest.fixture(scope="module")
def app(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The app as its README starts it; no traceback is in its log at the end."""
    [program] = re.findall(r"^    python (\S+)$", (EXAMPLE / "README.md").read_text(), re.MULTILINE)
    port = free_port()
    environment = {"PORT": str(port), "MODEL_URL": f"{model.url}/v1", "NO_PROXY": "*", "PING_INTERVAL": "0.2"}
    command = python("-W", "error", program)
    server = Server(command, port, tmp_path_factory.mktemp("app") / "log", environment)
    try:
        server.start()
        yield server
        assert "Traceback" not in server.log, server.log
    finally:
        server.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def open_tab(browser: Browser, app: Server, model: Model) -> Iterator[OpenTab]:
    """Give a function that opens the page: it asks no other host for anything, and nothing goes wrong in it."""
    model.wait_until_idle()
    context = browser.new_context()
    problems: list[str] = []

    def open_tab(query: str = "") -> Page:
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: message.type == "error" and problems.append(message.text))
        page.on("request", lambda asked: asked.url.startswith(app.url) or problems.append(asked.url))
        page.goto(f"{app.url}/{query}")
        return page

    yield open_tab
    context.close()
    assert problems == []


def ask(page: Page, prompt: str, way: str = "let it finish") -> None:
    """Ask by the keyboard alone."""
    page.get_by_role("radio", name=way).focus()
    page.keyboard.press("Space")
    field = page.get_by_label("Question", exact=True)
    field.fill(prompt)
    field.press("Control+Enter")
    wait_for_pieces(page, 3)


def pieces(page: Page) -> int:
    return int(page.locator("#text").evaluate("text => text.childNodes.length"))


def wait_for_pieces(page: Page, count: int) -> None:
    wait_for(lambda: pieces(page) >= count or is_done(page), f"{count} pieces", PATIENCE / 1000)


def is_done(page: Page) -> bool:
    return page.locator("#answer").get_attribute("data-state") == "done"


def expect_the_end(page: Page, prompt: str) -> None:
    expect(page.locator("#state")).to_have_text("Done", timeout=PATIENCE)
    assert page.locator("#text").evaluate("text => text.textContent") == reply(prompt)
    expect(page.get_by_role("status")).to_have_text("Done")
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()


def test_an_answer_is_whole_after_reloads_and_for_a_second_reader_and_was_asked_for_once(
    open_tab: OpenTab, model: Model
) -> None:
    served = model.counts()[1]
    page = open_tab()
    ask(page, "Is it <b>whole</b>?")
    expect(page.locator("#model")).to_have_text(re.compile("The model writes an answer"), timeout=PATIENCE)
    for _ in range(3):
        before = pieces(page)
        page.reload()
        wait_for_pieces(page, before + 5)
    other = open_tab("?" + page.url.partition("?")[2])
    expect_the_end(page, "Is it <b>whole</b>?")
    expect_the_end(other, "Is it <b>whole</b>?")
    assert page.locator("#text b").count() == 0
    expect(page.locator("#model")).to_have_text(re.compile("The model is idle"), timeout=PATIENCE)
    assert model.counts() == (0, served + 1)
    page.reload()
    expect_the_end(page, "Is it <b>whole</b>?")


def test_an_answer_that_nobody_reads_goes_on_or_stops_as_the_page_chose(
    open_tab: OpenTab, model: Model, app: Server
) -> None:
    page = open_tab()
    ask(page, "Go on?")
    query = page.url.partition("?")[2]
    page.close()
    model.wait_until_idle()
    expect_the_end(open_tab("?" + query), "Go on?")

    page = open_tab()
    ask(page, "At length, at length?", "stop the model")
    page.reload()  # which is no reason to stop
    wait_for_pieces(page, 10)
    query = page.url.partition("?")[2]
    page.close()
    model.wait_until_idle()
    page = open_tab("?" + query)
    expect(page.locator("#state")).to_have_text("Stopped", timeout=PATIENCE)
    text = page.locator("#text").evaluate("text => text.textContent")
    assert reply("At length, at length?").startswith(text)

    page = open_tab()
    ask(page, "Once, at length?", "by POST")
    page.close()
    model.wait_until_idle()


def test_the_stop_button_stops_the_model(open_tab: OpenTab, model: Model) -> None:
    for way in ("let it finish", "by POST"):
        page = open_tab()
        ask(page, "How much, at length?", way)
        stop = page.get_by_role("button", name="Stop")
        stop.focus()
        page.keyboard.press("Enter")
        expect(page.locator("#state")).to_have_text("Stopped", timeout=PATIENCE)
        assert page.evaluate("document.activeElement.id") == "prompt", "the keyboard is not lost with the button"
        model.wait_until_idle()
        page.close()


@pytest.mark.parametrize("way", ["let it finish", "by POST"])
@pytest.mark.parametrize(
    ("prompt", "why"), [("garbage", "the model sent what is no part of an answer"), ("break off", "broke off")]
)
def test_a_model_that_fails_in_the_middle_is_a_clear_end_and_a_line_in_the_log(
    open_tab: OpenTab, app: Server, way: str, prompt: str, why: str
) -> None:
    before = app.log.count("an answer failed: ")
    page = open_tab()
    ask(page, prompt, way)
    expect(page.locator("#state")).to_have_text("Failed", timeout=PATIENCE)
    expect(page.get_by_role("alert")).to_have_text("The model’s answer broke off.")
    assert pieces(page) == 20, "what came before is there"
    [line] = [line for line in app.log.splitlines() if "an answer failed: " in line][before:]
    assert why in line


def test_a_whole_answer_comes_by_post_in_the_models_own_format_without_any_comment(app: Server) -> None:
    def lines_of(method: str, path: str, **options: object) -> list[str]:
        text = httpx.request(method, f"{app.url}{path}", timeout=60, trust_env=False, **options).text  # type: ignore[arg-type]
        return [line for line in text.split("\n") if line]

    [answer] = lines_of("POST", "/answers", json={"prompt": "What do you think by GET?"})
    path = f"/answers/{json.loads(answer)['id']}"
    assert ": ping" in lines_of("GET", path), "there was time for a heartbeat"
    prompt = "What do you think by POST?"
    lines = lines_of("POST", "/v1/chat/completions", json={"messages": [{"role": "user", "content": prompt}]})
    assert not [line for line in lines if line.startswith(":")]
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    assert "".join(json.loads(item)["choices"][0]["delta"]["content"] for item in data[:-1]) == reply(prompt)


def test_what_is_no_question_is_refused_and_no_answer_is_nobodys(app: Server) -> None:
    with httpx.Client(base_url=app.url, trust_env=False) as client:
        for order in (["prompt"], {}, {"prompt": 5}, {"prompt": " "}, {"prompt": "x" * 2001}):
            assert client.post("/answers", json=order).status_code == 400, order
        for order in ([], {}, {"messages": []}, {"messages": ["x"]}, {"messages": [{"content": 5}]}):
            assert client.post("/v1/chat/completions", json=order).status_code == 400, order
        assert client.post("/answers", data={"prompt": "x"}).status_code == 415
        assert client.get("/answers/nobodys").status_code == 404
        assert client.delete("/answers/nobodys").json() == {"stopped": False}


def test_with_its_own_model_it_ends_quietly_in_the_middle_of_an_answer_whose_readers_are_told(tmp_path: Path) -> None:
    port = free_port()
    environment = {"PORT": str(port), "SSE_BROKER_URL": f"sqlite:///{tmp_path}/tokens.db", "NO_PROXY": "*"}
    server = Server(python("-W", "error", str(EXAMPLE / "app.py")), port, tmp_path / "log", environment)
    try:
        server.start()
        with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
            id = client.post("/answers", json={"prompt": "Who are you, at length?"}).json()["id"]
            with client.stream("GET", f"/answers/{id}") as answer:
                lines = answer.iter_lines()
                assert next(line for line in lines if line.startswith("data: ")) == "data: You"
                assert server.process is not None
                server.process.send_signal(signal.SIGINT)
                rest = list(lines)
        assert [line for line in rest if line][-1].startswith("retry: "), "it is asked to come back"
        assert server.process.wait(10) == 0
        server.start()
        text = httpx.get(f"{server.url}/answers/{id}", timeout=60, trust_env=False).text
        assert text.endswith("id: end\nevent: failed\ndata: interrupted\n\n")
        assert "Traceback" not in server.log, server.log
    finally:
        server.stop()
