"""Fuzz for as long as is asked for: ``python tests/fuzz --seconds 120 [--targets decoder body] [--keep]``.

With atheris (the dependency group ``fuzz``) each target is followed by its coverage, in a process of its own, from the
kept corpus on. Without it hypothesis makes the inputs, which finds less. An input that breaks a promise is written to
``crash-...`` here and ends the run with status 1. ``--keep`` adds what reached new code to the corpus.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from fuzz_targets import CORPUS, TARGETS, kept_inputs  # noqa: E402

ATHERIS = """
import sys
import atheris
with atheris.instrument_imports(include=["flask_sse_stream", "fuzz_targets"]):
    from fuzz_targets import TARGETS
atheris.Setup(sys.argv, TARGETS[{name!r}])
atheris.Fuzz()
"""
LONGEST = 600  # bytes of an input: all that matters fits, and small ones say more
KEPT = 100  # inputs of one target that --keep stops at


def environment() -> dict[str, str]:
    """Give the environment in which the targets are found."""
    paths = [str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def with_atheris(name: str, seconds: float, *, keep: bool) -> bool:
    """Fuzz one target by its coverage; say whether it held."""
    known = kept_inputs(name)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as directory:
        for number, data in enumerate(known):
            Path(directory, f"kept-{number}").write_bytes(data)
        program = [sys.executable, "-c", ATHERIS.format(name=name)]
        options = [f"-max_total_time={max(1, round(seconds))}", f"-max_len={LONGEST}", "-print_final_stats=1"]
        done = subprocess.run([*program, *options, directory], env=environment(), check=False)
        if done.returncode == 0 and keep:
            found = {path.read_bytes() for path in Path(directory).iterdir()} - set(known)
            ordered = sorted(found, key=lambda data: (len(data), data))
            # Large and small ones: each of them reached something new when it was found.
            spread = ordered[:: max(1, -(-len(ordered) // max(1, KEPT - len(known))))]
            with (CORPUS / f"{name}.txt").open("a", encoding="ascii") as corpus:
                corpus.writelines(f"{data!r}\n" for data in spread)
    return done.returncode == 0


def with_hypothesis(name: str, seconds: float) -> bool:
    """Fuzz one target with inputs that hypothesis makes; say whether it held."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    @settings(max_examples=2000, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=LONGEST))
    def hold(data: bytes) -> None:
        TARGETS[name](data)

    deadline, rounds = time.monotonic() + seconds, 0
    while time.monotonic() < deadline or not rounds:
        try:
            hold()
        except Exception:
            import traceback

            traceback.print_exc()
            return False
        rounds += 1
    print(f"{name}: {2000 * rounds} inputs")
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz the decoder and what the brokers read.")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target")
    parser.add_argument("--keep", action="store_true", help="add what reached new code to the corpus")
    options = parser.parse_args()
    has_atheris = importlib.util.find_spec("atheris") is not None
    if not has_atheris:
        print("atheris is not installed: hypothesis makes the inputs, without knowing what they reach.")
    broken = [
        name
        for name in options.targets
        if not (
            with_atheris(name, options.seconds, keep=options.keep)
            if has_atheris
            else with_hypothesis(name, options.seconds)
        )
    ]
    print(f"broken: {', '.join(broken)}" if broken else f"{len(options.targets)} targets held")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
