"""An evaluation as figures: budgets limit them, `eval --baseline` compares them with an earlier one's, by the gate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from cfsp.errors import InputError
from cfsp.evaluation.task_results import TaskMetric, TaskResult
from phoneready.evaluation.evaluation_record import Evaluation, TextLoss
from phoneready.figures.figures import (
    DENSE,
    OWN_METRIC,
    SHIPPED,
    TASK,
    TEXT,
    TOLERANCES,
    BudgetConfig,
    BudgetVerdict,
    Figure,
    FigureKey,
    metric_of,
    metrics_from,
    recorded_metric,
)
from phoneready.figures.gate import differences, judge
from runtime_bench.records.pairs import Windows


def evaluation_figures(item: str, subject: str, evaluation: Evaluation) -> Iterator[Figure]:
    """What an evaluation found of `subject`, and of the dense model; `item` as in FigureKey."""
    dense = evaluation.against.reference if evaluation.against else "dense"
    names = {SHIPPED: subject, DENSE: dense}

    def figure(
        role: str, metric: str, value: float | None, conditions: dict[str, str], on: str | None
    ) -> Figure:
        key, unit = FigureKey(metric, item, on=on), metric_of(metric).unit
        return Figure(key, role, names[role], unit, value, conditions=dict(conditions))

    yield from text_figures(item, subject, dense, evaluation.texts)
    yield from task_figures(item, SHIPPED, subject, evaluation.tasks)
    yield from task_figures(item, DENSE, dense, evaluation.against_tasks)
    if (answers := evaluation.degeneration) is not None:
        prompts = {"prompts": answers.prompts_sha256}
        yield figure(SHIPPED, "degenerate", answers.share, prompts, None)
        yield figure(DENSE, "degenerate", answers.against_share, prompts, None)
    # Own metrics are taken over all texts.
    all_tokens = {f"tokens of {text.name}": text.windows_sha256 for text in evaluation.texts}
    all_tokens["texts of own metrics"] = ", ".join(text.name for text in evaluation.texts)
    for own in evaluation.metrics:
        key, higher = FigureKey(own.name, item), own.higher_is_better
        conditions = dict(all_tokens)
        yield Figure(
            key, SHIPPED, subject, own.unit, own.value, higher_is_better=higher, conditions=conditions
        )


def text_windows(text: TextLoss) -> dict[str, Windows]:
    """Metric -> its windows, of those that are sums over windows."""
    found = {
        "perplexity": Windows(text.nats, text.against_n_tokens if text.distance else text.n_tokens, True),
        "bits_per_byte": text.bits,
        "tokens_per_byte": Windows(text.n_tokens, text.n_bytes),
    }
    if text.distance:
        more = tuple(own - other for own, other in zip(text.nats, text.against_nats, strict=True))
        found["perplexity_ratio"] = Windows(more, text.against_n_tokens, True)
        found["kl_mean"] = Windows(text.distance.kl, text.distance.n_tokens)
        found["same_top1"] = Windows(text.distance.n_same, text.distance.n_tokens)
    return found


def text_figures(item: str, subject: str, dense: str, texts: Sequence[TextLoss]) -> Iterator[Figure]:
    """What a model or a file loses on each text, and the dense model on the same windows."""
    for text in texts:
        tokens = {f"tokens of {text.name}": text.windows_sha256}
        for role, name, one in ((SHIPPED, subject, text), (DENSE, dense, text.against)):
            windows = text_windows(one) if one else {}
            for metric in metrics_from(TEXT):
                key, of = FigureKey(metric, item, on=text.name), windows.get(metric)
                value = of.value if of else None
                if metric == "kl_p99_9" and one and one.distance:
                    value = one.distance.kl_p99_9
                if value is not None:
                    unit = metric_of(metric).unit
                    yield Figure(key, role, name, unit, value, conditions=tokens, windows=of)


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
) -> tuple[BudgetVerdict, ...]:
    """Every figure held against the baseline's, with its tolerance; without a direction there is no verdict."""
    ours, theirs = _comparable(now, baseline), _comparable(baseline, now)
    for key, before in theirs.items():
        if key in ours and (differing := differences(ours[key], before)):
            raise InputError(f"{where} is a baseline of something else: {differing}")
    if missing := [key.describe() for key in theirs if key not in ours]:
        raise InputError(f"{where} has {'; '.join(missing)}, which was not measured now")
    if not theirs:
        raise InputError(f"{where} has no figures to compare with")
    verdicts = []
    for key, before in theirs.items():
        figure, metric = ours[key], recorded_metric(key.metric)
        higher = figure.higher_is_better if metric is OWN_METRIC else metric.higher_is_better
        allowed = limits.get("own" if metric is OWN_METRIC else metric.name, metric.tolerance or 0.0)
        if higher is None or math.isinf(allowed):
            continue
        budget = BudgetConfig(
            metric=key.metric,
            relative_to="baseline",
            difference=not metric.tolerates_ratio,
            at_least=-allowed if higher else None,
            at_most=None if higher else allowed,
        )
        verdicts.append(judge(budget, figure, before))
    return tuple(verdicts)


def _comparable(evaluation: Evaluation, other: Evaluation) -> dict[FigureKey, Figure]:
    """Every figure that has a tolerance, with all that must be equal for a comparison."""
    subject, figures = evaluation.model.reference, {}
    for figure in evaluation_figures("model", subject, evaluation):
        metric = recorded_metric(figure.key.metric)
        if figure.role == SHIPPED and metric.tolerance is not None and metric.source != TASK:
            figures[figure.key] = figure
    for task in evaluation.tasks:
        for score in task.metrics:
            figure = score_figure("model", SHIPPED, subject, task, score)
            key = replace(figure.key, on=f"{task.task} {score.name}")
            figures[key] = replace(figure, key=key)
    shared: dict[str, str] = {}
    if against := evaluation.against:
        known = against.sha256 if other.against and other.against.sha256 else None
        shared["reference model"] = known or against.reference
        shared["cache of the reference model"] = str(against.cache_type)
    if evaluation.model.source_sha256 and other.model.source_sha256:
        shared["hash of the dense model"] = evaluation.model.source_sha256
    for key, figure in figures.items():
        own = {}
        if key.metric == "degenerate" and evaluation.degeneration is not None:
            own["max_new_tokens"] = str(evaluation.degeneration.max_new_tokens)
        if figure.higher_is_better is not None:
            own[f"higher_is_better of {key.metric}"] = str(figure.higher_is_better)
        figures[key] = replace(figure, conditions=figure.conditions | shared | own)
    return figures
