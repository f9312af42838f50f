"""What servers need beside this repository, installed on request into ``_build/``; see ``--peers``.

Nothing is installed outside of ``_build/``. What cannot be had is told, and the benchmark goes on without it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from load import BUILD, BenchmarkError, build

SERVERS = Path(__file__).with_name("servers")
INSTALL_SECONDS = 600.0

# The versions are fixed, so that a measurement can be repeated.
NODE = BUILD / "node"
NODE_PACKAGES = {
    "koa": "3.3.0",
    "koa-sse-stream": "0.2.0",
    "egg": "4.0.10",
    "egg-sse": "1.0.7",
    "better-sse": "0.16.1",
    "fastify": "5.12.8",
    "@fastify/sse": "0.6.0",
}
STARLETTE = BUILD / "starlette"
STARLETTE_PYTHON = STARLETTE / "bin" / "python"
STARLETTE_PACKAGES = {"sse-starlette": "3.7.0", "uvicorn": "0.54.0", "uvloop": "0.23.0", "httptools": "0.9.0"}
NCHAN = BUILD / "nchan"
NCHAN_PACKAGE = "libnginx-mod-nchan"
NCHAN_MODULE = "usr/lib/nginx/modules/ngx_nchan_module.so"


def prepare(needs: str) -> str:
    """Install what is missing; say in a sentence why that is not possible, or nothing if all is there."""
    if not needs:
        return ""
    return _prepared(needs)


def environment(needs: str) -> dict[str, str]:
    """The variables that a server with these needs is started with."""
    if needs == "node":
        return {"NODE_PATH": str(NODE / "node_modules"), "NODE_ENV": "production"}
    if needs == "nchan":
        return {"BENCHMARK_NGINX": _nginx() or "", "BENCHMARK_NCHAN": str(_nchan() or "")}
    return {}


def versions(needs: Sequence[str]) -> dict[str, str]:
    """The versions of what is there for these needs."""
    found: dict[str, str] = {}
    if "plain" in needs:
        found["gcc"] = _said("cc", "-dumpfullversion")
    if "node" in needs:
        found["node"] = _said("node", "--version").removeprefix("v")
        for name in NODE_PACKAGES:
            with contextlib.suppress(OSError):
                manifest = (NODE / "node_modules" / name / "package.json").read_text()
                found[name] = json.loads(manifest)["version"]
    if "starlette" in needs:
        asked = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
        names = ("sse-starlette", "starlette", "uvicorn", "uvloop")
        found |= zip(names, _said(str(STARLETTE_PYTHON), "-c", asked, *names).split(), strict=False)
    if "nchan" in needs:
        found["nginx"] = _said(_nginx() or "nginx", "-v").rpartition("/")[2]
        found["nchan"] = _nchan_version()
    if "redis" in needs:
        match = re.search(r"v=([\d.]+)", _said("redis-server", "--version"))
        found["redis-server"] = match[1] if match else "?"
    return found


@functools.cache
def _prepared(needs: str) -> str:
    try:
        _PREPARATIONS[needs]()
    except (BenchmarkError, OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return ""


def _plain() -> None:
    build(SERVERS / "plain.c")


def _node() -> None:
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            raise BenchmarkError(f"It needs {program}; none was found.")
    stamp = NODE / "installed.json"
    if stamp.exists() and json.loads(stamp.read_text()) == NODE_PACKAGES:
        return
    NODE.mkdir(parents=True, exist_ok=True)
    wanted = [f"{name}@{version}" for name, version in NODE_PACKAGES.items()]
    _run("npm", "install", "--prefix", str(NODE), "--no-audit", "--no-fund", "--loglevel=error", *wanted)
    stamp.write_text(json.dumps(NODE_PACKAGES))


def _starlette() -> None:
    stamp = STARLETTE / "installed.json"
    if stamp.exists() and json.loads(stamp.read_text()) == STARLETTE_PACKAGES:
        return
    _run(sys.executable, "-m", "venv", "--clear", str(STARLETTE))
    wanted = [f"{name}=={version}" for name, version in STARLETTE_PACKAGES.items()]
    _run(str(STARLETTE_PYTHON), "-m", "pip", "install", "-qq", "--disable-pip-version-check", *wanted)
    stamp.write_text(json.dumps(STARLETTE_PACKAGES))


def _nchan_ready() -> None:
    if _nginx() is None:
        raise BenchmarkError("It needs Debian's nginx; none was found.")
    if _nchan() is None:
        # Debian's module fits Debian's nginx alone, and is taken out of its package: nothing is installed.
        if shutil.which("apt-get") is None:
            raise BenchmarkError(f"It needs Debian's {NCHAN_PACKAGE}, and there is no apt-get.")
        NCHAN.mkdir(parents=True, exist_ok=True)
        _run("apt-get", "download", "-q", NCHAN_PACKAGE, directory=NCHAN)
        (package,) = NCHAN.glob(f"{NCHAN_PACKAGE}_*.deb")
        _run("dpkg-deb", "-x", str(package), str(NCHAN))
    trial = NCHAN / "trial.conf"
    NCHAN.mkdir(parents=True, exist_ok=True)
    trial.write_text(f"load_module {_nchan()};\npid {NCHAN / 'trial.pid'};\nevents {{}}\n")
    _run(_nginx() or "nginx", "-t", "-q", "-p", str(NCHAN), "-c", str(trial))


def _redis() -> None:
    if shutil.which("redis-server") is None:
        raise BenchmarkError("It needs redis-server; none was found.")
    for package in ("redis", "flask-sse"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise BenchmarkError(f"It needs {package}: install the dependency group bench.") from None


_PREPARATIONS: dict[str, Callable[[], None]] = {
    "plain": _plain,
    "node": _node,
    "starlette": _starlette,
    "nchan": _nchan_ready,
    "redis": _redis,
}


def _nginx() -> str | None:
    # Debian has it where it is not on everybody's PATH.
    return shutil.which("nginx", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"]))


def _nchan() -> Path | None:
    places = (Path("/") / NCHAN_MODULE, NCHAN / NCHAN_MODULE)
    return next((place for place in places if place.exists()), None)


def _nchan_version() -> str:
    for package in NCHAN.glob(f"{NCHAN_PACKAGE}_*.deb"):
        return package.name.split("_")[1].replace("%3a", ":")
    return _said("dpkg-query", "-W", "-f", "${Version}", NCHAN_PACKAGE)


def _said(*command: str) -> str:
    """What a program says about itself; some do so as an error."""
    with contextlib.suppress(OSError):
        outcome = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        return (outcome.stdout.strip() or outcome.stderr.strip()).splitlines()[0] if outcome.returncode == 0 else "?"
    return "?"


def _run(*command: str, directory: Path | None = None) -> None:
    outcome = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False
    )
    if outcome.returncode != 0:
        lines = (outcome.stderr.strip() or outcome.stdout.strip() or "nothing").splitlines()
        # What went wrong comes first, and where a log of it is comes last.
        said = next((line for line in lines if "err" in line.lower()), lines[-1])
        raise BenchmarkError(f"{Path(command[0]).name} {command[1]} failed and said: {said}")
