"""Sphinx configuration. No part of a build needs the network."""

from __future__ import annotations

from importlib.metadata import version as installed_version

project = "flask_sse_stream"
author = "The flask_sse_stream maintainers"
copyright = f"2026, {author}"
release = installed_version("flask-sse-stream")
version = ".".join(release.split(".")[:2])

extensions = ["sphinx.ext.autodoc", "pallets_sphinx_themes"]
exclude_patterns = ["_build"]
default_role = "code"
highlight_language = "python"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_preserve_defaults = True

# Names of other projects cannot be looked up without fetching their inventories; ours must all resolve.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!flask_sse_stream\b).*")]

html_theme = "flask"
html_title = f"flask_sse_stream {release}"
html_copy_source = False
html_show_sourcelink = False
