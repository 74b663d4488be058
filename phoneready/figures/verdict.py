"""What a budget says of one figure, and what all of a release's say together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from cfsp.units import format_bytes

VERDICTS_FILE = "verdicts.json"

OUTCOMES = MISSED, INCONCLUSIVE, PASS = "missed", "inconclusive", "pass"
"""How a figure can stand to its budget, the worst first."""


@dataclass(frozen=True)
class BudgetVerdict:
    """One figure held against its budget.

    Attributes:
        metric: What is limited, such as `file_bytes` or `tg128`.
        subject: The file, or the checkpoint, that it was found on.
        target: Where it was measured, as in benchmark records; None for what depends on no machine.
        limit: The budget for people, such as `at most 1.05 x dense`.
        value: The figure, in the unit of the limit (a ratio where the limit is one); None where it is not known.
        low: Lower end of its interval; None where there is none.
        high: Upper end.
        outcome: One of OUTCOMES.
        reason: For people, one sentence.
        unit: Of value, low and high: `bytes`, `ms`, `t/s`, `J`, `nats`, `share`, `x` for a ratio, or nothing.
    """

    metric: str
    subject: str
    target: str | None
    limit: str
    value: float | None
    low: float | None
    high: float | None
    outcome: str
    reason: str
    unit: str = ""

    def figure(self) -> str:
        """The value for people, with its interval."""
        value = format_figure(self.value, self.unit)
        if self.low is None or self.high is None:
            return value
        return f"{value} ({format_figure(self.low, self.unit)} to {format_figure(self.high, self.unit)})"


@dataclass(frozen=True)
class Verdicts:
    """verdicts.json: every budget of a release.

    Attributes:
        outcome: The worst of all; `pass` where there are no budgets.
        source: Reference of the dense model.
        source_sha256: Hash of its weights, where known.
        baseline: File that figures were compared with, or None.
        verdicts: In the order of the budgets.
    """

    KIND: ClassVar[str] = "verdicts"
    SCHEMA_VERSION: ClassVar[int] = 1

    outcome: str
    source: str
    source_sha256: str | None
    baseline: str | None
    verdicts: tuple[BudgetVerdict, ...]


def worst_outcome(verdicts: Sequence[BudgetVerdict]) -> str:
    """The worst outcome of several; `pass` of none."""
    return min((verdict.outcome for verdict in verdicts), key=OUTCOMES.index, default=PASS)


def format_figure(value: float | None, unit: str) -> str:
    """A figure for people, such as `83.4 MiB`, `57.2 ms` or `1.05 x`; a dash for what is not known."""
    if value is None:
        return "-"
    if unit == "bytes":
        return format_bytes(value)
    return f"{value:.4g}" if unit in ("", "share") else f"{value:.4g} {unit}"
