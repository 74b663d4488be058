"""The one judgement about two models' answers to the same items: a paired bootstrap over items.

Items are drawn, each with what both models made of it (Koehn 2004, "Statistical significance tests for machine
translation evaluation"; Efron and Tibshirani 1993, chapter 8): that an item is hard cancels. Two models that are right
on the same items differ by nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from runtime_bench.records.summary import CONFIDENCE

_CELLS = (("1", "1"), ("1", "0"), ("0", "1"), ("0", "0"))
"""What both models made of an item."""
_RESAMPLES = 10_000


def paired_interval(now: Sequence[str], before: Sequence[str], *, difference: bool) -> tuple[float, float]:
    """The 95 % interval of accuracy `now` minus, or over, accuracy `before`, of the mean over tasks.

    Args:
        now: For each task a text of one character an item: 1 for a right answer, 0 for another one.
        before: The same of the model that is compared with, of the same items.
        difference: Whether the difference is wanted; else the ratio.
    """
    rng = np.random.default_rng(0)
    ours, theirs = np.zeros(_RESAMPLES), np.zeros(_RESAMPLES)
    for task, same_task in zip(now, before, strict=True):
        counts = Counter(zip(task, same_task, strict=True))
        shares = [counts[cell] / len(task) for cell in _CELLS]
        both, gained, lost, _ = rng.multinomial(len(task), shares, _RESAMPLES).T / len(task)
        ours, theirs = ours + both + gained, theirs + both + lost
    tail = (1 - CONFIDENCE) / 2
    # Where no right answer of the other model is drawn, half of one stands for the ratio's sake.
    least = 0.5 / sum(map(len, now))
    drawn = (ours - theirs) / len(now) if difference else ours / np.maximum(theirs, least)
    low, high = np.quantile(drawn, [tail, 1 - tail], method="closest_observation")
    return float(low), float(high)
