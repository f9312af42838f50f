"""Every block of code of the documentation is run, or held against what it is about, by a test."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from docs_blocks import PAGES, Block, all_blocks, blocks, commands
from redis_server import RedisServer
from support import ROOT, free_port

from flask_sse_stream import Settings
from flask_sse_stream.cli import main, sse
from flask_sse_stream.metrics import NAMES

pytestmark = pytest.mark.elsewhere

ALL: Final = [*PAGES, "examples/README.md"]

WALKED: Final = {
    "docs/tutorial.rst": "tests/live/test_live_docs.py::test_the_tutorial_leads_from_nothing_to_a_board_behind_nginx",
    "docs/quickstart.rst": "tests/live/test_live_docs.py::test_the_quickstarts_commands_show_the_first_headline",
}
"""Pages of which every command is typed, one after the other."""

SHOWN: Final = {
    ("docs/bridging.rst", "text"): "tests/test_docs.py::test_the_bridging_pages_user_may_do_all_that_a_bridge_does",
    ("docs/how-it-works.rst", "text"): "a drawing",
    ("docs/progress.rst", "json"): (
        "tests/test_docs.py::test_a_loop_in_a_thread_shows_how_far_it_is_to_the_page_and_to_one_that_comes_late"
    ),
    **{
        ("docs/proxies.rst", language): (
            "tests/live/test_live_proxies.py::test_many_streams_and_other_requests_share_a_connection_over_http_2"
        )
        for language in ("apache", "nginx", "text")
    },
    ("docs/redis.rst", "text"): "tests/test_docs_blocks.py::test_the_texts_of_the_redis_page_say_what_is_so",
    ("docs/scaling.rst", "text"): (
        "tests/test_docs.py::test_the_worksheet_prints_what_the_page_shows_and_takes_its_figures_from_where_they_are"
    ),
    ("docs/services.rst", "docker"): (
        "tests/live/test_live_services.py::test_a_pod_starts_is_asked_and_stops_as_the_deployment_says"
    ),
    ("docs/services.rst", "ini"): (
        "tests/live/test_live_services.py::test_the_unit_is_valid_and_what_it_starts_reloads_and_stops_does_so"
    ),
    ("docs/services.rst", "yaml"): (
        "tests/live/test_live_services.py::test_the_deployment_is_one_by_the_schema_of_kubernetes"
    ),
    ("docs/slow-clients.rst", "text"): (
        "tests/test_docs.py::TestInABrowser::test_a_page_that_was_too_slow_loads_what_it_missed"
    ),
    ("docs/tools.rst", "yaml"): "tests/test_docs_blocks.py::test_the_alerts_and_the_probe_are_about_what_there_is",
    ("docs/troubleshooting.rst", "text"): (
        "tests/test_docs.py::test_a_stream_that_works_begins_as_the_page_about_trouble_says"
    ),
}
"""The test of what is neither Python, JavaScript nor a command; or, in a few words, why there is none."""


def test_every_block_has_its_test() -> None:
    unknown = []
    for page in ALL:
        for block in all_blocks(page):
            if block.language in ("console", "shell"):
                unknown += [
                    f"{block.page}, line {block.line}: {command!r} is of no kind in KINDS"
                    for command in commands(block)
                    if page not in WALKED and not any(re.match(kind, command) for kind in KINDS)
                ]
            # Python and JavaScript: each page, whatever it is, by the tests of test_docs.py.
            elif block.language not in ("python", "js", "javascript") and (page, block.language) not in SHOWN:
                unknown.append(f"{block.page}, line {block.line}: a block of {block.language} is not in SHOWN")
    assert unknown == []


def test_the_tests_that_are_named_exist_and_their_blocks_too() -> None:
    for name in [*WALKED.values(), *(name for name in SHOWN.values() if "::" in name)]:
        path, _, test = name.partition("::")
        assert f"def {test.rpartition('::')[2]}(" in (ROOT / path).read_text(), name
    there = {(page, block.language) for page in ALL for block in all_blocks(page)}
    assert set(SHOWN) <= there
    assert len([name for name in SHOWN.values() if "::" not in name]) <= 1, "what is run by nothing is to be rare"


def test_every_file_that_a_page_includes_is_one_that_tests_serve_with() -> None:
    tests = "".join(
        path.read_text() for path in (ROOT / "tests").rglob("test_*.py") if path.name != "test_docs_blocks.py"
    )
    for page in PAGES:
        for target in re.findall(r"^\.\. literalinclude:: (\S+)", (ROOT / page).read_text(), re.MULTILINE):
            file = (ROOT / page).parent / target
            assert file.is_file(), (page, target)
            assert file.name in tests, f"{target} of {page} is in no test"


# Commands, by what they begin with


def check_pip(arguments: list[str]) -> None:
    """Every package is ours, with an extra that there is, or one that the tests have too."""
    project = (ROOT / "pyproject.toml").read_text()
    extras = set(
        re.findall(
            r"^(\w+) = \[", project.partition("[project.optional-dependencies]")[2].partition("\n[")[0], re.MULTILINE
        )
    )
    assert {"redis", "celery"} <= extras
    assert arguments[:2] == ["pip", "install"]
    for requirement in arguments[2:]:
        found = re.fullmatch(r"([\w-]+)(?:\[(\w+)\])?", requirement)
        assert found is not None, requirement
        if found[1] == "flask-sse-stream":
            assert found[2] is None or found[2] in extras, requirement
        else:
            assert f'"{requirement}>=' in project, f"{requirement} is nothing that is tested with"


def check_gunicorn(arguments: list[str]) -> None:
    """gunicorn takes all of it."""
    from gunicorn.config import Config

    config = Config()
    given = vars(config.parser().parse_args(arguments[1:]))
    for name, value in given.items():
        if value is not None and name in config.settings:
            config.set(name, value)
    assert given["args"], "it names no application"
    assert re.fullmatch(r"(news|clock|board):app|mysite\.wsgi:application", given["args"][0])


def check_sse(arguments: list[str]) -> None:
    """It is one of our commands, with options that it has."""
    words = arguments[arguments.index("sse" if arguments[0] == "flask" else "flask_sse_stream") + 1 :]
    group = sse if arguments[0] == "flask" else main
    group.commands[words[0]].make_context(words[0], words[1:])


def check_make(arguments: list[str]) -> None:
    """make knows what to do."""
    done = subprocess.run([arguments[0], "-n", *arguments[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for value in (word.partition("=")[2] for word in arguments[1:] if "=" in word):
        program = re.findall(r"python (\S+) ", done.stdout)
        assert value in done.stdout
        assert program, done.stdout


def check_python(arguments: list[str]) -> None:
    """It is a file of ours, which tests/examples runs."""
    name = Path(arguments[1]).name
    assert (ROOT / arguments[1]).is_file()
    assert any(name.removesuffix(".py") in path.read_text() for path in (ROOT / "tests" / "examples").glob("test_*.py"))


def check_celery(arguments: list[str]) -> None:
    """Celery finds the application in the page's ``tasks.py``, and has the command."""
    from celery.app.utils import find_app
    from celery.bin.celery import celery

    _, option, module, command = arguments
    assert option == "-A"
    assert find_app(module).main == "tasks"
    assert command in celery.commands


