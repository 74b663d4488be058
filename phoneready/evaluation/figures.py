"""An evaluation as figures: budgets limit them, `eval --baseline` compares them with an earlier one's, by the gate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cfsp.errors import InconclusiveError, InputError, LimitError
from cfsp.evaluation.task_results import TaskMetric, TaskResult
from phoneready.evaluation.evaluation_record import Evaluation, text_name
from phoneready.figures.figures import (
    DENSE,
    INCONCLUSIVE,
    MISSED,
    OWN_METRIC,
    PASS,
    PRUNED,
    TASK,
    TOLERANCES,
    BudgetConfig,
    Figure,
    FigureKey,
    metric_of,
    recorded_metric,
)
from phoneready.figures.gate import differences, judge
from runtime_bench.presentation.table import Table, table_of_cells


def evaluation_figures(item: str, subject: str, evaluation: Evaluation) -> Iterator[Figure]:
    """What an evaluation found of `subject`, and of the dense model; `item` as in FigureKey."""
    dense = evaluation.against.reference if evaluation.against else "dense"
    names = {PRUNED: subject, DENSE: dense}

    def figure(
        role: str, metric: str, value: float | None, conditions: dict[str, str], on: str | None
    ) -> Figure:
        key, unit = FigureKey(metric, item, on=on), metric_of(metric).unit
        return Figure(key, role, names[role], unit, value, conditions=dict(conditions))

    all_tokens: dict[str, str] = {}
    for text in evaluation.texts:
        name = text_name(text.kind, text.source)
        tokens = {f"tokens of {name}": text.windows_sha256}
        all_tokens |= tokens
        values = {"perplexity": text.perplexity}
        for metric in ("bits_per_byte", "tokens_per_byte"):
            own, theirs = getattr(text, metric), getattr(text, f"against_{metric}")
            if own is not None:
                values[metric] = own
            if theirs is not None:
                yield figure(DENSE, metric, theirs, tokens, name)
        if (d := text.divergence) is not None:
            values |= {
                one: getattr(d, one) for one in ("perplexity_ratio", "kl_mean", "kl_p99_9", "same_top1")
            }
            yield figure(DENSE, "perplexity", d.reference_perplexity, tokens, name)
        for metric, value in values.items():
            yield figure(PRUNED, metric, value, tokens, name)
    yield from task_figures(item, PRUNED, subject, evaluation.tasks)
    yield from task_figures(item, DENSE, dense, evaluation.against_tasks)
    if (answers := evaluation.degeneration) is not None:
        prompts = {"prompts": answers.prompts_sha256}
        yield figure(PRUNED, "degenerate", answers.share, prompts, None)
        yield figure(DENSE, "degenerate", answers.against_share, prompts, None)
    # Own metrics are taken over all texts.
    all_tokens["texts of own metrics"] = ", ".join(
        text_name(one.kind, one.source) for one in evaluation.texts
    )
    for own in evaluation.metrics:
        key, higher = FigureKey(own.name, item), own.higher_is_better
        conditions = dict(all_tokens)
        yield Figure(
            key, PRUNED, subject, own.unit, own.value, higher_is_better=higher, conditions=conditions
        )


def score_figure(item: str, role: str, subject: str, task: TaskResult, score: TaskMetric) -> Figure:
    """A score of a task; one that is better the lower it is counts as a perplexity."""
    conditions = {
        f"{name} of {task.task}": str(getattr(task, name))
        for name in ("version", "sha256", "limit", "num_fewshot", "n_items")
    } | {f"metric of {task.task}": score.name}
    metric = "accuracy" if score.higher_is_better else "perplexity"
    # Which items were answered rightly, if that is what the figure says.
    share = score.right.count("1") / len(score.right) if score.right else math.nan
    right = (score.right,) if math.isclose(share, score.value, abs_tol=1e-9) else ()
    return Figure(
        FigureKey(metric, item, on=task.task), role, subject, metric_of(metric).unit, score.value,
        stderr=score.stderr, conditions=conditions, right=right,
    )  # fmt: skip


def task_figures(item: str, role: str, subject: str, tasks: Sequence[TaskResult]) -> Iterator[Figure]:
    """The accuracy in each task, and their mean."""
    figures = [
        score_figure(item, role, subject, task, task.accuracy) for task in tasks if task.accuracy is not None
    ]
    yield from figures
    if figures:
        all_right = tuple(right for f in figures for right in f.right)
        yield Figure(
            FigureKey("mean_accuracy", item), role, subject, "share",
            sum(f.value or 0 for f in figures) / len(figures),
            stderr=math.sqrt(sum((f.stderr or 0) ** 2 for f in figures)) / len(figures),
            conditions={name: value for f in figures for name, value in f.conditions.items()},
            right=all_right if len(all_right) == len(figures) else (),
        )  # fmt: skip


@dataclass(frozen=True)
class GateRow:
    """One comparison.

    `change` is of the kind `ratio` (now / baseline), `increase` (now - baseline) or `drop` (baseline - now): the
    greater, the worse. Without `allowed` the figure is only reported. `outcome` is one of OUTCOMES.
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


def gate_table(rows: Sequence[GateRow]) -> Table[Sequence[str]]:
    """The comparison as a table."""
    words = {PASS: "ok", INCONCLUSIVE: "not decided", MISSED: "worse"}
    cells = [
        (
            row.metric,
            f"{row.baseline:.4f}",
            f"{row.now:.4f}" + ("" if row.stderr is None else f" ± {row.stderr:.3f}"),
            _change(row, ".4f") if row.kind else "-",
            "-" if row.allowed is None else f"{row.allowed:g}",
            "not gated" if row.kind is None else words[row.outcome],
        )
        for row in rows
    ]
    return table_of_cells(("metric", "baseline", "now", "change", "allowed", "verdict"), cells)


def _change(row: GateRow, form: str) -> str:
    return f"no {row.kind}" if row.change is None else f"{row.kind} {row.change:{form}}"


def _row(name: str, before: Figure, now: Figure, limits: Mapping[str, float]) -> GateRow:
    assert before.value is not None
    assert now.value is not None
    row = GateRow(name, before.value, now.value, now.stderr)
    metric = recorded_metric(now.key.metric)
    higher = now.higher_is_better if metric.higher_is_better is None else metric.higher_is_better
    tolerance = "own" if metric is OWN_METRIC else metric.name
    allowed = math.inf if metric.tolerance is None else limits.get(tolerance, metric.tolerance)
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
