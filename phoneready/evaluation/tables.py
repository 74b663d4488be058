"""Evaluations for people."""

from __future__ import annotations

from collections.abc import Sequence

from phoneready.console import format_rows
from phoneready.evaluation.record import Evaluation


def format_evaluation(evaluation: Evaluation) -> str:
    """The figures on text as a table."""
    header = ["text", "tokens", "perplexity"]
    if evaluation.against:
        header += ["reference's", "ratio", "KL mean", "KL median", "KL p99", "KL p99.9", "same top-1"]
    rows = []
    for text in evaluation.texts:
        row = [f"{text.source} ({text.kind})", f"{text.n_tokens}", f"{text.perplexity:.3f}"]
        if text.divergence:
            d = text.divergence
            row += [f"{d.reference_perplexity:.3f}", f"{d.perplexity_ratio:.3f}", f"{d.kl_mean:.4f}"]
            row += [f"{d.kl_median:.4f}", f"{d.kl_p99:.3f}", f"{d.kl_p99_9:.3f}", f"{d.same_top1:.2%}"]
        rows.append(row)
    return format_rows(header, rows) if rows else ""


def format_figures(evaluation: Evaluation) -> str:
    """Tasks, own metrics and the share of degenerate answers, each as a table."""
    parts = [_tasks(evaluation), _metrics(evaluation), _degeneration(evaluation)]
    return "\n".join(part for part in parts if part)


def format_answers(evaluation: Evaluation, names: Sequence[str]) -> str:
    """The answers below each other, question by question; `names` are of the reference model and the model."""
    lines = []
    found = evaluation.degeneration
    reasons = (found.against_reasons, found.reasons) if found else ((), ())
    columns = [evaluation.against_answers, evaluation.answers]
    for index, prompt in enumerate(evaluation.prompts):
        lines.append(f"Q: {prompt}")
        for name, column, why in zip(names, columns, reasons, strict=True):
            if column:
                flag = f" [{why[index]}]" if why[index] else ""
                lines.append(f"{name}{flag}: {' '.join(column[index].split())}")
        lines.append("")
    return "\n".join(lines)


def _tasks(evaluation: Evaluation) -> str:
    header = ["task", "version", "items", "few-shot", "metric", "value", "stderr"]
    if evaluation.against_tasks:
        header += ["reference's", "difference"]
    rows = []
    for index, task in enumerate(evaluation.tasks):
        for number, metric in enumerate(task.metrics):
            error = "-" if metric.stderr is None else f"{metric.stderr:.4f}"
            row = [task.task, task.version, f"{task.n_items}", f"{task.num_fewshot}", metric.name]
            row += [f"{metric.value:.4f}", error]
            if evaluation.against_tasks:
                other = evaluation.against_tasks[index].metrics[number].value
                row += [f"{other:.4f}", f"{metric.value - other:+.4f}"]
            rows.append(row)
    return format_rows(header, rows) if rows else ""


def _metrics(evaluation: Evaluation) -> str:
    rows = [[metric.name, f"{metric.value:.6g}"] for metric in evaluation.metrics]
    return format_rows(["own metric", "value"], rows) if rows else ""


def _degeneration(evaluation: Evaluation) -> str:
    found = evaluation.degeneration
    if found is None:
        return ""
    header, reference = ["degenerate answers", "model"], found.against_share is not None
    rows = [
        [reason, found.by_reason.get(reason, 0.0), found.against_by_reason.get(reason, 0.0)]
        for reason in sorted({*found.by_reason, *found.against_by_reason})
    ]
    rows.append([f"all ({found.n_prompts} prompts)", found.share, found.against_share or 0.0])
    if reference:
        header += ["reference", "difference, points"]
    cells = []
    for name, ours, theirs in rows:
        row = [str(name), f"{ours:.1%}"]
        cells.append([*row, f"{theirs:.1%}", f"{100 * (ours - theirs):+.1f}"] if reference else row)  # type: ignore[operator]
    return format_rows(header, cells)
