"""How long-running functions report progress without knowing who shows it."""

from __future__ import annotations

import time
from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""`progress(description, done, total)`; `done == total` ends the step, which the description up to `": "` names.

What follows is a figure that changes while the step goes on: `training: loss 2.31`.
"""


def no_progress(description: str, done: int, total: int) -> None:
    """Ignore progress: the default of every function that takes one."""


class Pace:
    """Since when steps go on, and about how long they still take."""

    def __init__(self) -> None:
        self._began: dict[str, tuple[float, int]] = {}

    def at(self, description: str, done: int, total: int) -> tuple[str, float, float | None]:
        """The step's name, the seconds since it began, and those left at that speed; None if nothing was done yet.

        A step that was resumed counts from where it began.
        """
        now, step = time.monotonic(), description.partition(": ")[0]
        began, first = self._began.setdefault(step, (now, done))
        if done >= total:
            self._began.pop(step)
        took_s = now - began
        return step, took_s, took_s * (total - done) / (done - first) if done > first else None
