"""nchan, a module of nginx: writes a configuration and becomes nginx, with the socket that the benchmark passed on.

It has no endpoint that publishes a series: each event is a request, ``POST /publish-one?connectKey=bench``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

CONFIGURATION = """
load_module {module};
user root;
daemon off;
worker_processes 1;
worker_rlimit_nofile 20000;
pid {scratch}/nginx.pid;
error_log stderr error;
events {{ worker_connections 19900; }}
http {{
    access_log off;
    client_body_temp_path {scratch}/body;
    client_body_in_single_buffer on;
    proxy_temp_path {scratch}/proxy;
    fastcgi_temp_path {scratch}/fastcgi;
    uwsgi_temp_path {scratch}/uwsgi;
    scgi_temp_path {scratch}/scgi;
    keepalive_requests 1000000;
    nchan_shared_memory_size 256m;
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location = /stream {{
            nchan_subscriber eventsource;
            nchan_channel_id $arg_connectKey;
            nchan_subscriber_first_message newest;
            nchan_eventsource_ping_interval {ping};
            nchan_eventsource_ping_comment ping;
        }}
        location = /publish-one {{
            nchan_publisher http;
            nchan_channel_id $arg_connectKey;
            nchan_message_buffer_length 1000;
        }}
        location = /view {{
            default_type text/plain;
            return 200 "an ordinary view\\n";
        }}
    }}
}}
"""

_, descriptor, port = sys.argv
scratch = os.environ["BENCHMARK_SCRATCH"]
file = Path(scratch) / "nginx.conf"
file.write_text(
    CONFIGURATION.format(
        module=os.environ["BENCHMARK_NCHAN"],
        scratch=scratch,
        port=port,
        ping=max(1, round(float(os.environ.get("BENCHMARK_PING_SECONDS", "10")))),
    )
)
# This is how an nginx hands its sockets to the one that replaces it.
os.environ["NGINX"] = f"{descriptor};"
program = os.environ["BENCHMARK_NGINX"]
os.execv(program, [program, "-p", scratch, "-c", str(file)])
