"""Sphinx configuration. No part of a build needs the network."""

from __future__ import annotations

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for the two extensions that live here

project = "flask_sse_stream"
author = "The flask_sse_stream maintainers"
copyright = f"2026, {author}"
release = installed_version("flask-sse-stream")
version = ".".join(release.split(".")[:2])

extensions = ["sphinx.ext.autodoc", "pallets_sphinx_themes", "markdown_section", "settings_table"]
exclude_patterns = ["_build"]
default_role = "code"
highlight_language = "python"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"  # the docstrings are prose: lists of parameters would only repeat the types
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100

# Names of other projects cannot be looked up without fetching their inventories; ours must all resolve.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!flask_sse_stream\b).*")]
nitpick_ignore_regex += [(r"py:class", r"flask_sse_stream(\.\w+)+\._?[A-Z]")]  # type variables
# Beside the other class of its name it would make that one's references ambiguous, so it has no entry.
nitpick_ignore = [("py:class", "flask_sse_stream.compat.flask_sse.Message")]

html_theme = "flask"
html_title = f"flask_sse_stream {release}"
html_copy_source = False
html_show_sourcelink = False
