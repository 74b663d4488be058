"""Which figures a configuration will produce, and budgets that ask for others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cfsp.validation import Location
from phoneready.evaluation.evaluation_record import text_name
from phoneready.figures.budgets import SELECTORS, BudgetConfig, fits, select
from phoneready.figures.metrics import (
    ANY_MEMBER,
    CHECKPOINT,
    PROJECTION,
    TEXT,
    FigureKey,
    means,
    metrics_from,
)
from phoneready.settings.schema import ReleaseConfig


def planned_figures(config: ReleaseConfig) -> Iterator[FigureKey]:
    """The figures that a release of this configuration will produce for its pruned model.

    Tasks may be folders or groups whose members show only when they are read: they are planned as one, with `on` None.
    """
    for item in config.export.names:
        yield FigureKey("file_bytes", item)
    yield from _benchmarks(config)
    for device in config.bench.devices:
        for item in config.bench.measured(config.export.projected):
            for metric in metrics_from(PROJECTION):
                yield FigureKey(metric, item, device)
    for item in (CHECKPOINT, *config.evaluate.files):
        yield from _judgements(config, item)


def _benchmarks(config: ReleaseConfig) -> Iterator[FigureKey]:
    threads = config.bench.n_threads or (None,)
    for place in config.bench.targets:
        for item in config.bench.measured(config.export.names):
            for n_threads in threads:
                for metric in config.bench.metrics:
                    yield FigureKey(metric, item, place, n_threads)


def _judgements(config: ReleaseConfig, item: str) -> Iterator[FigureKey]:
    evaluate = config.evaluate
    for kind, references in (("text", evaluate.text), ("chats", evaluate.chats)):
        for reference in references:
            for metric in metrics_from(TEXT):
                yield FigureKey(metric, item, on=text_name(kind, reference))
    if evaluate.tasks:
        yield FigureKey("accuracy", item)
        yield FigureKey("mean_accuracy", item)
    yield FigureKey("degenerate", item)
    if evaluate.sampled:
        yield FigureKey("degenerate_sampled", item)
    for name in evaluate.metrics:
        yield FigureKey(name + ANY_MEMBER, item)


def budget_problems(config: ReleaseConfig) -> Iterator[tuple[Location, str]]:
    """Where budgets ask for what the configuration does not produce, and what it does."""
    keys = list(planned_figures(config))
    for position, budget in enumerate(config.budgets):
        place = ("budgets", position)
        if budget.relative_to == "baseline" and config.baseline is None:
            yield (*place, "relative_to"), "there is no [baseline] to be relative to"
        candidates = [key for key in keys if means(budget.metric, key.metric)]
        if not candidates:
            known = ", ".join(dict.fromkeys(key.metric for key in keys))
            yield (*place, "metric"), f"{budget.metric} is not measured here; allowed: {known}"
            continue
        wrong = [problem for field in SELECTORS for problem in _strangers(budget, field, candidates)]
        for field, message in wrong:
            yield (*place, field), message
        if not wrong and not select(budget, candidates):
            yield place, f"nothing has {budget.metric} in this combination of {', '.join(SELECTORS)}"


def _strangers(
    budget: BudgetConfig, field: str, candidates: Sequence[FigureKey]
) -> Iterator[tuple[str, str]]:
    names = SELECTORS[field]
    for value in getattr(budget, field):
        if not any(fits(key, names, (value,)) for key in candidates):
            known = dict.fromkeys(str(name) for key in candidates for name in names(key) if name is not None)
            allowed = ", ".join(known) or f"nothing: {budget.metric} is the same everywhere"
            yield field, f"{value} has no {budget.metric} here; allowed: {allowed}"
