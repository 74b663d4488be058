"""Does a text say the same over and over?"""

from __future__ import annotations

import re
from collections import Counter

LOOP_REPEATS = 3
"""A tail that says the same this many times in a row is a loop,"""
LOOP_CHARACTERS = 60
"""if the repetition covers at least this many characters."""
LOOP_COUNTED_LETTERS = 12
"""A period that differs only in its digits counts as the same if it has this many letters (so 1, 2, 3 does not)."""
REPEATED_SHARE = 0.5
"""Share of word 4-grams that occurred before, above which a text only repeats itself."""
REPEATED_MINIMUM = 40
"""Number of 4-grams below which that share says nothing."""

N_GRAM = 4
"""Words in a row that are compared."""
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\U00020000-\U0002ffff"
)
"""Characters, as ranges of a regular expression, of scripts that put no spaces between words."""
LETTERS = re.compile(r"[^\W\d_]+")
_TOKEN = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+|[^\w\s]")


def is_loop(text: str) -> bool:
    """The text ends in a loop, or mostly repeats itself.

    It ends in a loop if its tail of at least LOOP_CHARACTERS consists of LOOP_REPEATS or more equal periods, the last
    of which may be cut off; with LOOP_COUNTED_LETTERS letters in the period, digits may differ ("Step 1: ... Step 2:
    ..."). It mostly repeats itself if more than REPEATED_SHARE of its word 4-grams occurred before in it.
    """
    text = " ".join(text.split())
    counted = re.sub(r"\d+", "0", text)
    if _tail_period(text) or len("".join(LETTERS.findall(_tail_period(counted)))) >= LOOP_COUNTED_LETTERS:
        return True
    words = [word.casefold() for word in _TOKEN.findall(text)]
    grams = Counter(zip(*(words[i:] for i in range(N_GRAM)), strict=False))
    total = sum(grams.values())
    return total >= REPEATED_MINIMUM and 1 - len(grams) / total > REPEATED_SHARE


def _tail_period(text: str) -> str:
    """The shortest period whose repetition ends the text long and often enough; empty where there is none."""
    for period in range(1, len(text) // LOOP_REPEATS + 1):
        if text[-1] != text[-1 - period]:
            continue
        span = period
        while span < len(text) and text[-1 - span] == text[-1 - span + period]:
            span += 1
        if span >= LOOP_REPEATS * period and span >= LOOP_CHARACTERS:
            return text[-period:]
    return ""
