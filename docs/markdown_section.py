"""The directive ``markdown-section``: sections of a Markdown file, such as the benchmarks' README, in a page.

It knows what that file uses (headings, paragraphs, lists, tables, code between backticks) and no more.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


def rst(markdown: str, first: str, last: str) -> str:
    """Give the sections from the heading ``first`` through the heading ``last`` as reStructuredText."""
    sections = re.split(r"^## (.+)\n", markdown, flags=re.MULTILINE)[1:]
    titles = sections[::2]
    lines = []
    for title, text in list(zip(titles, sections[1::2], strict=True))[titles.index(first) : titles.index(last) + 1]:
        lines += [f".. rubric:: {title}", ""]
        rows = 0
        for line in re.sub(r"`([^`\n]+)`", r"``\1``", text).split("\n"):
            if not line.startswith("|"):
                rows = 0
                lines.append(line)
                continue
            rows += 1
            if rows == 1:
                lines += [".. list-table::", "    :header-rows: 1", "    :width: 100%", ""]
            if rows != 2:  # the second only says how columns are aligned
                first_cell, *cells = (cell.strip() for cell in line.strip("|").split("|"))
                lines += [f"    * - {first_cell}", *(f"      - {cell}" for cell in cells)]
    return "\n".join(lines) + "\n"


def setup(app: Any) -> dict[str, bool]:
    from docutils import nodes
    from docutils.parsers.rst import directives
    from docutils.statemachine import StringList
    from sphinx.util.docutils import SphinxDirective

    class MarkdownSection(SphinxDirective):
        required_arguments = 1
        option_spec = {"first": directives.unchanged_required, "last": directives.unchanged_required}  # noqa: RUF012

        def run(self) -> list[nodes.Node]:
            relative, absolute = self.env.relfn2path(self.arguments[0])
            self.env.note_dependency(relative)
            text = rst(Path(absolute).read_text(encoding="utf-8"), self.options["first"], self.options["last"])
            node = nodes.container()
            self.state.nested_parse(StringList(text.splitlines(), source=absolute), self.content_offset, node)
            return node.children

    app.add_directive("markdown-section", MarkdownSection)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
