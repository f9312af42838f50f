"""How ``sse.js`` reaches a browser: its URL, its headers, its size, and its place in the package."""

from __future__ import annotations

import re
from pathlib import Path

import minify
import pytest
from flask import Flask

import flask_sse_stream
from flask_sse_stream import SSE, SettingsError

STATIC = Path(flask_sse_stream.__file__).parent / "static"


def make(**options: object) -> tuple[Flask, SSE]:
    app = Flask("an_app")
    return app, SSE(app, **options)


def test_the_client_is_served_as_a_module_for_pages_of_any_origin() -> None:
    app, _ = make()
    response = app.test_client().get("/stream.js")
    assert response.status_code == 200
    assert response.data == (STATIC / "sse.js").read_bytes()
    assert response.content_type == "text/javascript; charset=utf-8"
    assert response.headers["Access-Control-Allow-Origin"] == "*"
    assert response.headers["X-Content-Type-Options"] == "nosniff"


def test_a_url_with_the_hash_is_kept_and_one_without_or_with_another_is_asked_about() -> None:
    app, sse = make()
    with app.test_request_context():
        url = sse.url_for_client()
    client = app.test_client()
    assert re.fullmatch(r"/stream\.js\?v=[0-9a-f]{16}", url)
    assert client.get(url).headers["Cache-Control"] == "max-age=31536000, immutable, public"
    for other in ("/stream.js", "/stream.js?v=0123456789abcdef"):
        response = client.get(other)
        assert response.headers["Cache-Control"] == "no-cache, public"
        again = client.get(other, headers={"If-None-Match": response.headers["ETag"]})
        assert (again.status_code, again.data) == (304, b"")
        assert client.get(other, headers={"If-None-Match": '"another"'}).status_code == 200
    assert client.head("/stream.js").status_code == 200
    assert client.post("/stream.js").status_code == 405


def test_its_path_is_a_setting_and_its_url_has_the_apps_prefix() -> None:
    app, sse = make(client_path="/live/client.js")
    assert app.test_client().get("/stream.js").status_code == 404
    with app.test_request_context(base_url="http://localhost/prefix"):
        assert sse.url_for_client().startswith("/prefix/live/client.js?v=")


def test_without_a_path_it_is_not_served() -> None:
    app, sse = make(client_path=None)
    assert app.test_client().get("/stream.js").status_code == 404
    with app.test_request_context(), pytest.raises(SettingsError, match="SSE_CLIENT_PATH is None"):
        sse.url_for_client()


@pytest.mark.parametrize("taken", ["/stream.js", "/stream"])
def test_a_path_that_is_taken_is_an_error_that_names_the_setting(taken: str) -> None:
    app = Flask("an_app")
    app.add_url_rule("/stream.js", endpoint="mine", view_func=lambda: "")
    with pytest.raises(SettingsError, match=f"SSE_CLIENT_PATH '{taken}' is another view's route already"):
        SSE(app, client_path=taken)


def test_it_has_at_most_4_kib_when_minified() -> None:
    source = (STATIC / "sse.js").read_text(encoding="utf-8")
    assert len(minify.string("application/javascript", source).encode()) <= 4096


def test_its_types_name_every_option_that_it_reads_and_no_other() -> None:
    source = (STATIC / "sse.js").read_text(encoding="utf-8")
    types = (STATIC / "sse.d.ts").read_text(encoding="utf-8")
    [taken] = re.findall(r"const \{ (.+) \} = options;", source)
    read = set(re.findall(r"\boptions\.(\w+)", source)) | set(re.findall(r"(\w+)(?: = [^,]+)?(?:,|$)", taken))
    read |= {f"on{name}" for name in re.findall(r'"([A-Z]\w+)"', source) if f"on{name}" in types}
    [declared] = re.findall(r"export interface Options \{(.+?)^\}", types, re.DOTALL | re.MULTILINE)
    assert read == set(re.findall(r"^  (\w+)\?:", declared, re.MULTILINE))
