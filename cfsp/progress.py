"""How long-running functions report progress without knowing who shows it."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""`progress(description, done, total)`; `done == total` ends the step, which the description up to `": "` names."""


def no_progress(description: str, done: int, total: int) -> None:
    """Ignore progress: the default of every function that takes one."""
