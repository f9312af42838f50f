"""The commands: ``flask sse ...``, and ``python -m flask_sse_stream ...`` for those that need no application.

Here is what is shown and how; what is done is in the modules below. Flask finds the group by its entry point, each time
that ``flask`` runs: so nothing is imported here that a command does not need.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from collections.abc import Iterable
from typing import Any, Final

import click
from flask.cli import ScriptInfo, pass_script_info

from .errors import SettingsError, SSEError
from .pools import PoolManager
from .reports import inquire
from .showing import (
    KEY_HEAD,
    PROCESS_HEAD,
    as_json_line,
    as_text,
    figure_rows,
    key_rows,
    masked,
    process_rows,
)
from .tailing import Line, follow_broker, follow_url

__all__ = ["main", "sse"]

_CONTEXT: Final[dict[str, Any]] = {
    "help_option_names": ["-h", "--help"],
    "show_default": True,
    "max_content_width": 100,
    # Older versions of click know nothing of this variable (no-color.org).
    "color": False if os.environ.get("NO_COLOR") else None,
}
_UNREACHABLE: Final = (
    "SSE_BROKER_URL is memory://, the default: events and streams are in the memory of the server's own process, which "
    "no other process can {what}. Set SSE_BROKER_URL to sqlite:///path, which the processes of one machine share, or "
    "to redis://host:6379/0; or {instead}"
)


@click.group("sse", context_settings=_CONTEXT)
def sse() -> None:
    """Server-sent events: serve, publish, listen, look."""


@click.group("flask_sse_stream", context_settings=_CONTEXT)
def main() -> None:
    """What needs no application. The other commands are those of "flask sse"."""


class _Failure(click.ClickException):
    """Says what is wrong and how to mend it; exit status 1."""


def _manager(info: ScriptInfo) -> PoolManager:
    try:
        app = info.load_app()
    except SettingsError as error:
        raise _Failure(str(error)) from error
    manager = app.extensions.get("sse_stream")
    if not isinstance(manager, PoolManager):
        raise _Failure(f"the app {app.import_name!r} has no SSE extension: call SSE(app), or init_app(app), in it")
    return manager


def _shared(info: ScriptInfo, what: str, instead: str) -> PoolManager:
    manager = _manager(info)
    if not manager.reaches_other_processes:
        raise _Failure(_UNREACHABLE.format(what=what, instead=instead))
    return manager


# run


@sse.command()
@click.option("--host", default="127.0.0.1", help="The address to listen on; 0.0.0.0 for all.")
@click.option("--port", "-p", default=8000, type=click.IntRange(0, 65535), help="The port; 0 for any that is free.")
@click.option("--access-log/--no-access-log", default=False, help="Write a line for each request to standard output.")
@click.option(
    "--patch/--no-patch",
    default=True,
    help="Have the standard library wait as gevent does, so that a view that waits stops nobody else.",
)
@pass_script_info
def run(info: ScriptInfo, host: str, port: int, access_log: bool, patch: bool) -> None:
    """Serve the application with gevent's own server, in one process.

    As many open files are allowed as the system lets one have. At SIGTERM, and at Ctrl-C, each client is told when to
    come back, requests are waited for (2 seconds), and the process ends.
    """
    from . import serving

    if patch:
        serving.patch()
    files = serving.raise_descriptors()
    manager = _manager(info)
    app, settings = info.load_app(), manager.settings

    def ready(port: int) -> None:
        where = f"[{host}]" if ":" in host else host
        click.echo(f"Serving {app.import_name} on http://{where}:{port} (pid {os.getpid()}), Ctrl-C ends it")
        click.echo(
            f"  up to {settings.max_clients} streams at {settings.path or 'no path (SSE_PATH is None)'}, {files} open "
            f"files, broker {masked(settings.broker_url)}, standard library {'patched' if patch else 'not patched'}"
        )
        if files < settings.max_clients + 100:
            click.echo(
                f"  {files} open files are too few for SSE_MAX_CLIENTS={settings.max_clients}: raise the hard limit "
                "(LimitNOFILE= for systemd, ulimits for Docker), or lower SSE_MAX_CLIENTS",
                err=True,
            )
        sys.stdout.flush()

    try:
        serving.serve(app, manager, host, port, access_log=access_log, ready=ready)
    except OSError as error:
        raise _Failure(f"cannot listen on {host}:{port}: {error.strerror or error}. Choose another --port") from error


# publish


@sse.command()
@click.argument("key", required=False)
@click.argument("data", required=False)
@click.option("--event", "-e", help="The event's name.")
@click.option("--id", "identifier", help="An id of your own, in place of the log's.")
@click.option("--retry", type=click.IntRange(0), help="Milliseconds after which clients shall come back.")
@click.option("--json", "as_json", is_flag=True, help="DATA is JSON: it is checked, and sent in its shortest form.")
@click.option("--all", "to_all", is_flag=True, help="Publish to every stream of every key. There is no KEY then.")
@pass_script_info
def publish(
    info: ScriptInfo,
    key: str | None,
    data: str | None,
    event: str | None,
    identifier: str | None,
    retry: int | None,
    as_json: bool,
    to_all: bool,
) -> None:
    """Publish DATA to the streams of KEY, through the application's broker; print the event's id.

    DATA is text; "-" reads it from standard input. Without DATA the event is just its name.
    """
    if to_all:
        if data is not None:
            raise click.UsageError('with --all there is no KEY: flask sse publish --all "the data"')
        data, key = key, None
    elif key is None:
        raise click.UsageError("KEY is missing: name one, or say --all")
    manager = _shared(info, "reach", "publish in one of your views")
    if data == "-":
        data = sys.stdin.read().removesuffix("\n")
    if as_json:
        try:
            data = json.dumps(json.loads(data or ""), separators=(",", ":"), ensure_ascii=False)
        except ValueError as error:
            raise _Failure(f"DATA is no JSON ({error}): quote it for your shell, or leave --json out") from error
    try:
        if key is None:
            click.echo(manager.publish_all(data, event=event, id=identifier, retry=retry))
        else:
            click.echo(manager.publish(key, data, event=event, id=identifier, retry=retry))
    except SSEError as error:
        raise _Failure(str(error)) from error
    finally:
        manager.shutdown()


# tail


@sse.command()
@click.argument("keys", metavar="[KEY]...", nargs=-1)
@click.option("--last", "-n", default=0, type=click.IntRange(0), help="Begin with so many events of the history.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each event, each on a line.")
@click.option("--url", help="Listen over HTTP at this URL of a stream, as a browser does, in place of the broker.")
@click.option("--header", "-H", "headers", multiple=True, help="With --url: a header 'Name: value'. May be repeated.")
@pass_script_info
def tail(
    info: ScriptInfo,
    keys: tuple[str, ...],
    last: int,
    as_json: bool,
    url: str | None,
    headers: tuple[str, ...],
) -> None:
    """Show the events of each KEY as they come, and those for all, until Ctrl-C.

    It listens to the broker, as one process more; without a KEY to SSE_DEFAULT_KEY. With --url it is one client more.
    """
    try:
        if url is not None:
            if keys or last:
                raise click.UsageError("with --url the keys are in the URL's query, and --last is SSE_JOIN_HISTORY's")
            lines = follow_url(url, _headers(headers))
        else:
            manager = _shared(info, "listen to", "listen over HTTP: flask sse tail --url http://...")
            settings = manager.settings
            checked = manager.check_keys(keys or [settings.default_key])
            lines = follow_broker(settings, checked, last)
        _show(lines, as_json=as_json)
    except (SSEError, ValueError) as error:
        raise _Failure(str(error)) from error


def _headers(given: Iterable[str]) -> dict[str, str]:
    found = {}
    for text in given:
        name, colon, value = text.partition(":")
        if not colon or not name.strip():
            raise click.UsageError(f"--header {text!r} is no 'Name: value'")
        found[name.strip()] = value.strip()
    return found


def _show(lines: Iterable[Line], *, as_json: bool) -> None:
    gone = select.poll()
    gone.register(sys.stdout.fileno(), 0)  # errors alone: that nobody reads any more
    try:
        for line in lines:
            if line.notice is not None:
                where = f" {line.key!r}" if line.key is not None else ""
                click.secho(f"--{where} {line.notice}", fg="yellow", err=True)
            elif line.event is not None:
                click.echo(as_json_line(line.key, line.event) if as_json else as_text(line.key, line.event))
            elif gone.poll(0):
                break
            if line.event is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        pass
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the end is near: a second one would only leave a traceback
    else:
        return
    # What is still in a buffer has nobody to read it, and Python would complain of that at its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ps


@sse.command()
@click.option("--wait", default=1.0, type=click.FloatRange(0.05, 60), help="Seconds in which processes may answer.")
@click.option("--json", "as_json", is_flag=True, help="Everything, as one JSON object.")
@pass_script_info
def ps(info: ScriptInfo, wait: float, as_json: bool) -> None:
    """Show what every process of the application has: keys, streams, queues, lag.

    All of them are asked over the broker. One that has had no stream yet does not hear it, and has nothing to say; one
    that hangs does not answer.
    """
    manager = _shared(info, "ask", "see sse.stats() in one of your views, or SSECollector")
    try:
        reports = inquire(manager.settings, wait)
    except SSEError as error:
        raise _Failure(str(error)) from error
    if as_json:
        from dataclasses import asdict

        click.echo(json.dumps({"processes": [asdict(report) for report in reports]}, ensure_ascii=False, indent=2))
        return
    if not reports:
        click.echo(f"No process answered within {wait:g} s: none has had a stream, or none runs.", err=True)
        return
    _table(PROCESS_HEAD, process_rows(reports))
    rows = key_rows(reports)
    if rows:
        click.echo()
        _table(KEY_HEAD, rows)
    more = sum(report.more_keys for report in reports)
    if more:
        click.echo(f"and {more} keys with fewer streams", err=True)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for number, row in enumerate([head, *rows]):
        # Numbers stand below one another, names begin below one another.
        cells = [
            cell.ljust(width) if place == 0 or place == len(head) - 1 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        click.secho("  ".join(cells).rstrip(), bold=number == 0)


# doctor

_COLOURS: Final = {"ok": "green", "warning": "yellow", "problem": "red"}


@sse.command()
@click.option("--url", help="Open a stream at this URL, as browsers do, and see whether anything holds it back.")
@click.option("--header", "-H", "headers", multiple=True, help="With --url: a header 'Name: value'. May be repeated.")
@click.option(
    "--gunicorn-config",
    type=click.Path(dir_okay=False),
    help="gunicorn's configuration, ./gunicorn.conf.py if that is there; GUNICORN_CMD_ARGS counts as well.",
)
@click.option("--strict", is_flag=True, help="Warnings are problems.")
@click.option("--json", "as_json", is_flag=True, help="The findings as one JSON object.")
@pass_script_info
def doctor(
    info: ScriptInfo,
    url: str | None,
    headers: tuple[str, ...],
    gunicorn_config: str | None,
    strict: bool,
    as_json: bool,
) -> None:
    """Find what keeps streams from working, each with its cure. The exit status is 1 if there is a problem.

    Run it where the server runs: with its user, its environment, its limits. With --url it waits for a heartbeat, which
    takes as long as SSE_PING_INTERVAL.
    """
    from dataclasses import asdict
    from importlib.util import find_spec

    from .doctor import Gunicorn, examine

    manager = _manager(info)
    found = []
    try:
        gunicorn = Gunicorn.read(gunicorn_config)
        for finding in examine(manager, gunicorn=gunicorn, url=url, headers=_headers(headers)):
            found.append(finding)
            if not as_json:
                level = click.style(f"{finding.level:<8}", fg=_COLOURS[finding.level], bold=finding.level != "ok")
                click.echo(f"{level} {finding.check}: {finding.text}")
                if finding.cure:
                    click.echo(f"         -> {finding.cure}")
                sys.stdout.flush()
    except (SSEError, ValueError) as error:
        raise _Failure(str(error)) from error
    finally:
        manager.shutdown()
    bad = {"problem", "warning"} if strict else {"problem"}
    well = not any(finding.level in bad for finding in found)
    if as_json:
        click.echo(json.dumps({"ok": well, "findings": [asdict(finding) for finding in found]}, indent=2))
    elif gunicorn is None:
        here = find_spec("gunicorn") is not None
        why = "name its --gunicorn-config" if here else "it is not installed here (pip install 'gunicorn[gevent]')"
        click.echo(f"         gunicorn was not looked at: {why}", err=True)
    if not well:
        raise SystemExit(1)


# bench


@main.command()
@click.argument("url")
@click.option("--clients", "-c", default=100, type=click.IntRange(1), help="Streams to open, and never more.")
@click.option("--seconds", "-s", default=10.0, type=click.FloatRange(0), help="For how long to hold them then.")
@click.option("--rate", default=500.0, type=click.FloatRange(0.1), help="New clients a second at most.")
@click.option("--timeout", default=30.0, type=click.FloatRange(0.1), help="Seconds in which each must be answered.")
@click.option("--header", "-H", "headers", multiple=True, help="A header 'Name: value'. May be repeated.")
@click.option("--json", "as_json", is_flag=True, help="The figures as one JSON object.")
def bench(
    url: str,
    clients: int,
    seconds: float,
    rate: float,
    timeout: float,
    headers: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure the stream at URL: open clients, hold them, count what they get.

    Only for what is yours. Nobody reconnects: a stream that the server ends is counted as dropped. The exit status is 1
    if one was dropped or not answered. Ctrl-C ends it early, with the figures so far.
    """
    from dataclasses import asdict

    from .bench import Bench

    try:
        running = Bench(url, clients, rate=rate, timeout=timeout, headers=_headers(headers))
    except (SSEError, ValueError) as error:
        raise _Failure(str(error)) from error
    signal.signal(signal.SIGINT, lambda *_: running.stop())
    with click.progressbar(length=clients, label="Opening  ", file=sys.stderr, show_pos=True) as bar:
        for more in running.open():
            bar.update(more)
    with click.progressbar(length=int(seconds * 1000), label="Listening", file=sys.stderr) as bar:
        for passed in running.listen(seconds):
            bar.update(round(passed * 1000))
    if running.stopped:
        click.echo("stopped early", err=True)
    found = running.figures()
    running.close()
    if as_json:
        click.echo(json.dumps({"ok": found.ok, **asdict(found)}, indent=2))
    else:
        for name, value in figure_rows(found):
            click.echo(f"{name:<12} {value}")
        for why, times in sorted(found.failed.items(), key=lambda item: -item[1]):
            click.secho(f"{'failed':<12} {times}: {why}", fg="red")
        if found.client_busy_percent > 80:
            click.secho(
                "             so it is this client that was measured: run several, or fewer clients", fg="yellow"
            )
    if not found.ok:
        raise SystemExit(1)
