"""What counts as a change of a figure."""

from __future__ import annotations

from dataclasses import dataclass

from cfsp.settings import Settings, setting


@dataclass(frozen=True)
class HistorySettings(Settings):
    """How many runs are looked at, and what counts as a change among them."""

    threshold: float = setting(0.03, "Relative change that counts, however sure it is.", ge=0, lt=1)
    false_alarms: float = setting(
        0.05, "Chance that a history in which nothing changed shows a change.", gt=0, lt=1
    )
    last: int = setting(100, "Most runs to look at, the newest.", ge=1)


DEFAULTS = HistorySettings()
