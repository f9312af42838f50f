"""gevent's own server on the port that is given, with ``--patch`` in a process patched in full."""

from __future__ import annotations

import sys

if "--patch" in sys.argv:
    from gevent import monkey

    monkey.patch_all()

from gevent.pywsgi import WSGIServer
from live_app import create_app

if __name__ == "__main__":
    WSGIServer(("127.0.0.1", int(sys.argv[1])), create_app(), log=None, backlog=2048).serve_forever()
