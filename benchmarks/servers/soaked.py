"""What ``soak.py`` runs under gunicorn: a stream endpoint and nothing else. Its settings are in the environment."""

from __future__ import annotations

import json
import os

from flask import Flask

from flask_sse_stream import SSE

app = Flask(__name__)
sse = SSE(app, **json.loads(os.environ["SOAK_SETTINGS"]))
