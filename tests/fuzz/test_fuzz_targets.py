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
# What means something to one of the targets; bytes at random rarely make it.
TOKENS = [
    *(b"data", b"data:", b"data: ", b"data:  ", b"event: ", b"id: ", b"id: end", b"retry: ", b": ", b":", b" ", b"\t"),
    *(
        b"\n",
        b"\n\n",
        b"\r",
        b"\r\n",
        b"\xef\xbb\xbf",
        b"\xe2\x80\xa8",
        b"\xc2\x85",
        b"\v",
        b"\f",
        b"\xff",
        b"\xe2\x82",
    ),
    *(b"\0", b"x", b"7", b"007", b"9007199254740992", b"-1", b"1 0123456789ab 7 6\n", b"data: x\n\n", b"\x01", b"\x20"),
]
inputs = st.one_of(st.binary(max_size=300), st.lists(st.sampled_from(TOKENS), max_size=40).map(b"".join))


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
@given(data=inputs)
def test_any_other_input_holds(name: str, data: bytes) -> None:
    TARGETS[name](data)


def test_the_corpus_is_of_targets_that_there_are() -> None:
    assert {path.stem for path in CORPUS.iterdir()} == set(TARGETS)
