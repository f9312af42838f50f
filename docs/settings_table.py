"""The directive ``settings-table``: every setting with its default and its meaning, read from the code.

A table written by hand would be wrong one day. ``rst()`` needs no Sphinx, so the tests can look at what it gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

from flask_sse_stream.settings import PREFIX, Settings

_MIB = 1024 * 1024


def default_of(item: Field[Any]) -> str:
    value = item.default_factory() if item.default_factory is not MISSING else item.default
    if isinstance(value, int) and item.name.endswith(("_bytes", "_buffer")):
        size = f"{value // _MIB} MiB" if value % _MIB == 0 else f"{value // 1024} KiB"
        return f"``{value}`` ({size})"
    if isinstance(value, str):
        return f'``"{value}"``'
    if isinstance(value, (tuple, Mapping)) or value is None:
        return f"``{value!r}``".replace("'", '"')
    return f"``{value}``"


def rst() -> str:
    lines = [".. list-table::", "    :header-rows: 1", "    :widths: 34 22 44", ""]
    rows = [("In ``app.config``", "Default", "Meaning")]
    rows += [(f"``{PREFIX}{item.name.upper()}``", default_of(item), item.metadata["doc"]) for item in fields(Settings)]
    for name, default, meaning in rows:
        lines += [f"    * - {name}", f"      - {default}", f"      - {meaning}"]
    return "\n".join(lines) + "\n"


def setup(app: Any) -> dict[str, bool]:
    from docutils import nodes
    from docutils.statemachine import StringList
    from sphinx.util.docutils import SphinxDirective

    class SettingsTable(SphinxDirective):
        def run(self) -> list[nodes.Node]:
            import flask_sse_stream.settings

            self.env.note_dependency(flask_sse_stream.settings.__file__)
            node = nodes.container()
            self.state.nested_parse(StringList(rst().splitlines(), source=__file__), self.content_offset, node)
            return node.children

    app.add_directive("settings-table", SettingsTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
