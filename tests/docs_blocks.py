"""The blocks of code of the README and the documentation, of whatever language."""

from __future__ import annotations

import re
import textwrap
from typing import NamedTuple

from support import ROOT

__all__ = ["PAGES", "Block", "all_blocks", "blocks", "commands"]

DOCS = ROOT / "docs"
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in DOCS.glob("*.rst"))]

_START = re.compile(r"```(\w*)|( *)\.\. (?:code-block|sourcecode|code):: *(\S*)|( *)(?!\.\.).*::")
_INDENTED = 4


class Block(NamedTuple):
    """``line`` is where it begins; ``language`` is what the page says, ``shell`` for an indented one in Markdown."""

    page: str
    line: int
    language: str
    text: str


def all_blocks(page: str) -> list[Block]:
    """Every block of a page, in order."""
    lines = (ROOT / page).read_text(encoding="utf-8").split("\n")
    markdown = page.endswith(".md")
    found = []
    number = 0

    def take_indented(indent: int) -> str:
        nonlocal number
        begin = number
        while number < len(lines) and (not lines[number].strip() or lines[number][:indent].isspace()):
            number += 1
        return textwrap.dedent("\n".join(lines[begin:number]))

    while number < len(lines):
        line = lines[number]
        number += 1
        if markdown and line[:_INDENTED].isspace() and line.strip() and not lines[number - 2].strip():
            number -= 1
            found.append(Block(page, number + 1, "shell", take_indented(_INDENTED)))
            continue
        start = _START.fullmatch(line)
        if start is None:
            continue
        begin = number
        if markdown and line.startswith("```"):
            number = lines.index("```", number)
            found.append(Block(page, begin + 1, start[1], textwrap.dedent("\n".join(lines[begin:number]))))
            number += 1
        elif not markdown and start[3] is not None:
            found.append(Block(page, begin + 1, start[3], take_indented(len(start[2]) + 1)))
        elif not markdown and start[4] is not None:
            found.append(Block(page, begin + 1, "literal", take_indented(len(start[4]) + 1)))
    return found


def blocks(page: str) -> list[tuple[int, str]]:
    """The Python blocks of a page, each with the number of its first line."""
    return [(block.line, block.text) for block in all_blocks(page) if block.language == "python"]


def commands(block: Block) -> list[str]:
    """The commands that a reader types: a console block's lines behind a ``$``, and the lines of Markdown's."""
    lines = block.text.strip("\n").split("\n")
    if block.language == "shell":
        return [line.partition("  #")[0].strip() for line in lines]
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