def check_curl(arguments: list[str]) -> None:
    """curl takes all of it: it comes as far as asking, and nobody is there."""
    words = [re.sub(r"127\.0\.0\.1:\d+", f"127.0.0.1:{free_port()}", word) for word in arguments[1:]]
    done = subprocess.run(["curl", *words], capture_output=True, text=True, timeout=20, check=False)
    refused = 7
    assert done.returncode == refused, done.stderr


def check_redis_cli(arguments: list[str]) -> None:
    """See test_what_is_said_to_redis_is_said_as_the_page_says."""
    assert arguments[1] == "PUBLISH"


def check_nothing(arguments: list[str]) -> None:
    """The shell's own."""
    assert arguments[0] in ("rm", "mkdir")


KINDS: Final[dict[str, Callable[[list[str]], None]]] = {
    r"pip install ": check_pip,
    r"(?:[A-Z_]+=\S+ )*gunicorn ": check_gunicorn,
    r"(?:date \| )?flask --app \w+ sse ": check_sse,
    r"python -m flask_sse_stream ": check_sse,
    r"python examples/": check_python,
    r"make ": check_make,
    r"celery ": check_celery,
    r"curl ": check_curl,
    r"redis-cli ": check_redis_cli,
    r"rm -rf /run/news-metrics && mkdir /run/news-metrics$": check_nothing,
}

TYPED: Final = [
    pytest.param(command, id=f"{block.page}:{block.line}:{number}")
    for page in ALL
    for block in all_blocks(page)
    if block.language in ("console", "shell")
    for number, command in enumerate(commands(block))
    if page not in WALKED or command.startswith("pip ")
]


