"""What the files say of the package that no build looks at; ``tests/try_package.py`` tries the builds."""

from __future__ import annotations

import re

from support import ROOT

PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def found(pattern: str, text: str) -> list[str]:
    matches = re.findall(pattern, text, re.MULTILINE)
    assert matches, f"nothing is like {pattern}"
    return matches


def test_the_newest_changes_are_those_of_this_version() -> None:
    [version] = found(r'^version = "(.+)"$', PROJECT)
    newest = found(r"^## (\S+) \((?:unreleased|\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGES.md").read_text(encoding="utf-8"))
    assert newest[0] == version


def test_each_python_that_is_named_is_tested() -> None:
    named = found(r'^    "Programming Language :: Python :: 3\.(\d+)",$', PROJECT)
    [tested] = found(r"^env_list = py3\{([\d,]+)\}", (ROOT / "tox.ini").read_text(encoding="utf-8"))
    assert set(named) <= set(tested.split(","))
    assert found(r'^requires-python = ">=3\.(\d+)"$', PROJECT) == found(r'^python_version = "3\.(\d+)"$', PROJECT)
    assert min(map(int, named)) == int(found(r'^requires-python = ">=3\.(\d+)"$', PROJECT)[0])


def test_a_page_says_how_each_optional_part_is_installed() -> None:
    [table] = found(r"^\[project\.optional-dependencies\]\n((?:\w+ = .+\n)+)", PROJECT)
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.rst"))
    for extra in found(r"^(\w+) = ", table):
        assert f"pip install 'flask-sse-stream[{extra}]'" in pages
