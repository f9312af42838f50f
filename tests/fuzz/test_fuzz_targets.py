"""The targets of the fuzzing hold for every input that was kept, and for some that are made anew each time.

``make fuzz`` gives each of them minutes. FUZZ_EXAMPLES sets how many inputs hypothesis makes here.
"""

from __future__ import annotations

import os

import pytest
from fuzz_targets import CORPUS, TARGETS, kept_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "50"))


@pytest.mark.parametrize("name", TARGETS)
def test_every_kept_input_holds(name: str) -> None:
    kept = kept_inputs(name)
    assert len(kept) > 10, "the corpus is not there"
    for data in kept:
        try:
            TARGETS[name](data)
        except Exception as error:
            raise AssertionError(f"{data!r} does not hold") from error


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=EXAMPLES, deadline=None)
@given(data=st.binary(max_size=300))
def test_any_other_input_holds(name: str, data: bytes) -> None:
    TARGETS[name](data)


def test_the_corpus_is_of_targets_that_there_are() -> None:
    assert {path.stem for path in CORPUS.iterdir()} == set(TARGETS)