@pytest.mark.parametrize("command", TYPED)
def test_every_command_is_one_that_its_program_understands(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = types.ModuleType("tasks")
    if command.startswith("celery "):
        # What the page has in front of it.
        [code] = [code for _, code in blocks("docs/progress.rst") if 'Celery("tasks"' in code]
        exec(code.partition("@celery.task")[0], tasks.__dict__)
    monkeypatch.setitem(sys.modules, "tasks", tasks)
    [check] = [check for kind, check in KINDS.items() if re.match(kind, command)]
    words = shlex.split(command.rpartition(" | ")[2], comments=True)
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    check(words)


def test_each_of_our_commands_is_shown() -> None:
    shown = set()
    for page in PAGES:
        for block in all_blocks(page):
            for command in commands(block) if block.language == "console" else []:
                shown |= set(re.findall(r"(?:flask --app \w+ sse|python -m flask_sse_stream) (\w+)", command))
    assert set(main.commands) | set(sse.commands) <= shown


# Redis, and what looks at it


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> object:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


def text_blocks(page: str, language: str = "text") -> list[Block]:
    return [block for block in all_blocks(page) if block.language == language]


def test_what_the_redis_page_tells_to_set_redis_takes(redis: RedisServer) -> None:
    page = (ROOT / "docs" / "redis.rst").read_text(encoding="utf-8")
    table = page.partition("Setting Redis up\n")[2].partition("What a client sees\n")[0]
    rows = re.findall(r"^``([\w-]+)(?: ([\w-]+))?`` ", table, re.MULTILINE)
    assert len(rows) == 7
    for name, value in rows:
        before = redis.cli("CONFIG GET", name)
        assert set(before) == {name}, f"Redis knows no {name}"
        if value:
            assert redis.cli("CONFIG SET", name, value)
            redis.cli("CONFIG SET", name, before[name])
    for name, value in {"tcp-keepalive": "300", "timeout": "0"}.items():
        assert f"``{name}``" in table
        assert redis.cli("CONFIG GET", name) == {name: value}, "the default that the page names"


def test_the_texts_of_the_redis_page_say_what_is_so() -> None:
    user, formula, example = (block.text for block in text_blocks("docs/redis.rst"))
    # The first two are held by tests of test_docs.py: make_user, and what a history takes.
    assert user.strip().startswith("ACL SETUSER ")
    factor, more = re.findall(r"events kept × \(([\d.]+) × size of an event \+ (\d+) bytes\)", formula)[0]
    total = 0
    rows = [line for line in example.strip("\n").split("\n") if re.search(r"×", line)]
    assert len(rows) == 4
    for row in rows:
        reckoning, megabytes = re.findall(r"^\S.*?  +(.+?)  +(\d+) MB$", row)[0]
        assert "×" not in reckoning.partition("(")[2] or f"({factor} × 1,000 + {more})" in reckoning
        value = eval(reckoning.replace(",", "").replace("×", "*").replace(" bytes", ""))
        assert int(value / 1e6 + 0.5) == int(megabytes), row
        total += int(megabytes)
    assert f" {total} MB" in example.strip("\n").split("\n")[-1]


def test_what_is_said_to_redis_is_said_as_the_page_says(redis: RedisServer) -> None:
    [command] = [command for block in text_blocks("docs/bridging.rst", "console") for command in commands(block)]
    words = shlex.split(command)
    assert redis.cli(*words[1:]) == 0  # nobody listens here
    assert f'sse.bridge("{words[2]}"' in blocks("docs/bridging.rst")[0][1]
    assert json.loads(words[3]) == {"number": 7}


def test_the_alerts_and_the_probe_are_about_what_there_is() -> None:
    probe, alerts = (block.text for block in text_blocks("docs/tools.rst", "yaml"))
    named = re.findall(r"\bflask_sse_\w+", alerts.partition("rules:")[2])
    assert len(named) == 3
    assert {name.removesuffix("_bucket") for name in named} <= set(NAMES)
    assert [len(re.findall(f"{word}:", alerts)) for word in ("alert", "expr", "for")] == [3, 3, 3]
    [timeout] = re.findall(r"timeoutSeconds: (\d+)", probe)
    assert int(timeout) > Settings().broker_timeout
    [path] = re.findall(r"path: (\S+),", probe)
    assert f'@app.get("{path}")' in "".join(code for _, code in blocks("docs/tools.rst"))
