"""The tutorial and the quickstart as a newcomer goes through them: each command is typed as it stands there."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from clients import DEADLINE
from command import entry_points
from docs_blocks import all_blocks, blocks, commands
from playwright.sync_api import BrowserContext
from support import ROOT, Server, chromium, free_port, wait_for

pytestmark = [pytest.mark.live, pytest.mark.browser]

NGINX = (ROOT / "examples" / "several_workers" / "nginx.conf").read_text()


class Terminal:
    """A directory in which commands of a page are typed; the ports that the page names are free ones here."""

    def __init__(self, directory: Path, installed: Path, *ports: int) -> None:
        self.directory = directory
        self.ports = {port: free_port() for port in ports}
        self.exports: list[str] = []
        self._servers = 0
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self._env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("FLASK_")},
            "PATH": path,
            "PYTHONPATH": f"{entry_points(installed)}:{ROOT}",
            "NO_COLOR": "1",
            # Like the defaults, but in less time.
            "FLASK_SSE_PING_INTERVAL": "1",
            "FLASK_SSE_RETRY": "300",
            "FLASK_SSE_DRAIN_SECONDS": "1",
        }

    def here(self, text: str) -> str:
        """Give a text of the page with the ports of this terminal."""
        return re.sub(r"(127\.0\.0\.1:)(\d+)", lambda found: found[1] + str(self.ports[int(found[2])]), text)

    def _script(self, command: str) -> str:
        return "; ".join([f"cd {shlex.quote(str(self.directory))}", *self.exports, self.here(command)])

    def type(self, command: str, ends_with: tuple[int, ...] = (0,)) -> str:
        """Run a command to its end; give what it says."""
        if command.startswith("export "):
            self.exports.append(command)
            return ""
        done = subprocess.run(
            ["bash", "-c", self._script(command)],
            env=self._env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode in ends_with, (command, done.stdout, done.stderr)
        return done.stdout

    def listen(self, command: str, until: str, then: Callable[[], object] = lambda: None) -> str:
        """Run curl until it has said what a pattern finds, and ``then`` when it listens; give all that it has said."""
        said = self.directory.parent / "said"
        script = self._script(f"exec {command.replace('curl ', 'curl --silent ', 1)}")
        with (
            said.open("wb") as output,
            subprocess.Popen(["bash", "-c", script], env=self._env, stdout=output) as process,
        ):
            try:
                wait_for(lambda: said.read_text(), f"{command} is answered", DEADLINE)
                then()
                wait_for(lambda: re.search(until, said.read_text()), f"{command} says {until!r}", DEADLINE)
            finally:
                process.kill()
        return said.read_text()

    @contextlib.contextmanager
    def serve(self, command: str, port: int, stop: int = signal.SIGINT) -> Iterator[Server]:
        """Have a command running, and wait until somebody serves at what the page calls ``port``."""
        self._servers += 1
        log = self.directory.parent / f"log-{self._servers}"
        server = Server(["bash", "-c", self._script(command)], self.ports[port], log, self._env)
        try:
            yield server.start()
        finally:
            server.stop(stop)
        # At Ctrl-C gunicorn's workers are told to stop by the terminal and by their master, and may say so at length.
        assert f"{ROOT}/flask_sse_stream/" not in server.log, server.log


@pytest.fixture
def windows() -> Iterator[list[BrowserContext]]:
    with chromium() as browser:
        yield [browser.new_context(), browser.new_context()]


def test_the_tutorial_leads_from_nothing_to_a_board_behind_nginx(tmp_path: Path, windows: list[BrowserContext]) -> None:
    (tmp_path / "board").mkdir()
    (tmp_path / "installed").mkdir()
    terminal = Terminal(tmp_path / "board", tmp_path / "installed", 5000, 8000, 8080)
    page, first, publisher, last = (code for _, code in blocks("docs/tutorial.rst"))
    board = terminal.directory / "board.py"
    board.write_text(page + first)
    (terminal.directory / "load.py").write_text(publisher)
    typed = [commands(block) for block in all_blocks("docs/tutorial.rst") if block.language == "console"]
    _, [flask_run], [curl], [come_back], deploy, elsewhere, [load], private, in_front, doctor = typed
    note = "curl -s -H 'Content-Type: application/json' -d '\"{}\"' http://127.0.0.1:{}/notes"
    pages = [window.new_page() for window in windows]

    def both_show(text: str) -> None:
        for each in pages:
            found = each.locator("#notes li", has_text=text)
            wait_for(lambda found=found: found.count() == 1, f"both windows have {text!r} once", DEADLINE)

    # 1 and 2
    with terminal.serve(f"{flask_run} --port {terminal.ports[5000]}", 5000):
        for each in pages:
            each.goto(terminal.here("http://127.0.0.1:5000"))
        pages[0].fill("input", "from the page")
        pages[0].click("button")
        both_show("from the page")
        [seen] = re.findall(r"^id: (\S+)\nevent", terminal.listen(curl, "event: note\ndata: .*\n\n"), re.MULTILINE)
        for text in ("one", "two"):
            terminal.type(note.format(text, 5000))
        [example] = re.findall("'Last-Event-ID: (.+?)'", come_back)
        missed = terminal.listen(come_back.replace(example, seen), '"two"')
        assert re.findall('"text": "(.+?)"', missed) == ["one", "two"]

    # 3
    assert len(deploy) == 2
    terminal.type(deploy[0])
    with terminal.serve(deploy[1], 8000):
        for each in pages:
            each.goto(terminal.here("http://127.0.0.1:8000"))
        pages[1].fill("input", "from a worker")
        pages[1].click("button")
        both_show("from a worker")
    terminal.type(elsewhere[-1])
    # With what step 5 adds, to spare a restart.
    board.write_text("import os\n" + page + first + "\n" + last)
    with terminal.serve(deploy[1], 8000):
        both_show("while you were away")
        # 4
        with terminal.serve(f"exec {load}", 8000, signal.SIGTERM):
            for each in pages:
                output = each.locator("#load")
                wait_for(lambda output=output: output.text_content() != "not known yet", "the load is shown", DEADLINE)

        # 5
        refused, login, listen = private
        terminal.listen(refused, "HTTP/1.1 403 ")
        terminal.type(login)
        terminal.listen(listen, "^retry: 300\n")

    # 6
    assert "retry: 5000" in NGINX
    (terminal.directory / "nginx.conf").write_text(terminal.here(NGINX.replace("retry: 5000", "retry: 500")))
    for command in in_front[:-1]:
        terminal.type(command)
    with terminal.serve(in_front[-1], 8080):
        with terminal.serve(deploy[1], 8000):
            for each in pages:
                each.goto(terminal.here("http://127.0.0.1:8080"))
            both_show("while you were away")
            for command in doctor:
                found = terminal.type(command, ends_with=(0, 1))  # 1: too few open files, as a rule
                assert "ok       broker" in found, found
            assert found.count("ok       ") >= 5, found
            assert "problem  endpoint" not in found, found
        terminal.type(elsewhere[-1].replace("while you were away", "behind nginx"))
        with terminal.serve(deploy[1], 8000):
            both_show("behind nginx")


def test_the_quickstarts_commands_show_the_first_headline(tmp_path: Path) -> None:
    (tmp_path / "news").mkdir()
    (tmp_path / "installed").mkdir()
    terminal = Terminal(tmp_path / "news", tmp_path / "installed", 5000)
    code = [code for _, code in blocks("docs/quickstart.rst")]
    (terminal.directory / "news.py").write_text("\n".join(code[:2]))
    _, [run, listen, publish] = (
        commands(block) for block in all_blocks("docs/quickstart.rst") if block.language == "console"
    )
    with terminal.serve(f"{run} --port {terminal.ports[5000]}", 5000):
        # As it is typed, the first goes on beside the second.
        background, ampersand = listen.rsplit(" ", 1)
        assert ampersand == "&"
        terminal.listen(background, 'event: headline\ndata: {"title": "hi"}\n', then=lambda: terminal.type(publish))
