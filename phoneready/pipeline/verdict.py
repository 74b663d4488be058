"""What a budget says of one figure."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["INCONCLUSIVE", "MISSED", "OUTCOMES", "PASS", "BudgetVerdict"]

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
