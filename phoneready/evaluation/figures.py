"""An evaluation as figures, which budgets and baselines hold to their limits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from cfsp.evaluation.task_results import TaskMetric, TaskResult
from phoneready.evaluation.evaluation_record import Degeneration, Evaluation, TextResult, text_name
from phoneready.figures.figure_set import DENSE, PRUNED, Figure
from phoneready.figures.metrics import FigureKey, metric_of


def evaluation_figures(item: str, subject: str, evaluation: Evaluation) -> Iterator[Figure]:
    """What an evaluation found, of the dense model too."""
    dense = evaluation.against.reference if evaluation.against else "dense"
    for text in evaluation.texts:
        yield from _text_figures(item, subject, dense, text)
    yield from task_figures(item, PRUNED, subject, evaluation.tasks)
    yield from task_figures(item, DENSE, dense, evaluation.against_tasks)
    for metric, answers, conditions in _answers(evaluation):
        for role, name, share in ((PRUNED, subject, answers.share), (DENSE, dense, answers.against_share)):
            yield Figure(FigureKey(metric, item), role, name, "share", share, conditions=dict(conditions))
    # Own metrics are taken over all texts.
    texts = {name: value for text in evaluation.texts for name, value in _tokens(text).items()}
    texts["texts of own metrics"] = ", ".join(text_name(text.kind, text.source) for text in evaluation.texts)
    for own in evaluation.metrics:
        key, higher = FigureKey(own.name, item), own.higher_is_better
        yield Figure(
            key, PRUNED, subject, own.unit, own.value, higher_is_better=higher, conditions=dict(texts)
        )


def score_figure(item: str, role: str, subject: str, task: TaskResult, score: TaskMetric) -> Figure:
    """A score of a task; one that is better the lower it is counts as a perplexity."""
    conditions = {
        f"{name} of {task.task}": str(getattr(task, name))
        for name in ("version", "sha256", "limit", "num_fewshot", "n_items")
    } | {f"metric of {task.task}": score.name}
    metric = "accuracy" if score.higher_is_better else "perplexity"
    return Figure(
        FigureKey(metric, item, on=task.task), role, subject, metric_of(metric).unit, score.value,
        stderr=score.stderr, conditions=conditions, right=_right(score),
    )  # fmt: skip


def _right(score: TaskMetric) -> tuple[str, ...]:
    """Which items were answered rightly, where that is what the figure says."""
    share = score.right.count("1") / len(score.right) if score.right else math.nan
    return (score.right,) if math.isclose(share, score.value, abs_tol=1e-9) else ()


def _answers(evaluation: Evaluation) -> Iterator[tuple[str, Degeneration, dict[str, str]]]:
    """(metric, what was found, what must be equal) of greedy and of sampled answers, where there are any."""
    greedy, sampled = evaluation.degeneration, evaluation.sampled
    if greedy is not None:
        yield "degenerate", greedy, {"prompts": greedy.prompts_sha256}
    if sampled is not None:
        found, settings = sampled.degeneration, {k: f"{v:g}" for k, v in asdict(sampled.settings).items()}
        others = {"seed of sampled answers": f"{sampled.seed}", "max_new_tokens": f"{found.max_new_tokens}"}
        yield "degenerate_sampled", found, {"prompts": found.prompts_sha256, **others, **settings}


def _tokens(text: TextResult) -> dict[str, str]:
    return {f"tokens of {text_name(text.kind, text.source)}": text.windows_sha256}


def _text_figures(item: str, subject: str, dense: str, text: TextResult) -> Iterator[Figure]:
    name, conditions, d = text_name(text.kind, text.source), _tokens(text), text.divergence
    values = {"perplexity": text.perplexity}
    for metric in ("bits_per_byte", "tokens_per_byte"):
        own, theirs = getattr(text, metric), getattr(text, f"against_{metric}")
        if own is not None:
            values[metric] = own
        if theirs is not None:
            key, unit = FigureKey(metric, item, on=name), metric_of(metric).unit
            yield Figure(key, DENSE, dense, unit, theirs, conditions=conditions)
    if d is not None:
        relative = ("perplexity_ratio", "kl_mean", "kl_p99_9", "same_top1")
        values |= {metric: getattr(d, metric) for metric in relative}
        key = FigureKey("perplexity", item, on=name)
        yield Figure(key, DENSE, dense, "", d.reference_perplexity, conditions=conditions)
    for metric, value in values.items():
        unit = metric_of(metric).unit
        yield Figure(FigureKey(metric, item, on=name), PRUNED, subject, unit, value, conditions=conditions)


def task_figures(item: str, role: str, subject: str, tasks: Sequence[TaskResult]) -> Iterator[Figure]:
    """The accuracy in each task, and their mean."""
    figures = []
    for task in tasks:
        if task.accuracy is not None:
            figures.append(score_figure(item, role, subject, task, task.accuracy))
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
