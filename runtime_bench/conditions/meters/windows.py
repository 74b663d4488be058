"""Times in which something was done, and how much of any other time they cover."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate


class Windows:
    """Spans of time that do not overlap, seconds.

    Attributes:
        spans: (begin, end), the earliest first.
        seconds: All of them together.
    """

    def __init__(self, spans: Sequence[tuple[float, float]]) -> None:
        self.spans = sorted(spans)
        self._begins = [begin for begin, _ in self.spans]
        self._before = list(accumulate((end - begin for begin, end in self.spans), initial=0.0))
        self.seconds = self._before[-1]

    def within(self, begin: float, end: float) -> float:
        """Seconds of a time that are inside."""
        return max(0.0, self._until(end) - self._until(begin))

    def _until(self, time: float) -> float:
        place = bisect_right(self._begins, time)
        if not place:
            return 0.0
        begin, end = self.spans[place - 1]
        return self._before[place - 1] + min(time, end) - begin
