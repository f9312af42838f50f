"""Tries what a release would be: ``python tests/try_package.py dist build/tried`` (``make package`` does).

The wheel, which was built from the sdist, is installed into empty environments, and tested there with the tests of the
sdist. These lie beside no package: it is taken out of the unpacked sdist, so that neither they nor the processes that
they start can import anything but the wheel, whatever is on their paths.

Each test runs once. First, with nothing there but what the package requires and pytest, those that need no more; then,
where everything is that may stand beside it, the rest. Those that drive servers and browsers are left to ``make test``
and tox: they take eight minutes, and what a wheel can lack (a module, a file, an entry point) is seen without them.
Last, the types are checked as a user's checkers see them, and the documentation is built.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

OPTIONAL = ("apscheduler", "celery", "gunicorn", "hypothesis", "prometheus_client", "redis", "sqlalchemy")
"""What parts of the package need, or look at, and the package as such does not."""

PACKAGE = "flask_sse_stream"
METADATA = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}
PYTEST = ("pytest", "pytest-timeout", "pytest-xdist")  # the second one for a setting, the third one for speed
QUICK = ("-m", "not live and not browser")
WITHOUT = "tests/test_without_extras.py"


class Environment:
    """A new environment with ``requirements``, in which commands run from ``directory``."""

    def __init__(self, path: Path, directory: Path, *requirements: str) -> None:
        self.path = path
        self.directory = directory
        # Without PYTHONPATH, of course; and with nothing of an environment that this may be run in.
        hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTEST_ADDOPTS")
        self.variables = {name: value for name, value in os.environ.items() if name not in hidden}
        self.variables.update(PATH=f"{path / 'bin'}{os.pathsep}{os.environ['PATH']}", VIRTUAL_ENV=str(path))
        # Not pip: it takes a minute and a half for what takes this ten seconds.
        uv = (sys.executable, "-m", "uv")
        self.run(*uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(path))
        self.run(*uv, "pip", "install", "--quiet", "--python", str(path / "bin" / "python"), *requirements)

    def run(self, *command: str, check: bool = True, **variables: str) -> str:
        """Run it, show what it says, and give that; where it fails, this is over."""
        done = subprocess.run(
            command,
            cwd=self.directory,
            env={**self.variables, **variables},
            stdout=subprocess.PIPE if not check else None,
            stderr=subprocess.STDOUT if not check else None,
            text=True,
            check=False,
        )
        if check and done.returncode:
            raise SystemExit(f"{' '.join(command)}: exit status {done.returncode}")
        return done.stdout or ""

    def python(self, *arguments: str, check: bool = True, **variables: str) -> str:
        """Run its interpreter."""
        return self.run(str(self.path / "bin" / "python"), *arguments, check=check, **variables)

    def is_the_wheels(self) -> None:
        """Make sure that tests, and the processes that they start, get the package from this environment."""
        script = f"import {PACKAGE}; print({PACKAGE}.__file__)"
        for paths in ("", f"{self.directory}{os.pathsep}{self.directory / 'tests'}"):
            found = Path(self.python("-c", script, check=False, PYTHONPATH=paths).strip())
            if found.parent.parent.name != "site-packages" or not found.is_relative_to(self.path):
                raise SystemExit(f"{PACKAGE} is {found}, and not what was installed into {self.path}")
        print(f"{PACKAGE} is {found}")


def section(text: str) -> None:
    print(f"\n-- {text}", flush=True)


def unpack(sdist: Path, to: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(to)
    [directory] = to.iterdir()
    return directory


def compare(wheel: Path, package: Path) -> None:
    """Make sure that the wheel has each file of the package, as it is, and nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    there = {
        path.relative_to(package.parent).as_posix(): path.read_bytes() for path in package.rglob("*") if path.is_file()
    }
    information = re.sub(r"-py3-none-any\.whl$", ".dist-info", wheel.name)
    expected = {*there, *(f"{information}/{name}" for name in METADATA)}
    if set(content) != expected:
        missing, needless = sorted(expected - set(content)), sorted(set(content) - expected)
        raise SystemExit(f"{wheel.name} lacks {missing}, and should not have {needless}")
    if different := [name for name, data in there.items() if content[name] != data]:
        raise SystemExit(f"{wheel.name} has other contents than the sdist in {different}")
    print(f"{wheel.name} has the {len(there)} files of the package, its metadata, and nothing else")


def need_more(bare: Environment) -> list[str]:
    """Give the test files that cannot be imported without an optional package, and none that fails otherwise."""
    said = bare.python("-m", "pytest", "tests", "--collect-only", "-q", *QUICK, check=False)
    failed = re.findall(r"^ERROR (tests/\S+)", said, re.MULTILINE)
    reasons = re.findall(r"^E +(\w*Error: .+)", said, re.MULTILINE)
    others = [text for text in reasons if not re.search(r"No module named|pip install", text)]
    if others or not reasons:
        raise SystemExit(f"without optional packages, tests cannot be collected: {others or said}")
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dist", type=Path, help="where one sdist and one wheel are")
    parser.add_argument("work", type=Path, help="a directory to make anew")
    parser.add_argument("--jobs", default="3", help="processes of pytest")
    given = parser.parse_args()
    work = given.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    [sdist], [wheel] = given.dist.resolve().glob("*.tar.gz"), given.dist.resolve().glob("*.whl")
    parallel = ("-n", given.jobs, "--dist", "loadfile")
    pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider")

    section("the wheel and the sdist have the same package")
    source = unpack(sdist, work / "sdist")
    compare(wheel, source / PACKAGE)
    shutil.rmtree(source / PACKAGE)

    section("with what is required, and pytest")
    bare = Environment(work / "bare", source, str(wheel), *PYTEST)
    bare.is_the_wheels()
    bare.python("-c", f"from importlib.util import find_spec as find; assert not [*filter(find, {OPTIONAL})]")
    left = need_more(bare)
    bare.python(*pytest, WITHOUT)
    bare.python(*pytest, *parallel, *QUICK, "tests", *(f"--ignore={path}" for path in (WITHOUT, *left)))

    section("with everything that may stand beside it")
    groups = (part for group in ("typing", "docs") for part in ("--group", f"{source / 'pyproject.toml'}:{group}"))
    full = Environment(work / "full", source, str(wheel), *groups)
    full.is_the_wheels()
    full.python(*pytest, *parallel, *QUICK, *left)

    section("its types, for a user's checkers")
    # Their own settings apply, and not those of pyproject.toml, which are for the source.
    full.python("-m", "mypy", "--config-file=", "--strict", "--python-version=3.10", "tests/typed_api.py")
    full.python("-m", "basedpyright", "--pythonpath", str(work / "full" / "bin" / "python"))
    full.python("-m", "basedpyright", "--ignoreexternal", "--verifytypes", PACKAGE)

    section("its documentation")
    full.python("-m", "sphinx", "-q", "-n", "-W", "--keep-going", "-b", "html", "docs", str(work / "docs"))


if __name__ == "__main__":
    main()
