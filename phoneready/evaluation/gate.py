"""A judgement held against an earlier one: which figures got worse by more than is allowed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cfsp.errors import InputError, LimitError
from cfsp.evaluation.tasks import TaskResult
from phoneready.console import format_rows
from phoneready.evaluation.record import Evaluation, TextResult, text_name


@dataclass(frozen=True)
class Tolerance:
    """How much worse a figure may get.

    Attributes:
        option: Its command-line option.
        kind: `ratio` (now / baseline), `increase` (now - baseline) or `drop` (baseline - now).
        default: Most that is allowed of that.
        minimum: Least sensible setting.
        help: For people.
    """

    option: str
    kind: str
    default: float
    minimum: float
    help: str


TOLERANCES: Mapping[str, Tolerance] = MappingProxyType(
    {
        "perplexity": Tolerance(
            "max_perplexity_ratio", "ratio", 1.02, 0.0, "perplexity, as a multiple of the baseline's"
        ),
        "kl_mean": Tolerance("max_kl_increase", "increase", 0.01, 0.0, "mean KL divergence, in nats"),
        "same_top1": Tolerance("max_top1_drop", "drop", 0.01, 0.0, "same-top-1 share"),
        "accuracy": Tolerance(
            "max_accuracy_drop", "drop", 0.02, 0.0, "any higher-is-better figure of a task"
        ),
        "degenerate": Tolerance(
            "max_degenerate_increase", "increase", 0.05, 0.0, "share of degenerate answers"
        ),
        "metric_up": Tolerance("max_metric_change", "drop", 0.02, 0.0, "own metrics, in their unit"),
        "metric_down": Tolerance("max_metric_change", "increase", 0.02, 0.0, "own metrics, in their unit"),
    }
)
"""Kind of figure -> tolerance."""


def _ratio(before: float, now: float) -> float:
    if before:
        return now / before
    return 1.0 if now == before else math.inf


def _increase(before: float, now: float) -> float:
    return now - before


def _drop(before: float, now: float) -> float:
    return before - now


_CHANGES: Mapping[str, Callable[[float, float], float]] = MappingProxyType(
    {"ratio": _ratio, "increase": _increase, "drop": _drop}
)
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Measure:
    """One figure of an evaluation.

    Attributes:
        value: The figure.
        tolerance: Its row in TOLERANCES, or None for a figure that is only reported.
        stderr: Standard error, of accuracies.
    """

    value: float
    tolerance: str | None
    stderr: float | None = None


@dataclass(frozen=True)
class GateRow:
    """One comparison.

    Attributes:
        metric: Name of the figure.
        baseline: Before.
        now: Now.
        stderr: Standard error of `now`, of accuracies.
        change: Of the tolerance's kind: the greater, the worse; None for a figure that is only reported.
        allowed: Most that is allowed.
        kind: The tolerance's kind.
        ok: Whether the change is allowed.
    """

    metric: str
    baseline: float
    now: float
    stderr: float | None
    change: float | None
    allowed: float | None
    kind: str | None
    ok: bool


def measures(evaluation: Evaluation) -> dict[str, Measure]:
    """Every figure of an evaluation by its name."""
    found: dict[str, Measure] = {}
    for text in evaluation.texts:
        name = text_name(text.kind, text.source)
        found[f"perplexity, {name}"] = Measure(text.perplexity, "perplexity")
        if text.divergence:
            found[f"KL mean, {name}"] = Measure(text.divergence.kl_mean, "kl_mean")
            found[f"same top-1, {name}"] = Measure(text.divergence.same_top1, "same_top1")
    for task in evaluation.tasks:
        for metric in task.metrics:
            kind = "accuracy" if metric.higher_is_better else "perplexity"
            found[f"{task.task} {metric.name}"] = Measure(metric.value, kind, metric.stderr)
    if evaluation.degeneration:
        found["degenerate answers"] = Measure(evaluation.degeneration.share, "degenerate")
    directions = {None: None, True: "metric_up", False: "metric_down"}
    for own in evaluation.metrics:
        found[own.name] = Measure(own.value, directions[own.higher_is_better])
    return found


def check_limits(limits: Mapping[str, float]) -> None:
    """Raise InputError for a tolerance below its least sensible value, or not a number."""
    for tolerance in TOLERANCES.values():
        value = limits.get(tolerance.option, tolerance.default)
        if not value >= tolerance.minimum:
            option = "--" + tolerance.option.replace("_", "-")
            raise InputError(
                "out of range", field=option, value=value, allowed=f"{tolerance.minimum:g} or more"
            )


def compare_with_baseline(
    now: Evaluation, baseline: Evaluation, limits: Mapping[str, float], *, where: str | Path
) -> tuple[GateRow, ...]:
    """Every figure of the baseline beside today's.

    Args:
        now: Today's.
        baseline: The earlier one.
        limits: Option -> tolerance; each has a default.
        where: Where the baseline came from, named in errors.

    Raises:
        InputError: The baseline was measured otherwise (reference model, text, tasks, prompts), or has a figure that
            is missing now; what differs is named.
    """
    check_limits(limits)
    _check_comparable(now, baseline, where)
    ours = measures(now)
    rows = []
    for name, before in measures(baseline).items():
        if name not in ours:
            raise InputError(f"{where} has {name}, which was not measured now")
        rows.append(_row(name, before, ours[name], limits))
    if not rows:
        raise InputError(f"{where} has no figures to compare with")
    return tuple(rows)


def check_gate(rows: tuple[GateRow, ...]) -> None:
    """Hold the comparison against its tolerances.

    Raises:
        LimitError: Names every figure beyond its tolerance, and by how much.
    """
    failed = [
        f"{row.metric} went from {row.baseline:.5g} to {row.now:.5g} "
        f"({row.kind} {row.change:.4g}, allowed {row.allowed:g})"
        for row in rows
        if not row.ok
    ]
    if failed:
        raise LimitError(f"worse than the baseline: {'; '.join(failed)}")


def gate_to_json(rows: tuple[GateRow, ...]) -> list[dict[str, Any]]:
    """The comparison as JSON, which has no infinity: a change or a tolerance without end is null."""
    return [
        {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(row).items()
        }
        for row in rows
    ]


def format_gate(rows: tuple[GateRow, ...]) -> str:
    """The comparison as a table."""
    header = ["metric", "baseline", "now", "change", "allowed", "verdict"]
    cells = []
    for row in rows:
        error = f" ± {row.stderr:.3f}" if row.stderr is not None else ""
        change = "-" if row.change is None else f"{row.kind} {row.change:.4f}"
        allowed = "-" if row.allowed is None else f"{row.allowed:g}"
        verdict = "not gated" if row.change is None else "ok" if row.ok else "worse"
        cells.append([row.metric, f"{row.baseline:.4f}", f"{row.now:.4f}{error}", change, allowed, verdict])
    return format_rows(header, cells)


def _row(name: str, before: Measure, now: Measure, limits: Mapping[str, float]) -> GateRow:
    if now.tolerance is None:
        return GateRow(name, before.value, now.value, now.stderr, None, None, None, True)
    tolerance = TOLERANCES[now.tolerance]
    change = _CHANGES[tolerance.kind](before.value, now.value)
    allowed = limits.get(tolerance.option, tolerance.default)
    # Written so that NaN is no pass.
    ok = change <= allowed + _ROUNDING
    return GateRow(name, before.value, now.value, now.stderr, change, allowed, tolerance.kind, ok)


def _check_comparable(now: Evaluation, baseline: Evaluation, where: str | Path) -> None:
    for what, before, after in _conditions(now, baseline):
        if before != after:
            raise InputError(
                f"{where} is a baseline of something else: {what} was {before!r} and is {after!r}"
            )


def _conditions(now: Evaluation, baseline: Evaluation) -> Iterator[tuple[str, Any, Any]]:
    """(what, then, now) of everything that must be equal for figures to be comparable."""
    yield "reference model", _reference(baseline, now), _reference(now, baseline)
    if baseline.model.source_sha256 and now.model.source_sha256:
        yield "hash of the dense model", baseline.model.source_sha256, now.model.source_sha256
    texts, before_texts = _by_name(now.texts), _by_name(baseline.texts)
    if baseline.metrics:
        # Own metrics are taken over all texts in their order.
        yield "texts of own metrics", list(before_texts), list(texts)
    for name, text in before_texts.items():
        if name not in texts:
            yield "text", name, ", ".join(texts) or None
            continue
        yield f"seqlen of {name}", text.seqlen, texts[name].seqlen
        yield f"windows_sha256 of {name}", text.windows_sha256, texts[name].windows_sha256
    tasks = {task.task: task for task in now.tasks}
    for task in baseline.tasks:
        if task.task not in tasks:
            yield "task", task.task, ", ".join(tasks) or None
            continue
        ours, theirs = _task_conditions(tasks[task.task]), _task_conditions(task)
        for key, value in theirs.items():
            yield f"{key} of task {task.task}", value, ours[key]
    directions = {own.name: own.higher_is_better for own in now.metrics}
    for own in baseline.metrics:
        if own.name in directions:
            yield f"higher_is_better of {own.name}", own.higher_is_better, directions[own.name]
    before, after = baseline.degeneration, now.degeneration
    if before is not None:
        yield "prompts_sha256", before.prompts_sha256, after and after.prompts_sha256
        yield "max_new_tokens", before.max_new_tokens, after and after.max_new_tokens


def _by_name(texts: Sequence[TextResult]) -> dict[str, TextResult]:
    return {text_name(text.kind, text.source): text for text in texts}


def _reference(evaluation: Evaluation, other: Evaluation) -> str | None:
    """The reference model's hash where both evaluations know it, else its name."""
    if evaluation.against is None:
        return None
    known = evaluation.against.sha256 and other.against and other.against.sha256
    return evaluation.against.sha256 if known else evaluation.against.reference


def _task_conditions(task: TaskResult) -> dict[str, Any]:
    fields = asdict(task)
    return {key: fields[key] for key in ("version", "sha256", "limit", "num_fewshot", "n_items")}
