"""Four processes under gevent; each takes leave of its clients when it is told to stop, which needs nothing here."""

from pathlib import Path

wsgi_app = "app:app"
pythonpath = str(Path(__file__).resolve().parent)  # from whichever directory it is started
bind = "127.0.0.1:8000"
worker_class = "gevent"
workers = 4
worker_connections = 10_100  # SSE_MAX_CLIENTS, and a hundred for everything else
keepalive = 5  # seconds; longer than nginx keeps idle connections, or it would now and then use one that just closed
