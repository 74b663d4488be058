"""`eval --baseline`: an evaluation's figures against an earlier one's, each with its metric's tolerance.

The verdicts are the gate's of phoneready.figures: accuracies are compared with their noise, item by item.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cfsp.errors import InconclusiveError, InputError, LimitError
from phoneready.evaluation.evaluation_record import Evaluation
from phoneready.evaluation.figures import evaluation_figures, score_figure
from phoneready.figures.budgets import BudgetConfig
from phoneready.figures.figure_set import PRUNED, Figure
from phoneready.figures.gate import differences, judge
from phoneready.figures.metrics import TASK, TOLERANCES, recorded_metric, tolerance_name
from phoneready.figures.verdict import INCONCLUSIVE, MISSED, PASS
from runtime_bench.presentation.table import Column, Table


@dataclass(frozen=True)
class GateRow:
    """One comparison.

    Attributes:
        metric: Name of the figure.
        baseline: Before.
        now: Now.
        stderr: Standard error of `now`, of accuracies.
        change: Of the kind: the greater, the worse; None without a ratio, and for a figure that is only reported.
        allowed: Most that is allowed; None for a figure that is only reported.
        kind: `ratio` (now / baseline), `increase` (now - baseline) or `drop` (baseline - now).
        ok: Whether the change is surely allowed.
        outcome: One of OUTCOMES.
        reason: Of the outcome, for people; None for a figure that is only reported.
    """

    metric: str
    baseline: float
    now: float
    stderr: float | None
    change: float | None = None
    allowed: float | None = None
    kind: str | None = None
    ok: bool = True
    outcome: str = PASS
    reason: str | None = None


def read_tolerances(stated: Sequence[str]) -> dict[str, float]:
    """`KEY=VALUE` texts as metric -> tolerance; raises InputError for an unknown key, or no number of 0 or more."""
    limits = {}
    for text in stated:
        name, _, value = text.partition("=")
        try:
            limits[name.strip()] = number = float(value)
        except ValueError:
            number = math.nan
        if name.strip() not in TOLERANCES or not number >= 0:
            allowed = "KEY=VALUE with a value of 0 or more and a key of " + ", ".join(TOLERANCES)
            raise InputError("not understood", field="--tolerance", value=text, allowed=allowed)
    return limits


def compare_with_baseline(
    now: Evaluation, baseline: Evaluation, limits: Mapping[str, float], *, where: str | Path
) -> tuple[GateRow, ...]:
    """Every figure of the baseline beside today's.

    Raises:
        InputError: The baseline was measured otherwise (reference model, text, tasks, prompts), or has a figure that
            is missing now; what differs is named.
    """
    ours, theirs = _comparable(now, baseline), _comparable(baseline, now)
    for name, before in theirs.items():
        if name in ours and (differing := differences(ours[name], before)):
            raise InputError(f"{where} is a baseline of something else: {differing}")
    if missing := [name for name in theirs if name not in ours]:
        raise InputError(f"{where} has {', '.join(missing)}, which was not measured now")
    if not theirs:
        raise InputError(f"{where} has no figures to compare with")
    return tuple(_row(name, before, ours[name], limits) for name, before in theirs.items())


def check_gate(rows: tuple[GateRow, ...]) -> None:
    """Raise LimitError naming every figure beyond its tolerance, else InconclusiveError for those not decided."""
    for outcome, error, what in (
        (MISSED, LimitError, "worse than the baseline"),
        (INCONCLUSIVE, InconclusiveError, "not decided whether it is worse than the baseline"),
    ):
        found = [
            f"{row.metric} went from {row.baseline:.5g} to {row.now:.5g} ({_change(row, '.4g')}, "
            f"allowed {row.allowed:g}): {row.reason}"
            for row in rows
            if row.outcome == outcome
        ]
        if found:
            raise error(f"{what}: {'; '.join(found)}")


def gate_table(rows: Sequence[GateRow]) -> Table[GateRow]:
    """The comparison as a table."""
    words = {PASS: "ok", INCONCLUSIVE: "not decided", MISSED: "worse"}
    columns: tuple[Column[GateRow], ...] = (
        Column("metric", lambda row: row.metric),
        Column("baseline", lambda row: f"{row.baseline:.4f}", right=True),
        Column(
            "now",
            lambda row: f"{row.now:.4f}" + ("" if row.stderr is None else f" ± {row.stderr:.3f}"),
            right=True,
        ),
        Column("change", lambda row: _change(row, ".4f") if row.kind else None),
        Column("allowed", lambda row: None if row.allowed is None else f"{row.allowed:g}", right=True),
        Column("verdict", lambda row: "not gated" if row.kind is None else words[row.outcome]),
    )
    return Table(columns, rows)


def _change(row: GateRow, form: str) -> str:
    return f"no {row.kind}" if row.change is None else f"{row.kind} {row.change:{form}}"


def _row(name: str, before: Figure, now: Figure, limits: Mapping[str, float]) -> GateRow:
    assert before.value is not None
    assert now.value is not None
    row = GateRow(name, before.value, now.value, now.stderr)
    metric = recorded_metric(now.key.metric)
    higher = now.higher_is_better if metric.higher_is_better is None else metric.higher_is_better
    allowed = math.inf if metric.tolerance is None else limits.get(tolerance_name(metric), metric.tolerance)
    if higher is None or math.isinf(allowed):
        return row
    budget = BudgetConfig(
        metric=now.key.metric,
        relative_to="baseline",
        difference=not metric.tolerates_ratio,
        at_least=-allowed if higher else None,
        at_most=None if higher else allowed,
    )
    verdict = judge(budget, now, before)
    return replace(
        row,
        change=-verdict.value if higher and verdict.value is not None else verdict.value,
        allowed=allowed,
        kind="ratio" if metric.tolerates_ratio else "drop" if higher else "increase",
        ok=verdict.outcome == PASS,
        outcome=verdict.outcome,
        reason=verdict.reason,
    )


def _comparable(evaluation: Evaluation, other: Evaluation) -> dict[str, Figure]:
    """Every figure that has a tolerance, by its name for people, with all that must be equal for a comparison."""
    subject, figures = evaluation.model.reference, {}
    for figure in evaluation_figures("", subject, evaluation):
        metric = recorded_metric(figure.key.metric)
        if figure.role == PRUNED and metric.tolerance is not None and metric.source != TASK:
            title = metric.title if metric.name == figure.key.metric else figure.key.metric
            figures[f"{title}, {figure.key.on}" if figure.key.on else title] = figure
    for task in evaluation.tasks:
        for score in task.metrics:
            figures[f"{task.task} {score.name}"] = score_figure("", PRUNED, subject, task, score)
    shared: dict[str, str] = {}
    if against := evaluation.against:
        known = against.sha256 if other.against and other.against.sha256 else None
        shared["reference model"] = known or against.reference
        shared["cache of the reference model"] = str(against.cache_type)
    if evaluation.model.source_sha256 and other.model.source_sha256:
        shared["hash of the dense model"] = evaluation.model.source_sha256
    for name, figure in figures.items():
        own = {}
        if figure.key.metric == "degenerate" and evaluation.degeneration is not None:
            own["max_new_tokens"] = str(evaluation.degeneration.max_new_tokens)
        if figure.higher_is_better is not None:
            own[f"higher_is_better of {name}"] = str(figure.higher_is_better)
        figures[name] = replace(figure, conditions=figure.conditions | shared | own)
    return figures
