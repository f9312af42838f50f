"""The arrows between the modules point down, and each optional package is imported in one place."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import flask_sse_stream

PACKAGE = Path(flask_sse_stream.__file__).parent

# Each row may import the rows above it; modules of one row do not import each other.
LAYERS: list[set[str]] = [
    {"errors"},
    {"keys", "counts"},
    {"event", "settings"},
    {"access"},
    {"window", "overflow", "transports.base", "brokers.base"},
    {"stream", "brokers.memory", "brokers.listener", "brokers.redis_scripts", "brokers.redis_errors"},
    {"brokers.sqlite", "brokers.redis_link"},
    {"brokers.redis_listener"},
    {"brokers.redis"},
    {"draining", "kicks"},
    {"rounds", "listeners"},
    {"hearing"},
    {"revocations", "reports"},
    {"intake", "leaving", "stats"},
    {"opening"},
    {"asking"},
    {"pools"},
    {"progress"},
    {"transports.iterator", "transports.gevent", "transports.servers", "transports.threads"},
    {"transports.reactor", "keeper"},
    {"jobs"},
    {"wsgi", "publisher", "bridge", "metrics", "health"},
    {"tickets"},
    {"shortcut", "client", "celery", "sqlalchemy", "signals"},
    {"responses", "inspecting"},
    {"inspector"},
    {"extension"},
    {"testing.waiting", "testing.house", "testing.recording", "testing.clock"},
    {"testing.client"},
    {"testing.plugin"},
    {"testing.contracts"},
    {"testing.contracts.broker", "testing.contracts.transport", "testing.contracts.replay", "testing.contracts.jobs"},
    {"testing.contracts.threads", "testing.contracts.greenlets"},
    {"testing"},
    {"compat.flask_sse"},
    {"reading", "serving"},
    {"tailing", "probing", "bench"},
    {"doctor", "showing"},
    {"cli"},
    {"__main__"},
    {""},
]
CONTRACTS = {module for row in LAYERS for module in row if module.startswith("testing.contracts")}
RANK = {module: rank for rank, row in enumerate(LAYERS) for module in row}
PACKAGES = {"brokers", "transports", "compat"}  # hold nothing but their docstring

# Where a package that the core can do without may be imported.
ONLY_IN = {
    "gevent": {"transports.gevent", "serving", "testing.contracts.greenlets"},
    "greenlet": {"transports.gevent"},
    "redis": {"brokers.redis_errors", "brokers.redis_link", "compat.flask_sse"},
    "flask": {"shortcut", "client", "signals", "responses", "inspector", "extension", "compat.flask_sse", "cli"},
    "werkzeug": {"responses", "inspector", "extension", "testing.client", "cli"},
    "blinker": {"signals"},
    "click": {"cli", "showing", "__main__"},
    "celery": {"celery"},
    "sqlalchemy": {"sqlalchemy"},
    "itsdangerous": {"tickets"},
    "pytest": {"testing.plugin", *CONTRACTS},
    "hypothesis": {"testing.contracts.replay"},
    "prometheus_client": {"metrics"},
    "gunicorn": {"doctor"},
    "apscheduler": set(),
}


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(module: str, path: Path) -> set[str]:
    """Full names of what a module imports, those under ``if TYPE_CHECKING`` too."""
    package = ["flask_sse_stream", *module.split(".")] if module else ["flask_sse_stream"]
    if path.name != "__init__.py":
        package = package[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
    return names


MODULES = modules()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_from_the_layers_below_its_own(module: str) -> None:
    if module in PACKAGES:
        assert not imports(module, MODULES[module]), "a package's own file holds its docstring alone"
        return
    assert module in RANK, f"{module} has no place in the layers: give it one"
    for name in imports(module, MODULES[module]):
        target = name.removeprefix("flask_sse_stream").removeprefix(".")
        if name.startswith("flask_sse_stream") and target in RANK and target:
            assert RANK[target] < RANK[module], f"{module} imports {target}, which is not below it"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_an_optional_package_is_imported_in_its_own_place_alone(module: str) -> None:
    for name in imports(module, MODULES[module]):
        top = name.partition(".")[0]
        assert module in ONLY_IN.get(top, {module}), f"{module} imports {top}"


def test_the_core_imports_with_neither_gevent_nor_redis_nor_flask_installed() -> None:
    optional = set().union(*ONLY_IN.values()) | {"brokers.redis_listener", "brokers.redis"}  # they stand on the link
    core = [module for module in MODULES if module not in optional and module]
    script = (
        "import sys\n"
        f"for name in {sorted(ONLY_IN)!r}:\n"
        "    sys.modules[name] = None\n"
        "import flask_sse_stream, importlib\n"
        f"for module in {sorted(core)!r}:\n"
        "    importlib.import_module('flask_sse_stream.' + module)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_importing_the_package_starts_no_thread_and_imports_no_gevent() -> None:
    script = (
        "import threading, sys\n"
        "import flask_sse_stream\n"
        "assert threading.active_count() == 1\n"
        "assert 'gevent' not in sys.modules and 'redis' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_depends_on_a_clock_that_can_be_set(module: str) -> None:
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if module == "access" and name == "time.time":
            continue  # The times of tickets go from one machine to another.
        assert name not in ("time.time", "time.time_ns", "time.localtime", "datetime.now", "datetime.utcnow")
    assert "datetime" not in imports(module, MODULES[module])
    assert "time.time" not in imports(module, MODULES[module])
